"""Layers and groups of a large rank: which they are, and their two launches of products.py's kernel.

    S_i = scale_i * x A_i^T            y_i = x W_i^T + S_i B_i^T + b_i
    T_i = scale_i * dy_i B_i           dx  = sum of dy_i W_i + T_i A_i

dA_i = T_i^T x and dB_i = dy_i^T S_i are the libraries'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lora_kernels.backends import Precision, Problem, Scale
from lora_kernels.backends.triton.launches import (
    MOST_MEMBERS,
    TYPES,
    Launch,
    alignment,
    dot_precision,
    filled,
    fits_tma,
    remember,
)
from lora_kernels.backends.triton.products import products_kernel
from lora_kernels.backends.triton.tiles import (
    INTERPRETER,
    LEAST_WIDE_ROWS,
    OnePassTiles,
    chip_of,
    group_tiles,
    is_wide_rank,
    narrow_tiles,
)
from lora_kernels.dropout import Dropout

_MOST_PAIRS = 2 * MOST_MEMBERS

_launches: dict[tuple[object, ...], Launch] = {}


class Layer(NamedTuple):
    """out = left weight + S up + bias and S = scale * left down: forward of (x, W^T, A^T, B^T), backward of (dy, W, B, A)."""

    left: Tensor
    weight: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor | None
    scale: Scale

    def rounded(self) -> Layer:
        """With adapters of its own dtype."""
        dtype = self.left.dtype
        return self._replace(down=self.down.to(dtype), up=self.up.to(dtype))


class _Pair(NamedTuple):
    """A product, its right operand as it is stored: [N, L] if right_is_nk, else [L, N]."""

    left: Tensor
    right: Tensor
    right_is_nk: bool

    @property
    def columns(self) -> int:
        return self.right.shape[0 if self.right_is_nk else 1]


def are_wide(layers: Sequence[Layer], masked: bool, precision: Precision) -> bool:
    """Whether layers are computed here: on Hopper, where their rank is large, and TMA takes all there is.

    A mask would have to be applied to what the tensor cores read by themselves, and halves would double the steps.
    """
    first, ranks = layers[0].left, [layer.down.shape[1] for layer in layers]
    if masked or precision == "split" or not take(first.device, first.shape[0], max(ranks), len(layers)):
        return False
    # One loop has one layout: U lies as W does, and all members' alike.
    downs = {_pair(layer.left, layer.down).right_is_nk for layer in layers}
    others = {_pair(layer.left, matrix).right_is_nk for layer in layers for matrix in (layer.weight, layer.up)}
    if len(downs) + len(others) > 2 or any(1 not in t.stride() for layer in layers for t in (layer.down, layer.up)):
        return False
    return not chip_of(first.device).has_tma or all(map(_fits, layers))


def take(device: torch.device, rows: int, rank: int, members: int = 1) -> bool:
    """Whether a rank is large for so many rows of a group of so many, on a chip where that was measured."""
    chip = chip_of(device)
    return (chip.has_tma or chip == INTERPRETER) and is_wide_rank(rows, rank, members)


def take_gradients(dy: Tensor, narrow: Sequence[Tensor | None], dropouts: Sequence[Dropout | None]) -> bool:
    """Whether the adapters' gradients from these S and T are left to the libraries.

    As wide as that, they are products like any other, of which the kernels for narrow ones read x once for 64 columns each.
    """
    given = [t for t in narrow if t is not None]
    rank = max((t.shape[1] for t in given), default=0)
    plain = dy.dtype.itemsize == 2 and all(t.dtype == dy.dtype for t in given) and not any(dropouts)
    return plain and take(dy.device, dy.shape[0], rank)


def describe(problems: Sequence[Problem]) -> str | None:
    """What explain() says of a layer's or a group's rank, if it is large for some number of rows."""
    rank, rows = max(problem.rank for problem in problems), LEAST_WIDE_ROWS
    if not is_wide_rank(rows, rank, len(problems)) or not chip_of(problems[0].device).has_tma:
        return None
    for problem in problems:
        sizes = (problem.in_features, problem.out_features, problem.rank)
        if problem.precision == "split" or problem.dtype.itemsize != 2 or any(size % 8 for size in sizes):
            return None
    libraries = ", and dA and dB by the libraries" if is_wide_rank(rows, rank) else ""
    return f"from {rows} rows on, without dropout, S and T in launches of their own{libraries}"


def _fits(layer: Layer) -> bool:
    """Whether TMA descriptors can describe a layer's operands, S and the output."""
    dtype, R, N = layer.left.dtype, layer.down.shape[1], layer.weight.shape[1]
    adapters = [_pair(layer.left, matrix).right for matrix in (layer.down, layer.up)]
    # What is rounded gets memory of its own.
    fit = [fits_tma(t) if t.dtype == dtype else t.shape[1] % 8 == 0 for t in adapters]
    return all(fit) and R % 8 == N % 8 == 0 and fits_tma(layer.left) and fits_tma(_pair(layer.left, layer.weight).right)


def each(layers: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor]]:
    """Every layer's out and S, as a forward has them."""
    layers = [layer.rounded() for layer in layers]
    ss = _scaled(layers)
    pairs = [[_pair(a.left, a.weight), _pair(s, a.up)] for a, s in zip(layers, ss, strict=True)]
    outs = _launched(pairs, [a.bias for a in layers])
    return outs, ss


