"""`bench --model --generate`: the tokens of providers whose logits are, but for rounding, those of stock PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from lora_kernels.cli.bench import generation, models
from lora_kernels.cli.bench.generation import Generation
from lora_kernels.cli.bench.models import MODEL_PROVIDERS, Trained, build
from lora_kernels.cli.bench.results import RESULTS_FILE, Setting, read_results
from lora_kernels.cli.bench.shapes import TINY
from lora_kernels.cli.main import main

SETTING = Setting("tiny", 2, 2, batch=3, seq=16, rank=4, quantize=None, checkpointing=False, generate=5)
RUN = ["bench", "--device", "cpu", "--model", "tiny", "--no-plots", "--steps", "2", "--generate", "3"]


def _base() -> Any:
    return build(TINY, 2, 16, None, torch.device("cpu"), range(2))


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*RUN, "--batch", "2", "--seq", "8", "--providers", "peft", "peft-float32", "eager", "--out", str(tmp_path)]
    assert main(argv) == 0
    found = {m.provider: m for m in read_results(tmp_path / RESULTS_FILE).models}
    assert set(found) == {"frozen", "peft", "peft-float32", "eager"}
    for name, m in found.items():
        assert m.reason is None
        assert (m.batch, m.seq, m.generate, m.losses) == (2, 8, 3, ())
        assert m.times is not None
        assert m.tokens_per_second == pytest.approx(2e6 / m.times.median)
        assert (m.logits_error is None) == (name == "frozen")
        assert m.gradient_error is None
    assert found["peft"].logits_error == 0
    assert 0 < (found["eager"].logits_error or 0) < 0.1
    shown = capsys.readouterr().out
    assert "tiny: 3 tokens behind 2 x 8, rank 16, bfloat16\n" in shown
    assert "logits" in shown
    assert "checkpointing" not in shown


def test_ours_has_the_logits_of_peft_and_not_those_without_adapters() -> None:
    base, prompts = _base(), torch.randint(TINY.vocabulary, (3, 16), generator=torch.Generator().manual_seed(0))
    logits = {}
    for name in ("frozen", "peft", "eager"):
        trained = Trained(MODEL_PROVIDERS[name], base, 4, checkpointing=False)
        trained.model.eval()
        logits[name] = trained.logits(prompts).float()
        assert logits[name].shape == (3, 1, TINY.vocabulary)
        generated = trained.generate(prompts, 6)
        assert generated.shape == (3, 22)
        assert torch.equal(generated[:, :16], prompts)
    error = {name: float((t - logits["peft"]).norm() / logits["peft"].norm()) for name, t in logits.items()}
    assert error["eager"] < 0.02 < error["frozen"]


def test_a_token_takes_what_more_of_them_take_over_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    now, prompts = 0.0, []

    def generate(self: Trained, given: torch.Tensor, count: int) -> torch.Tensor:
        nonlocal now
        # A prompt of 0.7 s, and 0.02 s for each token.
        now += 0.7 + 0.02 * count
        prompts.append(given)
        return given

    monkeypatch.setattr(Trained, "generate", generate)
    monkeypatch.setattr(generation, "synchronized", lambda device: now)
    turns = Generation(SETTING, _base(), TINY.vocabulary)
    turns.prepare("peft")
    turns.prepare("eager")
    before = len(prompts)
    assert list(turns.rounds(4)) == [0, 1, 2, 3]
    for m in turns.measurements():
        assert m.times is not None
        assert m.times.median == pytest.approx(0.02e6)
        assert m.tokens_per_second == pytest.approx(3 / 0.02)
    # Two calls of each provider in a round, all with the same prompts, which are others in the next one.
    measured = prompts[before:]
    assert len(measured) == 4 * 4
    assert all(torch.equal(measured[0], other) for other in measured[:4])
    assert not torch.equal(measured[0], measured[4])


def test_wrong_logits_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = models._with_adapters

    def spoiled(model: Any, rank: int, provider: Any, dropout: float) -> Any:
        found = adapted(model, rank, provider, dropout)
        for module in found.modules() if provider.backend else ():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] *= 3.0
        return found

    monkeypatch.setattr(models, "_with_adapters", spoiled)
    turns = Generation(replace(SETTING, batch=1), _base(), TINY.vocabulary)
    for name in ("peft", "eager"):
        turns.prepare(name)
    assert turns.entries["peft"].reason is None
    assert "wrong answer: the logits of" in str(turns.entries["eager"].reason)


def test_a_compiled_model_does_not_generate() -> None:
    turns = Generation(SETTING, _base(), TINY.vocabulary)
    turns.prepare("peft-compile")
    assert "that are not compiled" in str(turns.entries["peft-compile"].reason)


@pytest.mark.parametrize(("option", "value"), [("--dropout", ["0.1"]), ("--no-checkpointing", [])])
def test_what_is_for_training_is_refused(option: str, value: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, option, *value]) == 2
    reason = f"{option} does not go with --generate: it is for training"
    assert capsys.readouterr().err == f"lora_kernels: error: {reason}\n"


def test_it_goes_with_whole_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cpu", "--shapes", "8x8x8", "--generate", "3"]) == 2
    assert capsys.readouterr().err == "lora_kernels: error: --generate goes with --model\n"
