"""`finetune` compiles while it loads: a model of one layer is rehearsed, with the kernels of the whole one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_kernels import apply_lora_kernels
from lora_kernels.cli.finetune import head_start as module
from lora_kernels.cli.finetune.head_start import forward, head_start, one_layer

CPU, META = torch.device("cpu"), torch.device("meta")
CONFIG = LlamaConfig(
    vocab_size=500,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=400,
)
TOKENS = (2, 8)


def _lora() -> LoraConfig:
    return LoraConfig(r=3, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")


def _layers(model: PeftModel) -> dict[str, tuple[int, ...]]:
    """The shapes of the first decoder layer's parameters."""
    return {n: tuple(p.shape) for n, p in model.named_parameters() if ".layers.0." in n}


def test_one_layer_has_the_whole_models_shapes() -> None:
    small = one_layer(CONFIG, _lora(), torch.bfloat16, CPU)
    assert not apply_lora_kernels(small).not_fused
    whole = get_peft_model(AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16), _lora())
    assert _layers(small) == _layers(whole)
    assert not any(".layers.1." in name for name, _ in small.named_parameters())
    assert CONFIG.num_hidden_layers == 3
    forward(small, TOKENS, torch.bfloat16)


def test_what_fails_in_it_is_left_to_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(module, "one_layer", fails)
    head_start(CONFIG, _lora(), TOKENS, torch.bfloat16, lambda model: None, META)


def test_on_a_cpu_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "one_layer", lambda *arguments: pytest.fail("built a model"))
    head_start(CONFIG, _lora(), TOKENS, torch.float32, lambda model: None, CPU)


@pytest.mark.gpu
def test_every_kernel_of_a_layer_is_being_compiled(tmp_path: Path) -> None:
    """In a process of its own, with a cache of its own."""
    script = """
import threading
import torch, triton
from peft import LoraConfig
from transformers import LlamaConfig
from lora_kernels import apply_lora_kernels
from lora_kernels.cli.finetune.head_start import head_start, one_layer

compiled = []
def listen(src, metadata, metadata_group, times, cache_hit):
    if not cache_hit:
        here = not threading.current_thread().name.startswith("lora_kernels compiles")
        compiled.append((here, src.fn.__name__))
triton.knobs.compilation.listener = listen

sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=100)
config = LlamaConfig(num_hidden_layers=2, **sizes)
lora = lambda: LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
gpu, dtype = torch.device("cuda", 0), torch.bfloat16
head_start(config, lora(), (2, 40), dtype, apply_lora_kernels, gpu)
assert not any(here for here, _ in compiled)

model = one_layer(config, lora(), dtype, gpu)
apply_lora_kernels(model)
model.train()
ids = torch.zeros(2, 40, dtype=torch.int64, device=gpu)
with torch.autocast("cuda", dtype):
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
for p in model.parameters():
    assert not p.requires_grad or p.grad.isfinite().all()
# All but that of the activation's backward, which takes no time.
print(sorted(name for here, name in compiled if here), sorted(name for here, name in compiled if not here))
"""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from lora_kernels.backends.triton.backward_launch import is_for_one_launch

    here, ahead = map(str.strip, done.stdout.strip().replace("] [", "]|[").split("|"))
    assert here == "['gated_backward_kernel']"
    launched = ("group_forward", "group_input", "group_grads", "one_pass", "adapter_grads", "gated_forward", "backward")
    for name in launched if is_for_one_launch(torch.device("cuda", 0), 4) else launched[:-1]:
        assert f"{name}_kernel" in ahead
