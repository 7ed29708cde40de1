"""What torch's ops, and ours, launch on a GPU: a dispatch mode that writes down a Kernel for each
launch while a step runs on tensors without values (absent_gpu.py). No times and no table.

One rule for everybody: a view launches nothing; a convolution's bias is a kernel of its own, which
is how cuDNN adds it in eager torch; a product takes a (C,) bias along; what is not named here reads
its inputs and writes its outputs once. Our CUDA and Triton functions run as they are, down to the
launch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_model import Assumptions, Kernel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastddpm.ops import library
from fastddpm.precision import tf32_asked

OURS = {
    "randn": "posterior", "noise": "posterior", "drawn_noise": "posterior",
    "posterior_step": "posterior", "posterior_step_out": "posterior",
    "noised": "posterior", "vlb_term": "posterior",
    "discretized_log_likelihood": "posterior", "residual_sum": "residual",
    "adam": "optimizer", "grad_norm": "optimizer",
    "group_norm_silu": "norm", "group_norm_silu_sum": "norm", "group_norm_silu_backward": "norm",
    "attention_block": "attention", "attention_block_backward": "attention",
}  # fmt: skip

aten = torch.ops.aten

# Allocations, and what only looks at a tensor.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_",
    "is_pinned", "is_same_size", "_has_compatible_shallow_copy_type", "record_stream", "lift_fresh",
    "squeeze_", "unsqueeze_", "t_", "transpose_", "as_strided_", "detach_", "_version", "sym_size",
    "sym_stride", "sym_numel", "sym_storage_offset",
}  # fmt: skip
UNKNOWN = {"_fused_sgd_", "_fused_adam_"}  # in place; torch can't run all of them without values
WAITS = {"_local_scalar_dense", "is_nonzero", "equal"}
PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_", "_addmm_activation"}
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def size(x: Any) -> int:
    """Bytes of the elements that x has in memory: an expanded dimension counts once."""
    if not isinstance(x, Tensor) or x.device.type != "cuda":
        return 0
    sizes = zip(x.shape, x.stride(), strict=True)
    return math.prod(n for n, stride in sizes if stride or n == 0) * x.itemsize


def sizes(values: Any) -> int:
    """Of all tensors in them, each once."""
    return sum(size(x) for x in {id(x): x for x in tree_leaves(values)}.values())


def is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def precision(x: Tensor) -> str:
    if x.dtype == torch.float32 and tf32_asked():
        return "tf32"
    return DTYPES.get(x.dtype, "fp32")


class Counter(TorchDispatchMode):
    """`kernels`: what was launched;  `waits`: how often the host waited for the device."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.kernels: list[Kernel] = []
        self.waits = 0
        self.paused = False
        self.kind: str | None = None  # of all that one of our ops launches
        self.given: set[int] = set()  # the storages of that op's inputs
        self.written: set[int] = set()  # and of what it has written so far

    def add(self, name: str, kind: str, reads: Any, writes: Any, **more: Any) -> None:
        if not self.paused:
            kind = self.kind or kind
            self.kernels.append(Kernel(name, kind, sizes(reads), sizes(writes), **more))

    @contextlib.contextmanager
    def pause(self, paused: bool = True) -> Iterator[None]:
        before, self.paused = self.paused, paused
        try:
            yield
        finally:
            self.paused = before

    @contextlib.contextmanager
    def _inside(self, op: str, args: tuple) -> Iterator[None]:
        before = self.kind, self.given, self.written
        self.kind = OURS.get(op, "other")
        self.given, self.written = _storages(args), set()
        try:
            yield
        finally:
            self.kind, self.given, self.written = before

    def knows(self, x: Tensor) -> bool:
        """x was given to the op that runs, or it has written it."""
        return _storage(x) in self.given | self.written

    def launch(self, name: str, *args: Any, **more: Any) -> None:
        """One launch of a kernel of ours with these arguments: what it was not given it writes."""
        tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
        reads = [x for x in tensors if self.knows(x)]
        # In place (posterior_step's out=) it writes what it was given first.
        writes = [x for x in tensors if not self.knows(x)] or tensors[:1]
        self.written |= _storages(writes)
        self.add(name, "other", reads, writes, **more)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, name = func.namespace, func._schema.name.split("::")[-1]
        if namespace == "fastddpm":
            out = func(*args, **kwargs)
            with self, self._inside(name, args):
                getattr(library, name).run(*args, **kwargs)
            return out
        if name in WAITS and any(_on_gpu(x) for x in tree_leaves(args)):
            self.waits += not self.paused
            # What a step that goes well reads: finite, equal, 0.
            return True if args[0].dtype == torch.bool or name == "equal" else 0.0
        if namespace == "prim":
            return func(*args, **kwargs)
        if name not in SPECIAL and _is_composite(
            func
        ):  # reached below autograd, from an op of ours
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = None if name in UNKNOWN else func(*args, **kwargs)
        if name in FREE or not any(map(_on_gpu, tree_leaves((args, kwargs, out)))):
            return out
        special = SPECIAL.get(name)
        if special is not None:
            special(self, func, args, kwargs, out)
        elif not _is_view(func, args, out):
            self.add(
                f"{namespace}::{name}", kind_of(name, args, out), *operands(func, args, kwargs, out)
            )
        return out


