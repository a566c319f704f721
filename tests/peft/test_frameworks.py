"""Trainer, TRL, accelerate, DDP and FSDP2 with one line before them: the same losses as with stock PEFT."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from datasets import Dataset
from peft_models import (
    VOCABULARY,
    assert_same,
    base_model,
    gradients,
    lora_config,
    lora_layers,
    lora_model,
    stock_and_fused,
)
from tokenizers import Tokenizer, models
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from lora_kernels import apply_lora_kernels, patch_peft
from lora_kernels.integrations.peft_layer import Linear, why_not_fused


def examples(count: int = 8) -> list[dict[str, list[int]]]:
    tokens = torch.randint(VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(6)).tolist()
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, device: str) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": device == "cpu",
        "disable_tqdm": True,
    }


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    assert {type(layer) for layer in lora_layers(trainer.model).values()} <= {peft.tuners.lora.Linear, Linear}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_trainer(folder: Path, device: str, **options: Any) -> list[float]:
    args = TrainingArguments(**arguments(folder, device), **options)
    return losses(Trainer(lora_model(), args, train_dataset=examples()))


def with_trainer_in_bfloat16(folder: Path, device: str) -> list[float]:
    return with_trainer(folder, device, bf16=True)


def with_trl(folder: Path, device: str, **changes: bool) -> list[float]:
    from trl import SFTConfig, SFTTrainer

    words = {f"w{i}": i for i in range(VOCABULARY - 2)} | {"<eos>": VOCABULARY - 2, "<pad>": VOCABULARY - 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<pad>")),
        eos_token="<eos>",
        pad_token="<pad>",
    )
    rows = [{"input_ids": example["input_ids"]} for example in examples()]
    torch.manual_seed(0)
    trainer = SFTTrainer(
        base_model(),
        SFTConfig(**arguments(folder, device), max_length=16, **changes),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(),
    )
    return losses(trainer)


def with_trl_in_float32(folder: Path, device: str) -> list[float]:
    """By default it trains in bfloat16, with activation checkpointing."""
    return with_trl(folder, device, bf16=False, gradient_checkpointing=False)


def with_accelerate(folder: Path, device: str) -> list[float]:
    accelerator = Accelerator(cpu=device == "cpu")
    model = lora_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    tokens = torch.tensor([example["input_ids"] for example in examples()], device=accelerator.device)
    found = []
    for _ in range(3):
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


TRAININGS: list[Callable[[Path, str], list[float]]] = [
    with_trainer,
    with_trainer_in_bfloat16,
    with_accelerate,
]
if importlib.util.find_spec("trl") is not None:
    TRAININGS += [with_trl, with_trl_in_float32]


@pytest.mark.parametrize("train", TRAININGS)
def test_training(train: Callable[[Path, str], list[float]], device: str, tmp_path: Path) -> None:
    stock = train(tmp_path, device)
    with patch_peft():
        fused = train(tmp_path, device)
    assert stock[-1] < stock[0]
    tolerance = 2e-2 if train in (with_trainer_in_bfloat16, with_trl) else 1e-3
    assert fused == pytest.approx(stock, rel=tolerance)


def test_a_grad_scaler_skips_the_same_steps(device: str) -> None:
    """Under autocast of float16: what overflows in a fused layer must reach the adapters' gradients, as PEFT's does."""
    tokens = torch.tensor([example["input_ids"] for example in examples()], device=device)

    def train(model: torch.nn.Module) -> tuple[list[float], list[float]]:
        adapters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(adapters, lr=1e-2)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**60, backoff_factor=2.0**-12, growth_interval=100)
        found, scales = [], []
        for _ in range(8):
            with torch.autocast(device, torch.float16):
                loss = model(input_ids=tokens, labels=tokens).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            found.append(loss.item())
            scales.append(scaler.get_scale())
        assert all(adapter.isfinite().all() for adapter in adapters)
        return found, scales

    (expected, expected_scales), (got, scales) = map(train, stock_and_fused(device=device))
    assert expected_scales[0] < 2.0**60, "nothing overflows"
    assert expected_scales[-1] == expected_scales[-2], "no step is taken"
    assert expected[-1] < expected[0]
    assert scales == expected_scales
    assert got == pytest.approx(expected, rel=1e-2)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp(process_group: None) -> None:
    stock, fused = stock_and_fused()
    assert_same(gradients(stock, "llama", "cpu"), gradients(fused, "llama", "cpu"), 2e-4)
    expected = gradients(stock, "llama", "cpu")
    wrapped = DistributedDataParallel(fused)
    result = gradients(wrapped, "llama", "cpu")
    assert_same(expected, {name.removeprefix("module."): value for name, value in result.items()}, 2e-4)
    with pytest.raises(ValueError, match="model was wrapped by DistributedDataParallel already"):
        apply_lora_kernels(wrapped)


def test_fsdp2_by_block(process_group: None) -> None:
    """Inside a block that is gathered whole, its layers see plain tensors and run fused."""
    stock, fused = stock_and_fused()
    expected = gradients(stock, "llama", "cpu")
    mesh = init_device_mesh("cpu", (1,))
    blocks = fused.base_model.model.model.layers
    inside: list[str | None] = []
    for block in blocks:
        layer = block.self_attn.q_proj
        layer.register_forward_hook(lambda layer, *_: inside.append(why_not_fused(layer)))
        fully_shard(block, mesh=mesh)
    result = gradients(fused, "llama", "cpu")
    assert inside == [None, None]
    assert_same(expected, {name: plain(value) for name, value in result.items()}, 2e-4)
    with pytest.raises(ValueError, match=r"layers.0' was wrapped by fully_shard already"):
        apply_lora_kernels(fused)


def test_fsdp2_of_an_adapter_falls_back(process_group: None) -> None:
    stock, fused = stock_and_fused("mlp")
    expected = gradients(stock, "mlp", "cpu")
    mesh = init_device_mesh("cpu", (1,))
    for layer in lora_layers(fused).values():
        fully_shard(layer.lora_A["default"], mesh=mesh)
        assert "FSDPLinear" in str(why_not_fused(layer))
    result = gradients(fused, "mlp", "cpu")
    assert_same(expected, {name: plain(value) for name, value in result.items()}, 1e-5)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
