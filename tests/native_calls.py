"""Groups and gated MLPs for the tests of the launch path in C++: calls that come again, and their bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from launch_path import NATIVE, LaunchPath, assert_same, bf16, only_python
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import GroupMember, apply_lora_kernels, lora_gated_mlp, lora_linear_group, native, use_backend

K, HIDDEN = 24, 40


@dataclass(frozen=True)
class Layers:
    """A call of lora_linear_group or, with an activation, of lora_gated_mlp."""

    x: Any
    members: tuple[Any, ...]
    activation: str | None = None

    def __call__(self, backend: str = "triton", **options: Any) -> list[Tensor]:
        if self.activation is None:
            return lora_linear_group(self.x, self.members, backend=backend, **options)
        return [lora_gated_mlp(self.x, *self.members, activation=self.activation, backend=backend, **options)]

    def tensors(self) -> list[Tensor | None]:
        """What may have a gradient."""
        return [self.x, *(t for member in self.members for t in (member.lora_A, member.lora_B, member.bias))]

    def leaves(self) -> list[Tensor]:
        return [t for t in self.tensors() if t is not None and t.requires_grad]

    def each(self, change: Callable[[Tensor], Tensor]) -> Layers:
        """With other x, adapters and biases."""
        return replace(self, x=change(self.x)).adapters(change, "lora_A", "lora_B", "bias")

    def adapters(self, change: Callable[[Tensor], Tensor], *names: str) -> Layers:
        """With other tensors of these names in each member; `change` gives what is to be a leaf again."""
        members = []
        for member in self.members:
            given = {name: getattr(member, name) for name in names}
            members.append(member._replace(**{k: None if t is None else change(t) for k, t in given.items()}))
        return replace(self, members=tuple(members))

    def on(self, device: str) -> Layers:
        moved = self.adapters(lambda t: t.to(device), "weight")
        return moved.each(lambda t: leaf(t, lambda t: t.to(device)))

    def member(self, index: int, **changes: Any) -> Layers:
        members = [m._replace(**changes) if i == index else m for i, m in enumerate(self.members)]
        return replace(self, members=tuple(members))


def group(
    leading: tuple[int, ...],
    *layers: tuple[int, int],
    columns: int = K,
    bias: bool = False,
    dtype: torch.dtype = bf16,
) -> Layers:
    """A group of layers (N, rank)."""
    generator = torch.Generator().manual_seed(sum(leading) + len(layers))
    x = _randn(generator, *leading, columns).to(dtype).requires_grad_()
    return Layers(x, tuple(_member(generator, columns, N, rank, bias, dtype) for N, rank in layers))


def gated(
    leading: tuple[int, ...],
    activation: str,
    hidden: int = HIDDEN,
    columns: int = K,
    bias: bool = False,
    dtype: torch.dtype = bf16,
) -> Layers:
    generator = torch.Generator().manual_seed(sum(leading))
    sizes = ((columns, hidden, 3), (columns, hidden, 17), (hidden, columns, 8))
    x = _randn(generator, *leading, columns).to(dtype).requires_grad_()
    return Layers(x, tuple(_member(generator, *size, bias, dtype) for size in sizes), activation)


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _member(generator: torch.Generator, columns: int, N: int, rank: int, bias: bool, dtype: torch.dtype) -> GroupMember:
    def randn(*shape: int) -> Tensor:
        return (_randn(generator, *shape) * shape[-1] ** -0.5).to(dtype)

    adapters = randn(rank, columns).requires_grad_(), randn(N, rank).requires_grad_()
    return GroupMember(randn(N, columns), *adapters, 1.0 + rank / 16, randn(N) if bias else None)


KINDS: dict[str, Callable[..., Layers]] = {
    "two": lambda leading, **options: group(leading, (40, 3), (24, 17), **options),
    "three": lambda leading, **options: group(leading, (40, 3), (17, 17), (63, 16), **options),
    "silu": partial(gated, activation="silu"),
    "gelu_tanh": partial(gated, activation="gelu_tanh", hidden=63),
}


def leaf(t: Tensor, change: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor:
    """A tensor changed, and a leaf of its own."""
    return change(t.detach()).detach().requires_grad_(t.requires_grad)


def dy_of(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)


def step(layers: Layers, dys: Sequence[Tensor | None] | None = None, **options: Any) -> list[Tensor | None]:
    """The outputs and the gradients of whatever requires them, from a seed."""
    layers = layers.each(leaf)
    torch.manual_seed(3)
    ys = layers(**options)
    if ys[0].requires_grad:
        pairs = [(y, dy) for y, dy in zip(ys, dys or [dy_of(y) for y in ys], strict=True) if dy is not None]
        torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
    return [*(y.detach() for y in ys), *(None if t is None else t.grad for t in layers.tensors())]


def step_in_python(layers: Layers, *arguments: Any, **options: Any) -> list[Tensor | None]:
    with only_python():
        return step(layers, *arguments, **options)


def checkpointed_step(
    layers: Layers, reentrant: bool, forget: Callable[[], None] = lambda: None
) -> list[Tensor | None]:
    """What `step` gives with dropout, recomputed after `forget`."""
    layers = layers.each(leaf)

    def block(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(replace(layers, x=x)(dropout_p=0.3))

    torch.manual_seed(3)
    ys = checkpoint(block, layers.x, use_reentrant=reentrant)
    forget()
    torch.autograd.backward(ys, [dy_of(y) for y in ys])
    return [*(y.detach() for y in ys), *(None if t is None else t.grad for t in layers.tensors())]


def assert_learned_call(path: LaunchPath, layers: Layers, *arguments: Any, **options: Any) -> None:
    """The forward is learned by the second call, the backward by the third, and then all of it is C++."""
    want = step_in_python(layers, *arguments, **options)
    for _ in range(3):
        assert_same(step(layers, *arguments, **options), want)
    path.who()
    for _ in range(2):
        assert_same(step(layers, *arguments, **options), want)
        assert path.who() == {NATIVE}


def native_ys(layers: Layers, **options: Any) -> list[Tensor]:
    """Outputs whose node was made in C++."""
    for _ in range(4):
        step(layers, **options)
    ys = layers(**options)
    assert not hasattr(ys[0].grad_fn, "plan"), "the node was made in Python"
    return ys


def llama(device: str, rank: int) -> nn.Module:
    """A decoder layer of PEFT's over a Llama, its attention and its MLP as groups."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=1, attn_implementation="eager", **sizes)
    torch.manual_seed(0)
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config).to(bf16),
        peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False),
    ).to(device)
    assert all(block.grouped for block in apply_lora_kernels(model).blocks)
    return model  # type: ignore[no-any-return]


def llama_step(model: nn.Module) -> list[Tensor | None]:
    device = next(model.parameters()).device
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(1)).to(device, bf16).requires_grad_()
    model.zero_grad()
    with use_backend("triton"):
        y = model(inputs_embeds=x, use_cache=False).logits
        y.backward(dy_of(y))
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def assert_llama_learned(device: str, monkeypatch: pytest.MonkeyPatch, rank: int = 3) -> None:
    """q, k and v, the MLP, and the output of attention by itself: all of it C++ in the end, with the same bits."""
    model = llama(device, rank)
    with only_python():
        want = llama_step(model)
    for _ in range(4):
        assert_same(llama_step(model), want)
    made: list[tuple[str, bool]] = []

    def watched(name: str, call: Callable[..., Any], *given: Any) -> Any:
        found = call(*given)
        made.append((name, isinstance(found, (Tensor, list))))
        return found

    for name in ("linear", "group", "gated"):
        monkeypatch.setattr(native, name, partial(watched, name, getattr(native, name)))
    assert_same(llama_step(model), want)
    assert made == [("group", True), ("linear", True), ("gated", True)]
