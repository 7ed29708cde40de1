// Arithmetic of counts, none negative.
#pragma once
#include <cstdint>

namespace fastddpm {
namespace {

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

}  // namespace
}  // namespace fastddpm
