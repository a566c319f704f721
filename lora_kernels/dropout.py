"""Dropout that is recomputed, not stored: a mask is a function of a 64-bit seed and the element's position.

This file is the specification. Every backend that draws the mask inside a kernel draws these bits.

The mask of element (m, k) comes from Philox4x32 with seven rounds, the fewest that pass BigCrush (Salmon, Moraes,
Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011, table 2). One call gives eight 16-bit lanes:

    key = seed, counter = (k // 8, m, 0, 0);  lane k % 8 is half (k % 2) of word (k % 8) // 2, low half first
    keep(m, k) = lane >= round(p * 65536)

so p has a resolution of 1.5e-5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PHILOX_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Dropout:
    """One draw of a dropout mask: the probability `p` of a zero, and the int64 `seed` (a tensor on the device)."""

    p: float
    seed: Tensor

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

    @property
    def inverse_keep(self) -> float:
        return inverse_keep(self.p)

    def keep(self, rows: int, columns: int) -> Tensor:
        """The bool mask [rows, columns]: True where an element stays."""
        return keep_mask(self.seed, rows, columns, self.p)


def drop_threshold(p: float) -> int:
    """The 16-bit lanes below this number are dropped."""
    return round(p * 65536)


def inverse_keep(p: float) -> float:
    """1 / (1 - p), and 0 where everything is dropped."""
    return 0.0 if p == 1.0 else 1.0 / (1.0 - p)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """The mask of the module's docstring, in plain PyTorch.

    Args:
        seed: int64 tensor of one element.
        rows, columns: the shape of the mask.
        p: the probability of a zero.
    Returns:
        A bool tensor [rows, columns] on the seed's device.
    """
    groups = -(-columns // 8)
    words = _philox(seed, torch.arange(groups, device=seed.device), torch.arange(rows, device=seed.device)[:, None])
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (lanes >= drop_threshold(p)).view(rows, groups * 8)[:, :columns]


def _philox(seed: Tensor, c0: Tensor, c1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 in int64 arithmetic: the low 32 bits of each number are the word."""
    c0, c1 = torch.broadcast_tensors(c0, c1)
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(PHILOX_ROUNDS):
        # A product of two 32-bit words wraps around int64's sign, which neither the mask nor the masked shift sees.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ key0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ key1,
            product0 & _WORD,
        )
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3
