"""The best that a chain of library matrix products can do. Runs on any device.

S is computed once and kept, S B^T is accumulated into the output in place, and dY B is computed once. An NF4
weight is decoded into a temporary for each of the two products that it is in. Under a dispatch mode nothing is
changed in place: selective activation checkpointing keeps the results of operators, and hands them out again.

A group without dropout reads x once for the S of all members and once for all dA, and its branches reach dx in one
product: each as if the members were one adapter. dx is accumulated in place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lora_kernels.backends import Activation, Backend, GatedBackend, GroupBackend, Member, Precision, Problem, Scale
from lora_kernels.dropout import Dropout
from lora_kernels.weights import Weight, dense

# Elements of g and u that the gated MLP's elementwise part takes at a time.
_GATED_BLOCK = 1 << 22


def forward(
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
    """y = x W^T + S B^T + b and S = scale * mask(x) A^T."""
    s = branch(x, lora_A, scale, dropout, precision)
    y = _linear(x, dense(weight, x.dtype), bias)
    return _accumulate(y, s, _branch(lora_B, x, precision).T), s if want_s else None


def branch(x: Tensor, lora_A: Tensor, scale: Scale, dropout: Dropout | None, precision: Precision) -> Tensor:
    """S = scale * mask(x) A^T."""
    return _scaled(_masked(x, dropout).to(_branch_dtype(x, precision)) @ _branch(lora_A, x, precision).T, scale)


def backward_input(
    dy: Tensor,
    weight: Weight | None,
    lora_A: Tensor | None,
    lora_B: Tensor,
    scale: Scale,
    dropout: Dropout | None,
    precision: Precision,
    want_dx: bool,
) -> tuple[Tensor | None, Tensor]:
    """T = scale * dy B and dx = dy W + mask(T A)."""
    t = _scaled(dy.to(_branch_dtype(dy, precision)) @ _branch(lora_B, dy, precision), scale)
    if not want_dx:
        return None, t
    assert weight is not None
    assert lora_A is not None
    dx = dy @ dense(weight, dy.dtype)
    up = _branch(lora_A, dy, precision)
    if dropout is None:
        return _accumulate(dx, t, up), t
    branch = _masked(t @ up, dropout)
    return _added(dx, branch), t


def backward_adapters(
    x: Tensor | None,
    dy: Tensor,
    s: Tensor | None,
    t: Tensor | None,
    dropout: Dropout | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """dA = T^T mask(x) where T and x are given, dB = dy^T S where S is given, both in `dtype`."""
    dA = None if t is None or x is None else _product(t.T, _masked(x, dropout), dtype)
    dB = None if s is None else _product(dy.T, s, dtype)
    return dA, dB


def group_forward(
    x: Tensor, members: Sequence[Member], precision: Precision, want_s: bool
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Each member's y and S."""
    if _masks(members):
        ys, ss = zip(*(forward(x, *member, precision, want_s) for member in members), strict=True)  # type: ignore[arg-type]
        return list(ys), list(ss)
    joint = x.to(_branch_dtype(x, precision)) @ _joined(members, x, precision).T
    parts = torch.split(joint, [_up(member).shape[1] for member in members], dim=1)
    # A scale of shape [1] is float32, whatever it multiplies.
    scaled = [(s * member.scale).to(s.dtype) for s, member in zip(parts, members, strict=True)]
    outputs = []
    for s, member in zip(scaled, members, strict=True):
        assert member.weight is not None
        y = _linear(x, dense(member.weight, x.dtype), member.bias)
        outputs.append(_accumulate(y, s, _branch(_up(member), x, precision).T))
    return outputs, list(scaled) if want_s else [None] * len(members)


