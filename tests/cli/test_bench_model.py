"""`bench --model` on a tiny model: the providers share weights, start alike, and are checked against stock PEFT."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from lora_kernels.cli.bench import command, models, options
from lora_kernels.cli.bench.models import MODEL_PROVIDERS, ModelProvider, Trained, build
from lora_kernels.cli.bench.providers import Missing, WrongAnswer
from lora_kernels.cli.bench.results import RESULTS_FILE, Setting, read_results
from lora_kernels.cli.bench.shapes import TINY
from lora_kernels.cli.bench.training import BATCHES, Training
from lora_kernels.cli.bench.turns import check
from lora_kernels.cli.main import main

CPU = torch.device("cpu")
SETTING = Setting("tiny", 2, 2, batch=2, seq=16, rank=4, quantize=None, checkpointing=True)
RUN = ["bench", "--device", "cpu", "--model", "tiny", "--seq", "16", "--steps", "3", "--no-plots"]


def _base(quantize: str | None = None) -> Any:
    return build(TINY, 2, 16, quantize, CPU, range(2))


def test_the_model_has_the_shape() -> None:
    base = _base()
    assert base.config.num_hidden_layers == len(base.model.layers) == 2
    for layer in base.model.layers:
        linears = {n.rpartition(".")[2]: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
        assert {name: (m.in_features, m.out_features) for name, m in linears.items()} == TINY.projections
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in base.parameters())
    assert torch.get_default_dtype() == torch.float32


def test_4_bit_weights_are_those_of_the_dense_model() -> None:
    """In a process of its own: bitsandbytes keeps the tables that it makes first."""
    pytest.importorskip("bitsandbytes")
    script = """
import torch
from lora_kernels import NF4Weight
from lora_kernels.cli.bench.models import build
from lora_kernels.cli.bench.shapes import TINY

dense, small = (build(TINY, 1, 16, quantize, torch.device("cpu"), range(1)) for quantize in (None, "nf4"))
assert torch.get_default_dtype() == torch.float32
for name in TINY.projections:
    path = ("self_attn." if hasattr(dense.model.layers[0].self_attn, name) else "mlp.") + name
    weight = dense.model.layers[0].get_submodule(path).weight
    stored = small.model.layers[0].get_submodule(path).weight
    assert stored.quant_state.code.dtype == torch.float32
    assert torch.equal(NF4Weight.from_bitsandbytes(stored).packed, NF4Weight.quantize(weight).packed), name
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_frozen_weights_are_shared_and_adapters_are_alike() -> None:
    base = _base()
    peft, eager = (Trained(MODEL_PROVIDERS[name], base, 4, True) for name in ("peft", "eager"))
    base_weights = {p.data_ptr() for p in base.parameters()}
    for trained in (peft, eager):
        assert {p.data_ptr() for p in trained.model.parameters() if not p.requires_grad} == base_weights
        assert len(trained.adapters) == 2 * 2 * 7
        assert all(bool(adapter.any()) for adapter in trained.adapters.values())
    for name, adapter in peft.adapters.items():
        assert adapter is not eager.adapters[name]
        torch.testing.assert_close(adapter, eager.adapters[name], rtol=0, atol=0)


def test_only_the_named_backend_runs_also_where_it_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kernels.backends import eager

    calls: list[str] = []
    for name, functions in (("layer", eager.BACKEND), ("group", eager.BACKEND.group)):
        record = vars(functions)["forward"]

        def counted(*arguments: Any, name: str = name, record: Any = record, **keywords: Any) -> Any:
            calls.append(name)
            return record(*arguments, **keywords)

        monkeypatch.setitem(vars(functions), "forward", counted)
    trained = Trained(MODEL_PROVIDERS["eager"], _base(), 4, checkpointing=True)
    trained.loss(torch.zeros(2, 16, dtype=torch.int64))
    # In each of two blocks: the forward, and once more in the backward. q, k and v are a group, and so are gate and up.
    assert calls.count("group") == 2 * (2 + 2)
    # o and down; the recomputation ends before down, whose output nobody needs again.
    assert calls.count("layer") == 2 * (2 + 1)


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*RUN, "--layers", "1", "--providers", "peft", "peft-float32", "eager", "--out", str(tmp_path)]
    assert main(argv) == 0
    found = {m.provider: m for m in read_results(tmp_path / RESULTS_FILE).models}
    assert set(found) == {"frozen", "peft", "peft-float32", "eager"}
    for name, m in found.items():
        assert m.reason is None
        assert m.tokens_per_second is not None
        assert m.tokens_per_second > 0
        assert len(m.losses) == 3
        assert (m.gradient_error is None) == (name == "frozen")
    assert found["peft"].gradient_error == 0
    assert 0 < (found["eager"].gradient_error or 0) < 0.1
    for ours, theirs in zip(found["eager"].losses, found["peft"].losses, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)
    assert "REDUCED to 1 of 2 layers" in capsys.readouterr().out


