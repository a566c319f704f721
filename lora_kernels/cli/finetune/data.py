"""Text for training: from files to sequences of token ids."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import torch

from lora_kernels.cli.errors import UserError


class Chat(NamedTuple):
    """The messages of a chat, and the file and line that they are from."""

    where: str
    messages: list[dict[str, str]]


Document = str | Chat

Example = dict[str, torch.Tensor]

# Enough sequences for a steady loss, few enough that measuring it is a small part of a short run.
HELD_OUT_SHARE = 10
HELD_OUT_MOST = 16

IGNORED_LABEL = -100

_REASON_LENGTH = 200
_JSONL_SUFFIXES = (".jsonl", ".json")

# A chat template is a program that comes with the model: besides jinja's, it raises what operations in it raise.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Corpus:
    """Sequences of equal length: those to train on, and those that only measure."""

    train: list[Example]
    held_out: list[Example]


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """Reads and checks all files; without any, the language reference that comes with Python.

    Raises UserError that names the file, and in JSON Lines the line, that cannot be used.
    """
    if not paths:
        return _language_reference()
    documents: list[Document] = []
    for path in paths:
        text = _read_text(path)
        documents += _parse_jsonl(path, text) if path.suffix.lower() in _JSONL_SUFFIXES else [text]
    return documents


def tokenize(documents: Iterable[Document], tokenizer: Any) -> list[int]:
    """All documents as one stream of token ids, each ended by the end-of-text token where there is one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in documents:
        if isinstance(document, str):
            ids += tokenizer(document, verbose=False)["input_ids"]
        else:
            # The template writes the special tokens itself, so that the tokenizer must not add them again.
            ids += tokenizer(_render_chat(document, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]
        ids += end
    return ids


def split(ids: Sequence[int], seq: int) -> Corpus:
    """Cuts the stream into sequences of `seq` tokens and holds out some of them, evenly spread."""
    count = len(ids) // seq
    if count < 2:
        raise UserError(
            f"the text is too short: {len(ids)} tokens, but --seq {seq} needs {2 * seq},"
            " one sequence to train on and one to hold out"
        )
    rows = torch.tensor(ids[: count * seq]).view(count, seq)
    held_out_count = min(HELD_OUT_MOST, max(1, count // HELD_OUT_SHARE))
    spacing = count // held_out_count
    held_out_rows = {(index + 1) * spacing - 1 for index in range(held_out_count)}
    labels = rows.clone()
    # Nothing predicts a first token. Older versions of Trainer would still count it when they take the mean.
    labels[:, 0] = IGNORED_LABEL
    examples = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    return Corpus(
        train=[example for index, example in enumerate(examples) if index not in held_out_rows],
        held_out=[examples[index] for index in sorted(held_out_rows)],
    )


def _render_chat(chat: Chat, tokenizer: Any) -> str:
    if tokenizer.chat_template is None:
        raise UserError(
            f'{chat.where}: the model has no chat template, so that it cannot take "messages": use "text"'
        )
    try:
        text: str = tokenizer.apply_chat_template(chat.messages, tokenize=False)
    except _TEMPLATE_ERRORS as error:
        # In one line, and not a long one: a template may well quote what it was given.
        why = " ".join(str(error).split())[:_REASON_LENGTH] or type(error).__name__
        raise UserError(f"{chat.where}: the model's chat template fails: {why}") from None
    return text


def _language_reference() -> list[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(f"this Python lacks its language reference ({error}): use --data") from None
    return [topics[name] for name in sorted(topics)]


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not text.strip():
        raise UserError(f"{path}: no text in it")
    return text


def _parse_jsonl(path: Path, text: str) -> list[Document]:
    return [
        _parse_line(f"{path}:{number}", line)
        # Not splitlines(), which also breaks at characters that JSON allows inside a string.
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def _parse_line(where: str, line: str) -> Document:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from None
    except ValueError:
        # Python reads no longer ones: it would take time that grows with the square of their length.
        raise UserError(f"{where}: has a whole number of too many digits") from None
    except RecursionError:
        raise UserError(f"{where}: is nested too deeply") from None
    if not isinstance(record, dict) or not record.keys() & {"text", "messages"}:
        raise UserError(f'{where}: must be an object with "text" or "messages"')
    if "text" in record:
        content = record["text"]
        if not isinstance(content, str) or not content.strip():
            raise UserError(f'{where}: "text" must be a string that is not empty')
        _require_unicode(where, content)
        return content
    messages = record["messages"]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise UserError(f'{where}: "messages" must be a list of objects with strings "role" and "content"')
    # Whatever else a message has, the template may read.
    _require_unicode(where, json.dumps(messages, ensure_ascii=False))
    return Chat(where, messages)


def _require_unicode(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"{where}: has {half}, one half of a surrogate pair, which is no character") from None


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
