"""lora_linear: check the arguments once, describe the problem, choose a backend, apply."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lora_kernels import native
from lora_kernels.autograd import LoRALinearFunction, as_input, as_matrix, as_rows, forward
from lora_kernels.backends import NF4Path, Precision, Problem, Scale, tf32_allowed
from lora_kernels.deferred import applied
from lora_kernels.dispatch import BackendName, Choice, choose, requested
from lora_kernels.dropout import Dropout, inverse_keep
from lora_kernels.limits import BASE_DTYPES, MAX_RANK
from lora_kernels.nf4 import NF4Weight
from lora_kernels.weights import Weight


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:
    """A frozen linear layer with a low-rank adapter, computed in one pass over x.

        y = x W^T + scaling * (D(x) A^T) B^T + b

    D is dropout with probability `dropout_p` on the adapter's input alone; its mask is drawn from PyTorch's
    generator and recomputed in the backward. Gradients go to whatever of x, lora_A, lora_B and bias requires
    them, never to the weight; that of a float32 adapter is float32 from end to end.

    Args:
        x: [..., K], in bfloat16, float16 or float32; any strides, empty batches included.
        weight: [N, K], in x's dtype, frozen; or an NF4Weight, which is decoded to x's dtype, whatever it was
            quantized from, and to the same bits in the backward.
        lora_A: [r, K], in x's dtype or float32; r from 1 to 512.
        lora_B: [N, r], in lora_A's dtype.
        scaling: alpha / r as a rule; an int or a float, or a real tensor of one element, of any shape, on x's
            device. Not differentiated. torch.compile makes a number a constant of its graph, as it does with
            dropout_p: give a tensor where many values come.
        bias: [N] or None, in x's dtype or float32.
        dropout_p: an int or a float from 0 to 1, in force rounded to a multiple of 2^-16. Ignored where
            `training` is False.
        backend: "triton", "cuda", "eager" or "auto"; None takes what the enclosing use_backend says.
    Returns:
        y: [..., N] in x's dtype; under autocast in the autocast dtype.

    Under autocast x and weight are cast to the autocast dtype; float32 adapters and biases are rounded to it
    where they are used. Outside, float32 adapters over a 16-bit base keep float32 accuracy in the branch.

    Raises:
        ValueError: a shape, rank, device, probability or backend name does not fit; or the weight requires
            grad.
        TypeError: a type or a dtype does not fit; float64 does not even under autocast, as in
            torch.nn.functional.linear.
        RuntimeError: the backend that was named cannot run this call; or a backward is differentiated again.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022.
    """
    compiling = torch.compiler.is_compiling()
    name = requested(backend)
    learn = not compiling and native.enabled
    given = (x, weight, lora_A, lora_B, bias, scaling, dropout_p, training, name)
    if learn and native.linear is not None:
        y = native.linear(*given)
        if isinstance(y, Tensor):
            return y
        learn = y is None
    _require(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    x, weight, lora_A, lora_B, bias, precision = _unify_dtypes(x, weight, lora_A, lora_B, bias)
    if compiling:
        _check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    else:
        choice = _cached_choice(x, weight, lora_A, lora_B, bias, scaling, dropout_p, precision, name)
    p = float(dropout_p) if training else 0.0
    scale = _scale(scaling, p)
    dropout = Dropout.draw(p, x.device)
    leading = x.shape[:-1]
    if compiling:
        from lora_kernels.compiled import apply

        y = apply(as_rows(as_matrix(x)), weight, lora_A, lora_B, bias, scale, dropout, precision, name)
    else:
        x = as_input(x)
        with native.noting(learn, choice.backend, x) as made:
            operands = (weight, lora_A, lora_B, bias, scale, dropout, precision)
            if torch.is_grad_enabled():
                y = applied(LoRALinearFunction, x, *operands, choice.backend)
            else:
                y, _ = forward(choice.backend, as_matrix(x), *operands, want_s=False)
        native.learn_linear(given, made, choice.backend, precision, dropout)
    return y if y.dim() == len(leading) + 1 else y.view(*leading, y.shape[-1])


def explain(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float | Tensor = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> Choice:
    """Which backend lora_linear would take for these arguments, and why each other one would not.

    Of an NF4 weight it says as well where the forward and the backward of this very call decode it, and why there.
    Takes the arguments of lora_linear and raises what it raises; computes nothing. Print the result.
    """
    _require(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    x, weight, lora_A, lora_B, bias, precision = _unify_dtypes(x, weight, lora_A, lora_B, bias)
    _check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    choice = choose(_describe(x, weight, lora_A, precision), requested(backend))
    nf4_paths = choice.backend.nf4_paths
    if nf4_paths is None or not isinstance(weight, NF4Weight):
        return choice
    forward, backward = nf4_paths(as_rows(as_matrix(x)), weight)
    if not (x.requires_grad and torch.is_grad_enabled()):
        # The adapters' gradients need no weight.
        backward = NF4Path("nowhere", "x needs no gradient" if torch.is_grad_enabled() else "gradients are off")
    return replace(choice, nf4_paths=(forward, backward))


def _unify_dtypes(
    x: Tensor, weight: Weight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None
) -> tuple[Tensor, Weight, Tensor, Tensor, Tensor | None, Precision]:
    """The tensors in the dtypes in which they meet, and how the adapters meet the base."""
    device_type = x.device.type
    if not torch.is_autocast_enabled(device_type):
        return x, weight, lora_A, lora_B, bias, "native" if lora_A.dtype == x.dtype else "split"
    dtype = torch.get_autocast_dtype(device_type)
    # What is float32 of these stays so, and is rounded where it is used: its gradient is then never rounded.
    lora_A, lora_B = (_autocast(t, dtype, keep_float32=True) for t in (lora_A, lora_B))
    bias = None if bias is None else _autocast(bias, dtype, keep_float32=True)
    x = _autocast(x, dtype)
    weight = weight if isinstance(weight, NF4Weight) else _autocast(weight, dtype)
    return x, weight, lora_A, lora_B, bias, "native" if lora_A.dtype == dtype else "rounded"


def _autocast(t: Tensor, dtype: torch.dtype, keep_float32: bool = False) -> Tensor:
    # Autocast casts floating-point numbers, but not float64: neither of them becomes valid by a cast here.
    stays = t.dtype == torch.float64 or not t.is_floating_point() or (keep_float32 and t.dtype == torch.float32)
    return t if stays else t.to(dtype)


def _scale(scaling: float | Tensor, p: float) -> Scale:
    """scaling / (1 - p) as backends take it."""
    scale = scaling.reshape(1).to(torch.float32) if isinstance(scaling, Tensor) else scaling
    return scale * inverse_keep(p) if p else scale


# Checked arguments and the choice they led to, by everything that a check or the choice depends on.
_choices: dict[tuple[object, ...], Choice] = {}


def _cached_choice(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    dropout_p: float,
    precision: Precision,
    name: BackendName,
) -> Choice:
    key = (
        x.shape[-1:],
        x.dtype,
        x.device,
        isinstance(weight, NF4Weight),
        weight.shape,
        weight.dtype,
        weight.device,
        weight.requires_grad,
        lora_A.shape,
        lora_A.dtype,
        lora_A.device,
        lora_B.shape,
        lora_B.dtype,
        lora_B.device,
        None if bias is None else (bias.shape, bias.dtype, bias.device),
        (scaling.shape, scaling.dtype, scaling.device, scaling.requires_grad) if isinstance(scaling, Tensor) else None,
        torch.is_grad_enabled(),
        dropout_p,
        precision,
        name,
        x.dtype == torch.float32 and tf32_allowed(),
    )
    choice = _choices.get(key)
    if choice is None:
        _check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
        choice = choose(_describe(x, weight, lora_A, precision), name)
        _choices[key] = choice
    return choice


def _describe(x: Tensor, weight: Weight, lora_A: Tensor, precision: Precision) -> Problem:
    out_features, in_features = weight.shape
    nf4 = isinstance(weight, NF4Weight)
    return Problem.of(x.device, x.dtype, precision, in_features, out_features, lora_A.shape[0], nf4)


def _require(
    x: object,
    weight: object,
    lora_A: object,
    lora_B: object,
    bias: object,
    scaling: object,
    dropout_p: object,
) -> None:
    for name, value in (("x", x), ("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B), ("bias", bias)):
        if not isinstance(value, Tensor) and not (
            (name == "weight" and isinstance(value, NF4Weight)) or (name == "bias" and value is None)
        ):
            or_else = {"weight": " or an NF4Weight", "bias": " or None"}.get(name, "")
            raise TypeError(f"{name} was {_kind(value)}, but must be a tensor{or_else}")
        if isinstance(value, Tensor) and value.layout != torch.strided:
            raise TypeError(f"{name} had layout {value.layout}, but must be dense (torch.strided)")
    if not isinstance(scaling, Tensor) and not is_number(scaling):
        raise TypeError(f"scaling was {_kind(scaling)}, but must be an int, a float or a tensor of one element")
    if not is_number(dropout_p):
        raise TypeError(f"dropout_p was {_kind(dropout_p)}, but must be an int or a float")
    # Asked first, because autocast has no answer for the meta device.
    if x.is_meta:  # type: ignore[attr-defined]
        raise ValueError("x was on the meta device, but must be on one that holds its numbers")


def is_number(value: object) -> bool:
    """Whether a value is an int or a float; a bool is a mistake."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _check(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    dropout_p: float,
) -> None:
    """Raises for the first argument that does not fit, naming it, what it was and what it must be."""
    if weight.dim() != 2:
        raise ValueError(f"weight had shape {_shape(weight)}, but must be two-dimensional: [N, K]")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x had shape {_shape(x)}, but its last dimension must be weight's K = {weight.shape[1]}")
    out_features, in_features = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != in_features:
        raise ValueError(f"lora_A had shape {_shape(lora_A)}, but must be [r, {in_features}]")
    rank = lora_A.shape[0]
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"lora_A had rank {rank}, but the rank must be from 1 to {MAX_RANK}")
    if lora_B.dim() != 2 or tuple(lora_B.shape) != (out_features, rank):
        raise ValueError(f"lora_B had shape {_shape(lora_B)}, but must be [{out_features}, {rank}]")
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias had shape {_shape(bias)}, but must be [{out_features}]")
    if x.dtype not in BASE_DTYPES:
        raise TypeError(f"x was {x.dtype}, but must be one of {', '.join(map(str, BASE_DTYPES))}")
    if weight.dtype != x.dtype and not isinstance(weight, NF4Weight):
        raise TypeError(f"weight was {weight.dtype}, but must have x's dtype, {x.dtype}")
    if lora_A.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"lora_A was {lora_A.dtype}, but must be {x.dtype}, as x is, or torch.float32")
    if lora_B.dtype != lora_A.dtype:
        raise TypeError(f"lora_B was {lora_B.dtype}, but must have lora_A's dtype, {lora_A.dtype}")
    if bias is not None and bias.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"bias was {bias.dtype}, but must be {x.dtype}, as x is, or torch.float32")
    tensors = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "bias": bias}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} was on {tensor.device}, but must be on x's device, {x.device}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight required grad, but must be frozen: it gets no gradient here (pass weight.detach())")
    if isinstance(scaling, Tensor):
        if scaling.numel() != 1:
            raise ValueError(f"scaling had shape {_shape(scaling)}, but must be a number or a tensor of one element")
        if scaling.dtype == torch.bool or scaling.is_complex():
            raise TypeError(f"scaling was {scaling.dtype}, but must be a real number or a tensor of one")
        if scaling.device != x.device:
            raise ValueError(f"scaling was on {scaling.device}, but must be on x's device, {x.device}")
        if scaling.requires_grad and torch.is_grad_enabled():
            raise ValueError("scaling required grad, but it is not differentiated (pass scaling.detach())")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p was {dropout_p}, but must be from 0 to 1")


def _shape(tensor: Weight) -> list[int]:
    return list(tensor.shape)
