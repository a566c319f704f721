"""`finetune` on a tiny model, from the files it reads to the files it writes."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import gguf
import numpy
import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_kernels import apply_lora_kernels, native
from lora_kernels.cli.finetune import command, data, memory, report, training
from lora_kernels.cli.finetune.model import gguf_read_once
from lora_kernels.cli.finetune.training import Run
from lora_kernels.cli.main import main

SEQ = 32
# On a GPU the command computes in bfloat16, which has 8 bits, and other batches and kernels round other sums.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SAME_LOSS = 1e-2 if DEVICE == "cuda" else 1e-5
SAME_TRAINING = 1e-2 if DEVICE == "cuda" else 1e-3
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(tiny.TEXT)
    return path


def _options(model: Path, text: Path, out: Path, *more: object) -> list[str]:
    options = ["--model", model, "--data", text, "--out", out, "--seq", SEQ, "--batch", 4, "--lr", 0.02]
    return ["finetune", *map(str, [*options, *more])]


def _results(out: Path) -> Any:
    return json.loads((out / "results.json").read_text())


def _held_out_loss(model: Any, folder: Path) -> float:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = data.split(data.tokenize([tiny.TEXT], tokenizer), SEQ)
    rows = torch.stack([example["input_ids"] for example in corpus.held_out])
    rows = rows.to(DEVICE)
    with torch.no_grad(), _arithmetic():
        return float(model.to(DEVICE)(input_ids=rows, labels=rows).loss)


def _arithmetic() -> Any:
    """Autocast where the command trains under it."""
    return torch.autocast(DEVICE, DTYPE, enabled=DEVICE == "cuda")


def test_it_learns_and_stock_peft_serves_the_adapter(
    model_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    assert main(_options(model_dir, text, out, "--steps", 30)) == 0

    [run] = _results(out)["runs"]
    losses = [step["loss"] for step in run["steps"]]
    assert len(losses) == 30
    assert run["loss_after"] < 0.8 * run["loss_before"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    # More than an epoch, and no batch of another size.
    assert [step["tokens"] for step in run["steps"]] == [4 * SEQ] * 30
    assert run["tokens_per_second"] > 0
    assert run["peak_memory_bytes"] > 0
    assert set(run["layers"].values()) == {None}
    assert len(run["layers"]) == 2 * 7
    assert run["text_before"] != run["text_after"]
    assert (out / "loss.png").read_bytes().startswith(PNG_SIGNATURE)

    printed = capsys.readouterr().out
    for expected in (
        "fused LoRA layers    14 of 14",
        "backend              " + ("triton" if DEVICE == "cuda" else "eager (not triton: "),
        "30 of 30",
        f"{run['loss_after']:.4f}",
        "GiB",
        str(out),
    ):
        assert expected in printed

    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=DTYPE)
    assert _held_out_loss(base, model_dir) == pytest.approx(run["loss_before"], abs=SAME_LOSS)
    served = PeftModel.from_pretrained(base, out)
    assert {type(m).__module__ for m in served.modules() if hasattr(m, "lora_A")} == {
        "peft.tuners.lora.layer"
    }
    assert _held_out_loss(served, model_dir) == pytest.approx(run["loss_after"], abs=SAME_LOSS)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompt = tokenizer(run["prompt"], return_tensors="pt", return_token_type_ids=False).to(DEVICE)
    if DEVICE == "cuda":
        # The likeliest token may change where a sum is rounded otherwise.
        apply_lora_kernels(served)
    with _arithmetic():
        ids = served.generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    assert (
        tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        == run["text_after"]
    )


def test_compare_trains_the_same_thing_twice(
    model_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(_options(model_dir, text, out, "--steps", 8, "--dropout", 0, "--compare")) == 0
    ours, stock = _results(out)["runs"]
    assert (ours["name"], stock["name"]) == ("lora_kernels", "stock PEFT")
    assert set(ours["layers"].values()) == {None}
    assert stock["layers"] == {}
    assert stock["loss_before"] == pytest.approx(ours["loss_before"], abs=0 if DEVICE == "cpu" else SAME_LOSS)
    for one, other in zip(ours["steps"], stock["steps"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=SAME_TRAINING)
    assert stock["loss_after"] == pytest.approx(ours["loss_after"], rel=SAME_TRAINING)
    table = capsys.readouterr().out
    assert re.search(r"lora_kernels +stock PEFT +ratio", table)
    assert re.search(r"tokens per second +[\d,]+ +[\d,]+ +\d+\.\d{3}", table)
    assert (out / "loss.png").read_bytes().startswith(PNG_SIGNATURE)


def test_the_same_seed_gives_the_same_run(model_dir: Path, text: Path, tmp_path: Path) -> None:
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main(_options(model_dir, text, tmp_path / name, "--steps", 3, "--seed", seed)) == 0
        losses.append([step["loss"] for step in _results(tmp_path / name)["runs"][0]["steps"]])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_what_is_measured_runs_on_pefts_own_layers(
    model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So nothing is compiled for it, and the losses are those of whoever loads the adapter."""
    from lora_kernels.integrations import peft_layer

    fused: list[bool] = []
    forward = peft_layer.Linear.forward
    monkeypatch.setattr(
        peft_layer.Linear, "forward", lambda self, *x: (fused.append(self.training), forward(self, *x))[1]
    )
    assert main(_options(model_dir, text, tmp_path, "--steps", 2)) == 0
    assert fused
    assert all(fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_adapters_add_exactly_nothing(model_dir: Path, dtype: torch.dtype) -> None:
    """So what is measured before training may be measured without them."""
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")).to(DEVICE).eval()
    ids = torch.arange(100, device=DEVICE).view(2, 50)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(input_ids=ids).logits
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, logits)
    assert any(p.requires_grad for p in model.parameters())


