"""The coder's stack and its masses: inverses to the bit, the lengths that probabilities ask for,
and what a hostile stream or tensor does."""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
import threading

import numpy as np
import pytest
import torch
from sanitized import SANITIZED, TESTS, needs_compiler
from scipy.stats import kstest, norm
from toy import generator

from fastddpm import _native, reference

pytestmark = pytest.mark.skipif(_native.C is None, reason="the coder is native")
codec = None if _native.C is None else _native.C.codec

TOTAL = 2**28
EXPONENT = -9


def gaussians(n: int, seed: int = 0) -> dict:
    """n normal distributions of very different widths, about a grid of 2^-9."""
    random = generator(seed)
    log_variance = torch.rand(n, generator=random) * 14 - 12
    return {"mean": torch.randn(n, generator=random), "log_variance": log_variance}


def on_grid(x: torch.Tensor, exponent: int = EXPONENT) -> torch.Tensor:
    return (x.double() * 2.0**-exponent).round().mul(2.0**exponent).float()


def normals(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, generator=generator(seed))


# ---- inverses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("log_variance", ["each", -60.0, -7.3, 9.0])
def test_a_push_gives_back_what_a_pop_took(outside, log_variance):
    of = gaussians(3000)
    if log_variance != "each":
        of["log_variance"] = log_variance
    coder, values = codec.Coder(b"some words of supply"), torch.empty(3000)
    begun = coder.content()
    coder.pop_gaussian(values, **of, exponent=EXPONENT, outside=outside)
    assert torch.equal(values, on_grid(values))
    coder.push_gaussian(values, **of, exponent=EXPONENT, outside=outside, backwards=True)
    state, words = coder.content()
    assert state == begun[0]
    # What it popped beyond the state's first words is the supply and the random words behind it.
    supply = np.frombuffer(b"some words of supply" + codec.random_words(4000), "<u2")
    assert np.array_equal(np.frombuffer(words, "<u2")[::-1], supply[3 : coder.taken])


@pytest.mark.parametrize("spread", [1.0, 1000.0])
def test_what_was_pushed_is_popped(spread):
    of, n = gaussians(3000), 3000
    sigma = (of["log_variance"] / 2).exp()
    values = on_grid(of["mean"] + torch.where(normals(n) > 1, spread, 1.0) * sigma * normals(n, 2))
    pixels = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator())
    coder = codec.Coder()
    coder.push_gaussian(values, **of, exponent=EXPONENT, outside=True)
    coder.push_levels(pixels, **of)
    decoder = codec.Coder(*coder.content())
    found, levels = torch.empty(n), torch.empty(n, dtype=torch.uint8)
    decoder.pop_levels(levels, **of, backwards=True)
    decoder.pop_gaussian(found, **of, exponent=EXPONENT, outside=True, backwards=True)
    assert torch.equal(found, values)
    assert torch.equal(levels, pixels)
    assert decoder.content() == codec.Coder().content()


def test_pops_of_random_bits_are_draws_of_the_distribution():
    values = torch.empty(20_000)
    mean = torch.full((20_000,), 0.3)
    codec.Coder().pop_gaussian(values, mean, -2.0, exponent=-12, outside=False)
    z = (values.double() - 0.3) / math.exp(-1.0)
    assert kstest(z.numpy(), norm.cdf).pvalue > 1e-3


# ---- masses and lengths --------------------------------------------------------------------------


