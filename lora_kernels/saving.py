"""What a node keeps for its backward, and who sees it.

Hooks for saved tensors take away what is saved, to free its memory or to compute it again. A leaf that gets a gradient
is in memory as long as the graph is, which holds it for that gradient: a hook would free nothing, and those of
activation checkpointing take microseconds of every tensor. So such leaves, adapters for the most part, are kept as they
are where there are hooks. csrc/host/node.h does the same: what one of them kept, the other may compute again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def save(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """Keeps tensors for the backward of a torch.autograd.Function."""
    ctx.leaves = {}
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        leaves = {i: t for i, t in enumerate(tensors) if t is not None and t.requires_grad and t.is_leaf}
        ctx.leaves = {i: (leaf, leaf._version) for i, leaf in leaves.items()}
        tensors = [None if i in leaves else t for i, t in enumerate(tensors)]
    ctx.save_for_backward(*tensors)


def unpacked(ctx: Any) -> list[Tensor | None]:
    """What was kept; to be asked for once, for activation checkpointing forgets what it handed out.

    Raises:
        RuntimeError: the graph has given it up, or a leaf was changed in place since.
    """
    tensors = list(ctx.saved_tensors)
    for index, (leaf, version) in ctx.leaves.items():
        # As autograd checks whatever it keeps without hooks.
        if leaf._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a leaf of shape {list(leaf.shape)} is at version {leaf._version}, and was saved at version {version}"
            )
        tensors[index] = leaf
    return tensors
