"""Tests of the PEFT integration. Without PEFT there is nothing to test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("peft", reason="the PEFT integration needs peft")


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LORA_KERNELS", raising=False)
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
