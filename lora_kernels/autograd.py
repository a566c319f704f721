"""The one place where gradients are composed and where what is saved is decided.

needs gradient    computes          keeps from the forward
x                 T, dx             weight, lora_A, lora_B, the dropout seed, a scaling that is a tensor
lora_A            T, dA             x, lora_B, the dropout seed, a scaling that is a tensor
lora_B            dB                S
bias              sum of dy         nothing

Where hooks take what is saved, S is kept beside it: deferred.py says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.backends import Backend, Precision, Scale
from lora_kernels.deferred import Deferred
from lora_kernels.dropout import Dropout
from lora_kernels.nf4 import NF4Weight
from lora_kernels.nf4_codec import Form
from lora_kernels.weights import Weight


class Needs(NamedTuple):
    """Which gradients somebody asked for."""

    x: bool
    lora_A: bool
    lora_B: bool
    bias: bool


class Saved(NamedTuple):
    """What the backward may read; None where no needed gradient uses it."""

    x: Tensor | None
    weight: Weight | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    s: Tensor | None
    seed: Tensor | None
    scale: Tensor | None

    @staticmethod
    def select(
        needs: Needs,
        x: Tensor,
        weight: Weight | None,
        lora_A: Tensor,
        lora_B: Tensor,
        s: Tensor | None,
        seed: Tensor | None,
        scale: Tensor | None,
    ) -> Saved:
        needs_t = needs.x or needs.lora_A
        return Saved(
            x=x if needs.lora_A else None,
            weight=weight if needs.x else None,
            lora_A=lora_A if needs.x else None,
            lora_B=lora_B if needs_t else None,
            s=s if needs.lora_B else None,
            seed=seed if needs_t else None,
            scale=scale if needs_t else None,
        )

    def flat(self) -> tuple[tuple[Tensor | None, ...], Form | None]:
        """All as tensors, for autograd to watch; and the form of the NF4 weight whose tensors end them."""
        weight = self.weight
        if weight is None or isinstance(weight, Tensor):
            return self, None  # type: ignore[return-value]
        return (*self._replace(weight=None), *weight.tensors()), weight.form  # type: ignore[arg-type]

    @staticmethod
    def of(tensors: Sequence[Tensor | None], form: Form | None) -> Saved:
        """What `flat` made flat."""
        if form is None:
            return Saved(*tensors)
        count = len(Saved._fields)
        weight = rebuilt(tensors[count:], form)  # type: ignore[arg-type]
        return Saved(*tensors[:count])._replace(weight=weight)


def forward(
    backend: Backend,
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scale: Scale,
    dropout: Dropout | None,
    precision: Precision,
    want_s: bool,
) -> tuple[Tensor, Tensor | None]:
    """y, and S where it is wanted. x is [M, K] in the base's dtype with contiguous rows."""
    with outside_autocast(x.device.type):
        return backend.forward(x, weight, lora_A, lora_B, bias, scale, dropout, precision, want_s)


