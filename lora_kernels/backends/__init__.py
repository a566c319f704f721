"""What a backend is: a record of functions on plain two-dimensional tensors. Autograd takes it as data.

In all of them x is [M, K], weight [N, K], lora_A [r, K], lora_B [N, r], dy [M, N]; S and T are [M, r].
The weight is dense, in x's dtype, or NF4: then W is what it decodes to in the dtype of x or dy, which is one.
`scale` is scaling / (1 - p): a mask is then a mask, and no kernel multiplies by 1 / (1 - p) again:

    S  = scale * mask(x) A^T        y  = x W^T + S B^T + b
    T  = scale * dy B               dx = dy W + mask(T A)
    dA = T^T mask(x)                dB = dy^T S

It is a number, or a float32 tensor of shape [1]. (One of shape [] would take the dtype of what it
multiplies: a GPU rounds it to 16 bits first.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lora_kernels.dropout import Dropout

if TYPE_CHECKING:
    from lora_kernels.nf4 import NF4Weight
    from lora_kernels.weights import Weight

# How adapters meet a base of another dtype. "native": they have the base's dtype. "rounded": float32
# adapters, rounded to the base's dtype where they are used, as autocast does. "split": float32 adapters over
# a 16-bit base with float32 accuracy in the branch.
Precision = Literal["native", "rounded", "split"]
Scale = float | Tensor

_HAS_FP32_PRECISION = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def tf32_allowed() -> bool:
    """Whether PyTorch's own float32 products may use TF32, by whichever of its settings the user said so."""
    matmul = torch.backends.cuda.matmul
    # PyTorch 2.9 brought fp32_precision, which follows the older settings; allow_tf32 raises once it was set.
    return bool(matmul.fp32_precision == "tf32" if _HAS_FP32_PRECISION else matmul.allow_tf32)


@dataclass(frozen=True)
class Problem:
    """What the choice of a backend may depend on. M is not in it: it changes with every batch."""

    device: torch.device
    dtype: torch.dtype
    precision: Precision
    in_features: int
    out_features: int
    rank: int
    tf32: bool = False
    nf4: bool = False

    @staticmethod
    def of(
        device: torch.device,
        dtype: torch.dtype,
        precision: Precision,
        in_features: int,
        out_features: int,
        rank: int,
        nf4: bool = False,
    ) -> Problem:
        """The problem under PyTorch's present settings: TF32 only matters to float32."""
        tf32 = dtype == torch.float32 and tf32_allowed()
        return Problem(device, dtype, precision, in_features, out_features, rank, tf32, nf4)


class Forward(Protocol):
    def __call__(
        self,
        x: Tensor,
        weight: Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        bias: Tensor | None,
        scale: Scale,
        dropout: Dropout | None,
        precision: Precision,
        want_s: bool,
    ) -> tuple[Tensor, Tensor | None]: ...


class BackwardInput(Protocol):
    def __call__(
        self,
        dy: Tensor,
        weight: Weight | None,
        lora_A: Tensor | None,
        lora_B: Tensor,
        scale: Scale,
        dropout: Dropout | None,
        precision: Precision,
        want_dx: bool,
    ) -> tuple[Tensor | None, Tensor]: ...


class BackwardAdapters(Protocol):
    def __call__(
        self,
        x: Tensor | None,
        dy: Tensor,
        s: Tensor | None,
        t: Tensor | None,
        dropout: Dropout | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor | None, Tensor | None]: ...


class Backward(Protocol):
    def __call__(
        self,
        dy: Tensor,
        weight: Weight,
        lora_A: Tensor,
        lora_B: Tensor,
        x: Tensor | None,
        s: Tensor | None,
        scale: Scale,
        dropout: Dropout | None,
        precision: Precision,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]: ...


class Refusal(Protocol):
    def __call__(self, problem: Problem) -> str | None: ...


class NF4Path(NamedTuple):
    """Where a product has its NF4 weight decoded, and why there."""

    where: str
    why: str


class NF4Paths(Protocol):
    def __call__(self, x: Tensor, weight: NF4Weight) -> tuple[NF4Path, NF4Path]: ...


class Member(NamedTuple):
    """What a backend needs of one member of a group: layers that read the same x.

    In a backward `bias` is None, and so are `weight` and `lora_A` where x needs no gradient.
    """

    weight: Weight | None
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None
    scale: Scale
    dropout: Dropout | None


class GroupRefusal(Protocol):
    def __call__(self, problems: Sequence[Problem]) -> str | None: ...


class GroupForward(Protocol):
    def __call__(
        self, x: Tensor, members: Sequence[Member], precision: Precision, want_s: bool
    ) -> tuple[list[Tensor], list[Tensor | None]]: ...


class GroupBackwardInput(Protocol):
    def __call__(
        self, dys: list[Tensor], members: Sequence[Member], precision: Precision, want_dx: bool
    ) -> tuple[Tensor | None, list[Tensor]]: ...


class GroupBackwardAdapters(Protocol):
    def __call__(
        self,
        x: Tensor | None,
        dys: list[Tensor],
        ss: list[Tensor | None],
        ts: list[Tensor | None],
        dropouts: list[Dropout | None],
        dtype: torch.dtype,
    ) -> tuple[list[Tensor | None], list[Tensor | None]]: ...


@dataclass(frozen=True)
class GroupBackend:
    """A backend's functions on two or more members at once. Each has the single function's equations, and

        dx = sum over the members of dy_i W_i + mask_i(T_i A_i)

    `refuses` says why a group must go member by member through the single functions. All members of a call have
    one precision and one dtype of adapters; a backward has all members of its forward: where only some of the
    outputs got a gradient, the single functions run instead. `describe` says what else explain_group() should tell.
    """

    refuses: GroupRefusal
    forward: GroupForward
    backward_input: GroupBackwardInput
    backward_adapters: GroupBackwardAdapters
    describe: GroupRefusal


# The gate's activation: x sigmoid(x), or the approximation of GELU by a hyperbolic tangent.
Activation = Literal["silu", "gelu_tanh"]


class GatedForward(Protocol):
    def __call__(self, g: Tensor, u: Tensor, activation: Activation) -> Tensor: ...


class GatedBackward(Protocol):
    def __call__(
        self, dh: Tensor, g: Tensor, u: Tensor, activation: Activation, want_h: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...


@dataclass(frozen=True)
class GatedBackend:
    """The elementwise part of a gated MLP on g and u, the [M, N] outputs of its gate and its up projection:

        h = act(g) * u        dg = dh * u * act'(g)        du = dh * act(g)

    in float32, each rounded once to g's dtype. `backward` gives dg, du and, where it is wanted, h again. It may
    write into dh, and never into g or u, which hooks for saved tensors may bring back with any strides.
    """

    forward: GatedForward
    backward: GatedBackward


@dataclass(frozen=True)
class Backend:
    """`refuses` says why it cannot run a problem; `declines` why the automatic choice should pass it by.

    Without a `group` of its own its groups go member by member, without a `gated` those parts are PyTorch's.
    `nf4_paths` says how the forward and the backward of one call go, where that depends on more than the problem.
    `backward` gives dx, and dA where it has x and dB where it has S, at once: what backward_input and backward_adapters
    give one after the other, which run without it.
    """

    name: str
    refuses: Refusal
    declines: Refusal
    forward: Forward
    backward_input: BackwardInput
    backward_adapters: BackwardAdapters
    describe: Refusal
    group: GroupBackend | None = None
    gated: GatedBackend | None = None
    nf4_paths: NF4Paths | None = None
    backward: Backward | None = None