def summed(layers: Sequence[Layer]) -> tuple[Tensor, list[Tensor]]:
    """The sum of all layers' out, rounded once, and every S, as a backward has them."""
    layers = [layer.rounded() for layer in layers]
    ss = _scaled(layers)
    pairs = [_pair(layer.left, layer.weight) for layer in layers]
    pairs += [_pair(s, layer.up) for layer, s in zip(layers, ss, strict=True)]
    (out,) = _launched([pairs], [None])
    return out, ss


def _pair(left: Tensor, right: Tensor) -> _Pair:
    """Of a right operand [L, N] in either layout."""
    is_nk = right.stride(0) == 1
    return _Pair(left, right.T if is_nk else right, is_nk)


def _scaled(layers: Sequence[Layer]) -> list[Tensor]:
    """S of each layer."""
    products = [[_pair(layer.left, layer.down)] for layer in layers]
    return _launched(products, [None] * len(layers), [layer.scale for layer in layers])


def _launched(
    outputs: Sequence[Sequence[_Pair]], biases: Sequence[Tensor | None], scales: Sequence[Scale] = ()
) -> list[Tensor]:
    """Each output's sum of products: with a bias of each or none, and of one product with a scale."""
    first = outputs[0][0].left
    M, dtype, device = first.shape[0], first.dtype, first.device
    outs = [torch.empty(M, pairs[0].columns, dtype=dtype, device=device) for pairs in outputs]
    pairs = [pair for of_output in outputs for pair in of_output]
    tensors = [scale if isinstance(scale, Tensor) else None for scale in scales]
    key = (
        device, dtype, M, len(outs), *[(p.left.shape[1], p.left.stride(0), p.right.shape, p.right.stride(0)) for p in pairs],
        pairs[0].right_is_nk, *[bias is not None and bias.dtype for bias in biases],
        *[t is not None and t.dtype for t in tensors], alignment(*outs, *biases, *tensors), dot_precision(dtype),
    )  # fmt: skip
    launch = _launches.get(key)
    if launch is None:
        launch = _plan(outs, pairs, key, biases[0] is not None)
        remember(_launches, key, launch)
    flat = [t for pair in pairs for t in (pair.left, pair.right)]
    numbers = [1.0 if isinstance(scale, Tensor) else float(scale) for scale in scales]
    launch(device, (*filled(outs), *filled(flat, None, 2 * _MOST_PAIRS),
                    *filled(biases), *filled(tensors),
                    *filled(numbers)))  # fmt: skip
    return outs


def _plan(outs: Sequence[Tensor], pairs: Sequence[_Pair], key: tuple[object, ...], has_bias: bool) -> Launch:
    first, per_output = pairs[0], len(pairs) // len(outs)
    (M, _), dtype, chip = first.left.shape, first.left.dtype, chip_of(first.left.device)
    use_tma = chip.has_tma
    Ns = [out.shape[1] for out in outs]
    tiles = narrow_tiles(chip, M, Ns) if per_output == 1 else group_tiles(chip, dtype.itemsize, use_tma, M, Ns)
    count = triton.cdiv(M, tiles.block_m) * sum(triton.cdiv(N, tiles.block_n) for N in Ns)
    programs = min(chip.multiprocessors, count)
    lengths = [pair.left.shape[1] for pair in pairs]
    # All outputs go through as many steps, so that one loop can have them all.
    steps = [triton.cdiv(max(lengths[place::per_output]), tiles.block_k) for place in range(per_output)]
    numbers = (
        M, *filled(Ns, 0), *filled(lengths, 0, _MOST_PAIRS), *filled(steps, 0, _MOST_PAIRS),
        *filled([pair.left.stride(0) for pair in pairs], 0, _MOST_PAIRS),
        *filled([pair.right.stride(0) for pair in pairs], 0, _MOST_PAIRS),
    )  # fmt: skip
    # Whether there is a next tile to load while one is finished.
    flat = tiles.use_tma and count > programs and per_output > 1
    options = {
        "MEMBERS": len(outs),
        "PAIRS": per_output,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "GROUP_M": tiles.group_m,
        "RIGHT_IS_NK": first.right_is_nk,
        "HAS_BIAS": has_bias,
        "PRECISION": dot_precision(dtype),
        "USE_TMA": tiles.use_tma,
        "DTYPE": TYPES[dtype],
        "FLATTEN": flat,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    blocks = _blocks(tiles, len(outs), len(pairs), first.right_is_nk) if tiles.use_tma else None
    device, _, _, *shapes = key
    kind = ("products", device, dtype, *shapes, tiles, flat)
    return Launch(products_kernel, kind, (programs, 1, 1), options, blocks, 0, 0, numbers)


def _blocks(tiles: OnePassTiles, outs: int, pairs: int, right_is_nk: bool) -> tuple[tuple[int, int] | None, ...]:
    """The tiles of the leading arguments, of which those that are not there have none."""
    m, n, k = tiles.block_m, tiles.block_n, tiles.block_k
    of_pair = [(m, k), (n, k) if right_is_nk else (k, n)]
    return (*filled([(m, n // 2)] * outs), *of_pair * pairs)
