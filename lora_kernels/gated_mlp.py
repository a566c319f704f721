"""lora_gated_mlp: the MLP of Llama and its kin, in one call and one node of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from lora_kernels import native
from lora_kernels.autograd import as_input, as_matrix, as_rows, with_leading
from lora_kernels.autograd_gated import GatedPlan, forward, gated_mlp
from lora_kernels.backends import Activation, Member
from lora_kernels.dispatch import BackendName, Choice, requested
from lora_kernels.dispatch_group import GroupChoice, group_choice
from lora_kernels.group import as_given, checked, member_of
from lora_kernels.nf4 import NF4Weight

_NAMES = ("gate", "up", "down")


@dataclass(frozen=True)
class GatedChoice:
    """Which way a gated MLP takes: that of gate and up, and the down projection's backend."""

    group: GroupChoice
    down: Choice

    def __str__(self) -> str:
        first, *rest = str(self.group).replace("members[0]", "gate").replace("members[1]", "up").splitlines()
        return "\n".join(
            [f"gate and up {first}", *rest, "down", *(f"  {line}" for line in str(self.down).splitlines())]
        )


def lora_gated_mlp(
    x: Tensor,
    gate: tuple[Any, ...],
    up: tuple[Any, ...],
    down: tuple[Any, ...],
    *,
    activation: str = "silu",
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:
    """A gated MLP (SwiGLU, GeGLU) whose three projections are linear layers with low-rank adapters.

        g = gate(x)        u = up(x)        h = act(g) * u        y = down(h)

    Each projection is the equation of lora_linear, with a mask of its own, drawn in this order; gate and up are a
    group. h is computed in float32 from g and u as they are stored, rounded once, and not kept: the backward
    makes it again from g and u, in the pass that makes their gradients.

    Args:
        x: [..., K], as for lora_linear.
        gate, up: (weight, lora_A, lora_B, scaling, bias), or GroupMember, of which the last two may be left out,
            as for lora_linear; both with the same N.
        down: the same; its K is their N.
        activation: "silu", x sigmoid(x), or "gelu_tanh", GELU approximated by a hyperbolic tangent.
        dropout_p, training, backend: as for lora_linear; one for all three.
    Returns:
        y: [..., N of down], in x's dtype; under autocast in the autocast dtype.
    Raises:
        ValueError, TypeError: as lora_linear, naming the projection, as "up: lora_A had ..."; or the projections
            do not fit each other, or the activation is unknown.
        RuntimeError: the backend that was named cannot run a projection; or a backward is differentiated again.

    Sources: Hu et al., "LoRA", ICLR 2022; Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    name = requested(backend)
    compiling = torch.compiler.is_compiling()
    learn = not compiling and native.enabled
    given = (x, gate, up, down, activation, dropout_p, training, name)
    if learn and native.gated is not None:
        found = native.gated(*given)
        if isinstance(found, Tensor):
            return found
        learn = found is None
    kind = _activation(activation)
    x, members, choices = _checked(x, gate, up, down, dropout_p, training, name)
    if compiling:
        from lora_kernels.compiled_group import apply_gated

        return as_given(apply_gated(as_rows(as_matrix(x)), members, kind, name), x)
    plan, rows = _plan(choices, kind), as_input(x)
    with native.noting(learn, plan.down, rows) as made:
        y = gated_mlp(plan, rows, members) if torch.is_grad_enabled() else forward(plan, rows, members)
    native.learn_group(given, made, plan, members)
    return with_leading(y, x.shape)


def explain_gated_mlp(
    x: Tensor,
    gate: tuple[Any, ...],
    up: tuple[Any, ...],
    down: tuple[Any, ...],
    *,
    activation: str = "silu",
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> GatedChoice:
    """Whether gate and up would go as one group, or why not, and the backends of all three projections.

    Takes the arguments of lora_gated_mlp and raises what it raises; computes nothing. Print the result.
    """
    _activation(activation)
    _, _, choices = _checked(x, gate, up, down, dropout_p, False, requested(backend))
    return GatedChoice(group_choice(choices[:2]), choices[2])


def _activation(name: str) -> Activation:
    if name not in get_args(Activation):
        raise ValueError(f"activation was {name!r}, but must be one of {', '.join(get_args(Activation))}")
    return name  # type: ignore[return-value]


def _checked(
    x: Tensor, gate: object, up: object, down: object, dropout_p: float, training: bool, backend: BackendName
) -> tuple[Tensor, list[Member], list[Choice]]:
    given = [member_of(member, name) for member, name in zip((gate, up, down), _NAMES, strict=True)]
    x, group, choices = checked(x, given[:2], _NAMES[:2], dropout_p, training, backend)
    (hidden, _), (up_hidden, _) = (_shape(member) for member in group)
    if hidden != up_hidden:
        raise ValueError(f"up: weight had N = {up_hidden}, but must have gate's N = {hidden}")
    # h has x's dtype. Its width is what the down projection's weight says, until that is known to be a matrix.
    # A tuple of classes, as torch.compile of PyTorch 2.8 takes no union.
    width = given[2].weight.shape[-1:] if isinstance(given[2].weight, (Tensor, NF4Weight)) else (hidden,)
    h = x.new_empty(0, *width)
    _, own, choice = checked(h, given[2:], _NAMES[2:], dropout_p, training, backend)
    if _shape(own[0])[1] != hidden:
        raise ValueError(f"down: weight had K = {_shape(own[0])[1]}, but must have gate's N = {hidden}")
    return x, [*group, *own], [*choices, *choice]


def _shape(member: Member) -> tuple[int, int]:
    assert member.weight is not None
    rows, columns = member.weight.shape
    return rows, columns


def _plan(choices: list[Choice], activation: Activation) -> GatedPlan:
    down = choices[2]
    return GatedPlan.of(group_choice(choices[:2]).plan, activation, down.backend, down.problem.precision)
