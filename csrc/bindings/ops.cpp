// The ops of ops.h for Python. Outputs are allocated by fastddpm/ops/native.py.
#include "adam_plain.h"
#include "launch.h"

namespace fastddpm {
namespace {

Prediction prediction_of(const std::string& name) {
  if (name == "eps") return Prediction::eps;
  if (name == "x0") return Prediction::x0;
  if (name == "mean") return Prediction::mean;
  if (name == "v") return Prediction::v;
  throw py::value_error("prediction must be one of 'eps', 'x0', 'mean', 'v'; got '" + name + "'");
}

template <auto run>
void def_randn(py::module_& m) {
  m.def("randn", [](py::handle out, py::handle seed, py::handle step, py::handle sample_index,
                    int64_t where) {
    Reader read(is_cuda(run));
    const Shape shape = read.set_shape(out, "out");
    const Tensor tensor = read.output(out, "out");
    const int64_t size[4] = {shape.n, shape.c, shape.h, shape.w};
    for (int64_t i = 3, step = 1; i >= 0; step *= size[i--])
      if (tensor.data && size[i] > 1 && tensor.stride[i] != step)
        Reader::refuse("out", "must be contiguous");
    if (seed.is_none()) throw py::value_error("seed must be given");
    launch(run,
           Randn{shape.n, shape.c * shape.h * shape.w, tensor.data, tensor.dtype,
                 read.random(seed, step, sample_index)},
           where);
  });
}

template <auto run>
void def_choices(py::module_& m) {
  m.def("choices", [](py::handle sample_index, py::handle seed, uint32_t step, int64_t levels,
                      py::handle t, py::handle flip, int64_t where) {
    Reader read(is_cuda(run));
    const Shape shape = read.set_shape(sample_index, "sample_index");
    if (levels < 1 || levels >= MAX_LEVELS)
      throw py::value_error("levels must be in 1 .. 2^31 - 1");
    if (seed.is_none()) throw py::value_error("seed must be given");
    const Random random = read.random(seed, sample_index, sample_index);
    launch(run,
           Choices{shape.n, levels, random.seed, step, random.sample_index, read.words_out(t, "t"),
                   read.flags_out(flip, "flip")},
           where);
  });
}

template <auto run>
void def_noise(py::module_& m) {
  m.def("noise", [](py::handle x0, py::handle eps, py::handle xt, py::handle seed, py::handle step,
                    py::handle sample_index, py::handle t, py::handle flip, py::handle table,
                    int64_t where) {
    Reader read(is_cuda(run));
    const Shape shape = read.set_shape(x0, "x0");
    launch(run,
           Noise{shape, read.tensor(x0, "x0", true),
                 seed.is_none()  ? read.tensor(eps, "eps")
                 : eps.is_none() ? read.optional(eps, "eps")
                                 : read.output(eps, "eps"),
                 read.output(xt, "xt"), !seed.is_none(), read.random(seed, step, sample_index),
                 read.per_sample(t, "t"), read.flags(flip, "flip"), read.table(table)},
           where);
  });
}

template <auto run>
void def_posterior_step(py::module_& m) {
  m.def("posterior_step",
        [](py::handle xt, py::handle model_output, py::handle z, py::handle log_variance,
           py::handle out, py::handle seed, py::handle step, py::handle sample_index, py::handle t,
           py::handle table, const std::string& prediction, bool clip, bool learned_range,
           int64_t where) {
          launch(run,
                 posterior_step_of(is_cuda(run), xt, model_output, z, log_variance, out, seed, step,
                                   sample_index, t, table, prediction, clip, learned_range),
                 where);
        });
}

// What group_norm_silu and its gradient read alike. Leaves the reader at the shape of y.
GroupNormSilu group_norm_silu_of(Reader& read, py::handle x, int64_t groups, py::handle weight,
                                 py::handle bias, double eps, py::handle scale, py::handle shift,
                                 bool silu, py::handle before, py::handle x2, double dropout,
                                 py::handle seed, py::handle step, py::handle sample_index) {
  Shape shape = read.set_shape(x, "x");
  GroupNormSilu op{};
  op.c1 = shape.c;
  op.eps = norm_eps(eps), op.silu = silu;
  op.x = read.tensor(x, "x");
  if (!before.is_none())
    op.before = read.is_vector(before, "before") ? read.weight(before, "before", shape.c)
                                                 : read.weight(before, "before", shape.n, shape.c);
  if (!x2.is_none()) {
    const int64_t more = read.channels_of(x2, "x2");
    read.set_channels(more);
    op.x2 = read.tensor(x2, "x2");
    shape.c += more;
    read.set_channels(shape.c);
  }
  op.shape = shape;
  op.groups = divisor("num_groups", groups, shape.c);
  op.weight = read.matrix(weight, "weight", false), op.bias = read.matrix(bias, "bias", false);
  op.scale = read.matrix(scale, "scale", true), op.shift = read.matrix(shift, "shift", true);
  op.dropout = read.dropout(dropout, seed, step, sample_index);
  return op;
}

template <auto run>
void def_group_norm_silu(py::module_& m) {
  m.def("group_norm_silu", [](py::handle x, py::handle y, int64_t groups, py::handle weight,
                              py::handle bias, double eps, py::handle scale, py::handle shift,
                              bool silu, py::handle before, py::handle residual, py::handle u,
                              py::handle x2, double dropout, py::handle seed, py::handle step,
                              py::handle sample_index, py::handle mean, py::handle rstd,
                              py::handle workspace, int64_t where) {
    Reader read(is_cuda(run));
    GroupNormSilu op = group_norm_silu_of(read, x, groups, weight, bias, eps, scale, shift, silu,
                                          before, x2, dropout, seed, step, sample_index);
    op.y = read.output(y, "y");
    op.mean = read.floats(mean, "mean", op.shape.n, groups);
    op.rstd = read.floats(rstd, "rstd", op.shape.n, groups);
    op.workspace =
        read.floats(workspace, "workspace", group_norm_workspace(op.shape, groups, false));
    if (residual.is_none() != u.is_none())
      throw py::value_error("residual and u must both be given, or neither");
    if (!residual.is_none()) {
      read.set_channels(op.c1);
      op.residual = read.tensor(residual, "residual");
      op.u = read.output(u, "u");
    }
    launch(run, op, where);
  });
}

template <auto run>
void def_group_norm_silu_backward(py::module_& m) {
  m.def("group_norm_silu_backward",
        [](py::handle grad, py::handle x, int64_t groups, py::handle weight, py::handle bias,
           double eps, py::handle scale, py::handle shift, bool silu, py::handle before,
           py::handle x2, py::handle grad_u, double dropout, py::handle seed, py::handle step,
           py::handle sample_index, py::handle dx, py::handle dweight, py::handle dbias,
           py::handle dscale, py::handle dshift, py::handle dbefore, py::handle dx2,
           py::handle workspace, int64_t where) {
          Reader read(is_cuda(run));
          GroupNormSiluBackward op{};
          op.forward = group_norm_silu_of(read, x, groups, weight, bias, eps, scale, shift, silu,
                                          before, x2, dropout, seed, step, sample_index);
          const Shape& shape = op.forward.shape;
          op.forward.workspace =
              read.floats(workspace, "workspace", group_norm_workspace(shape, groups, true));
          op.grad = read.tensor(grad, "grad");
          op.dweight = read.floats(dweight, "dweight", shape.c);
          op.dbias = read.floats(dbias, "dbias", shape.c);
          op.dscale = read.floats(dscale, "dscale", shape.n, shape.c);
          op.dshift = read.floats(dshift, "dshift", shape.n, shape.c);
          if (x2.is_none() != dx2.is_none())
            throw py::value_error("x2 and dx2 must both be given, or neither");
          if (!dx2.is_none()) {
            read.set_channels(shape.c - op.forward.c1);
            op.dx2 = read.output(dx2, "dx2");
          }
          read.set_channels(op.forward.c1);
          op.dx = read.output(dx, "dx");
          op.grad_u = read.optional(grad_u, "grad_u");
          op.dbefore = read.floats(dbefore, "dbefore", shape.n, op.forward.c1);
          launch(run, op, where);
        });
}

template <auto run>
void def_residual_sum(py::module_& m) {
  m.def("residual_sum",
        [](py::handle x, py::handle residual, py::handle before, py::handle u, int64_t where) {
          Reader read(is_cuda(run));
          ResidualSum op{};
          op.shape = read.set_shape(x, "x");
          op.x = read.tensor(x, "x"), op.u = read.output(u, "u");
          op.residual = read.optional(residual, "residual");
          if (!before.is_none())
            op.before = read.is_vector(before, "before")
                            ? read.weight(before, "before", op.shape.c)
                            : read.weight(before, "before", op.shape.n, op.shape.c);
          launch(run, op, where);
        });
}

template <auto run>
void def_attention_block(py::module_& m) {
  m.def("attention_block", [](py::handle x, py::handle y, int64_t groups, py::handle norm_weight,
                              py::handle norm_bias, py::handle qkv_weight, py::handle qkv_bias,
                              py::handle proj_weight, py::handle proj_bias, int64_t heads,
                              double eps, int64_t where) {
    if (qkv_weight.is_none() || proj_weight.is_none())
      throw py::value_error("attention_block needs qkv_weight and proj_weight");
    Reader read(is_cuda(run));
    const Shape shape = read.set_shape(x, "x");
    launch(run,
           AttentionBlock{shape, divisor("num_groups", groups, shape.c),
                          divisor("num_heads", heads, shape.c), norm_eps(eps), read.tensor(x, "x"),
                          read.output(y, "y"), read.weight(norm_weight, "norm_weight", shape.c),
                          read.weight(norm_bias, "norm_bias", shape.c),
                          read.weight(qkv_weight, "qkv_weight", 3 * shape.c, shape.c),
                          read.weight(qkv_bias, "qkv_bias", 3 * shape.c),
                          read.weight(proj_weight, "proj_weight", shape.c, shape.c),
                          read.weight(proj_bias, "proj_bias", shape.c)},
           where);
  });
}

void def_attention_block_backward(py::module_& m) {
  m.def("attention_block_backward",
        [](py::handle grad, py::handle x, int64_t groups, py::handle norm_weight,
           py::handle norm_bias, py::handle qkv_weight, py::handle qkv_bias, py::handle proj_weight,
           py::handle proj_bias, int64_t heads, double eps, py::handle dx, py::handle dnorm_weight,
           py::handle dnorm_bias, py::handle dqkv_weight, py::handle dqkv_bias,
           py::handle dproj_weight, py::handle dproj_bias, int64_t threads) {
          for (py::handle weight : {qkv_weight, proj_weight, dqkv_weight, dproj_weight})
            if (weight.is_none())
              throw py::value_error("attention_block_backward needs both weights and gradients");
          Reader read(false);
          const Shape shape = read.set_shape(x, "x");
          const int64_t c = shape.c;
          const AttentionBlock forward{shape,
                                       divisor("num_groups", groups, c),
                                       divisor("num_heads", heads, c),
                                       norm_eps(eps),
                                       read.tensor(x, "x"),
                                       {},
                                       read.weight(norm_weight, "norm_weight", c),
                                       read.weight(norm_bias, "norm_bias", c),
                                       read.weight(qkv_weight, "qkv_weight", 3 * c, c),
                                       read.weight(qkv_bias, "qkv_bias", 3 * c),
                                       read.weight(proj_weight, "proj_weight", c, c),
                                       read.weight(proj_bias, "proj_bias", c)};
          launch(cpu::attention_block_backward,
                 AttentionBlockBackward{forward, read.tensor(grad, "grad"), read.output(dx, "dx"),
                                        read.floats(dnorm_weight, "dnorm_weight", c),
                                        read.floats(dnorm_bias, "dnorm_bias", c),
                                        read.floats(dqkv_weight, "dqkv_weight", 3 * c, c),
                                        read.floats(dqkv_bias, "dqkv_bias", 3 * c),
                                        read.floats(dproj_weight, "dproj_weight", c, c),
                                        read.floats(dproj_bias, "dproj_bias", c)},
                 threads);
        });
}

template <auto run>
void def_discretized_log_likelihood(py::module_& m) {
  m.def("discretized_log_likelihood", [](py::handle x, py::handle mean, py::handle log_scale,
                                         py::handle out, int64_t where) {
    Reader read(is_cuda(run));
    // Samples mean nothing here: missing dimensions go in front, where they cost nothing.
    const Shape shape = read.set_shape(x, "x", Pad::front);
    launch(run,
           DiscretizedLogLikelihood{shape, read.tensor(x, "x"), read.tensor(mean, "mean"),
                                    read.tensor(log_scale, "log_scale"), read.output(out, "out")},
           where);
  });
}

template <auto run>
void def_vlb_term(py::module_& m) {
  m.def("vlb_term", [](py::handle x0, py::handle xt, py::handle model_output,
                       py::handle log_variance, py::handle term, py::handle mse, py::handle seed,
                       py::handle step, py::handle sample_index, py::handle t, py::handle table,
                       py::handle log_ratio, const std::string& prediction, bool clip,
                       bool learned_range, py::handle workspace, int64_t where) {
    if (xt.is_none() && seed.is_none()) throw py::value_error("vlb_term needs xt or a seed");
    for (py::handle given : {term, mse, log_ratio})
      if (given.is_none()) throw py::value_error("vlb_term needs term, mse and log_ratio");
    Reader read(is_cuda(run));
    VlbTerm op{};
    op.shape = read.set_shape(x0, "x0");
    op.x0 = read.tensor(x0, "x0", true), op.xt = read.optional(xt, "xt");
    op.model_output = read.tensor(model_output, "model_output");
    op.log_variance = read.optional(log_variance, "log_variance");
    op.random = read.random(seed, step, sample_index), op.t = read.per_sample(t, "t");
    op.prediction = prediction_of(prediction), op.clip = clip, op.learned_range = learned_range;
    op.table = read.table(table);
    op.log_ratio = read.floats(log_ratio, "log_ratio", op.table.steps);
    op.term = read.floats(term, "term", op.shape.n), op.mse = read.floats(mse, "mse", op.shape.n);
    const int64_t chunks = vlb_term_chunks(op.shape.c * op.shape.h * op.shape.w);
    if (needs_workspace(run) && chunks > 1)
      op.workspace = read.doubles(workspace, "workspace", 2 * op.shape.n * chunks);
    launch(run, op, where);
  });
}

template <auto run>
void def_squared_error(py::module_& m) {
  m.def("squared_error", [](py::handle prediction, py::handle target, py::handle out,
                            py::handle workspace, int64_t where) {
    if (out.is_none()) throw py::value_error("out must be given");
    Reader read(is_cuda(run));
    SquaredError op{};
    op.shape = read.set_shape(prediction, "prediction");
    op.prediction = read.tensor(prediction, "prediction");
    op.target = read.tensor(target, "target");
    op.out = read.floats(out, "out", op.shape.n);
    const int64_t chunks = squared_error_chunks(op.shape.c * op.shape.h * op.shape.w);
    if (needs_workspace(run) && chunks > 1)
      op.workspace = read.doubles(workspace, "workspace", op.shape.n * chunks);
    launch(run, op, where);
  });
}

template <auto run>
void def_squared_error_backward(py::module_& m) {
  m.def("squared_error_backward", [](py::handle grad, py::handle prediction, py::handle target,
                                     py::handle dprediction, int64_t where) {
    if (grad.is_none()) throw py::value_error("grad must be given");
    Reader read(is_cuda(run));
    const Shape shape = read.set_shape(prediction, "prediction");
    launch(run,
           SquaredErrorBackward{
               shape, read.weight(grad, "grad", shape.n), read.tensor(prediction, "prediction"),
               read.tensor(target, "target"), read.output(dprediction, "dprediction")},
           where);
  });
}

}  // namespace

PosteriorStep posterior_step_of(bool cuda, py::handle xt, py::handle model_output, py::handle z,
                                py::handle log_variance, py::handle out, py::handle seed,
                                py::handle step, py::handle sample_index, py::handle t,
                                py::handle table, const std::string& prediction, bool clip,
                                bool learned_range) {
  if (z.is_none() && seed.is_none()) throw py::value_error("posterior_step needs z or a seed");
  Reader read(cuda);
  const Shape shape = read.set_shape(xt, "xt");
  return {shape,
          read.tensor(xt, "xt"),
          read.tensor(model_output, "model_output"),
          read.optional(z, "z"),
          read.optional(log_variance, "log_variance"),
          read.output(out, "out"),
          read.random(seed, step, sample_index),
          read.per_sample(t, "t"),
          prediction_of(prediction),
          clip,
          learned_range,
          read.table(table)};
}

// A build of the tests has the kernels of csrc/cuda alone.
#if !defined(FASTDDPM_CUDA_ON_CPU)
void def_cpu_ops(py::module_& m) {
  def_randn<cpu::randn>(m);
  def_choices<cpu::choices>(m);
  def_noise<cpu::noise>(m);
  def_posterior_step<cpu::posterior_step>(m);
  def_group_norm_silu<cpu::group_norm_silu>(m);
  def_group_norm_silu_backward<cpu::group_norm_silu_backward>(m);
  def_residual_sum<cpu::residual_sum>(m);
  def_attention_block<cpu::attention_block>(m);
  def_attention_block_backward(m);
  def_discretized_log_likelihood<cpu::discretized_log_likelihood>(m);
  def_convolution(m);
  def_vlb_term<cpu::vlb_term>(m);
  def_squared_error<cpu::squared_error>(m);
  def_squared_error_backward<cpu::squared_error_backward>(m);
  def_adam<cpu::adam>(m);
  def_adam_if_plain(m);
  def_grad_norm<cpu::grad_norm>(m);
}
#endif

#if defined(FASTDDPM_CUDA)
void def_cuda(py::module_& m) {
  def_randn<cuda::randn>(m);
  def_choices<cuda::choices>(m);
  def_noise<cuda::noise>(m);
  def_posterior_step<cuda::posterior_step>(m);
  def_group_norm_silu<cuda::group_norm_silu>(m);
  def_group_norm_silu_backward<cuda::group_norm_silu_backward>(m);
  def_residual_sum<cuda::residual_sum>(m);
  def_discretized_log_likelihood<cuda::discretized_log_likelihood>(m);
  def_vlb_term<cuda::vlb_term>(m);
  def_squared_error<cuda::squared_error>(m);
  def_squared_error_backward<cuda::squared_error_backward>(m);
  def_adam<cuda::adam>(m);
  def_grad_norm<cuda::grad_norm>(m);
  m.attr("GRAD_NORM_CHUNK") = GRAD_NORM_CHUNK;
  m.attr("VLB_TERM_CHUNK") = VLB_TERM_CHUNK;
  m.def("squared_error_chunks", [](int64_t elements) {
    if (elements < 0 || elements > MAX_ELEMENTS)
      throw py::value_error("elements must be in 0 .. 2^48");
    return squared_error_chunks(elements);
  });
  m.def("group_norm_workspace", [](int64_t n, int64_t c, int64_t groups, bool backward) {
    if (n < 0 || c < 0 || groups < 0 || n > MAX_SIZE || c > MAX_SIZE || groups > MAX_SIZE)
      throw py::value_error("n, c and groups must be in 0 .. 2^24");
    return group_norm_workspace({n, c, 1, 1}, groups, backward);
  });
}
#endif

}  // namespace fastddpm