def test_with_dropout_gradients_are_checked_without_and_steps_are_timed_with_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chances: list[float] = []
    loss = Trained.loss

    def watched(self: Trained, tokens: torch.Tensor) -> torch.Tensor:
        chances.extend({m.p for m in self.model.modules() if isinstance(m, torch.nn.Dropout)})
        return loss(self, tokens)

    monkeypatch.setattr(Trained, "loss", watched)
    argv = [*RUN, "--layers", "1", "--providers", "peft", "eager", "--dropout", "0.25", "--out", str(tmp_path)]
    assert main(argv) == 0
    # Checked: the reference, PEFT and eager. Two steps of each warm up, three are measured.
    assert chances.count(0.0) == 3
    assert chances.count(0.25) == 2 * (2 + 3)
    found = {m.provider: m for m in read_results(tmp_path / RESULTS_FILE).models}
    assert {m.dropout for m in found.values()} == {0.25}
    # Far closer than with masks of their own.
    assert 0 < (found["eager"].gradient_error or 0) < 0.1
    assert found["eager"].losses != found["peft"].losses
    assert "rank 16, dropout 0.25" in capsys.readouterr().out


def test_the_same_batches_come_again_and_the_loss_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    steps = Trained.step

    def step(self: Trained, tokens: torch.Tensor) -> torch.Tensor:
        if self.provider.backend == "eager":
            seen.append(tokens)
        return steps(self, tokens)

    monkeypatch.setattr(Trained, "step", step)
    training = Training(SETTING, _base(), TINY.vocabulary)
    for name in ("peft", "eager"):
        training.prepare(name)
    list(training.rounds(12 * BATCHES))
    assert len(seen) > 12 * BATCHES
    for index, tokens in enumerate(seen):
        assert torch.equal(tokens, seen[index % BATCHES])
    assert len({tuple(tokens.flatten().tolist()) for tokens in seen}) == BATCHES
    for m in training.measurements():
        first, last = m.losses[:BATCHES], m.losses[-BATCHES:]
        assert all(after < before - 0.03 for before, after in zip(first, last, strict=True)), m.losses


def test_what_rounding_does_to_each_is_measured_against_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*RUN, "--providers", "peft", "peft-exact", "eager", "--out", str(tmp_path)]
    assert main(argv) == 0
    found = {m.provider: m for m in read_results(tmp_path / RESULTS_FILE).models}
    assert found["peft-exact"].gradient_error == 0
    peft, ours = found["peft"].gradient_error, found["eager"].gradient_error
    assert peft is not None
    assert ours is not None
    # Both are bfloat16's distance from it, and ours is no greater than stock PEFT's but for chance.
    assert 1e-3 < peft < 0.1
    assert 1e-3 < ours < 1.5 * peft
    assert "from float32" in capsys.readouterr().out


def test_no_float32_copy_of_a_quantized_model() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(Missing, match="the weights are quantized"):
        Trained(MODEL_PROVIDERS["peft-exact"], _base("nf4"), 4, True)


def test_who_was_left_out_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = {name: MODEL_PROVIDERS[name] for name in ("frozen", "peft", "peft-compile", "peft-exact")}
    monkeypatch.setattr(options, "MODEL_PROVIDERS", few)
    assert main([*RUN, "--layers", "1", "--steps", "1", "--out", str(tmp_path)]) == 0
    compiled = {"frozen-compile", "peft-compile", "triton-compile"}
    assert set(read_results(tmp_path / RESULTS_FILE).left_out) == compiled | {"peft-exact", "auto"}
    [line] = [line for line in capsys.readouterr().out.splitlines() if "peft-compile" in line]
    assert "a whole model takes minutes to compile: name it after --providers to have it" in line


