"""Layers of one block that are called with the same tensor, one after the other: the first call computes them all.

A block's forward opens a scope, and closes it however it ends: nothing that was computed outlives the block's forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Scope:
    """The layers that share an input, and the outputs that their siblings have yet to take.

    `compute` gives the outputs of all of them, or None where they must run each for itself.
    """

    def __init__(
        self, layers: Sequence[nn.Module], compute: Callable[[Sequence[nn.Module], Tensor], list[Tensor] | None]
    ) -> None:
        self._layers, self._compute = layers, compute
        self.traced = torch.compiler.is_compiling()
        self._x: Tensor | None = None
        self._state: tuple[object, ...] = ()
        self._outputs: dict[nn.Module, Tensor] = {}

    def take(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The output of a layer for x; None where it must compute it by itself."""
        if layer not in self._layers:
            return None
        if self._outputs:
            # The same object with the same contents, and called under the same settings.
            if self._x is not x or self._state != _state(x):
                self._drop()
                return None
            return self._pop(layer)
        # Computed once in a scope: a layer that is called again computes for itself.
        layers, self._layers = self._layers, ()
        outputs = self._compute(layers, x) if _tells_changes(x) else None
        if outputs is None:
            return None
        self._layers, self._x, self._state = layers, x, _state(x)
        self._outputs = dict(zip(layers, outputs, strict=True))
        return self._pop(layer)

    def _pop(self, layer: nn.Module) -> Tensor | None:
        y = self._outputs.pop(layer, None)
        if not self._outputs:
            self._drop()
        return y

    def _drop(self) -> None:
        self._layers, self._x, self._outputs = (), None, {}


class _Open(threading.local):
    """The scope that is open, of each thread: autograd's threads compute again what was checkpointed."""

    def __init__(self) -> None:
        # From the first look on: a graph that was traced without it is compiled again when it is there.
        self.scope: Scope | None = None


_open = _Open()


@contextmanager
def scope(opened: Scope) -> Iterator[None]:
    """Layers that are called inside the `with` block look into this scope first."""
    before = _open.scope
    _open.scope = opened
    try:
        yield
    finally:
        _open.scope = before


def taken(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The output that a sibling's call has computed already, or computes now; None where there is none to be had."""
    opened = _open.scope
    # What a graph computed belongs to that graph, and what was computed outside of it is no constant inside.
    if opened is None or opened.traced != torch.compiler.is_compiling():
        return None
    return opened.take(layer, x)


def _tells_changes(x: Tensor) -> bool:
    """Whether the tensor tells if it was changed in place: one of the inference mode does not."""
    if torch.compiler.is_compiling():
        return True
    return type(x) in (Tensor, nn.Parameter) and not x.is_inference()


def _state(x: Tensor) -> tuple[object, ...]:
    kind = x.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    # A graph cannot ask for the version: whoever opens a scope while one is traced knows that nothing changes x.
    version = None if torch.compiler.is_compiling() else x._version
    return version, torch.is_grad_enabled(), autocast
