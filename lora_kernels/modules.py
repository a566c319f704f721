"""LoRALinear: the parameters around lora_linear, their initialisation, and merging."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.functional import lora_linear


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank adapter.

        y = x W^T + scaling * (D(x) A^T) B^T + b        scaling = alpha / r, or alpha / sqrt(r) with use_rslora

    lora_A starts as torch.nn.Linear's weights do and lora_B as zeros, so the layer starts as the frozen one.

    Args:
        in_features, out_features: K and N; the frozen weight is [N, K].
        r: the rank, from 1 to 512.
        alpha: numerator of the scaling.
        dropout: probability of a zero in the adapter's input while training.
        bias: whether there is a (frozen) bias.
        use_rslora: divide alpha by sqrt(r).
        device, dtype: of the frozen weight and bias.
        adapter_dtype: of lora_A and lora_B: `dtype` (also where None) or float32.
    Raises:
        ValueError: the rank or the dropout probability is out of range.

    Sources: Hu et al., "LoRA", ICLR 2022; Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning
    with LoRA", 2023.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        alpha: float = 8,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= r <= 512:
            raise ValueError(f"r was {r}, but must be from 1 to 512")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout was {dropout}, but must be from 0 to 1")
        self.in_features, self.out_features = in_features, out_features
        self.r, self.alpha, self.dropout, self.use_rslora = r, alpha, dropout, use_rslora
        self.scaling: float = alpha / (math.sqrt(r) if use_rslora else r)
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        frozen_bias = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if frozen_bias is None else nn.Parameter(frozen_bias, requires_grad=False)
        adapter_dtype = adapter_dtype or weight.dtype
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device, dtype=adapter_dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, device=device, dtype=adapter_dtype))
        # The weight as it was before a merge: subtracting what was added would not give its bits back.
        self._unmerged: Tensor | None = None
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int = 8,
        alpha: float = 8,
        *,
        dropout: float = 0.0,
        use_rslora: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """The layer with `linear`'s own weight and bias (shared, not copied, and frozen) and a fresh adapter.

        Args:
            linear: the layer to adapt; its parameters stop requiring gradients.
            r, alpha, dropout, use_rslora, adapter_dtype: as for LoRALinear.
        Raises:
            TypeError: `linear` is not a torch.nn.Linear.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear was a {type(linear).__name__}, but must be a torch.nn.Linear")
        weight, bias = linear.weight, linear.bias
        layer = cls(
            linear.in_features,
            linear.out_features,
            r,
            alpha,
            dropout=dropout,
            bias=bias is not None,
            use_rslora=use_rslora,
            device="meta",
            dtype=weight.dtype,
            adapter_dtype=adapter_dtype,
        )
        layer.weight = weight.requires_grad_(False)
        layer.bias = None if bias is None else bias.requires_grad_(False)
        for name in ("lora_A", "lora_B"):
            adapter = getattr(layer, name)
            setattr(layer, name, nn.Parameter(torch.empty_like(adapter, device=weight.device)))
        layer._reset_adapter()
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Draws weight and bias as torch.nn.Linear does, and the adapter as LoRA starts."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self._reset_adapter()

    def _reset_adapter(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return nn.functional.linear(x, self.weight, self.bias)
        return lora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            scaling=self.scaling,
            bias=self.bias,
            dropout_p=self.dropout,
            training=self.training,
        )

    @property
    def merged(self) -> bool:
        """Whether the weight holds the adapter's product."""
        return self._unmerged is not None

    def delta_weight(self) -> Tensor:
        """scaling * B A: [N, K] in float32, what a merge adds to the weight."""
        return self.scaling * (self.lora_B.detach().float() @ self.lora_A.detach().float())

    def merge(self, safe: bool = False) -> None:
        """W <- W + scaling * B A, after which the layer costs what a plain linear does. Merging twice is once.

        Args:
            safe: look at the merged weight first, and leave the layer as it was if it is not finite.
        Raises:
            ValueError: `safe`, and the merged weight has a NaN or an infinity.
        """
        if self.merged:
            return
        merged = (self.weight.detach().float() + self.delta_weight()).to(self.weight.dtype)
        if safe and not bool(torch.isfinite(merged).all()):
            raise ValueError("lora_A, lora_B had values that make the merged weight NaN or infinite; nothing was merged")
        self._unmerged = self.weight.detach().clone()
        self.weight.data.copy_(merged)

    def unmerge(self) -> None:
        """Puts the weight's own bits back."""
        if self._unmerged is not None:
            self.weight.data.copy_(self._unmerged)
            self._unmerged = None

    def _apply(self, fn: Any, recurse: bool = True) -> LoRALinear:
        super()._apply(fn, recurse)
        if self._unmerged is not None:
            self._unmerged = fn(self._unmerged)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, alpha={self.alpha}, "
            f"dropout={self.dropout}, bias={self.bias is not None}, merged={self.merged}"
        )