def backward(
    backend: Backend,
    needs: Needs,
    saved: Saved,
    dy: Tensor,
    scale: float,
    dropout_p: float,
    precision: Precision,
    adapter_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA, dB and db, each None where it is not needed. dy is [M, N], in y's dtype: autograd casts it."""
    dropout = None if saved.seed is None else Dropout(dropout_p, saved.seed)
    with outside_autocast(dy.device.type):
        dy = as_rows(dy)
        dx, dA, dB = _backward_of_products(
            backend, needs, saved, dy, scale if saved.scale is None else saved.scale, dropout, precision, adapter_dtype
        )
        db = dy.sum(0, dtype=bias_dtype) if needs.bias else None
    return dx, dA, dB, db


def _backward_of_products(
    backend: Backend,
    needs: Needs,
    saved: Saved,
    dy: Tensor,
    scale: Scale,
    dropout: Dropout | None,
    precision: Precision,
    adapter_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA and dB."""
    # Hooks for saved tensors may have brought them back with other strides.
    x = None if saved.x is None else as_rows(saved.x)
    s = None if saved.s is None else saved.s.contiguous()
    weight, lora_A, lora_B = saved.weight, saved.lora_A, saved.lora_B
    for_adapters = needs.lora_A or needs.lora_B
    if needs.x and for_adapters and backend.backward is not None:
        assert weight is not None
        assert lora_A is not None
        assert lora_B is not None
        return backend.backward(dy, weight, lora_A, lora_B, x, s, scale, dropout, precision, adapter_dtype)
    dx = t = dA = dB = None
    if lora_B is not None:
        dx, t = backend.backward_input(dy, weight, lora_A, lora_B, scale, dropout, precision, needs.x)
    if for_adapters:
        dA, dB = backend.backward_adapters(x, dy, s, t if needs.lora_A else None, dropout, adapter_dtype)
    return dx, dA, dB


class _Once(torch.autograd.Function):
    """Gradients, as the outputs of a node that depends on what they come from and cannot be differentiated.

    torch's once_differentiable looks at dy alone: with a dy that is a constant, as that of a sum is, the gradients of
    gradients would be missing without a word.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(TWICE)


TWICE = "the gradients of a LoRA linear were differentiated again, which lora_kernels cannot: use PEFT's own layers"


def once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """A Function's backward, of one that takes ctx, what ctx saved, and the gradients, of which one is not None."""

    @wraps(backward)
    def wrapped(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(dy is None for dy in dys):
            return (None,) * len(ctx.needs_input_grad)
        # Once: activation checkpointing forgets what it handed out.
        tensors = ctx.saved_tensors
        with torch.no_grad():
            gradients = backward(ctx, tensors, *dys)
        if not torch.is_grad_enabled():
            return gradients
        return _Once.apply(len(gradients), *gradients, *dys, *tensors)  # type: ignore[no-any-return, no-untyped-call]

    return wrapped


class LoRALinearFunction(torch.autograd.Function):
    """y = x W^T + scaling * (D(x) A^T) B^T + b; never a gradient for the weight.

    x is contiguous, or two-dimensional with contiguous rows; deferred.py applies it. csrc/host/linear.h is the same
    node in C++, for calls whose launches are known.
    """

    @staticmethod
    def forward(
        ctx: Any,
        later: Deferred | None,
        x: Tensor,
        weight: Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scale: Scale,
        dropout: Dropout | None,
        precision: Precision,
        backend: Backend,
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        needs = Needs(wanted[1], wanted[3], wanted[4], wanted[5])
        rows, shape = as_matrix(x), x.shape
        product = partial(
            forward, backend, rows, weight, lora_A, lora_B, bias, scale, dropout, precision, needs.lora_B
        )
        y, s = product() if later is None else (later(product, x, weight.shape[0]), None)
        # A tensor on ctx itself would escape autograd's check that nobody changed it in place.
        number, scale_tensor = split_scale(scale)
        p, seed = (0.0, None) if dropout is None else (dropout.p, dropout.seed)
        tensors, ctx.form = Saved.select(needs, x, weight, lora_A, lora_B, s, seed, scale_tensor).flat()
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.needs, ctx.later = backend, needs, later
        ctx.constants = (number, p, precision, lora_A.dtype, None if bias is None else bias.dtype)
        return with_leading(y, shape)

    @staticmethod
    @once
    def backward(ctx: Any, tensors: Sequence[Tensor | None], dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = Saved.of(tensors, ctx.form)
        if ctx.later is not None:
            saved = saved._replace(s=ctx.later.s())
        dx, dA, dB, db = backward_of(ctx.backend, ctx.needs, saved, dy, *ctx.constants)
        return None, dx, None, dA, dB, db, None, None, None, None


def backward_of(
    backend: Backend, needs: Needs, saved: Saved, dy: Tensor, *constants: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`backward` of dy and x with any number of leading dimensions, which dx has too."""
    leading = dy.shape[:-1]
    if len(leading) == 1:
        return backward(backend, needs, saved, dy, *constants)
    if saved.x is not None:
        saved = saved._replace(x=as_matrix(saved.x))
    dx, dA, dB, db = backward(backend, needs, saved, as_matrix(dy), *constants)
    return None if dx is None else dx.view(*leading, dx.shape[1]), dA, dB, db


def rebuilt(tensors: Sequence[Tensor], form: Form) -> NF4Weight:
    """The NF4 weight of tensors that autograd kept."""
    # FSDP frees what it can gather again. A kernel would read whatever lies there now.
    if tensors[0].untyped_storage().nbytes() < tensors[0].nbytes:
        raise RuntimeError("weight's packed storage was freed between forward and backward, and not filled again")
    return NF4Weight.of(tensors, form)


def split_scale(scale: Scale) -> tuple[float, Tensor | None]:
    """The scale as a number and a tensor; the number is 1 where it is a tensor."""
    return (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)


def as_input(x: Tensor) -> Tensor:
    """x as the nodes take it: contiguous, or two-dimensional with contiguous rows."""
    if x.dim() != 2 and x.is_contiguous():
        return x
    return as_rows(as_matrix(x))


def with_leading(y: Tensor, shape: torch.Size) -> Tensor:
    """y, [M, N] if it has not got them yet, with the leading dimensions of an x of this shape."""
    # Not a view, which could not be changed in place where a Function returns it.
    return y if y.dim() == len(shape) else torch.ops.aten._unsafe_view.default(y, (*shape[:-1], y.shape[1]))


def as_matrix(t: Tensor) -> Tensor:
    """`t` with its leading dimensions in one."""
    # Not reshape(-1, K), which has no answer where K is 0.
    return t if t.dim() == 2 else t.reshape(t.shape[:-1].numel(), t.shape[-1])


def as_rows(t: Tensor) -> Tensor:
    """`t` with contiguous rows: what every backend takes as x or dy."""
    columns = t.shape[1]
    if (t.stride(1) != 1 and columns > 1) or (t.stride(0) < columns and t.shape[0] > 1):
        t = t.contiguous()
    return t


def outside_autocast(device_type: str) -> AbstractContextManager[Any]:
    """No autocast: dtypes are settled by now. A backward may be in a region that its forward was not in."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
