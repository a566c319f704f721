"""Dropout that is recomputed, not stored: a mask is a function of a 64-bit seed and the element's position.

This file is the specification. Every backend that draws the mask inside a kernel draws these bits.

The mask of element (m, k) comes from Philox4x32 with seven rounds, the fewest that pass BigCrush (Salmon,
Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011, table 2). One call gives eight
16-bit lanes:

    key = seed, counter = (k // 8, m, 0, 0);  lane k % 8 is half (k % 2) of word (k % 8) // 2, low half first
    keep(m, k) = lane >= round(p * 65536)

so the probability in force is a multiple of 2^-16, and what stays is scaled by 1 / (1 - p) with that p: the
mean of D(x) is exactly x.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_LANES = 1 << 16
# Calls of Philox that a CPU makes at a time: the int64 temporaries of so many stay in its cache.
_CPU_BLOCK = 1 << 17


@dataclass
class Dropout:
    """One draw of a dropout mask: `p`, the probability of a zero, and `seed`, an int64 tensor on the device.

    The mask itself lives as long as the object does, which is one forward or one backward.
    """

    p: float
    seed: Tensor
    # The mask as the Triton backend's kernels read it, once it has been drawn.
    bits: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _mask: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    @staticmethod
    def draw(p: float, device: torch.device) -> Dropout | None:
        """A fresh mask from PyTorch's generator of `device`; None where p is 0, when nothing is dropped."""
        if p == 0.0:
            return None
        # On the device, so that a captured CUDA graph draws a new seed at each replay.
        return Dropout(p, torch.randint(0, 2**62, (1,), device=device, dtype=torch.int64))

    @property
    def threshold(self) -> int:
        return drop_threshold(self.p)

    def keep(self, rows: int, columns: int) -> Tensor:
        """The bool mask [rows, columns]: True where an element stays. dx and dA of one backward share it."""
        if self._mask is None:
            self._mask = keep_mask(self.seed, rows, columns, self.p)
        assert self._mask.shape == (rows, columns), "a draw has one mask"
        return self._mask


def drop_threshold(p: float) -> int:
    """The 16-bit lanes below this number are dropped."""
    return round(p * _LANES)


def inverse_keep(p: float) -> float:
    """1 / (1 - p) with the p that the mask of a p has, threshold / 65536; 0 where everything is dropped."""
    kept = _LANES - drop_threshold(p)
    return _LANES / kept if kept else 0.0


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The mask of the module's docstring, in plain PyTorch.

    Args:
        seed: int64 tensor of one element.
        rows, columns: the shape of the mask.
        p: the probability of a zero.
    Returns:
        A bool tensor [rows, columns] on the seed's device.
    """
    device, threshold, groups = seed.device, drop_threshold(p), -(-columns // 8)
    keep = torch.empty(rows, groups, 8, dtype=torch.bool, device=device)
    if threshold == _LANES:
        return keep.zero_().view(rows, groups * 8)[:, :columns]
    c0 = torch.arange(groups, device=device)[None, :]
    step = max(1, _CPU_BLOCK // max(1, groups)) if device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        block = keep[start : start + step]
        words = _philox(seed, c0, torch.arange(start, start + len(block), device=device)[:, None])
        # The low 32 bits of a number are the word, and the halves of four words in a row are the eight lanes.
        lanes = torch.stack([word.view(torch.int32)[:, ::2] for word in words], dim=-1).view(torch.int16)
        # PyTorch compares signed numbers: with the sign bit flipped they are in the order of unsigned ones.
        torch.ge(lanes.bitwise_xor_(-(1 << 15)), threshold - (1 << 15), out=block)
    return keep.view(rows, groups * 8)[:, :columns]


def _philox(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 of the counters (c0, c1, 0, 0) in int64 [rows, groups]; the low 32 bits are the word.

    c0 is [1, groups] and c1 [rows, 1]: they meet in the second round, and what comes before is cheap.
    """
    c2 = c3 = torch.zeros_like(c0[:, :1])
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(PHILOX_ROUNDS):
        # A product of two words may wrap around int64's sign; _mix masks that away. c1 and c3 keep their
        # upper halves: only what is multiplied must be a clean word.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = _mix(product1, c1, key0), _mix(product0, c3, key1)
        c1, c3 = product1, product0
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _mix(product: Tensor, word: Tensor, key: Tensor) -> Tensor:
    """The product's upper half, the word and the key, xor-ed."""
    return (product >> 32).bitwise_xor_(key).bitwise_xor(word).bitwise_and_(_WORD)