def test_epochs_and_chats_and_chosen_targets(model_dir: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    lines = [{"messages": [{"role": "user", "content": line}]} for line in tiny.TEXT.splitlines()]
    chats.write_text("\n".join(map(json.dumps, [*lines, {"text": tiny.TEXT}])))
    out = tmp_path / "out"
    assert main(_options(model_dir, chats, out, "--epochs", 2, "--targets", "q_proj", "mlp.up_proj")) == 0
    [run] = _results(out)["runs"]
    tokenizer = tiny.make_tokenizer()
    corpus = data.split(data.tokenize(data.read_documents([chats]), tokenizer), SEQ)
    assert sum(step["tokens"] for step in run["steps"]) == 2 * len(corpus.train) * SEQ
    assert len(run["layers"]) == 2 * 2


def test_gguf(text: Path, tmp_path: Path) -> None:
    path = tiny.save_gguf(tmp_path / "tiny.gguf")
    assert main(_options(path, text, tmp_path / "out", "--steps", 2)) == 0
    [run] = _results(tmp_path / "out")["runs"]
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=DTYPE)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ids = tokenizer(tiny.TEXT, add_special_tokens=False)["input_ids"]
    assert ids == tiny.make_tokenizer()(tiny.TEXT)["input_ids"]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert run["loss_before"] == pytest.approx(_held_out_loss(expected, tmp_path / "tokenizer"), abs=SAME_LOSS)
    assert run["loss_after"] < run["loss_before"]