def test_nf4(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    argv = [*RUN, "--quantize", "nf4", "--providers", "peft", "eager", "--out", str(tmp_path)]
    assert main(argv) == 0
    found = {m.provider: m for m in read_results(tmp_path / RESULTS_FILE).models}
    assert found["peft"].times is not None
    assert (found["eager"].times is None) == (found["eager"].reason is not None)


def test_only_one_layer_is_ever_held_in_16_bits() -> None:
    pytest.importorskip("bitsandbytes")
    base = _base("nf4")
    kinds = {type(m).__name__ for layer in base.model.layers for m in layer.modules() if hasattr(m, "in_features")}
    assert kinds == {"Linear4bit"}
    assert all(p.dtype == torch.uint8 for layer in base.model.layers for p in layer.parameters() if p.dim() == 2)


def test_a_wrong_gradient_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(SETTING, _base(), TINY.vocabulary)
    gradients = Training._answers

    def spoiled(self: Training, trained: Trained) -> dict[str, torch.Tensor]:
        found = gradients(self, trained)
        if trained.provider.backend == "eager":
            next(iter(found.values())).mul_(2.0)
        return found

    monkeypatch.setattr(Training, "_answers", spoiled)
    for name in ("peft", "eager"):
        training.prepare(name)
    assert list(training.rounds(2)) == [0, 1]
    peft, eager = training.measurements()
    assert peft.times is not None
    assert eager.times is None
    assert "wrong answer: the gradient of" in str(eager.reason)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_wrong_scaling_gets_no_time(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = models._with_adapters

    def spoiled(model: Any, rank: int, provider: ModelProvider, dropout: float) -> Any:
        found = adapted(model, rank, provider, dropout)
        for module in found.modules() if provider.backend else ():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] *= factor
        return found

    monkeypatch.setattr(models, "_with_adapters", spoiled)
    training = Training(SETTING, _base(), TINY.vocabulary)
    for name in ("peft", "eager"):
        training.prepare(name)
    assert training.entries["peft"].reason is None
    assert "wrong answer: the gradient of" in str(training.entries["eager"].reason)


def test_nan_is_a_wrong_gradient() -> None:
    found = {"a": torch.ones(2), "b": torch.full((2,), float("nan"))}
    with pytest.raises(WrongAnswer, match="wrong answer: the gradient of b is off by nan"):
        check(found, {"a": torch.ones(2), "b": torch.ones(2)}, "the gradient of")


def test_layers_that_are_not_fused_are_no_figure_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", "0")
    with pytest.raises(Missing, match="14 of 14 layers are not fused: LORA_KERNELS=0 in the environment"):
        Trained(MODEL_PROVIDERS["eager"], _base(), 4, True)


def test_what_fails_while_it_is_built_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(model: Any, rank: int, provider: ModelProvider, dropout: float) -> Any:
        if provider.backend:
            raise torch.OutOfMemoryError("out of memory\nTried to allocate")
        return adapted(model, rank, provider, dropout)

    adapted = models._with_adapters
    monkeypatch.setattr(models, "_with_adapters", out_of_memory)
    training = Training(SETTING, _base(), TINY.vocabulary)
    for name in ("peft", "eager", "cuda"):
        training.prepare(name)
    list(training.rounds(1))
    peft, eager, _ = training.measurements()
    assert peft.times is not None
    assert eager.reason == "OutOfMemoryError: out of memory"


def test_interrupt_leaves_the_rounds_that_were_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Trained.step

    def interrupted(self: Trained, tokens: torch.Tensor) -> torch.Tensor:
        taken.append(self)
        # Two providers take two steps each to get ready and two each in the first two rounds.
        if len(taken) > 2 * 2 + 2 * 2:
            raise KeyboardInterrupt
        return steps(self, tokens)

    taken: list[Trained] = []
    monkeypatch.setattr(Trained, "step", interrupted)
    assert main([*RUN, "--providers", "peft", "--out", str(tmp_path)]) == command.EXIT_INTERRUPTED
    found = read_results(tmp_path / RESULTS_FILE)
    assert found.interrupted
    assert [(m.provider, m.times and m.times.samples) for m in found.models] == [("frozen", 2), ("peft", 2)]
