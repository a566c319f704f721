"""Layers that share a tensor: what may happen between their calls, to their outputs, and under torch.compile."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from group_models import Calls, adapted, blocks, decoder, grouped
from peft_models import assert_same, gradients, output, randomize_adapters, stock_and_fused
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from lora_kernels import apply_lora_kernels
from lora_kernels.integrations import peft_blocks
from lora_kernels.integrations.peft_scope import Scope
from lora_kernels.integrations.peft_traced import StandIn


class Attention(nn.Module):
    """What the scope sees of an attention, with everything that could go wrong in between."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 12), nn.Linear(8, 4), nn.Linear(8, 4)
        self.between = lambda x: x
        self.uses_v = True

    def forward(self, x: Tensor) -> list[Tensor]:
        q = self.q_proj(x)
        x = self.between(x)
        k = self.k_proj(x)
        return [q, k, self.v_proj(x)] if self.uses_v else [q, k]


def attentions(device: str = "cpu") -> list[Any]:
    """Stock and grouped."""
    torch.manual_seed(0)
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"]), Attention()
    )
    randomize_adapters(model)
    fused = copy.deepcopy(model)
    assert all(block.grouped for block in apply_lora_kernels(fused).blocks)
    assert peft_blocks.is_grouped(fused)
    return [model.to(device), fused.to(device)]


def compare(models: list[Any], device: str = "cpu") -> None:
    results = []
    for model in models:
        model.zero_grad()
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        ys = model(x * 1.0)
        sum((i + 1) * y.square().sum() for i, y in enumerate(ys)).backward()  # type: ignore[union-attr]
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"x": x.grad, "ys": [y.detach() for y in ys], **found})
    assert_same(*results, 1e-5)