def test_a_gguf_file_is_read_once_and_as_gguf_reads_it(tmp_path: Path) -> None:
    path = tiny.save_gguf(tmp_path / "tiny.gguf")
    read, name = gguf.GGUFReader, gguf.get_tensor_name_map
    with gguf_read_once():
        reader, names = gguf.GGUFReader(path), gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.GGUFReader(path) is reader
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is names
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == (read, name)
    assert names.mapping == name(gguf.MODEL_ARCH.LLAMA, 2).mapping

    expected = read(path)
    assert list(reader.fields) == list(expected.fields)
    for field, other in zip(reader.fields.values(), expected.fields.values(), strict=True):
        assert (field.data, field.types) == (other.data, other.types)
        assert [part.tobytes() for part in field.parts] == [part.tobytes() for part in other.parts]
    assert len(reader.tensors) == len(expected.tensors)
    for tensor, other in zip(reader.tensors, expected.tensors, strict=True):
        assert (tensor.name, tensor.tensor_type) == (other.name, other.tensor_type)
        assert numpy.array_equal(tensor.data, other.data)
        # What is cut out of one takes four times as long.
        assert not isinstance(tensor.data, numpy.memmap)


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_collected_again_after_the_imports(collects: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    during: list[bool] = []
    monkeypatch.setattr(command, "quieten_libraries", lambda: during.append(gc.isenabled()))
    if not collects:
        gc.disable()
    try:
        command._import_libraries()
        assert (during, gc.isenabled()) == ([False], collects)
    finally:
        gc.enable()


@pytest.mark.filterwarnings("error:.*autograd kernel was not registered")
def test_nf4(model_dir: Path, text: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    options = _options(
        model_dir, text, tmp_path / "out", "--steps", 8, "--quantize", "nf4", "--dropout", 0, "--compare"
    )
    assert main(options) == 0
    ours, stock = _results(tmp_path / "out")["runs"]
    assert ours["loss_after"] < ours["loss_before"]
    assert set(ours["layers"].values()) == {None}
    assert len(ours["layers"]) == 2 * 7
    assert ours["loss_before"] == pytest.approx(stock["loss_before"], abs=1e-4 if DEVICE == "cpu" else SAME_LOSS)
    assert ours["loss_after"] == pytest.approx(stock["loss_after"], rel=SAME_TRAINING)


def test_the_language_reference_is_the_default_text() -> None:
    documents = data.read_documents([])
    assert sum(map(len, documents)) > 400_000


def test_held_out_sequences_are_spread_and_not_trained_on() -> None:
    corpus = data.split(range(100 * 8 + 3), 8)
    held_out = [int(example["input_ids"][0]) // 8 for example in corpus.held_out]
    train = [int(example["input_ids"][0]) // 8 for example in corpus.train]
    assert held_out == list(range(9, 100, 10))
    assert sorted(held_out + train) == list(range(100))


def _start(options: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "lora_kernels", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )


def _wait_for_step(process: "subprocess.Popen[str]") -> None:
    """Reads the progress bar until it shows a step that is done."""
    assert process.stderr is not None
    shown = ""
    while not re.search(r"\| [1-9]\d*/\d+ \[", shown):
        character = process.stderr.read(1)
        assert character, f"ended before its first step: {shown}"
        shown += character


def test_interrupt_saves_the_adapter(model_dir: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _start(_options(model_dir, text, out, "--steps", 1_000_000, "--compare"))
    _wait_for_step(process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    [run] = _results(out)["runs"]
    assert run["interrupted"]
    assert 1 <= len(run["steps"]) < 1_000_000
    assert f"{len(run['steps'])} of 1000000" in stdout
    assert "held-out loss after  not measured" in stdout
    served = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), out)
    assert any(bool(p.any()) for name, p in served.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_error_that_came_of_an_interrupt_is_one(
    interrupted: bool, model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        try:
            raise KeyboardInterrupt if interrupted else LookupError
        except BaseException:
            raise AssertionError("a library's clean-up") from None

    monkeypatch.setattr("lora_kernels.cli.finetune.training.execute", fail)
    if interrupted:
        assert main(_options(model_dir, text, tmp_path / "out")) == 130
    else:
        with pytest.raises(AssertionError, match="clean-up"):
            main(_options(model_dir, text, tmp_path / "out"))


def test_interrupt_before_training(model_dir: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = _start(_options(model_dir, text, out))
    assert process.stderr is not None
    # The last thing that is said before the weights are loaded.
    assert any("loading the weights" in line for line in process.stderr)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not (out / "adapter_model.safetensors").exists()
    assert "none: interrupted before the first step" in stdout


@pytest.mark.parametrize(("gpu", "compiled"), [(True, False), (True, True), (False, False)])
def test_the_summary_says_how_launches_get_faster(gpu: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(native, "why_not", lambda: None if compiled else native.NOT_COMPILED)
    advice = "`python -m lora_kernels build`"
    assert (advice in report.summary(Run("lora_kernels", {"q_proj": None}))) == (gpu and not compiled)
    assert advice not in report.summary(Run("stock PEFT"))


def test_a_disk_that_is_full_when_the_adapter_is_saved(
    model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was measured is printed all the same."""

    def save(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(PeftModel, "save_pretrained", save)
    assert main(_options(model_dir, text, tmp_path / "out", "--steps", 2)) == 2
    captured = capsys.readouterr()
    assert "the adapter cannot be written (I/O error: No space left on device (os error 28))" in captured.err
    assert re.search(r"held-out loss after +\d", captured.out)


def test_a_disk_without_room_for_the_adapter(
    model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 40, free=3 << 20))
    assert main(_options(model_dir, text, tmp_path / "out", "--rank", 512)) == 2
    assert "there is room for 3 MiB, and 4 MiB are needed" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["load_model", "_continue_text", "_train"])
def test_interrupt_before_a_step_leaves_earlier_results(
    where: str, model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    earlier = [out / name for name in ("results.json", "loss.png", "adapter_model.safetensors")]
    for path in earlier:
        path.write_text("{}")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, where, interrupted)
    assert main(_options(model_dir, text, out, "--steps", 2)) == 130
    assert [path.read_text() for path in earlier] == ["{}"] * 3


def test_interrupt_while_the_adapter_is_saved(
    model_dir: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PeftModel, "save_pretrained", interrupted)
    assert main(_options(model_dir, text, tmp_path / "out", "--steps", 2)) == 130
    assert "adapter      none: interrupted while it was saved" in capsys.readouterr().out


def test_damaged_weights_are_one_line(
    model_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(model_dir, damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert main(_options(damaged, text, tmp_path / "out", "--steps", 2)) == 2
    assert f"--model {damaged}: " in capsys.readouterr().err


def test_peak_memory_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name: python\n")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    memory.reset_peak(torch.device("cpu"))
    assert memory.peak_bytes(torch.device("cpu")) > 1 << 20