def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _on_gpu(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cuda"


def _is_view(func: Any, args: tuple, out: Any) -> bool:
    """Its results share memory with an input, which it does not write."""
    if func._schema.is_mutable:
        return False
    given = _storages(args)
    results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    return bool(results) and all(_storage(x) in given for x in results)


def _storages(values: Any) -> set[int]:
    return {_storage(x) for x in tree_leaves(values) if isinstance(x, Tensor)}


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def operands(func: Any, args: tuple, kwargs: dict, out: Any) -> tuple[list, list]:
    """(what is read, what is written) of an op by its schema."""
    reads, writes = [], []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        tensors = [x for x in tree_leaves(value) if isinstance(x, Tensor)]
        written = argument.alias_info is not None and argument.alias_info.is_write
        # An out= argument and what copy_ and fill_ write is not read.
        if written:
            writes += tensors
        only = (argument.kwarg_only and written) or (func._schema.name in OVERWRITES and written)
        reads += [] if only else tensors
    if not writes:
        writes = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    return reads, writes


OVERWRITES = {
    "aten::copy_", "aten::fill_", "aten::zero_", "aten::normal_", "aten::random_", "aten::uniform_",
    "aten::bernoulli_", "aten::_foreach_copy_", "aten::_foreach_zero_",
}  # fmt: skip


def kind_of(name: str, args: tuple, out: Any) -> str:
    """What an elementwise op of a U-Net stands for."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    if name == "cat":
        return "concatenation"
    if name in ("add", "add_") and len(tensors) == 2 and isinstance(out, Tensor) and out.dim() == 4:
        return "residual" if tensors[0].shape == tensors[1].shape else "embedding"
    if "group_norm" in name or (name in ("silu", "silu_backward") and args[0].dim() == 4):
        return "norm"
    if name.startswith(("_foreach", "_fused_adam")):
        return "optimizer"
    return "other"


# ---- ops that are more or less than one kernel over their operands ------------------------------


def convolution(counter: Counter, func: Any, args: tuple, kwargs: dict, out: Tensor) -> None:
    x, weight, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
    if is_channels_last(out):  # cuDNN's kernels want one layout of all
        for operand in (x, weight):
            if not is_channels_last(operand):
                counter.add("layout of a convolution's operand", "other", operand, operand)
    transposed = args[6] if len(args) > 6 else kwargs.get("transposed", False)
    strided = transposed and max(args[3] if len(args) > 3 else kwargs["stride"]) > 1
    image = x if transposed else out
    m, n, k = image.numel() // image.shape[1], out.shape[1], weight.numel() // out.shape[1]
    counter.add(
        "convolution", "convolution", (x, weight), out, operations=2.0 * m * n * k,
        dtype=precision(x), product=(m, n, k), engine="strided" if strided else "library",
    )  # fmt: skip
    if bias is not None:
        counter.add("convolution's bias", "bias", (out, bias), out)


def convolution_backward(counter: Counter, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
    grad, x, weight = args[:3]
    dx, dweight, dbias = out
    pixels, k = grad.numel() // grad.shape[1], weight[0].numel()
    more = {"operations": 2.0 * pixels * grad.shape[1] * k, "dtype": precision(grad)}
    if is_channels_last(x) and not is_channels_last(grad):
        counter.add("layout of a convolution's operand", "other", grad, grad)
    if dx is not None:
        engine = "strided" if max(args[4]) > 1 else "library"
        product = (x.numel() // x.shape[1], x.shape[1], weight.numel() // x.shape[1])
        counter.add(
            "convolution, to its input", "convolution", (grad, weight), dx,
            product=product, engine=engine, **more,
        )  # fmt: skip
    if dweight is not None:
        counter.add(
            "convolution, to its weight", "convolution", (grad, x), dweight,
            product=(grad.shape[1], k, pixels), **more,
        )  # fmt: skip
    if dbias is not None:
        counter.add("convolution, to its bias", "bias", grad, dbias)


def product(counter: Counter, func: Any, args: tuple, kwargs: dict, out: Tensor) -> None:
    name = func._schema.name.split("::")[-1]
    tensors = [x for x in args if isinstance(x, Tensor)]
    bias = None if name in ("mm", "bmm") else tensors.pop(0)
    a, b = tensors[:2]
    m, n, k = a.numel() // a.shape[-1], b.shape[-1], a.shape[-1]
    if bias is not None and bias.dim() > 1 and bias.stride()[-2] and not name.endswith("_"):
        counter.add("copy of what a product is added to", "other", bias, out)
        bias = out
    work = {"operations": 2.0 * m * n * k, "dtype": precision(a), "product": (m, n, k)}
    kind = "product" if m > counter.batch else "embedding"
    counter.add(name, kind, (a, b, bias), out, **work)


def attention(counter: Counter, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
    q, k, v = args[:3]
    n, heads, length, width = q.shape
    work = {"operations": 4.0 * n * heads * length * k.shape[2] * width, "engine": "attention"}
    counter.add(
        "flash attention", "attention", (q, k, v), (out[0], out[1]), dtype=precision(q), **work
    )


def attention_backward(counter: Counter, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
    grad, q, k, v, mixed = args[:5]
    n, heads, length, width = q.shape
    operations = 10.0 * n * heads * length * k.shape[2] * width
    sums = torch.empty(q.shape[:-1], dtype=torch.float32, device="cuda")
    dq = torch.empty(q.shape, dtype=torch.float32, device="cuda")
    counter.add("flash attention, products of rows", "attention", (grad, mixed), (sums, dq))
    counter.add(
        "flash attention, gradient", "attention", (grad, q, k, v, sums), (dq, out[1], out[2]),
        operations=operations, dtype=precision(q), engine="attention_backward",
    )  # fmt: skip
    counter.add("flash attention, dq rounded", "attention", dq, out[0])


def group_norm(counter: Counter, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
    """Moments, the affine's coefficients, the result: RowwiseMoments, ComputeFusedParams, and an
    elementwise kernel."""
    x, weight, bias = args[:3]
    y, mean, rstd = out
    lines = torch.empty(2, x.shape[0], x.shape[1], dtype=torch.float32, device="cuda")
    counter.add("group_norm, moments", "norm", x, (mean, rstd))
    counter.add("group_norm, coefficients", "norm", (mean, rstd, weight, bias), lines)
    counter.add("group_norm, result", "norm", (x, lines), y)


def group_norm_backward(counter: Counter, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
    grad, x, mean, rstd, weight = args[:5]
    sums = torch.empty(2, x.shape[0], x.shape[1], dtype=torch.float32, device="cuda")
    counter.add("group_norm backward, sums", "norm", (grad, x), sums)
    counter.add("group_norm backward, coefficients", "norm", (sums, weight, mean, rstd), sums)
    counter.add("group_norm backward, dx", "norm", (grad, x, sums), out[0])
    counter.add("group_norm backward, parameters", "norm", sums, out[1:])


def pad(counter: Counter, func: Any, args: tuple, kwargs: dict, out: Tensor) -> None:
    counter.add("constant_pad_nd, fill", "other", (), out)
    counter.add("constant_pad_nd, copy", "other", args[0], args[0])


def copy(counter: Counter, func: Any, args: tuple, kwargs: dict, out: Tensor) -> None:
    reads = [x for x in args[:2] if isinstance(x, Tensor)]
    source = reads[1] if func._schema.name == "aten::copy_" else reads[0]
    counter.add("copy", "other", source, out)


def rows(counter: Counter, func: Any, args: tuple, kwargs: dict, out: Tensor) -> None:
    """What is picked from a table is read, not the table."""
    indices = [x for x in tree_leaves(args[1:]) if isinstance(x, Tensor)]
    counter.add(func._schema.name, "other", (out, indices), out)


def foreach(counter: Counter, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
    """Multi-tensor kernels: blocks of a fixed size, so many tensors and blocks a launch."""
    a = Assumptions()
    lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)]
    tensors = lists[0]
    chunks = sum(-(-x.numel() // a.foreach_chunk) for x in tensors)
    most = a.foreach_tensors[min(len(lists), len(a.foreach_tensors) - 1)]
    launches = max(-(-chunks // a.foreach_blocks), -(-len(tensors) // most))
    reads, writes = operands(func, args, kwargs, out)
    share = (sizes(reads) // launches, sizes(writes) // launches)
    if not counter.paused:
        name = func._schema.name.split("::")[-1]
        counter.kernels += [Kernel(name, "optimizer", *share)] * launches


SPECIAL: dict[str, Callable[[Counter, Any, tuple, dict, Any], None]] = {
    "convolution": convolution, "convolution_backward": convolution_backward,
    "_scaled_dot_product_flash_attention": attention,
    "_scaled_dot_product_efficient_attention": attention,
    "_scaled_dot_product_cudnn_attention": attention,
    "_scaled_dot_product_flash_attention_backward": attention_backward,
    "_scaled_dot_product_efficient_attention_backward": attention_backward,
    "native_group_norm": group_norm, "native_group_norm_backward": group_norm_backward,
    "constant_pad_nd": pad, "copy_": copy, "clone": copy, "_to_copy": copy,
}  # fmt: skip
SPECIAL |= dict.fromkeys(PRODUCTS, product)
SPECIAL |= dict.fromkeys(("index", "index_select", "gather", "embedding"), rows)
SPECIAL |= {
    name.split("::")[-1]: foreach
    for name in torch._C._dispatch_get_all_op_names()
    if "::_foreach_" in name or "::_fused_" in name
}