def group_backward_input(
    dys: list[Tensor], members: Sequence[Member], precision: Precision, want_dx: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Each member's T, and dx: the sum of what each adds."""
    ts = []
    for dy, member in zip(dys, members, strict=True):
        t = dy.to(_branch_dtype(dy, precision)) @ _branch(_up(member), dy, precision)
        ts.append(_scaled(t, member.scale))
    if not want_dx:
        return None, ts
    dx: Tensor | None = None
    for dy, member in zip(dys, members, strict=True):
        assert member.weight is not None
        weight = dense(member.weight, dy.dtype)
        dx = dy @ weight if dx is None else _accumulate(dx, dy, weight)
    assert dx is not None
    if not _masks(members):
        return _accumulate(dx, torch.cat(ts, dim=1), _joined(members, dx, precision)), ts
    wide = dx.to(ts[0].dtype)
    for t, member in zip(ts, members, strict=True):
        assert member.lora_A is not None
        wide = _added(wide, _masked(t @ _branch(member.lora_A, dx, precision), member.dropout))
    return wide.to(dx.dtype), ts


def group_backward_adapters(
    x: Tensor | None,
    dys: list[Tensor],
    ss: list[Tensor | None],
    ts: list[Tensor | None],
    dropouts: list[Dropout | None],
    dtype: torch.dtype,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Each member's dA and dB, where it has a T and an S."""
    dBs = [None if s is None else _product(dy.T, s, dtype) for dy, s in zip(dys, ss, strict=True)]
    given = [t for t in ts if t is not None]
    if x is None or not given:
        return [None] * len(ts), dBs
    if any(dropout is not None for dropout in dropouts):
        return [
            None if t is None else _product(t.T, _masked(x, dropout), dtype)
            for t, dropout in zip(ts, dropouts, strict=True)
        ], dBs
    joint = _product(torch.cat(given, dim=1).T, x, dtype)
    # Copies: a view would keep the gradients of all members in memory for the sake of one.
    parts = iter([part.clone() for part in torch.split(joint, [t.shape[1] for t in given])])
    return [None if t is None else next(parts) for t in ts], dBs


def gated_product(g: Tensor, u: Tensor, activation: Activation) -> Tensor:
    """act(g) * u in float32, rounded once."""
    return (_activated(g.float(), activation) * u).to(g.dtype)


def gated_forward(g: Tensor, u: Tensor, activation: Activation) -> Tensor:
    """h, in blocks of rows whose float32 temporaries are small."""
    if is_in_torch_dispatch_mode():
        return gated_product(g, u, activation)
    h = torch.empty_like(g, memory_format=torch.contiguous_format)
    for rows in _blocks(g):
        h[rows] = gated_product(g[rows], u[rows], activation)
    return h


def gated_backward(
    dh: Tensor, g: Tensor, u: Tensor, activation: Activation, want_h: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dg, which takes dh's place, du, and h where it is wanted."""
    du = torch.empty_like(u, memory_format=torch.contiguous_format)
    h = torch.empty_like(du) if want_h else None
    for rows in _blocks(g):
        gate, given = g[rows].float(), dh[rows].float()
        activated = _activated(gate, activation)
        if h is not None:
            h[rows] = activated * u[rows]
        du[rows] = given * activated
        dh[rows] = _activated_backward(given * u[rows], gate, activation)
    return dh, du, h


def _activated(g: Tensor, activation: Activation) -> Tensor:
    return F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")


def _activated_backward(da: Tensor, g: Tensor, activation: Activation) -> Tensor:
    gradient: Tensor
    if activation == "silu":
        gradient = torch.ops.aten.silu_backward(da, g)
    else:
        gradient = torch.ops.aten.gelu_backward(da, g, approximate="tanh")
    return gradient


def _blocks(t: Tensor) -> Iterator[slice]:
    step = max(1, _GATED_BLOCK // max(1, t.shape[1]))
    for start in range(0, t.shape[0], step):
        yield slice(start, start + step)


def _masks(members: Sequence[Member]) -> bool:
    return any(member.dropout is not None for member in members)


def _up(member: Member) -> Tensor:
    assert member.lora_B is not None
    return member.lora_B


def _joined(members: Sequence[Member], x: Tensor, precision: Precision) -> Tensor:
    """The A's of all members, one below the other."""
    return torch.cat([_branch(member.lora_A, x, precision) for member in members if member.lora_A is not None])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x @ weight.T if bias is None else torch.addmm(bias.to(x.dtype), x, weight.T)


def _masked(x: Tensor, dropout: Dropout | None) -> Tensor:
    # Not a product with the mask: an infinity that is dropped is 0, and not NaN.
    return x if dropout is None else torch.where(dropout.keep(x.shape[0], x.shape[1]), x, 0.0)


def _branch_dtype(x: Tensor, precision: Precision) -> torch.dtype:
    return torch.float32 if precision == "split" else x.dtype


def _branch(adapter: Tensor, x: Tensor, precision: Precision) -> Tensor:
    return adapter.to(_branch_dtype(x, precision))


def _scaled(s: Tensor, scale: Scale) -> Tensor:
    """scale * s, in place where that is allowed, and in s's dtype: a scale of shape [1] is float32."""
    return (s * scale).to(s.dtype) if is_in_torch_dispatch_mode() else s.mul_(scale)


def _accumulate(y: Tensor, s: Tensor, up: Tensor) -> Tensor:
    """y + s up, in place where that is allowed and the dtypes agree, else in the wider dtype and rounded once."""
    if s.dtype == y.dtype and not is_in_torch_dispatch_mode():
        return y.addmm_(s, up)
    return torch.addmm(y.to(s.dtype), s, up).to(y.dtype)


def _added(dx: Tensor, branch: Tensor) -> Tensor:
    """dx + branch, in place where that is allowed and the dtypes agree, else in the wider dtype and rounded once."""
    if branch.dtype == dx.dtype and not is_in_torch_dispatch_mode():
        return dx.add_(branch)
    return (dx + branch).to(dx.dtype)


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in `dtype`, which a float32 adapter's gradient reaches without a stop in 16 bits."""
    wide = torch.promote_types(left.dtype, right.dtype)
    if wide == dtype:
        return left.to(wide) @ right.to(wide)
    if left.is_cuda and left.dtype == right.dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _never(problem: Problem) -> str | None:
    return None


def _describe(problem: Problem) -> str | None:
    products = "library matrix products: 3 forward, 5 backward"
    return f"{products}; the NF4 weight is decoded into a temporary before one of each" if problem.nf4 else products


def _never_of_a_group(problems: Sequence[Problem]) -> str | None:
    return None


GATED = GatedBackend(gated_forward, gated_backward)
BACKEND = Backend(
    "eager",
    _never,
    _never,
    forward,
    backward_input,
    backward_adapters,
    _describe,
    GroupBackend(_never_of_a_group, group_forward, group_backward_input, group_backward_adapters, _never_of_a_group),
    GATED,
)