def changed_in_place(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x.mul_(2.0)


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "another tensor": lambda x: x * 3.0,
    "the same numbers in another tensor": lambda x: x.clone(),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_happens_between_the_calls(name: str, device: str) -> None:
    models = attentions(device)
    for model in models:
        model.between = BETWEEN[name]
    compare(models, device)


def test_a_change_in_place_between_the_calls() -> None:
    models = attentions()
    for model in models:
        model.between = changed_in_place
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert_same(*(model(x.clone()) for model in models), 1e-5)


@pytest.mark.parametrize("setting", ["no_grad", "autocast"])
def test_other_settings_between_the_calls(setting: str) -> None:
    results = []
    for model in attentions():
        with contextlib.ExitStack() as settings:

            def enter(x: Tensor, settings: contextlib.ExitStack = settings) -> Tensor:
                other = torch.no_grad() if setting == "no_grad" else torch.autocast("cpu", torch.bfloat16)
                settings.enter_context(other)
                return x

            model.between = enter
            ys = model(torch.linspace(-1, 1, 40).view(5, 8))
        results.append([(y.detach(), y.requires_grad) for y in ys])
    assert_same(*results, 0.02)


def test_a_sibling_that_is_never_called(device: str, calls: Calls) -> None:
    models = attentions(device)
    for model in models:
        model.uses_v = False
    compare(models, device)
    assert calls.take() == (1, 0)
    assert models[1].v_proj.lora_A.default.weight.grad is None
    for model in models:
        model.uses_v = True
    compare(models, device)


def test_an_exception_between_the_calls(device: str) -> None:
    models = attentions(device)

    def fail(x: Tensor) -> Tensor:
        raise ZeroDivisionError

    models[1].between = fail
    with pytest.raises(ZeroDivisionError):
        models[1](torch.randn(5, 8, device=device))
    models[1].between = lambda x: x
    compare(models, device)


def test_layers_called_by_themselves(device: str, calls: Calls) -> None:
    stock, fused = attentions(device)
    x = torch.randn(5, 8, device=device)
    assert_same(stock.k_proj(x), fused.k_proj(x), 1e-5)
    assert calls.take() == (0, 0)


def test_outputs_live_no_longer_than_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    _, fused = attentions()
    made: list[weakref.ref[Tensor]] = []
    compute = peft_blocks.lora_linear_group

    def recording(*arguments: Any, **options: Any) -> list[Tensor]:
        ys = compute(*arguments, **options)
        made.extend(weakref.ref(y) for y in ys)
        return ys

    monkeypatch.setattr(peft_blocks, "lora_linear_group", recording)
    gc.disable()
    try:
        for uses_v, between in [(True, lambda x: x), (False, lambda x: x), (True, lambda x: x.clone())]:
            fused.uses_v, fused.between = uses_v, between
            with torch.no_grad():
                fused(torch.randn(5, 8))
            assert len(made) == 3
            assert all(y() is None for y in made)
            made.clear()
        x = torch.randn(5, 8)
        alive = weakref.ref(x)
        with torch.no_grad():
            ys = fused(x)
        del x
        assert alive() is None
        assert len(ys) == 3
    finally:
        gc.enable()


class InARow(nn.Module):
    """The attention of a model, with what it needs beside its input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.attention = decoder(model).self_attn
        self.attention.o_proj = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.zeros(1, x.shape[1], 8, device=x.device)
        y, _ = self.attention(x, position_embeddings=(angles.cos(), angles.sin()), attention_mask=None)
        return y


def graphs_of(module: nn.Module, *arguments: Tensor) -> list[str]:
    """The operators of the one graph of a module, and of the graphs inside of it."""
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        for part in graph.modules():
            if isinstance(part, torch.fx.GraphModule):
                targets.extend(str(node.target) for node in part.graph.nodes)
        return graph.forward

    torch.compile(module, backend=backend, fullgraph=True)(*arguments)
    return targets


def test_compiled_blocks_are_one_graph(device: str) -> None:
    stock = adapted("Gemma", device)
    fused = grouped(stock)
    x = torch.randn(2, 5, 32, device=device)
    mlp = graphs_of(decoder(fused).mlp, x)
    assert sum("lora_kernels.group_forward" in target for target in mlp) == 1
    assert sum("lora_kernels.forward" in target for target in mlp) == 1
    assert not any("linear" in target for target in mlp)
    torch._dynamo.reset()
    # Its input might be changed between the calls, of which a graph cannot ask.
    attention = graphs_of(attentions(device)[1], torch.randn(5, 8, device=device))
    assert sum("lora_kernels.forward" in target for target in attention) == 3
    torch._dynamo.reset()
    attention = graphs_of(InARow(fused), x)
    assert [target for target in attention if "lora_kernels" in target] == ["lora_kernels.group_forward.default"]


class Checkpointed(InARow):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_compiled_blocks_with_checkpointing_are_one_graph(device: str) -> None:
    """What is checkpointed may not change anything outside of it, or it is not compiled."""
    model, x = adapted(device=device), torch.randn(2, 5, 32, device=device)
    stock, fused = Checkpointed(model), Checkpointed(grouped(model))
    targets = graphs_of(fused, x)
    assert [target for target in targets if "lora_kernels" in target] == ["lora_kernels.group_forward.default"]
    stock(x).square().sum().backward()
    wanted = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    assert len(wanted) == 6
    for backend in ("aot_eager", "eager"):
        torch._dynamo.reset()
        fused.zero_grad()
        torch.compile(fused, backend=backend, fullgraph=True)(x).square().sum().backward()
        assert_same(wanted, {n: p.grad for n, p in fused.named_parameters() if p.grad is not None}, 1e-5)


@pytest.fixture
def attended(device: str) -> Iterator[InARow]:
    """A fused block whose attention function is not of transformers."""

    def function(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        assert isinstance(module, nn.Module)
        module.seen = module.q_proj.weight.shape
        return query.transpose(1, 2) + value.mean() * key.mean(), None

    model = grouped(adapted(device=device))
    AttentionInterface.register("of_a_test", function)
    model.config._attn_implementation = "of_a_test"
    yield InARow(model)
    del AttentionInterface._global_mapping["of_a_test"]


def test_an_attention_function_of_somebody_else_gets_the_module(attended: InARow, device: str) -> None:
    """Compiled, its layers go one by one: what stands in for the module while it is traced is none."""
    x = torch.randn(2, 5, 32, device=device)
    want = attended(x)
    targets = graphs_of(attended, x)
    assert sum("lora_kernels.forward" in target for target in targets) == 3
    torch._dynamo.reset()
    assert_same(want, torch.compile(attended, backend="aot_eager", fullgraph=True)(x), 1e-5)
    assert attended.attention.seen == (32, 32)


def test_what_stands_in_for_a_block_is_like_it(device: str) -> None:
    block = decoder(grouped(adapted(device=device))).self_attn
    stand_in = StandIn(block, peft_blocks.SHARING, Scope([], lambda *_: None))
    stand_in.seen = 3
    assert block.seen == stand_in.seen == 3
    assert stand_in.q_proj.weight is block.q_proj.weight
    assert stand_in.o_proj is block.o_proj
    with pytest.raises(AttributeError, match="nothing_like_it"):
        stand_in.nothing_like_it  # noqa: B018


def test_graph_breaks_between_the_calls(device: str) -> None:
    models, counter = attentions(device), CompileCounterWithBackend("aot_eager")
    for model in models:
        model.between = broken
    compare(models, device)
    models[1].forward = torch.compile(models[1].forward, backend=counter)
    for rows in (5, 5, 5):
        x = torch.randn(rows, 8, device=device)
        assert_same(models[0](x), models[1](x), 1e-5)
    compiled = counter.frame_count
    for _ in range(5):
        models[1](torch.randn(5, 8, device=device))
    assert counter.frame_count == compiled, "a call compiles again"


def broken(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x


def test_compiled_layers_in_a_block_that_is_not(device: str) -> None:
    models, counter = attentions(device), CompileCounterWithBackend("aot_eager")
    models[1].k_proj.compile(backend=counter, fullgraph=True)
    for _ in range(4):
        compare(models, device)
    assert counter.frame_count == 1


def test_compiled_model(device: str) -> None:
    stock = adapted(device=device)
    expected = gradients(stock, "llama", device)
    fused = grouped(stock)
    for block in blocks(fused).values():
        block.compile(backend="aot_eager", fullgraph=True)
    assert_same(expected, gradients(fused, "llama", device), 1e-4)


Plant = Callable[[pytest.MonkeyPatch], None]


def test_a_thread_s_first_scope_is_no_reason_to_compile_again() -> None:
    """What a thread had not opened before was not there to be guarded, and was there when the graph ran again."""
    torch.compiler.reset()
    _, model = stock_and_fused()
    compiled = torch.compile(model, backend="eager")
    outputs: list[Tensor | BaseException] = []

    def twice() -> None:
        try:
            for _ in range(2):
                with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
                    outputs.append(output(compiled, "llama", "cpu"))
        except RuntimeError as error:
            outputs.append(error)

    thread = threading.Thread(target=twice)
    thread.start()
    thread.join()
    first, second = outputs
    assert isinstance(first, Tensor)
    assert isinstance(second, Tensor), second
    assert torch.equal(first, second)
