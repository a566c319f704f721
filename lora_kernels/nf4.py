"""NF4Weight: a frozen weight of 4 bits an element, as bitsandbytes stores it, to the bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lora_kernels import nf4_codec as codec
from lora_kernels import nf4_state
from lora_kernels.limits import BASE_DTYPES
from lora_kernels.nf4_codec import BLOCK_SIZES, Form


@dataclass(eq=False)
class NF4Weight:
    """A [N, K] weight in blocks of 4-bit codes with a scale each, which lora_linear takes like a dense one.

        w = round(code_table[code] * absmax)                         one float32 product, rounded once to a dtype
        absmax = round(round(nested_map[q] * nested_absmax) + offset)    with double quantization

    Blocks run over the flattened weight, not over rows: K need not be a multiple of the block size.

    packed: uint8 [(N K + 1) // 2]; the high nibble of a byte is the lower, even index.
    absmax: float32 [blocks], or uint8 [blocks], the q of the equation, with double quantization.
    nested_absmax: float32 [ceil(blocks / 256)]. nested_map: float32 [256]. offset: float32 [1]. None without.
    dtype: of the weight that was quantized, and what dequantize decodes to unless told otherwise.

    Make one by quantize, from_state_dict or from_bitsandbytes, which check what they are given.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_map: Tensor | None
    offset: Tensor | None
    block_size: int
    shape: torch.Size
    dtype: torch.dtype

    # It is never trained. What asks a weight whether it requires grad need not know that this is no tensor.
    requires_grad: ClassVar[bool] = False

    @classmethod
    def quantize(cls, w: Tensor, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
        """Rounds every w / absmax of its block to the nearest of 16 values; a tie takes the lower one.

        Beside the result, it takes tens of megabytes, however large the weight.

        Args:
            w: [N, K] in bfloat16, float16 or float32, on any device, with any strides.
            block_size: elements that share a scale: 32, 64, 128, 256, 512, 1024, 2048 or 4096.
            double_quant: store the scales in 8 bits: 4.127 bits an element in blocks of 64, and 4.5 without.
        Raises:
            TypeError: w is no tensor, or has another dtype.
            ValueError: w has no elements, is not two-dimensional or not finite; or the block size is another.
        """
        if not isinstance(w, Tensor):
            raise TypeError(f"w was a {type(w).__name__}, but must be a tensor")
        if w.dtype not in BASE_DTYPES:
            raise TypeError(f"w was {w.dtype}, but must be one of {', '.join(map(str, BASE_DTYPES))}")
        if w.dim() != 2 or w.numel() == 0:
            raise ValueError(f"w had shape {list(w.shape)}, but must be [N, K] with at least one element")
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size was {block_size}, but must be one of {', '.join(map(str, BLOCK_SIZES))}")
        packed, absmax = codec.encode(w.detach(), block_size)
        if not w.is_meta and not bool(torch.isfinite(absmax).all()):
            raise ValueError("w had a NaN or an infinity, which NF4 cannot hold, but must be finite")
        if not double_quant:
            return cls(packed, absmax, None, None, None, block_size, w.shape, w.dtype)
        codes, nested_absmax, offset = codec.encode_scales(absmax)
        if not w.is_meta and not bool(torch.isfinite(offset)):
            raise ValueError(
                "w had values so large that the mean of its scales overflows, for which double_quant must be False"
            )
        # A copy of its own: what somebody writes into it changes no other weight.
        nested_map = codec.nested_map(w.device).clone()
        return cls(packed, codes, nested_absmax, nested_map, offset, block_size, w.shape, w.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in `dtype`, or in the dtype that it was quantized from: [N, K], a new tensor."""
        out = torch.empty(self.shape, dtype=dtype or self.dtype, device=self.device)
        codec.decode(self.packed, self.scales(), self.block_size, out.view(-1))
        return out

    def scales(self) -> Tensor:
        """The scale of each block: float32 [blocks]."""
        if self.nested_absmax is None:
            return self.absmax
        assert self.nested_map is not None and self.offset is not None
        return codec.decode_scales(self.absmax, self.nested_absmax, self.nested_map, self.offset)

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def double_quant(self) -> bool:
        """Whether the scales are stored in 8 bits."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """What all of its tensors take."""
        return sum(t.nbytes for t in self.tensors())

    def dim(self) -> int:
        return len(self.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        """packed, absmax and, with double quantization, nested_absmax, nested_map and offset."""
        if self.nested_absmax is None:
            return self.packed, self.absmax
        assert self.nested_map is not None and self.offset is not None
        return self.packed, self.absmax, self.nested_absmax, self.nested_map, self.offset

    @property
    def form(self) -> Form:
        """What `of` needs to know besides the tensors."""
        return self.block_size, self.shape, self.dtype

    @staticmethod
    def of(tensors: Sequence[Tensor], form: Form) -> NF4Weight:
        """The weight of these tensors, in the order of `tensors()`. Checks nothing."""
        packed, absmax, *nested = tensors
        nested_absmax, nested_map, offset = nested or (None, None, None)
        return NF4Weight(packed, absmax, nested_absmax, nested_map, offset, *form)

    def to(self, device: torch.device | str | int) -> NF4Weight:
        """The weight on `device`; itself where it is there already."""
        moved = tuple(t.to(device) for t in self.tensors())
        return self if moved[0] is self.packed else self.of(moved, self.form)

    def state_dict(self, prefix: str = "weight") -> dict[str, Tensor]:
        """The weight under the keys that bitsandbytes writes for a parameter called `prefix`.

        Tensors are shared, not copied.
        """
        return nf4_state.dump(self.tensors(), self.form, prefix)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], prefix: str = "weight", device: torch.device | str | None = None
    ) -> NF4Weight:
        """The weight of a state_dict of bitsandbytes or of this class, without quantizing anything again.

        Tensors are shared where they are on `device` already; None leaves them where the packed codes are.

        Raises:
            ValueError: a key is missing, unknown, or does not hold what the others say; it is named.
        """
        return cls.of(*nf4_state.load(state, prefix, device))

    @classmethod
    def from_bitsandbytes(cls, params: Any, quant_state: Any = None) -> NF4Weight:
        """The weight of a bitsandbytes Params4bit. Shares its storage.

        Args:
            params: the parameter; its packed codes may be stored as uint8, bfloat16, float16 or float32.
            quant_state: None takes the parameter's own.
        Raises:
            ValueError: it is not quantized (or lost its quant_state), not NF4, or not in the layout of a checkpoint.
        """
        return cls.of(*nf4_state.from_bitsandbytes(params, quant_state))

    def __repr__(self) -> str:
        return (
            f"NF4Weight(shape={list(self.shape)}, block_size={self.block_size}, double_quant={self.double_quant}, "
            f"dtype={self.dtype}, device='{self.device}')"
        )
