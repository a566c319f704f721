"""patch_peft, apply_lora_kernels, revert_lora_kernels: what they change, report and refuse."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from peft.tuners import lora
from peft_models import assert_same, base_model, gradients, lora_config, lora_layers, lora_model
from torch import nn

import lora_kernels
from lora_kernels import apply_lora_kernels, native, patch_peft, revert_lora_kernels
from lora_kernels.integrations import peft_contract
from lora_kernels.integrations.peft_layer import Linear


@pytest.fixture
def fresh_check() -> Iterator[None]:
    """The contract is checked once a process; these tests change what it sees."""
    peft_contract.check_peft.cache_clear()
    yield
    peft_contract.check_peft.cache_clear()


def kinds(model: nn.Module) -> set[type]:
    return {type(layer) for layer in lora_layers(model).values()}


def test_importing_the_package_does_not_import_peft() -> None:
    code = "import sys, lora_kernels; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_patch_and_undo() -> None:
    stock = vars(lora.LoraModel)["_create_new_module"]
    handle = patch_peft()
    assert handle.active
    assert kinds(lora_model()) == {Linear}
    handle.undo()
    assert not handle.active
    assert vars(lora.LoraModel)["_create_new_module"] is stock
    assert kinds(lora_model()) == {lora.Linear}
    handle.undo()


def test_patch_twice_is_patch_once() -> None:
    with patch_peft() as outer:
        with patch_peft() as inner:
            assert not inner.active
            assert "patched already" in repr(inner)
        assert outer.active
        assert kinds(lora_model()) == {Linear}
    assert kinds(lora_model()) == {lora.Linear}


def test_undo_puts_back_what_a_later_peft_may_define(monkeypatch: pytest.MonkeyPatch) -> None:
    """inject_adapter is inherited today."""

    def inject_adapter(self: Any, *arguments: Any, **options: Any) -> Any:
        return super(lora.LoraModel, self).inject_adapter(*arguments, **options)

    monkeypatch.setattr(lora.LoraModel, "inject_adapter", inject_adapter)
    for groups in (True, False):
        patch_peft(groups=groups).undo()
        assert vars(lora.LoraModel)["inject_adapter"] is inject_adapter


def test_patch_is_undone_by_an_error() -> None:
    with pytest.raises(ZeroDivisionError), patch_peft():
        raise ZeroDivisionError
    assert kinds(lora_model()) == {lora.Linear}


def test_undo_refuses_to_drop_a_later_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = patch_peft()
    with monkeypatch.context() as later:
        later.setattr(lora.LoraModel, "_create_new_module", staticmethod(lambda *_: None))
        with pytest.raises(RuntimeError, match="replaced by something else"):
            handle.undo()
    handle.undo()


def test_apply_and_revert() -> None:
    model = lora_model()
    before, keys, text = gradients(model, "llama", "cpu"), list(model.state_dict()), repr(model)
    report = apply_lora_kernels(model)
    assert kinds(model) == {Linear}
    assert (report.fused, report.not_fused, len(report)) == (10, 0, 10)
    assert str(report).splitlines()[0] == "lora_kernels: 10 of 10 LoRA layers are fused"
    assert [layer.name for layer in report] == list(lora_layers(model))
    assert_same(before, gradients(model, "llama", "cpu"), 2e-4)
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert apply_lora_kernels(model) == report
    assert revert_lora_kernels(model) == 10
    assert revert_lora_kernels(model) == 0
    assert kinds(model) == {lora.Linear}
    assert_same(before, gradients(model, "llama", "cpu"), 0.0)


def test_the_report_says_how_launches_become_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    report, advice = apply_lora_kernels(lora_model()), "lora_kernels: launches come from Python, and short steps wait"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for reason, said in ((native.NOT_COMPILED, True), ("LORA_KERNELS_NATIVE is 0", False), (None, False)):
        monkeypatch.setattr(native, "why_not", lambda reason=reason: reason)
        assert str(report).splitlines()[-1].startswith(advice) == said
    monkeypatch.setattr(native, "why_not", lambda: native.NOT_COMPILED)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "launches" not in str(report)


def test_fused_layer_has_no_state_of_its_own() -> None:
    own = {"__module__", "__doc__", "forward", "_read_base"}
    assert set(vars(Linear)) <= own | set(vars(type("Empty", (lora.Linear,), {})))
    model = lora_model()
    before = {name: sorted(vars(layer)) for name, layer in lora_layers(model).items()}
    apply_lora_kernels(model)
    gradients(model, "llama", "cpu")
    assert {name: sorted(vars(layer)) for name, layer in lora_layers(model).items()} == before


def test_report_names_layers_and_reasons() -> None:
    model = peft.get_peft_model(base_model(), lora_config(target_modules=["q_proj", "embed_tokens"]))
    model.add_adapter("dora", lora_config(target_modules=["v_proj"], use_dora=True))
    model.base_model.set_adapter(["default", "dora"])
    report = apply_lora_kernels(model)
    reasons = {layer.name.split(".")[-1]: layer.reason for layer in report}
    assert reasons["q_proj"] is None
    assert reasons["embed_tokens"] == "lora.Embedding has no fused kernel"
    assert reasons["v_proj"] == "adapter 'dora' is a variant of LoRA: DoraLinearVariant"
    assert (report.fused, report.not_fused) == (2, 3)
    assert str(report).splitlines()[:6] == [
        "lora_kernels: 2 of 5 LoRA layers are fused",
        "  1 not fused: lora.Embedding has no fused kernel",
        "    base_model.model.model.embed_tokens",
        "  2 not fused: adapter 'dora' is a variant of LoRA: DoraLinearVariant",
        "    base_model.model.model.layers.0.self_attn.v_proj",
        "    base_model.model.model.layers.1.self_attn.v_proj",
    ]


def test_layers_of_others_are_left_alone() -> None:
    class Custom(lora.Linear):
        pass

    model = lora_model()
    for layer in lora_layers(model).values():
        layer.__class__ = Custom
    report = apply_lora_kernels(model)
    assert kinds(model) == {Custom}
    assert {layer.reason for layer in report} == {"lora.Custom has no fused kernel"}


def test_model_without_lora_layers() -> None:
    report = apply_lora_kernels(nn.Linear(2, 2))
    assert len(report) == 0
    assert "no LoRA layers" in str(report)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", "0")
    with patch_peft() as handle:
        assert not handle.active
        assert "LORA_KERNELS=0" in repr(handle)
        model = lora_model()
    report = apply_lora_kernels(model)
    assert kinds(model) == {lora.Linear}
    assert report.not_fused == len(report) == 10
    assert {layer.reason for layer in report} == {"LORA_KERNELS=0 in the environment"}


def test_argument_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"model was str, but must be an nn.Module"):
        apply_lora_kernels("llama")  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [apply_lora_kernels, revert_lora_kernels])
def test_compiled_model_is_refused(change: object) -> None:
    model = lora_model()
    with pytest.raises(ValueError, match=r"wrapped by torch.compile already.*before"):
        change(torch.compile(model))  # type: ignore[operator]
    lora_layers(model)["base_model.model.model.layers.0.self_attn.q_proj"].compile()
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj' was wrapped by torch.compile"):
        change(model)  # type: ignore[operator]


def test_layer_with_accelerates_hook() -> None:
    """accelerate keeps the forward that it found: hooked before, a layer stays stock; hooked after, fused."""
    model = lora_model("mlp")
    layer = lora_layers(model)["base_model.model.lin0"]
    add_hook_to_module(layer, AlignDevicesHook("cpu"))
    report = apply_lora_kernels(model)
    assert type(layer) is lora.Linear
    assert [bool(entry.reason) for entry in report] == [True, False]
    remove_hook_from_module(layer)
    assert apply_lora_kernels(model).fused == 2
    add_hook_to_module(layer, AlignDevicesHook("cpu"))
    assert apply_lora_kernels(model).fused == 2
    with pytest.raises(ValueError, match=r"layer base_model.model.lin0 had a forward of its own"):
        revert_lora_kernels(model)
    assert kinds(model) == {Linear}


def test_old_peft_is_refused(monkeypatch: pytest.MonkeyPatch, fresh_check: None) -> None:
    monkeypatch.setattr(peft, "__version__", "0.17.1")
    with pytest.raises(RuntimeError, match=r"peft was 0.17.1, but must be 0.18 or newer"):
        patch_peft()


def test_peft_that_creates_layers_otherwise_is_refused(
    monkeypatch: pytest.MonkeyPatch, fresh_check: None
) -> None:
    monkeypatch.setattr(lora.LoraModel, "_create_new_module", staticmethod(lambda config, target: None))
    with pytest.raises(RuntimeError, match=r"_create_new_module takes \(config, target\), and took"):
        patch_peft()
    monkeypatch.delattr(lora.LoraModel, "_create_new_module")
    with pytest.raises(RuntimeError, match="no static method of its own"):
        patch_peft()


stock_forward = lora.Linear.forward


def forward_of_more_names(
    self: lora.Linear, x: torch.Tensor, *args: object, **kwargs: object
) -> torch.Tensor:
    return stock_forward(self, x, *args, **kwargs) * self.some_new_gate


def test_peft_that_looks_at_something_new_is_refused(
    monkeypatch: pytest.MonkeyPatch, fresh_check: None
) -> None:
    monkeypatch.setattr(lora.Linear, "forward", forward_of_more_names)
    with pytest.raises(RuntimeError, match=r"other names than it did: .*some_new_gate"):
        patch_peft()


def test_peft_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, fresh_check: None
) -> None:
    def forward(self: lora.Linear, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return stock_forward(self, x) * 2

    monkeypatch.setattr(peft_contract, "_names", lambda code: peft_contract._FORWARD_NAMES)
    monkeypatch.setattr(lora.Linear, "forward", forward)
    with pytest.raises(RuntimeError, match="does not compute"):
        apply_lora_kernels(nn.Identity())


def test_check_leaves_the_generator_alone(fresh_check: None) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with patch_peft():
        assert torch.equal(torch.rand(2), expected)


def test_deepcopy_and_revert_are_independent() -> None:
    model = lora_model()
    apply_lora_kernels(model)
    twin = copy.deepcopy(model)
    revert_lora_kernels(model)
    assert kinds(twin) == {Linear}


def test_names_are_exported() -> None:
    assert {"patch_peft", "apply_lora_kernels", "revert_lora_kernels"} <= set(lora_kernels.__all__)
