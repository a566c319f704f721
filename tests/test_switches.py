"""Environment variables that switch a part off take 0 or 1, and nothing else goes by unnoticed."""

from __future__ import annotations

import pytest
from torch import nn

from lora_kernels.switches import is_on


def test_is_on_where_nobody_set_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_KERNELS", raising=False)
    assert is_on("LORA_KERNELS")
    for value, on in (("0", False), ("1", True)):
        monkeypatch.setenv("LORA_KERNELS", value)
        assert is_on("LORA_KERNELS") is on


@pytest.mark.parametrize("value", ["", "off", "false", "no", "00"])
def test_anything_else_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_KERNELS", value)
    with pytest.raises(ValueError, match=f"LORA_KERNELS in the environment was {value!r}, but must be 0 or 1"):
        is_on("LORA_KERNELS")


def test_both_lines_for_peft_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft", reason="PEFT is not installed")
    from lora_kernels.integrations.peft import apply_lora_kernels, patch_peft

    monkeypatch.setenv("LORA_KERNELS", "off")
    for line in (patch_peft, lambda: apply_lora_kernels(nn.Linear(2, 2))):
        with pytest.raises(ValueError, match="LORA_KERNELS in the environment was 'off', but must be 0 or 1"):
            line()
