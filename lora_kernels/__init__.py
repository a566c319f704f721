"""Fused LoRA linear layers for PyTorch: a LoRA linear at the price of a frozen one.

Importing this package touches no GPU, compiles nothing and imports neither Triton nor PEFT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lora_kernels.dispatch import use_backend
from lora_kernels.functional import explain, lora_linear
from lora_kernels.gated_mlp import explain_gated_mlp, lora_gated_mlp
from lora_kernels.group import GroupMember, explain_group, lora_linear_group
from lora_kernels.modules import LoRALinear
from lora_kernels.nf4 import NF4Weight
from lora_kernels.reference import lora_linear_reference

if TYPE_CHECKING:
    from lora_kernels.integrations.peft import apply_lora_kernels, patch_peft, revert_lora_kernels

__version__ = "0.1.0"
__all__ = [
    "GroupMember",
    "LoRALinear",
    "NF4Weight",
    "apply_lora_kernels",
    "explain",
    "explain_gated_mlp",
    "explain_group",
    "lora_gated_mlp",
    "lora_linear",
    "lora_linear_group",
    "lora_linear_reference",
    "patch_peft",
    "revert_lora_kernels",
    "use_backend",
]

_PEFT_NAMES = {"apply_lora_kernels", "patch_peft", "revert_lora_kernels"}


def __getattr__(name: str) -> Any:
    # PEFT takes seconds to import and is optional: only its own names bring it in.
    if name in _PEFT_NAMES:
        from lora_kernels.integrations import peft

        return getattr(peft, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
