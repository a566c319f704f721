"""Tests of the PEFT integration. Without PEFT there is nothing to test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


@pytest.fixture(scope="session")
def _extension() -> Any:
    from launch_path import built

    extension = built()
    extension.use_modules(nn.Linear, nn.ModuleDict, nn.Dropout, nn.Identity)
    return extension


@pytest.fixture(autouse=True)
def read_in_cpp(_extension: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that C++ read, as with the launch path: whatever a test does to a layer, Python must read the same."""
    from lora_kernels import native
    from lora_kernels.integrations import peft_layer

    read, plain = peft_layer._read_in_cpp, []

    def both(layer: Any, x: Tensor) -> peft_layer.Operands | None:
        found = read(layer, x)
        if found is not None:
            expected = peft_layer._read(layer, x)
            assert isinstance(expected, peft_layer.Operands), expected
            for one, other in zip(_flat(found), _flat(expected), strict=True):
                assert one is other or (type(one) is type(other) is not Tensor and one == other)
            plain.append(layer)
        return found

    monkeypatch.setattr(native, "operands", _extension.operands)
    monkeypatch.setattr(peft_layer, "_read_in_cpp", both)
    return plain


def _flat(operands: Any) -> list[Any]:
    weight, bias, adapters, product = operands
    return [weight, bias, product, *(part for adapter in adapters for part in adapter)]


@pytest.fixture(autouse=True)
def _no_scope_is_left_open() -> Iterator[None]:
    from lora_kernels.integrations import peft_scope

    yield
    assert getattr(peft_scope._open, "scope", None) is None
