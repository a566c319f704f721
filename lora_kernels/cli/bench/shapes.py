"""The models whose layers are measured: their sizes, and the projections that follow from these. Nowhere else."""

from __future__ import annotations

from dataclasses import dataclass

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Of these, who reads the same x.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder, as its published configuration has them."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocabulary: int

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of each linear layer of a block."""
        hidden, wide = self.hidden, self.intermediate
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        mlp = [(hidden, wide), (hidden, wide), (wide, hidden)]
        return dict(zip(PROJECTIONS, attention + mlp, strict=True))


MODELS = {
    "llama-8b": ModelShape(4096, 14336, 32, 8, 128, 32, 128256),  # Llama 3.1
    "llama-70b": ModelShape(8192, 28672, 64, 8, 128, 80, 128256),  # Llama 3.1
    "qwen-7b": ModelShape(3584, 18944, 28, 4, 128, 28, 152064),  # Qwen 2.5
    "qwen-32b": ModelShape(5120, 27648, 40, 8, 128, 64, 152064),  # Qwen 2.5
    "mistral-7b": ModelShape(4096, 14336, 32, 8, 128, 32, 32768),
    "gemma-9b": ModelShape(3584, 14336, 16, 8, 256, 42, 256000),  # Gemma 2
}
# Nobody's model: small enough for a CPU, where it shows that a command works and nothing about speed.
TINY = ModelShape(64, 160, 4, 2, 16, 2, 512)


def projection_shapes(model: str) -> list[tuple[int, int]]:
    """The distinct (in_features, out_features) of a model, in the order of a block."""
    return list(dict.fromkeys(MODELS[model].projections.values()))


def projection_groups(model: str) -> list[tuple[int, tuple[int, ...]]]:
    """in_features, and the out_features of every member, of each group of a model."""
    projections = MODELS[model].projections
    return [(projections[group[0]][0], tuple(projections[name][1] for name in group)) for group in GROUPS]