def test_the_table_is_phi_and_will_always_have_these_bits():
    table = np.frombuffer(codec.tail_table(), "<u4")
    exact = norm.sf(np.arange(len(table)) / 1024) * 2.0**32
    assert np.abs(table - exact).max() <= 0.51
    digest = hashlib.sha256(table.tobytes()).hexdigest()
    assert digest == "300ebf6a001852361b59f6694fa326a4bfef7908303b849412b621cd4272c88b"


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("sigma", [2.0**-14, 2.0**-9, 0.03, 1.0, 100.0])
def test_masses_are_those_of_the_normal_distribution(sigma, outside):
    mean, log_variance = 0.123, float(np.float32(2 * math.log(sigma)))
    first, edges = codec.cumulative(mean, log_variance, EXPONENT, outside)
    masses = np.diff(np.array(edges, dtype=np.int64))
    assert edges[0] == 0
    assert edges[-1] == TOTAL - outside
    assert masses.min() >= 1
    index = first + np.arange(len(masses) + 1)
    exact = np.diff(norm.cdf(((index - 0.5) * 2.0**EXPONENT - mean) / sigma)) * TOTAL
    # each bin has one part for itself, which all give in proportion; edges are rounded
    assert (
        np.abs(masses - exact).max() <= 4 + 2e-5 * exact.max() + len(masses) * exact.max() / TOTAL
    )
    assert len(masses) >= (15 if outside else 12) * sigma / 2.0**EXPONENT


@pytest.mark.parametrize(("mean", "sigma"), [(0.1, 0.007), (-1.0, 0.02), (1.0, 0.5), (-3.0, 0.01)])
def test_masses_of_the_levels_are_equation_13s(mean, sigma):
    edges = codec.cumulative_levels(mean, 2 * math.log(sigma))
    masses = np.diff(np.array(edges, dtype=np.int64))
    assert (edges[0], edges[-1], len(masses)) == (0, TOTAL, 256)
    assert masses.min() >= 1
    x = reference.to_unit(torch.arange(256, dtype=torch.uint8), torch.float64)
    said = reference.discretized_log_likelihood(
        x, torch.full_like(x, mean), torch.full_like(x, math.log(sigma))
    ).exp()
    assert np.abs(masses / TOTAL - said.numpy()).max() < 2e-6


def test_a_symbol_takes_the_bits_of_its_mass():
    n = 5000
    values, mean = on_grid(normals(n) * 0.05), torch.zeros(n)
    first, edges = codec.cumulative(0.0, -6.0, EXPONENT, True)
    index = (values * 2.0**-EXPONENT).long().numpy() - first
    ideal = -np.log2(np.diff(edges)[index] / TOTAL).sum()
    coder = codec.Coder()
    before = coder.bits
    coder.push_gaussian(values, mean, -6.0, exponent=EXPONENT, outside=True)
    assert abs(coder.bits - before - ideal) < n * 2.0**-18


def test_lengths_and_masses_are_constrictions():
    """Whose masses have 24 bits: a normal distribution of a few dozen bins is well within them."""
    constriction = pytest.importorskip("constriction", reason="the oracle is not installed")
    stream = constriction.stream
    n, sigma = 20_000, 3.7
    mean = normals(n, 3) * 5
    symbols = (mean + sigma * normals(n, 4)).round()
    model = stream.model.QuantizedGaussian(-60, 60)
    theirs = stream.stack.AnsCoder()
    theirs.encode_reverse(
        symbols.numpy().astype(np.int32), model, mean.double().numpy(), np.full(n, sigma)
    )
    ours = codec.Coder()
    before = ours.bits
    log_variance = 2 * math.log(sigma)
    ours.push_gaussian(symbols, mean, log_variance, exponent=0, outside=True)
    # theirs are whole words of 32 bits, and masses of 2^-24
    assert abs(ours.bits - before - theirs.num_valid_bits()) < 32 + n * 1e-4
    # the masses, by the length of one symbol coded many times
    first, edges = codec.cumulative(0.25, log_variance, 0, True)
    for symbol in (-9, 0, 4):
        theirs = stream.stack.AnsCoder()
        theirs.encode_reverse(
            np.full(n, symbol, np.int32), model, np.full(n, 0.25), np.full(n, sigma)
        )
        mass = edges[symbol - first + 1] - edges[symbol - first]
        assert abs(theirs.num_valid_bits() / n + math.log2(mass / TOTAL)) < 32 / n + 1e-4


# ---- what goes wrong -----------------------------------------------------------------------------


