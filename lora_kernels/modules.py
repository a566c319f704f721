"""LoRALinear: the parameters around lora_linear, their initialisation, and merging."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_kernels.autograd import outside_autocast
from lora_kernels.functional import is_number, lora_linear
from lora_kernels.limits import BASE_DTYPES, MAX_RANK
from lora_kernels.loftq import loftq
from lora_kernels.nf4 import NF4Weight
from lora_kernels.weights import dense


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank adapter.

        y = x W^T + scaling * (D(x) A^T) B^T + b     scaling = alpha / r, or alpha / sqrt(r) with use_rslora

    lora_A starts as torch.nn.Linear's weights do and lora_B as zeros, so the layer starts as the frozen one.

    A state_dict is that of the layer in training, merged or not: it holds the frozen weight without the
    adapter. Loading one into a merged layer unmerges it first.

    With quantize="nf4" the frozen weight is an NF4Weight: W is then what it decodes to in x's dtype. It is no
    parameter: .to(device) moves it, .to(dtype) leaves it as it is, and a state_dict has it under bitsandbytes'
    keys. While such a layer is merged it holds a dense weight beside, because a merged weight in 4 bits would
    round the adapter away.

    Args:
        in_features, out_features: K and N; the frozen weight is [N, K].
        r: the rank, from 1 to 512.
        alpha: numerator of the scaling.
        dropout: probability of a zero in the adapter's input while training.
        bias: whether there is a (frozen) bias.
        use_rslora: divide alpha by sqrt(r).
        device, dtype: of the frozen weight and bias; the dtype is bfloat16, float16 or float32.
        adapter_dtype: of lora_A and lora_B: `dtype` (also where None) or float32.
        quantize: "nf4", or None for a dense frozen weight.
        block_size, double_quant: as for NF4Weight.quantize.
    Raises:
        ValueError: the rank or the dropout probability is out of range, or quantize or block_size is unknown.
        TypeError: a dtype, the rank, alpha or the dropout probability is of the wrong kind.

    Sources: Hu et al., "LoRA", ICLR 2022; Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning
    with LoRA", 2023.
    """

    weight: nn.Parameter | NF4Weight
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
        quantize: Literal["nf4"] | None = None,
        block_size: int = 64,
        double_quant: bool = True,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        adapter_dtype = adapter_dtype or dtype
        _check_sizes(in_features, out_features)
        _check(r, alpha, dropout, dtype, adapter_dtype)
        _check_quantize(quantize)
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
        self._unmerged: Tensor | NF4Weight | None = None
        self.reset_parameters()
        if quantize:
            self._set_weight(NF4Weight.quantize(self.weight, block_size, double_quant))

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
        quantize: Literal["nf4"] | None = None,
        block_size: int = 64,
        double_quant: bool = True,
        init: Literal["default", "loftq"] = "default",
        loftq_steps: int = 5,
    ) -> LoRALinear:
        """The layer with `linear`'s own weight and bias (shared, not copied, and frozen) and a fresh adapter.

        Sharing goes both ways: while this layer is merged, so is the weight of `linear`. With quantize="nf4"
        the weight is quantized, and only the bias is shared.

        Args:
            linear: the layer to adapt; its parameters stop requiring gradients.
            r, alpha, dropout, use_rslora, adapter_dtype, quantize, block_size, double_quant: as for LoRALinear.
            init: "default", or with quantize="nf4" "loftq": the adapter starts as the best approximation of what
                quantization lost, and not at zero.
            loftq_steps: how often LoftQ quantizes and approximates in turns.
        Raises:
            TypeError: `linear` is not a torch.nn.Linear, or its weight is quantized, sharded or else not a
                plain matrix of bfloat16, float16 or float32.
            ValueError: its bias does not fit its weight.
            ValueError: `init` is unknown, or "loftq" without quantize="nf4" or with an alpha that is not above 0.
            ValueError, TypeError: as for LoRALinear, and for NF4Weight.quantize.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear was a {type(linear).__name__}, but must be a torch.nn.Linear")
        _check_quantize(quantize)
        if init not in ("default", "loftq"):
            raise ValueError(f"init was {init!r}, but must be 'default' or 'loftq'")
        if init == "loftq" and quantize is None:
            raise ValueError("init was 'loftq', but quantize was None, so that nothing is lost which it could restore")
        weight, bias = linear.weight, linear.bias
        shape = (linear.out_features, linear.in_features)
        if type(weight) is not nn.Parameter or weight.dtype not in BASE_DTYPES or weight.shape != shape:
            raise TypeError(
                f"linear.weight was a {type(weight).__name__} {list(weight.shape)} of {weight.dtype}, "
                f"but must be a plain torch.nn.Parameter {list(shape)} of one of {_BASE_NAMES}"
            )
        if bias is not None and (bias.shape != shape[:1] or bias.dtype not in (weight.dtype, torch.float32)):
            raise ValueError(
                f"linear.bias was {list(bias.shape)} of {bias.dtype}, "
                f"but must be {list(shape[:1])} of {weight.dtype} or torch.float32"
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
        if init == "loftq":
            quantized, lora_A, lora_B = loftq(weight, r, layer.scaling, block_size, double_quant, loftq_steps)
            layer._set_weight(quantized)
            # Where the weight has fewer singular values than r, the rest of the adapter starts as LoRA does.
            layer.lora_A.data[: len(lora_A)] = lora_A
            layer.lora_B.data[:, : len(lora_A)] = lora_B
        elif quantize:
            layer._set_weight(NF4Weight.quantize(weight, block_size, double_quant))
        return layer.train(linear.training)

    def reset_parameters(self) -> None:
        """Draws weight and bias as torch.nn.Linear does, and the adapter as LoRA starts."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        if isinstance(self.weight, NF4Weight):
            drawn = torch.empty(self.weight.shape, dtype=self.weight.dtype, device=self.weight.device)
            self.weight = NF4Weight.quantize(
                drawn.uniform_(-bound, bound), self.weight.block_size, self.weight.double_quant
            )
        else:
            nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        self._reset_adapter()

    def _set_weight(self, weight: Tensor | NF4Weight) -> None:
        # A name that is a parameter's takes no other attribute, nor the reverse.
        del self.weight
        self.weight = weight if isinstance(weight, NF4Weight) else nn.Parameter(weight, requires_grad=False)

    def _reset_adapter(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            assert isinstance(self.weight, Tensor)
            if torch.is_autocast_enabled(x.device.type):
                return nn.functional.linear(x, self.weight, self.bias)
            # Merged or not, a bias may be float32, and x decides what is computed in if the weight was quantized.
            bias = None if self.bias is None else self.bias.to(x.dtype)
            weight = self.weight.to(x.dtype) if isinstance(self._unmerged, NF4Weight) else self.weight
            return nn.functional.linear(x, weight, bias)
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

        Merging twice is merging once. An NF4 weight is decoded, and the sum held densely in its dtype beside it.

        Args:
            safe: look at the merged weight first, and leave the layer as it was if it is not finite.
        Raises:
            ValueError: `safe`, and the merged weight has a NaN or an infinity.
        """
        if self.merged:
            return
        base = self.weight
        merged = (dense(base, base.dtype).detach().float() + self.delta_weight()).to(base.dtype)
        if safe and not bool(torch.isfinite(merged).all()):
            raise ValueError(
                "lora_A, lora_B had values that make the merged weight NaN or infinite; nothing was merged"
            )
        if isinstance(base, NF4Weight):
            self._unmerged = base
            self._set_weight(merged)
        else:
            self._unmerged = base.detach().clone()
            # Seen by autograd: a backward that needs the weight as it was is an error.
            with torch.no_grad():
                base.copy_(merged)

    def unmerge(self) -> None:
        """Puts the weight's own bits back."""
        if isinstance(self._unmerged, NF4Weight):
            self._set_weight(self._unmerged)
        elif self._unmerged is not None:
            assert not isinstance(self.weight, NF4Weight)
            with torch.no_grad():
                self.weight.copy_(self._unmerged)
        self._unmerged = None

    def _apply(self, fn: Any, recurse: bool = True) -> LoRALinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if isinstance(self.weight, NF4Weight):
            self.weight = _moved(self.weight, fn)
        if isinstance(self._unmerged, NF4Weight):
            self._unmerged = _moved(self._unmerged, fn)
        elif self._unmerged is not None:
            self._unmerged = fn(self._unmerged)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # With the merged weight beside the adapter, whoever loads both would apply the adapter twice.
        base = self.weight if self._unmerged is None else self._unmerged
        if isinstance(base, NF4Weight):
            destination.update(base.state_dict(prefix + "weight"))
        elif self._unmerged is not None:
            destination[prefix + "weight"] = base

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self.unmerge()
        key = prefix + "weight"
        if isinstance(self.weight, NF4Weight):
            # What is wrong with one of a layer's tensors keeps all of them out.
            own = {prefix + name: parameter for name, parameter in self._parameters.items() if parameter is not None}
            shapes = {name: list(getattr(state_dict[name], "shape", ())) for name in own if name in state_dict}
            misfits = [
                f"state[{name!r}] was {shape}, but must be {list(own[name].shape)}"
                for name, shape in shapes.items()
                if shape != list(own[name].shape)
            ]
            if misfits:
                error_msgs += misfits
                return
            if key in state_dict:
                assign = bool(local_metadata.get("assign_to_params_buffers"))
                try:
                    self.weight = self._loaded(self.weight, state_dict, key, assign)
                except ValueError as error:
                    error_msgs.append(str(error))
                    return
            elif strict:
                missing_keys.append(key)
        unexpected: list[str] = []
        others = (local_metadata, strict, missing_keys, unexpected, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *others)  # type: ignore[no-untyped-call]
        nf4 = isinstance(self.weight, NF4Weight)
        unexpected_keys += [k for k in unexpected if not (nf4 and (k == key or k.startswith(key + ".")))]

    @staticmethod
    def _loaded(present: NF4Weight, state: Mapping[str, Any], key: str, assign: bool) -> NF4Weight:
        if present.packed.is_meta and not assign:
            raise ValueError(f"state[{key!r}] cannot be copied to the meta device: pass assign=True, or use to_empty")
        loaded = NF4Weight.from_state_dict(state, key, None if assign else present.device)
        if loaded.shape != present.shape:
            raise ValueError(f"state[{key!r}] was {list(loaded.shape)}, but must be {list(present.shape)}")
        return loaded if assign else NF4Weight.of([t.clone() for t in loaded.tensors()], loaded.form)

    def extra_repr(self) -> str:
        base = self.weight if self._unmerged is None else self._unmerged
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"alpha={self.alpha}, dropout={self.dropout}, bias={self.bias is not None}, merged={self.merged}"
            f"{', quantize=nf4' if isinstance(base, NF4Weight) else ''}"
        )


