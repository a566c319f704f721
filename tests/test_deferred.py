"""Activation checkpointing: the product that ends a block is not computed twice, and all bits are the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lora_kernels import NF4Weight, autograd, lora_gated_mlp, lora_linear
from lora_kernels.weights import Weight

HIDDEN, WIDE, R = 32, 48, 3
KINDS = ("linear", "dropout", "nf4", "gated")


class Block:
    """A residual and, last of all, a LoRA linear or a gated MLP, on [2, 3, 32]."""

    def __init__(self, kind: str, device: torch.device, backend: str) -> None:
        self.kind, self.backend = kind, backend
        generator = torch.Generator().manual_seed(1)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).mul(shape[-1] ** -0.5).to(device)

        def member(out: int, into: int) -> tuple[Weight, Tensor, Tensor, float]:
            weight = randn(out, into)
            adapters = randn(R, into).requires_grad_(), randn(out, R).requires_grad_()
            return (NF4Weight.quantize(weight) if kind == "nf4" else weight, *adapters, 2.0)

        self.x = randn(2, 3, HIDDEN).requires_grad_()
        gated = [member(WIDE, HIDDEN), member(WIDE, HIDDEN), member(HIDDEN, WIDE)]
        self.members = gated if kind == "gated" else [member(HIDDEN, HIDDEN)]
        self.leaves = [self.x, *(t for *_, lora_A, lora_B, _ in self.members for t in (lora_A, lora_B))]

    def __call__(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(x)
        if self.kind == "gated":
            return x + lora_gated_mlp(h, *self.members, backend=self.backend)
        weight, lora_A, lora_B, scaling = self.members[0]
        p = 0.3 if self.kind == "dropout" else 0.0
        return x + lora_linear(h, weight, lora_A, lora_B, scaling=scaling, dropout_p=p, backend=self.backend)

    def gradients(self, run: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> list[Tensor]:
        """The output of run(self, x) and the gradients of everything."""
        torch.manual_seed(3)
        y = run(self, self.x)
        dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
        return [y.detach(), *torch.autograd.grad(y, self.leaves, dy)]


def plainly(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return block(x)


def checkpointed(block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)  # type: ignore[no-any-return]


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    for value, reference in zip(got, want, strict=True):
        assert torch.equal(value, reference)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of the products that single linears computed in a forward."""
    computed: list[int] = []
    forward = autograd.forward

    def counted(*arguments: Any, **options: Any) -> Any:
        y, s = forward(*arguments, **options)
        computed.append(y.shape[1])
        return y, s

    monkeypatch.setattr(autograd, "forward", counted)
    return computed


@pytest.fixture(params=KINDS)
def block(request: pytest.FixtureRequest, device: torch.device, backend: str) -> Block:
    if request.param == "nf4" and backend == "cuda":
        # It takes 16-bit bases only; tests/test_nf4_linear.py has them.
        backend = "triton"
    return Block(request.param, device, backend)


def test_the_last_product_is_computed_once(block: Block, products: list[int]) -> None:
    want = block.gradients(plainly)
    products.clear()
    assert_same_bits(block.gradients(checkpointed), want)
    assert products.count(HIDDEN) == 1
    products.clear()
    with set_checkpoint_early_stop(False):
        assert_same_bits(block.gradients(checkpointed), want)
    assert products.count(HIDDEN) == 2


def test_a_product_that_is_read_is_computed_again(device: torch.device, backend: str, products: list[int]) -> None:
    first, last = Block("linear", device, backend), Block("gated", device, backend)
    first.leaves += last.leaves[1:]

    def both(run: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> list[Tensor]:
        return first.gradients(lambda block, x: run(lambda x: last(block(x)), x))

    want = both(plainly)
    products.clear()
    assert_same_bits(both(checkpointed), want)
    assert products.count(HIDDEN) == 3


def test_one_checkpoint_within_another(block: Block) -> None:
    want = block.gradients(plainly)
    assert_same_bits(block.gradients(lambda block, x: checkpointed(lambda x: checkpointed(block, x), x)), want)


def test_reentrant_checkpoints(block: Block) -> None:
    want = block.gradients(plainly)
    block.x.grad = None
    torch.manual_seed(3)
    y = checkpoint(block, block.x, use_reentrant=True)
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape))
    assert_same_bits([y.detach(), *(leaf.grad for leaf in block.leaves)], want)  # type: ignore[misc]


def test_saved_tensors_moved_to_the_cpu(block: Block) -> None:
    want = block.gradients(plainly)
    with save_on_cpu():
        assert_same_bits(block.gradients(plainly), want)


def test_two_backwards_through_one_graph(block: Block) -> None:
    y = checkpointed(block, block.x)
    dy = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape)
    first = torch.autograd.grad(y, block.leaves, dy, retain_graph=True)
    assert_same_bits(list(torch.autograd.grad(y, block.leaves, dy)), list(first))


def test_y_is_like_any_other(block: Block) -> None:
    """It is an output like that of a call without hooks, which may be changed in place."""
    results = []
    for packed in (False, True):
        torch.manual_seed(3)
        with saved_tensors_hooks(torch.clone, torch.clone) if packed else torch.enable_grad():
            weight, lora_A, lora_B, scaling = block.members[0]
            y = lora_linear(block.x, weight, lora_A, lora_B, scaling=scaling, backend=block.backend)
        assert y.is_contiguous()
        assert not y._is_view() or y.dim() == 3
        y.mul_(2.0)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), block.leaves[:3])])
    assert_same_bits(*results)


@pytest.mark.parametrize("retain", [False, True])
def test_s_goes_with_what_was_saved(retain: bool, block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is still held after the last backward holds no S."""
    kept: list[weakref.ref[Tensor]] = []
    forward = autograd.forward

    def watched(*arguments: Any, **options: Any) -> Any:
        y, s = forward(*arguments, **options)
        # Of a gated MLP, gate and up are recomputed and their S with them.
        if y.shape[1] == HIDDEN:
            kept.append(weakref.ref(s))
        return y, s

    monkeypatch.setattr(autograd, "forward", watched)
    y = checkpointed(block, block.x)
    y.backward(torch.ones_like(y), retain_graph=retain)
    assert [s() is not None for s in kept] == [retain]


def test_what_a_hook_raises_ends_the_call(block: Block, products: list[int]) -> None:
    def fail(t: Tensor) -> Tensor:
        if t.shape == block.members[-1][2].shape:
            raise LookupError("not here")
        return t

    with pytest.raises(LookupError, match="not here"), saved_tensors_hooks(fail, torch.clone):
        block(block.x)
    assert HIDDEN not in products