def test_a_stream_that_ends_is_named_and_is_not_gone_on_with():
    coder = codec.Coder(2**48 + 12345, b"ab" * 20)
    values, mean = torch.empty(500), torch.zeros(500)
    with pytest.raises(ValueError, match="run out of words"):
        coder.pop_gaussian(values, mean, 0.0, exponent=-9, outside=True)
    with pytest.raises(ValueError, match="not the encoder's"):
        coder.push_gaussian(on_grid(mean), mean, 0.0, exponent=-9, outside=True)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1e30])
def test_means_and_variances_have_to_be_numbers(wrong):
    values, mean = torch.zeros(4), torch.zeros(4)
    bad = torch.tensor([0.0, 0.0, wrong, 0.0])
    for call in ("push_gaussian", "pop_gaussian"):
        with pytest.raises(ValueError, match=r"not finite|off the grid"):
            getattr(codec.Coder(), call)(values, bad, 0.0, exponent=-9, outside=True)
        if not math.isfinite(wrong):
            with pytest.raises(ValueError, match="not finite"):
                getattr(codec.Coder(), call)(values, mean, bad, exponent=-9, outside=True)


def test_values_have_to_lie_on_the_grid():
    mean = torch.zeros(1)
    for wrong in (0.3, math.nan, math.inf, 1e9):
        with pytest.raises(ValueError, match="off the grid"):
            codec.Coder().push_gaussian(torch.tensor([wrong]), mean, 0.0, exponent=-9, outside=True)
    with pytest.raises(ValueError, match="not the encoder's"):
        codec.Coder().push_gaussian(torch.tensor([64.0]), mean, 0.0, exponent=-9, outside=False)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"values": torch.zeros(4, dtype=torch.float64)}, "float32"),
        ({"values": torch.zeros(8)[::2]}, "contiguous"),
        ({"values": torch.zeros(2, 2)}, "shape"),
        ({"mean": torch.zeros(3)}, "shape"),
        ({"mean": None}, "tensor"),
        ({"log_variance": torch.zeros(5)}, "shape"),
        ({"log_variance": None}, "tensor"),
        ({"exponent": 100}, "exponent"),
        ({"values": torch.zeros(4, device="meta")}, "values"),
    ],
)
def test_the_border_takes_nothing_else(change, error):
    arguments = {
        "values": torch.zeros(4), "mean": torch.zeros(4), "log_variance": 0.0,
        "exponent": -9, "outside": True,
    }  # fmt: skip
    for call in ("push_gaussian", "pop_gaussian"):
        with pytest.raises((ValueError, TypeError), match=error):
            getattr(codec.Coder(), call)(**{**arguments, **change})


def test_a_coder_begins_with_a_state_and_whole_words():
    with pytest.raises(ValueError, match="at least 2\\^48"):
        codec.Coder(2**48 - 1, b"")
    with pytest.raises(ValueError, match="words of 2 bytes"):
        codec.Coder(2**48, b"abc")
    with pytest.raises(TypeError):
        codec.Coder(-1, b"")


def test_threads_at_one_coder_take_turns():
    coder, mean = codec.Coder(), torch.zeros(20_000)
    before, values = coder.bits, on_grid(normals(20_000))

    def push():
        coder.push_gaussian(values, mean, 0.0, exponent=EXPONENT, outside=True)

    threads = [threading.Thread(target=push) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = torch.empty(20_000)
    for _ in range(4):
        coder.pop_gaussian(found, mean, 0.0, exponent=EXPONENT, outside=True, backwards=True)
        assert torch.equal(found, values)
    assert abs(coder.bits - before) < 1e-9


@pytest.mark.slow
@needs_compiler
def test_random_streams_under_sanitizers(tmp_path):
    sources = [TESTS / "codec_check.cpp", *(TESTS.parent / "csrc/codec").glob("*.cpp")]
    program = tmp_path / "check"
    compiler = shutil.which("g++")
    subprocess.run([compiler, "-std=c++17", "-O1", *SANITIZED, *sources, "-o", program], check=True)
    run = subprocess.run([program, "2000000"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
