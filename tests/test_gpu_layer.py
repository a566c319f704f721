"""A whole decoder layer, its layers together where they share x: as a CUDA graph, and as one graph of torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graphs import captured
from tolerance import relative_error
from torch import Tensor, nn

pytest.importorskip("peft", reason="PEFT is not installed")

import peft
from transformers.models.llama import modeling_llama as llama

from lora_kernels import apply_lora_kernels

HIDDEN, BATCH, LENGTH = 256, 2, 150
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A decoder layer with its rotary embedding."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        # PyTorch's fused attention adds its gradients up in any order.
        config = llama.LlamaConfig(
            hidden_size=HIDDEN, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2,
            attn_implementation="eager",
        )  # fmt: skip
        self.layer = llama.LlamaDecoderLayer(config, 0).to(device, torch.bfloat16)
        for parameter in self.layer.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        positions = torch.arange(LENGTH, device=device)[None]
        rotary = llama.LlamaRotaryEmbedding(config).to(device)
        self.rotary = rotary(torch.empty(0, dtype=torch.bfloat16, device=device), positions)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x, position_embeddings=self.rotary)
        # Releases before 4.57 gave a tuple.
        return y[0] if isinstance(y, tuple) else y


def block(device: torch.device, dropout: float) -> Block:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=8, lora_alpha=12, lora_dropout=dropout, target_modules=TARGETS)
    model = peft.get_peft_model(Block(device), config, autocast_adapter_dtype=False)
    report = apply_lora_kernels(model)
    assert report.fused == len(TARGETS), str(report)
    assert [entry.grouped for entry in report.blocks] == [True, True], str(report)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    found: Block = model.base_model.model
    return found.train()


def inputs(device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x and dy."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(2, BATCH, LENGTH, HIDDEN, generator=generator).to(device, torch.bfloat16)
    return x.requires_grad_(), dy


def step(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output and all gradients. Nothing of the graph outlives the call: a capture may not meet its streams."""
    adapters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert len(adapters) == 2 * len(TARGETS)
    y = call(x)
    found = torch.autograd.grad(y, [x, *adapters.values()], dy)
    return {"y": y.detach(), **dict(zip(["x", *adapters], found, strict=True))}


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_captured_graph_replays_with_the_bits_of_eager_code(dropout: float, device: torch.device) -> None:
    module, (x, dy) = block(device, dropout), inputs(device)
    graph, results = captured(lambda: step(module, module, x, dy))
    outputs = []
    for seed in range(3):
        with torch.no_grad():
            for held, new in zip((x, dy), inputs(device, seed + 1), strict=True):
                held.copy_(new)
        torch.manual_seed(seed)
        graph.replay()
        torch.manual_seed(seed)
        for name, want in step(module, module, x, dy).items():
            assert torch.equal(results[name], want), name
        outputs.append(results["y"].clone())
    assert not torch.equal(outputs[0], outputs[1])


COMPILERS: list[Any] = ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiled_into_one_graph(dropout: float, compiler: str, device: torch.device) -> None:
    module, (x, dy) = block(device, dropout), inputs(device)
    torch.manual_seed(3)
    expected = step(module, module, x, dy)
    # Inductor has random numbers of its own unless it is asked not to.
    with torch._inductor.config.patch(fallback_random=True):
        call = torch.compile(module, backend=compiler, fullgraph=True)
        for seed in (1, 3):
            torch.manual_seed(seed)
            got = step(call, module, x, dy)
    for name, want in expected.items():
        assert got[name].dtype == want.dtype, name
        # Inductor rounds less often between two operations.
        assert relative_error(got[name], want) < 2e-2, name
