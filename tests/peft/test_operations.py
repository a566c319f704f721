"""What people do with PEFT models, under stock PEFT and under patch_peft: the results must be the same."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging import version
from peft.helpers import rescale_adapter_scale
from peft.optimizers import create_loraplus_optimizer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import (
    assert_same,
    base_model,
    batch,
    gradients,
    lora_config,
    lora_layers,
    lora_model,
    output,
    randomize_adapters,
)
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from lora_kernels import patch_peft
from lora_kernels.integrations import peft_layer

# Float32 arithmetic in another order, through two transformer blocks.
FLOAT32 = 2e-4
# PEFT's own distance from the exact gradients in bfloat16 is up to 5e-2 here; for accuracy, test_regimes.py.
BFLOAT16 = 1e-1


class Place:
    """Where an operation runs: the device, and a folder of its own."""

    def __init__(self, device: str, folder: Path) -> None:
        self.device = device
        self.folder = folder

    def saved(self, name: str, seed: int = 5, **options: Any) -> str:
        """A checkpoint of a Llama adapter with random weights."""
        model = lora_model("llama", self.device, **options)
        randomize_adapters(model, seed)
        model.save_pretrained(str(self.folder / name))
        return str(self.folder / name)

    def two_adapters(self, kind: str = "llama", **options: Any) -> peft.PeftModel:
        model = lora_model(kind, self.device)
        model.add_adapter("other", lora_config(kind, **({"r": 3, "lora_alpha": 9} | options)))
        randomize_adapters(model)
        return model.to(self.device)


Operation = Callable[[Place], Any]
OPERATIONS: dict[str, tuple[Operation, float]] = {}


def operation(tolerance: float = FLOAT32) -> Callable[[Operation], Operation]:
    def register(function: Operation) -> Operation:
        OPERATIONS[function.__name__] = (function, tolerance)
        return function

    return register


@operation()
def numerics(place: Place) -> Any:
    return [output(lora_model(kind, place.device), kind, place.device) for kind in ("mlp", "llama", "gpt2")]


@operation()
def gradients_of_adapters(place: Place) -> Any:
    return [
        gradients(lora_model(kind, place.device), kind, place.device) for kind in ("mlp", "llama", "gpt2")
    ]


@operation()
def gradients_of_biases(place: Place) -> Any:
    return [
        gradients(lora_model(kind, place.device, bias=bias), kind, place.device)
        for kind, bias in [("gpt2", "all"), ("gpt2", "lora_only"), ("mlp", "all")]
    ]


@operation()
def state_dict_keys(place: Place) -> Any:
    model = place.two_adapters()
    return (
        dict(model.state_dict()),
        peft.get_peft_model_state_dict(model),
        [n for n, _ in model.named_buffers()],
    )


@operation()
def representation(place: Place) -> Any:
    return repr(place.two_adapters()), repr(place.two_adapters("gpt2"))


@operation()
def save_and_load(place: Place) -> Any:
    loaded = peft.PeftModel.from_pretrained(base_model(), place.saved("one")).to(place.device)
    return output(loaded, "llama", place.device)


@operation()
def load_adapter(place: Place) -> Any:
    model = lora_model("llama", place.device)
    model.load_adapter(place.saved("two", r=8, target_modules=["q_proj", "k_proj"]), adapter_name="other")
    model.set_adapter("other")
    return output(model, "llama", place.device)


@operation()
def add_adapter_on_old_targets(place: Place) -> Any:
    model = place.two_adapters()
    model.set_adapter("other")
    return gradients(model, "llama", place.device)


@operation()
def add_adapter_on_new_targets(place: Place) -> Any:
    model = place.two_adapters(target_modules=["k_proj", "gate_proj", "q_proj"])
    model.set_adapter("other")
    return gradients(model, "llama", place.device)


@operation()
def two_adapters_active(place: Place) -> Any:
    results = []
    for kind in ("llama", "gpt2"):
        model = place.two_adapters(kind)
        model.base_model.set_adapter(["default", "other"])
        results.append(gradients(model, kind, place.device))
    return results


@operation()
def delete_adapter(place: Place) -> Any:
    model = place.two_adapters()
    model.delete_adapter("default")
    return model.active_adapters, output(model, "llama", place.device)


@operation()
def merge_and_unload(place: Place) -> Any:
    models = [lora_model(kind, place.device).merge_and_unload() for kind in ("llama", "gpt2")]
    return [output(model, kind, place.device) for model, kind in zip(models, ("llama", "gpt2"), strict=True)]


@operation()
def safe_merge_and_unmerge(place: Place) -> Any:
    model = lora_model("llama", place.device)
    model.merge_adapter(safe_merge=True)
    merged = output(model, "llama", place.device)
    model.unmerge_adapter()
    return merged, gradients(model, "llama", place.device)


@operation()
def disable_adapter(place: Place) -> Any:
    model = lora_model("llama", place.device)
    with model.disable_adapter():
        disabled = output(model, "llama", place.device)
    return disabled, gradients(model, "llama", place.device)


@operation()
def disable_while_merged(place: Place) -> Any:
    model = lora_model("llama", place.device)
    model.merge_adapter()
    with model.disable_adapter():
        disabled = output(model, "llama", place.device)
    return disabled, output(model, "llama", place.device)


@operation()
def mixed_batch(place: Place) -> Any:
    model = place.two_adapters().eval()
    return output(model, "llama", place.device, adapter_names=["other", "__base__"])


@operation()
def unload_and_again(place: Place) -> Any:
    unloaded = lora_model("llama", place.device).unload()
    again = peft.get_peft_model(unloaded, lora_config())
    randomize_adapters(again, seed=7)
    return output(unloaded, "llama", place.device), gradients(again.to(place.device), "llama", place.device)


@operation()
def dora(place: Place) -> Any:
    return gradients(lora_model("llama", place.device, use_dora=True), "llama", place.device)


@operation()
def rslora(place: Place) -> Any:
    return gradients(lora_model("llama", place.device, use_rslora=True), "llama", place.device)


@operation()
def lora_bias(place: Place) -> Any:
    results = []
    for kind in ("mlp", "gpt2"):
        model = place.two_adapters(kind, lora_bias=True)
        model.base_model.set_adapter(["other", "default"])
        results.append(gradients(model, kind, place.device))
    return results


@operation()
def add_weighted_adapter(place: Place) -> Any:
    model = place.two_adapters()
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type="cat")
    model.set_adapter("sum")
    return output(model, "llama", place.device)


@operation()
def hotswap(place: Place) -> Any:
    model = peft.PeftModel.from_pretrained(base_model(), place.saved("one")).to(place.device)
    before = output(model, "llama", place.device)
    hotswap_adapter(model, place.saved("two", seed=11), adapter_name="default", torch_device=place.device)
    return before, output(model, "llama", place.device)


@operation()
def compiled_hotswap(place: Place) -> Any:
    model = peft.PeftModel.from_pretrained(base_model(), place.saved("one")).to(place.device)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        before = output(compiled, "llama", place.device)
        other = place.saved("two", seed=11, r=8)
        hotswap_adapter(compiled, other, adapter_name="default", torch_device=place.device)
        with torch._dynamo.config.patch(error_on_recompile=True):
            return before, output(compiled, "llama", place.device)


@operation()
def set_scale(place: Place) -> Any:
    model = lora_model("llama", place.device)
    for layer in lora_layers(model).values():
        layer.set_scale("default", 2.5)
        layer.scale_layer(0.5)
    scaled = gradients(model, "llama", place.device)
    with rescale_adapter_scale(model, multiplier=0.3):
        return scaled, output(model, "llama", place.device)


@operation()
def scaling_as_tensor(place: Place) -> Any:
    model = place.two_adapters()
    model.base_model.set_adapter(["default", "other"])
    for layer in lora_layers(model).values():
        layer.scaling["default"] = torch.tensor(0.3, device=place.device)
    return gradients(model, "llama", place.device)


def checkpointed(place: Place, use_reentrant: bool) -> Any:
    model = lora_model("llama", place.device)
    model.enable_input_require_grads()
    plain = gradients(model, "llama", place.device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.train()
    assert_same(plain, gradients(model, "llama", place.device), 1e-6)
    return plain


@operation()
def reentrant_checkpointing(place: Place) -> Any:
    return checkpointed(place, use_reentrant=True)


@operation()
def nonreentrant_checkpointing(place: Place) -> Any:
    return checkpointed(place, use_reentrant=False)


@operation(BFLOAT16)
def regime_r1(place: Place) -> Any:
    model = peft.get_peft_model(base_model().to(torch.bfloat16), lora_config()).to(place.device)
    randomize_adapters(model)
    with torch.autocast(place.device, dtype=torch.bfloat16):
        return gradients(model, "llama", place.device)


@operation(BFLOAT16)
def regime_r3(place: Place) -> Any:
    model = peft.get_peft_model(base_model().to(torch.bfloat16), lora_config()).to(place.device)
    randomize_adapters(model)
    return gradients(model, "llama", place.device)


@operation()
def deepcopy(place: Place) -> Any:
    return gradients(copy.deepcopy(lora_model("llama", place.device)), "llama", place.device)


@operation()
def torch_save(place: Place) -> Any:
    buffer = io.BytesIO()
    torch.save(lora_model("llama", place.device), buffer)
    buffer.seek(0)
    return gradients(torch.load(buffer, weights_only=False), "llama", place.device)


@operation()
def inject_adapter(place: Place) -> Any:
    model = peft.inject_adapter_in_model(lora_config(), base_model())
    randomize_adapters(model)
    return gradients(model.to(place.device), "llama", place.device)


def add_adapter_of_transformers(place: Place) -> Any:
    model = base_model()
    model.add_adapter(lora_config())
    randomize_adapters(model)
    return gradients(model.to(place.device), "llama", place.device)


# transformers 5.23 takes PEFT from 0.20 on.
if version.parse(peft.__version__) >= version.parse(MIN_PEFT_VERSION):
    operation()(add_adapter_of_transformers)


@operation()
def low_cpu_mem_usage(place: Place) -> Any:
    model = peft.PeftModel.from_pretrained(base_model(), place.saved("one"), low_cpu_mem_usage=True)
    return output(model.to(place.device), "llama", place.device)


@operation()
def hooks(place: Place) -> Any:
    """Every inner module's hook is called, on the layer's own forward too."""
    model = lora_model("mlp", place.device)
    layer = lora_layers(model)["base_model.model.lin0"]
    seen: list[str] = []
    results = []
    for name in ("base_layer", "lora_A.default", "lora_dropout.default", "lora_B.default", ""):
        inner = layer.get_submodule(name)
        handle = inner.register_forward_hook(lambda m, i, o, name=name: seen.append(name) or o * 2)
        results.append(gradients(model, "mlp", place.device))
        handle.remove()
        handle = inner.register_full_backward_hook(lambda m, i, o, name=name: seen.append(f"backward {name}"))
        results.append(gradients(model, "mlp", place.device))
        handle.remove()
    return seen, results, gradients(model, "mlp", place.device)


@operation()
def compiled(place: Place) -> Any:
    results = []
    for kind in ("mlp", "llama"):
        model = torch.compile(lora_model(kind, place.device), backend="aot_eager", fullgraph=True)
        results.append(list(gradients(model, kind, place.device).values()))
    return results


@operation()
def graph_breaks(place: Place) -> Any:
    model = place.two_adapters()
    model.base_model.set_adapter(["default", "other"])
    return torch._dynamo.explain(model)(batch("llama", place.device)).graph_break_count


@operation()
def all_linear(place: Place) -> Any:
    model = lora_model("llama", place.device, target_modules="all-linear")
    model.add_adapter("other", lora_config("llama", target_modules="all-linear"))
    return sorted(lora_layers(model)), gradients(model, "llama", place.device)


# Those whose calls cannot be counted, and those in which no layer may run fused.
COMPILED = {"compiled", "compiled_hotswap", "graph_breaks"}
STOCK_ONLY = {"state_dict_keys", "representation", "merge_and_unload", "mixed_batch", "dora"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, tolerance = OPERATIONS[name]
    calls: list[str] = []
    fused_forward = peft_layer.fused_forward

    def counted(*arguments: Any) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            calls.append("fused")
        return fused_forward(*arguments)

    monkeypatch.setattr(peft_layer, "fused_forward", counted)
    stock = run(Place(device, tmp_path / "stock"))
    assert not calls
    torch._dynamo.reset()
    with patch_peft():
        fused = run(Place(device, tmp_path / "fused"))
    assert name in COMPILED or bool(calls) == (name not in STOCK_ONLY)
    assert_same(stock, fused, tolerance, name)


def test_stock_loads_what_fused_saved(tmp_path: Path, device: str) -> None:
    with patch_peft():
        model = lora_model("llama", device)
        model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(base_model(), str(tmp_path)).to(device)
    assert all(type(layer) is peft.tuners.lora.Linear for layer in lora_layers(loaded).values())
    assert_same(output(loaded, "llama", device), output(model, "llama", device), FLOAT32)


def test_optimizer_groups_are_the_same() -> None:
    def groups() -> list[list[str]]:
        model = lora_model("llama")
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
        return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]

    stock = groups()
    with patch_peft():
        assert groups() == stock


def test_output_may_be_changed_in_place() -> None:
    with patch_peft():
        model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), peft.LoraConfig(target_modules=["0"]))
    y = model(torch.randn(2, 3, 6))
    y += 1
    y.sum().backward()
