"""Products that are computed after their node has saved what its backward reads.

Activation checkpointing (not the reentrant kind) recomputes a block until all is saved again that its forward saved,
and ends there, by an exception out of the hook for saved tensors. PyTorch's own operations save before they compute:
the last product of a block, whose output nobody reads by then, is computed once. A torch.autograd.Function saves after
its forward has returned, which is too late. So where hooks take what is saved, the forward here returns an output
without memory, and the product takes its place once the node exists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Deferred:
    """The product of a node: y, and S where it is wanted, which is kept here, as it is not there yet to be saved.

    It is the S that the node would have saved: gradients have the same bits with checkpointing and without.
    """

    def __init__(self) -> None:
        self._product: Callable[[], tuple[Tensor, Tensor | None]] | None = None
        self._s: Tensor | None = None

    def __call__(self, product: Callable[[], tuple[Tensor, Tensor | None]], x: Tensor, out_features: int) -> Tensor:
        """What stands for y = [*, out_features] until `into`; to be called in the forward."""
        self._product = product
        return x.new_empty_strided((*x.shape[:-1], out_features), (0,) * x.dim())

    def into(self, y: Tensor) -> Tensor:
        """Computes the product and gives it to y, which is the output of the node by now."""
        assert self._product is not None
        with torch.no_grad():
            product, self._s = self._product()
            # Not a change in place, which the graph would be told of: until here, y was nothing.
            y.data = product.view(y.shape)
        self._product = None
        return y

    def s(self) -> Tensor | None:
        """S for a backward; given up with what the graph saved, where that is not kept for another one."""
        s = self._s
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self._s = None
        return s


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """y of a function whose first argument is a Deferred; None where nobody takes what is saved, S included, away."""
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    later = Deferred() if hooked else None
    y: Tensor = function.apply(later, *arguments)  # type: ignore[no-untyped-call]
    return y if later is None else later.into(y)
