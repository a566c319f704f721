"""Attention blocks while torch.compile traces them: their layers run together without a change outside of the graph.

A scope that is opened around a forward is such a change. Inside of activation checkpointing nothing that makes one is
traced: whole layers would stay uncompiled, without a word. So the stock forward gets a stand-in for its block, made
inside of the graph, whose projections look into the scope.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_kernels.integrations.peft_scope import Scope


class StandIn:
    """A block, but for the layers of these names, which take their outputs from the scope where it has some."""

    def __init__(self, block: nn.Module, names: Collection[str], opened: Scope) -> None:
        for name, value in (("_block", block), ("_names", names), ("_scope", opened)):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._block, name)
        return _Sharing(found, self._scope) if name in self._names else found

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._block, name, value)


class _Sharing:
    def __init__(self, layer: nn.Module, opened: Scope) -> None:
        self._layer, self._scope = layer, opened

    def __call__(self, x: Tensor) -> Tensor:
        y = self._scope.take(self._layer, x)
        return self._layer(x) if y is None else y  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class Traits(NamedTuple):
    """What the forward of an attention does: nothing else with x between its calls; gives its block to somebody."""

    calls_in_a_row: bool
    hands_itself_on: bool

    @staticmethod
    def of(kind: type) -> Traits:
        """Of a class whose forward calls q_proj, k_proj and v_proj with one variable."""
        source = textwrap.dedent(inspect.getsource(kind.forward))  # type: ignore[attr-defined]
        calls = list(re.finditer(r"\bself\.[qkv]_proj\((\w+)\)", source))
        between = source[calls[0].start() : calls[-1].end()]
        nodes = list(ast.walk(ast.parse(source)))
        asked = [node.value for node in nodes if isinstance(node, ast.Attribute)]
        named = [node for node in nodes if isinstance(node, ast.Name) and node.id == "self"]
        return Traits(
            len(re.findall(rf"\b{calls[0][1]}\b", between)) == len(calls), any(node not in asked for node in named)
        )


def takes_a_stand_in(block: nn.Module, kind: type, traits: Traits) -> bool:
    """Whether the stock forward of a block, which is that of `kind`, is the same with a stand-in for it."""
    if not traits.calls_in_a_row or not traits.hands_itself_on:
        return traits.calls_in_a_row
    # An attention function of anybody else may want a real module.
    config: Any = getattr(block, "config", None)
    if config is None or not kind.__module__.startswith("transformers."):
        return False
    return bool(_is_of_transformers(config._attn_implementation))


# A graph that is being traced takes the answer for a constant.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_of_transformers(attention: str | None) -> bool:
    """Whether the attention function of a name is transformers' own; "eager", if not registered, is the model's."""
    function = ALL_ATTENTION_FUNCTIONS.get(attention)
    return attention in (None, "eager") if function is None else str(function.__module__).startswith("transformers.")
