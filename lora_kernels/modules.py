"""LoRALinear: the parameters around lora_linear, their initialisation, and merging."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels.autograd import outside_autocast
from lora_kernels.backends import BASE_DTYPES, MAX_RANK
from lora_kernels.functional import is_number, lora_linear


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank adapter.

        y = x W^T + scaling * (D(x) A^T) B^T + b     scaling = alpha / r, or alpha / sqrt(r) with use_rslora

    lora_A starts as torch.nn.Linear's weights do and lora_B as zeros, so the layer starts as the frozen one.

    A state_dict is that of the layer in training, merged or not: it holds the frozen weight without the
    adapter. Loading one into a merged layer unmerges it first.

    Args:
        in_features, out_features: K and N; the frozen weight is [N, K].
        r: the rank, from 1 to 512.
        alpha: numerator of the scaling.
        dropout: probability of a zero in the adapter's input while training.
        bias: whether there is a (frozen) bias.
        use_rslora: divide alpha by sqrt(r).
        device, dtype: of the frozen weight and bias; the dtype is bfloat16, float16 or float32.
        adapter_dtype: of lora_A and lora_B: `dtype` (also where None) or float32.
    Raises:
        ValueError: the rank or the dropout probability is out of range.
        TypeError: a dtype, the rank, alpha or the dropout probability is of the wrong kind.

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
        dtype = dtype or torch.get_default_dtype()
        adapter_dtype = adapter_dtype or dtype
        _check(r, alpha, dropout, dtype, adapter_dtype)
        self.in_features, self.out_features = in_features, out_features
        self.r, self.alpha, self.dropout, self.use_rslora = r, alpha, dropout, use_rslora
        self.scaling: float = alpha / (math.sqrt(r) if use_rslora else r)
        weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        frozen_bias = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if frozen_bias is None else nn.Parameter(frozen_bias, requires_grad=False)
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

        Sharing goes both ways: while this layer is merged, so is the weight of `linear`.

        Args:
            linear: the layer to adapt; its parameters stop requiring gradients.
            r, alpha, dropout, use_rslora, adapter_dtype: as for LoRALinear.
        Raises:
            TypeError: `linear` is not a torch.nn.Linear, or its weight is quantized, sharded or else not a
                plain matrix of bfloat16, float16 or float32.
            ValueError, TypeError: as for LoRALinear.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear was a {type(linear).__name__}, but must be a torch.nn.Linear")
        weight, bias = linear.weight, linear.bias
        shape = (linear.out_features, linear.in_features)
        if type(weight) is not nn.Parameter or weight.dtype not in BASE_DTYPES or weight.shape != shape:
            raise TypeError(
                f"linear.weight was a {type(weight).__name__} {list(weight.shape)} of {weight.dtype}, "
                f"but must be a plain torch.nn.Parameter {list(shape)} of one of {_BASE_NAMES}"
            )
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
        layer.weight, layer.bias = weight, bias
        for frozen in (weight, bias):
            if frozen is not None:
                frozen.requires_grad_(False)
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
        with outside_autocast(self.lora_B.device.type):
            product = self.lora_B.detach().float() @ self.lora_A.detach().float()
        return self.scaling * product

    def merge(self, safe: bool = False) -> None:
        """W <- W + scaling * B A in place, after which the layer costs what a plain linear does.

        Merging twice is merging once.

        Args:
            safe: look at the merged weight first, and leave the layer as it was if it is not finite.
        Raises:
            ValueError: `safe`, and the merged weight has a NaN or an infinity.
        """
        if self.merged:
            return
        merged = (self.weight.detach().float() + self.delta_weight()).to(self.weight.dtype)
        if safe and not bool(torch.isfinite(merged).all()):
            raise ValueError(
                "lora_A, lora_B had values that make the merged weight NaN or infinite; nothing was merged"
            )
        self._unmerged = self.weight.detach().clone()
        self.weight.data.copy_(merged)

    def unmerge(self) -> None:
        """Puts the weight's own bits back."""
        if self._unmerged is not None:
            self.weight.data.copy_(self._unmerged)
            self._unmerged = None

    def _apply(self, fn: Any, recurse: bool = True) -> LoRALinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._unmerged is not None:
            self._unmerged = fn(self._unmerged)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._unmerged is not None:
            # With the merged weight beside the adapter, whoever loads both would apply the adapter twice.
            destination[prefix + "weight"] = self._unmerged

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"alpha={self.alpha}, dropout={self.dropout}, bias={self.bias is not None}, merged={self.merged}"
        )


_BASE_NAMES = ", ".join(map(str, BASE_DTYPES))


def _check(r: int, alpha: float, dropout: float, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    if not isinstance(r, int) or isinstance(r, bool):
        raise TypeError(f"r was a {type(r).__name__}, but must be an int")
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"r was {r}, but must be from 1 to {MAX_RANK}")
    for name, value in (("alpha", alpha), ("dropout", dropout)):
        if not is_number(value):
            raise TypeError(f"{name} was a {type(value).__name__}, but must be an int or a float")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout was {dropout}, but must be from 0 to 1")
    if dtype not in BASE_DTYPES:
        raise TypeError(f"dtype was {dtype}, but must be one of {_BASE_NAMES}")
    if adapter_dtype not in (dtype, torch.float32):
        raise TypeError(f"adapter_dtype was {adapter_dtype}, but must be {dtype}, as dtype is, or torch.float32")
