"""Which blocks are grouped, what they report, and that those which cannot be run as without groups."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from group_models import ALL, Calls, adapted, blocks, decoder, grouped, layer, train, ungrouped
from peft.tuners import lora
from peft_models import assert_same, gradients, lora_layers, output, randomize_adapters
from torch import Tensor, nn

from lora_kernels import apply_lora_kernels, patch_peft, revert_lora_kernels
from lora_kernels.integrations import peft_blocks


def test_apply_and_revert(device: str) -> None:
    model = adapted(device=device)
    before = gradients(model, "llama", device)
    classes = {name: type(block) for name, block in blocks(model).items()}
    keys, text = list(model.state_dict()), repr(model)
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    report = apply_lora_kernels(model)
    # On a GPU a third may say that the launch path is not compiled.
    assert str(report).splitlines()[:2] == [
        "lora_kernels: 14 of 14 LoRA layers are fused",
        "lora_kernels: 4 of 4 attention and MLP blocks are grouped",
    ]
    assert [block.name for block in report.blocks] == list(classes)
    assert all(peft_blocks.is_grouped(block) for block in blocks(model).values())
    assert all(isinstance(block, classes[name]) for name, block in blocks(model).items())
    gradients(model, "llama", device)
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == attributes
    assert apply_lora_kernels(model) == report
    assert apply_lora_kernels(model, groups=False).fused == 14
    assert {name: type(block) for name, block in blocks(model).items()} == classes
    apply_lora_kernels(model)
    assert revert_lora_kernels(model) == 14
    assert {name: type(block) for name, block in blocks(model).items()} == classes
    assert_same(before, gradients(model, "llama", device), 0.0)


@pytest.mark.parametrize("groups", [True, False])
def test_patched_peft_groups_what_it_makes(groups: bool) -> None:
    inherited = lora.LoraModel.inject_adapter
    with patch_peft(groups=groups):
        model = adapted()
        assert all(peft_blocks.is_grouped(block) == groups for block in blocks(model).values())
        later = adapted(target_modules=["q_proj"])
        assert not any(peft_blocks.is_grouped(block) for block in blocks(later).values())
        later.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"]))
        assert any(peft_blocks.is_grouped(block) for block in blocks(later).values()) == groups
    assert "inject_adapter" not in vars(lora.LoraModel)
    assert lora.LoraModel.inject_adapter is inherited
    assert not any(peft_blocks.is_grouped(block) for block in blocks(adapted()).values())


def test_undo_refuses_to_drop_a_later_patch_of_injection(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = patch_peft()
    with monkeypatch.context() as later:
        later.setattr(lora.LoraModel, "inject_adapter", lambda *_: None)
        with pytest.raises(RuntimeError, match=r"LoraModel\.inject_adapter was replaced by something else"):
            handle.undo()
    handle.undo()


def test_copies_and_pickles(calls: Calls) -> None:
    model = grouped(adapted())
    expected = output(model, "llama", "cpu")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.take()
        assert torch.equal(output(twin, "llama", "cpu"), expected)
        assert calls.take() == (2, 2)
        assert [type(block) for block in blocks(twin).values()] == [type(block) for block in blocks(model).values()]
        revert_lora_kernels(model)
        assert all(peft_blocks.is_grouped(block) for block in blocks(twin).values())
        apply_lora_kernels(model)


def second_adapter(model: Any) -> None:
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=ALL))
    randomize_adapters(model)
    model.base_model.set_adapter(["default", "other"])


def dora(model: Any) -> None:
    model.add_adapter("dora", peft.LoraConfig(r=3, target_modules=["k_proj", "up_proj"], use_dora=True))
    model.base_model.set_adapter(["default", "dora"])
    for module in lora_layers(model).values():
        if "dora" in module.lora_A:
            module.set_adapter("dora")


def double_output(*arguments: Any) -> Tensor:
    return arguments[-1] * 2


def double_input(_: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    return given[0] * 2


def not_active(model: Any) -> None:
    for name in ("k_proj", "up_proj"):
        layer(model, name).set_adapter([])


Spoil = Callable[[Any], object]
# What is done to a model, and a part of the reason that its first attention and its first MLP must give ("": none).
SPOILED: dict[str, tuple[Spoil, str, str]] = {
    "disabled": (lambda m: m.base_model.disable_adapter_layers(), "adapters are disabled", "adapters are disabled"),
    "merged": (lambda m: m.merge_adapter(), "merged into its base weight", "merged into its base weight"),
    "two adapters": (second_adapter, "q_proj has several active adapters", "gate_proj has several active adapters"),
    "DoRA": (dora, "k_proj: adapter 'dora' is a variant", "up_proj: adapter 'dora' is a variant"),
    "not active": (not_active, "k_proj: it has none of the active adapters", "up_proj: it has none"),
    "hook on a member": (
        lambda m: [layer(m, name).register_forward_hook(double_output) for name in ("v_proj", "down_proj")],
        "v_proj has hooks",
        "down_proj has hooks",
    ),
    "pre-hook on a member": (
        lambda m: [layer(m, name).register_forward_pre_hook(double_input) for name in ("k_proj", "up_proj")],
        "k_proj has hooks",
        "up_proj has hooks",
    ),
    "hook on lora_B": (
        lambda m: [layer(m, n).lora_B.default.register_forward_hook(double_output) for n in ("q_proj", "gate_proj")],
        "q_proj: adapter 'default' has hooks",
        "gate_proj: adapter 'default' has hooks",
    ),
    "hook on act_fn": (lambda m: decoder(m).mlp.act_fn.register_forward_hook(double_output), "", "act_fn has hooks"),
    "another activation": (lambda m: setattr(decoder(m).mlp, "act_fn", nn.ReLU()), "", "its activation is ReLU"),
    "exact GELU": (lambda m: setattr(decoder(m).mlp, "act_fn", nn.GELU()), "", "its activation is GELU"),
    "another dtype": (
        lambda m: [layer(m, name).lora_A.double() and layer(m, name).lora_B.double() for name in ("k_proj", "up_proj")],
        "k_proj: adapter 'default' is torch.float64",
        "up_proj: adapter 'default' is torch.float64",
    ),
    "saved module": (
        lambda m: (
            [
                setattr(decoder(m).self_attn, n, getattr(decoder(m).self_attn, n).base_layer)
                for n in ("q_proj", "k_proj")
            ]
            + [setattr(decoder(m).mlp, "down_proj", decoder(m).mlp.down_proj.base_layer)]
        ),
        "fewer than two of q_proj, k_proj, v_proj",
        "down_proj is no fused LoRA layer",
    ),
    "own forward": (
        lambda m: setattr(layer(m, "gate_proj"), "forward", layer(m, "gate_proj").base_layer.forward),
        "",
        "gate_proj has hooks",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_blocks_that_cannot_run_as_today(name: str, device: str, calls: Calls) -> None:
    spoil, attention, mlp = SPOILED[name]
    stock = adapted(device=device)
    fused = grouped(stock)
    for model in (stock, fused):
        spoil(model)
    reasons = {block.name.rpartition(".")[2]: block.reason for block in apply_lora_kernels(fused).blocks[:2]}
    for key, expected in (("self_attn", attention), ("mlp", mlp)):
        found = reasons[key]
        assert (expected in str(found)) if expected else found is None
    # A hook on an inner module is PEFT's to run: the layers run its code, and each other layer its fused forward.
    decoders = [decoder(model) for model in (stock, fused)]
    x = torch.randn(2, 5, 32, device=device)
    assert_same(decoders[0].mlp(x), decoders[1].mlp(x), 1e-5)
    assert calls.take() == (0, 0 if mlp else 1)
    projections = [[getattr(d.self_attn, n)(x) for n in ("q_proj", "k_proj", "v_proj")] for d in decoders]
    assert_same(*projections, 1e-5)
    assert_same(output(stock, "llama", device), output(fused, "llama", device), 1e-4)


def test_different_dropout(device: str, calls: Calls) -> None:
    stock = adapted(device=device, lora_dropout=0.2)
    models = [grouped(stock), ungrouped(stock)]
    losses = []
    for model in models:
        for module in (layer(model, "k_proj"), layer(model, "up_proj")):
            module.lora_dropout["default"].p = 0.5
        losses.append(train(model, device))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # The other decoder layer's blocks are still alike.
    assert calls.take() == (4, 4)
    assert "differs from the layers before it" in str(apply_lora_kernels(models[0]).blocks[0].reason)


def test_mixed_batches(device: str, calls: Calls) -> None:
    stock = adapted(device=device).eval()
    fused = grouped(stock)
    names = ["default", "__base__"]
    assert_same(
        output(stock, "llama", device, adapter_names=names), output(fused, "llama", device, adapter_names=names), 1e-6
    )
    assert calls.take() == (0, 0)


def test_block_with_accelerates_hook() -> None:
    model = adapted()
    mlp = decoder(model).mlp
    add_hook_to_module(mlp, AlignDevicesHook("cpu"))
    report = apply_lora_kernels(model)
    assert [bool(block.reason) for block in report.blocks] == [False, True, False, False]
    assert "replaced on the instance already" in str(report)
    hooked = decoder(model).self_attn
    add_hook_to_module(hooked, AlignDevicesHook("cpu"))
    with pytest.raises(ValueError, match=r"block base_model.model.model.layers.0.self_attn had a forward of its own"):
        revert_lora_kernels(model)


def test_modules_of_other_code_are_left_alone() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.q_proj(x) + self.k_proj(other) + self.v_proj(other)

    for kind in (Scaled, Cross):
        model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules="all-linear"), nn.Sequential(kind()))
        assert apply_lora_kernels(model).blocks == ()
        assert type(model[0]) is kind


class NamedOtherwise(nn.Module):
    """An MLP whose forward names its input as transformers' Qwen2.5-VL does."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.act_fn = nn.SiLU()

    def forward(self, hidden_state: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_state)) * self.up_proj(hidden_state))


@pytest.mark.parametrize("name", ["hidden_state", "x"])
def test_an_mlp_is_called_by_its_own_parameters_name(name: str, device: str, calls: Calls) -> None:
    """A Llama's is named x."""
    stock: Any = decoder(adapted(device=device)).mlp
    if name == "hidden_state":
        config = peft.LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"])
        stock = peft.inject_adapter_in_model(config, NamedOtherwise()).to(device)
        randomize_adapters(stock)
    mlp = copy.deepcopy(stock)
    assert all(block.grouped for block in apply_lora_kernels(mlp).blocks)
    assert peft_blocks.is_grouped(mlp)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).to(device)
    assert_same(stock(x), mlp(**{name: x}), 1e-5)
    assert_same(stock(x), mlp(x), 1e-5)
    assert calls.take() == (0, 2)
    for wrong, arguments in [((), {"y": x}), ((), {}), ((x,), {name: x}), ((x, x), {})]:
        with pytest.raises(TypeError, match=r"argument"):
            mlp(*wrong, **arguments)
