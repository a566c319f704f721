"""Tests of the PEFT integration. Without PEFT there is nothing to test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("peft", reason="the PEFT integration needs peft")


DEVICES: list[Any] = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LORA_KERNELS", raising=False)
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Any:
    """How often layers ran together."""
    from group_models import Calls

    return Calls(monkeypatch)


@pytest.fixture(autouse=True)
def _no_scope_is_left_open() -> Iterator[None]:
    from lora_kernels.integrations import peft_scope

    yield
    assert getattr(peft_scope._open, "scope", None) is None