def _moved(weight: NF4Weight, fn: Any) -> NF4Weight:
    """The weight on the device to which `fn` moves tensors; fn itself might cast the scales to another dtype."""
    device = fn(weight.packed[:0]).device
    if weight.packed.is_meta:
        # Only to_empty comes from there: every other fn has refused.
        return NF4Weight.of([torch.empty_like(t, device=device) for t in weight.tensors()], weight.form)
    return weight.to(device)


_BASE_NAMES = ", ".join(map(str, BASE_DTYPES))


def _check_quantize(quantize: str | None) -> None:
    if quantize not in (None, "nf4"):
        raise ValueError(f"quantize was {quantize!r}, but must be 'nf4' or None")


def _check_sizes(in_features: int, out_features: int) -> None:
    for name, value in (("in_features", in_features), ("out_features", out_features)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} was a {type(value).__name__}, but must be an int")
        if value < 0:
            raise ValueError(f"{name} was {value}, but must be at least 0")


def _check(r: int, alpha: float, dropout: float, dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    if not isinstance(r, int) or isinstance(r, bool):
        raise TypeError(f"r was a {type(r).__name__}, but must be an int")
    if not 1 <= r <= MAX_RANK:
        raise ValueError(f"r was {r}, but must be from 1 to {MAX_RANK}")
    for name, value in (("alpha", alpha), ("dropout", dropout)):
        if not is_number(value):
            raise TypeError(f"{name} was a {type(value).__name__}, but must be an int or a float")
    if not math.isfinite(alpha):
        raise ValueError(f"alpha was {alpha}, but must be finite")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout was {dropout}, but must be from 0 to 1")
    if dtype not in BASE_DTYPES:
        raise TypeError(f"dtype was {dtype}, but must be one of {_BASE_NAMES}")
    if adapter_dtype not in (dtype, torch.float32):
        raise TypeError(f"adapter_dtype was {adapter_dtype}, but must be {dtype}, as dtype is, or torch.float32")
