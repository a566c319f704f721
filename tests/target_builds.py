"""What is compiled for chips that need not be there: every kernel in every shipped configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from lora_kernels.backends import Activation, Precision
from lora_kernels.backends.triton.launches import MOST_MEMBERS
from lora_kernels.backends.triton.mask_launch import MASK_BLOCK
from lora_kernels.backends.triton.nf4_launch import DEQUANTIZE_BLOCK
from lora_kernels.backends.triton.nf4_tiles import NF4Tiles, fly_table
from lora_kernels.backends.triton.tiles import (
    Chip,
    FewRowsTiles,
    GradTiles,
    OnePassTiles,
    candidates,
    few_rows_table,
    group_grad_tiles,
    narrow_table,
    shipped_grad_tiles,
)

# Compute capability -> bytes of shared memory that a block can have.
CHIPS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}
# AMD's gfx942, an MI300, whose capability PyTorch gives as 9.4.
GFX942 = 942
SHARED_MEMORY = {**CHIPS, GFX942: 65536}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class PlainBlock:
    """The one configuration of a kernel that goes through memory from one end to the other."""

    block: int
    num_warps: int = 4
    num_stages: int = 1


MASK, DEQUANTIZE, GATED = PlainBlock(MASK_BLOCK), PlainBlock(DEQUANTIZE_BLOCK), PlainBlock(1024)


@dataclass(frozen=True)
class Build:
    """One kernel, as the launcher would ask for it.

    turned: the weight is stored as [K, N], and not as [N, K]. ieee: float32 products are without TF32. alone: S is
    computed by programs that have fewer tiles, if X has no mask and there are no halves. want_h: of a gated MLP's
    backward.
    eights: sizes and strides that 8 divides and 16 does not. flat: one loop over all steps of all tiles.
    shared: S is computed in shares, and not by every tile. pairs: the products that an output is a sum of; bias: that
    it has one, where that is not said by `masked`.
    """

    capability: int
    kernel: str
    tiles: OnePassTiles | FewRowsTiles | GradTiles | NF4Tiles | PlainBlock
    forward: bool = True
    masked: bool = False
    precision: Precision = "native"
    rank: int = 16
    aligned: bool = True
    members: int = 1
    dtype: str = "bf16"
    turned: bool = False
    ieee: bool = False
    block_size: int = 64
    double_quant: bool = True
    activation: Activation = "silu"
    want_h: bool = True
    alone: bool = True
    eights: bool = False
    flat: bool = True
    shared: bool = True
    pairs: int = 1
    bias: bool = False

    def __str__(self) -> str:
        tiles = "x".join(str(v) for k, v in asdict(self.tiles).items() if k.startswith("block"))
        booleans = ("forward", "masked", "aligned", "turned", "ieee", "alone", "eights", "flat", "shared", "bias")
        flags = [k for k in booleans if getattr(self, k)]
        flags += [self.dtype, self.precision]
        if self.members > 1:
            flags.append(f"{self.members} members")
        if self.kernel == "products":
            flags.append(f"{self.pairs} pairs")
        if self.kernel in ("nf4_product", "dequantize"):
            flags.append(f"b{self.block_size} {'double' if self.double_quant else 'plain'}")
        if self.kernel.startswith("gated"):
            flags.append(self.activation)
        chip = "gfx" if self.capability == GFX942 else "sm_"
        return " ".join([f"{chip}{self.capability}", self.kernel, tiles, f"r{self.rank}", *flags])


def chip_of(capability: int) -> Chip:
    major, minor = (9, 4) if capability == GFX942 else divmod(capability, 10)
    return Chip((major, minor), 132, SHARED_MEMORY[capability], capability == 90)


def builds(capability: int) -> Iterator[Build]:
    """Everything for a chip: all tiles in bf16, and what is rarer in the widest of them."""
    if capability == GFX942:
        yield from amd_builds()
        return
    yield from tile_builds(capability)
    # Compiling takes its time, and what other dtypes and layouts change, they change alike on the chips between.
    if capability in (80, 90):
        yield from variants(capability)


def tile_builds(capability: int) -> Iterator[Build]:
    chip = chip_of(capability)
    tables = {t for use_tma in (True, False) for t in candidates(chip, 2, use_tma)}
    for tiles in sorted(tables, key=str):
        for forward in (True, False):
            plain = Build(capability, "one_pass", tiles, forward)
            yield plain
            # Compiling takes its time: the kernels of 89 are those of 86, and in the tiles that both hold, those of 80.
            # A stage less needs less of everything; and halves are scarcest of registers in the widest tiles.
            if capability == 89 or (capability == 86 and tiles in candidates(chip_of(80), 2, False)):
                continue
            if replace(tiles, num_stages=tiles.num_stages + 1, rate=0.0) in {replace(t, rate=0.0) for t in tables}:
                continue
            yield replace(plain, masked=True, rank=64)
            widest = tiles == candidates(chip, 2, tiles.use_tma)[0]
            if tiles.use_tma or widest:
                yield replace(plain, precision="split")
            if widest and not tiles.use_tma:
                yield replace(plain, precision="split", aligned=False)
            if tiles.use_tma or capability in (80, 86):
                yield from group_builds(plain)
            if tiles.use_tma:
                yield replace(plain, alone=False)
            if tiles.use_tma and widest:
                yield from (replace(plain, flat=False), replace(plain, flat=False, masked=True, rank=64))
            if tiles.use_tma and not forward:
                yield replace(plain, kernel="backward")
                if widest:
                    yield replace(plain, kernel="backward", flat=False)
                if tiles.block_n == 256:
                    yield replace(plain, kernel="backward", masked=True)
                if widest:
                    yield replace(plain, masked=True, precision="split")
    for few in few_rows_table(chip):
        for forward in (True, False):
            plain = Build(capability, "few_rows", few, forward)
            yield plain
            yield replace(plain, masked=True, rank=64, precision="native" if forward else "split")
            if forward:
                yield replace(plain, precision="split")
            if few == few_rows_table(chip)[0]:
                yield replace(plain, eights=True)
    if chip.has_tma:
        yield from product_builds(capability)
    yield Build(capability, "adapter_grads", shipped_grad_tiles(chip, 2), rank=64)
    yield Build(capability, "adapter_grads", shipped_grad_tiles(chip, 2), masked=True, precision="split", rank=64)
    for masked, rank in ((False, 16), (True, 64)):
        three = group_grad_tiles(chip, 2, MOST_MEMBERS * rank, masked)
        yield Build(capability, "group_grads", three, masked=masked, rank=rank, members=MOST_MEMBERS)
    for forward in (True, False):
        for nf4_tiles in fly_table(chip, forward).tiles:
            plain = Build(capability, "nf4_product", nf4_tiles, forward)
            yield plain
            if capability != 89:
                yield replace(plain, masked=True, rank=64)
                yield replace(plain, precision="split", aligned=False)
    # For p below a half, and above.
    yield from (Build(capability, "mask", MASK), Build(capability, "mask", MASK, forward=False))
    yield Build(capability, "dequantize", DEQUANTIZE)
    yield Build(capability, "dequantize", DEQUANTIZE, aligned=False)
    for kernel, activation in (("gated_forward", "silu"), ("gated_backward", "silu"), ("gated_backward", "gelu_tanh")):
        yield Build(capability, kernel, GATED, activation=activation, want_h=activation == "silu")
    yield Build(capability, "gated_forward", GATED, aligned=False, dtype="fp16", activation="gelu_tanh")


def product_builds(capability: int) -> Iterator[Build]:
    """Layers and groups of a large rank: S of them, and what S is a part of."""
    chip = chip_of(capability)
    for narrow in narrow_table(chip):
        yield Build(capability, "products", narrow)
    yield replace(Build(capability, "products", narrow_table(chip)[1], forward=False), members=MOST_MEMBERS)
    widest, *others = candidates(chip, 2, True)
    for tiles in others:
        yield Build(capability, "products", tiles, pairs=2)
    for forward in (True, False):
        yield Build(capability, "products", widest, forward, pairs=2, bias=forward)
        yield Build(capability, "products", widest, forward, pairs=2, flat=False)
    yield Build(capability, "products", widest, pairs=2, members=MOST_MEMBERS, dtype="fp16")
    yield Build(capability, "products", widest, pairs=2, members=MOST_MEMBERS, bias=True)
    yield Build(capability, "products", widest, forward=False, pairs=4)
    yield Build(capability, "products", widest, forward=False, pairs=2 * MOST_MEMBERS)


def group_builds(single: Build) -> Iterator[Build]:
    """A group's kernel in the tiles of a single one. The flat loop (TMA) is where products could be serialized."""
    tiles = single.tiles
    assert isinstance(tiles, OnePassTiles)
    plain = replace(single, kernel="group_forward" if single.forward else "group_input", members=MOST_MEMBERS)
    yield from (plain, replace(plain, alone=False))
    # What registers and overlap are scarcest for; compiling all variants in all tiles would take minutes more.
    if not tiles.use_tma or tiles.block_n < 256:
        return
    yield replace(plain, masked=True, rank=64)
    if not single.forward:
        yield replace(plain, masked=True, rank=64, alone=False)
        yield replace(plain, members=2)
        yield replace(plain, rank=64)
        yield replace(plain, precision="split")


def variants(capability: int) -> Iterator[Build]:
    """Dtypes, layouts and kinds of adapters besides those of tile_builds, in the widest tiles alone."""
    chip = chip_of(capability)
    (widest, *_), (pointers, *_) = candidates(chip, 2, True), candidates(chip, 2, False)
    (wide_fp32,) = candidates(chip, 4, False)
    for forward in (True, False):
        plain = Build(capability, "one_pass", widest, forward)
        yield replace(plain, precision="rounded", masked=True)
        yield replace(plain, dtype="fp16", turned=True, rank=64)
        yield replace(plain, tiles=pointers, aligned=False)
        yield replace(plain, tiles=wide_fp32, dtype="fp32", masked=True)
    grads = Build(capability, "adapter_grads", shipped_grad_tiles(chip, 2))
    yield replace(grads, precision="rounded", aligned=False)
    yield replace(grads, dtype="fp32", tiles=shipped_grad_tiles(chip, 4), masked=True)
    forward_tiles, backward_tiles = (fly_table(chip, forward).tiles[0] for forward in (True, False))
    nf4 = Build(capability, "nf4_product", forward_tiles, block_size=32, double_quant=False, precision="rounded")
    yield from (nf4, replace(nf4, tiles=backward_tiles, forward=False, block_size=4096, dtype="fp16"))
    if capability == 90:
        yield from scarce_variants(capability, widest, wide_fp32)


def scarce_variants(capability: int, widest: OnePassTiles, wide_fp32: OnePassTiles) -> Iterator[Build]:
    """What compiles alike wherever it compiles, or takes long: on one chip."""
    chip = chip_of(capability)
    for forward in (True, False):
        yield Build(capability, "one_pass", wide_fp32, forward, dtype="fp32", ieee=True)
        if not forward:
            whole = Build(capability, "backward", widest, forward)
            yield from (replace(whole, alone=False), replace(whole, masked=True, rank=32))
            yield replace(whole, dtype="fp16", turned=True, precision="rounded")
            yield replace(whole, tiles=wide_fp32, dtype="fp32")
        # Ranks that 16 does not divide: what Triton sees in a multiple of 16 must be seen in them, too.
        yield Build(capability, "one_pass", widest, forward, rank=8)
        yield Build(capability, "nf4_product", fly_table(chip, forward).tiles[0], forward, rank=8)
        group = Build(capability, "group_forward" if forward else "group_input", widest, forward, members=2)
        yield replace(group, rank=8, members=MOST_MEMBERS)
        yield replace(group, rank=256, shared=False)
        yield Build(capability, "one_pass", widest, forward, rank=256, shared=False)
        # The widest share of S, from float32 adapters.
        yield from (replace(group, precision="rounded"), replace(group, precision="rounded", members=MOST_MEMBERS))
        yield replace(group, tiles=wide_fp32, dtype="fp32", turned=True)
    yield Build(capability, "adapter_grads", shipped_grad_tiles(chip, 4), dtype="fp32", ieee=True)
    of_two = Build(capability, "group_grads", group_grad_tiles(chip, 2, 32, False), members=2)
    yield replace(of_two, precision="rounded", dtype="fp16")
    yield replace(of_two, rank=8)
    yield replace(of_two, dtype="fp32", tiles=group_grad_tiles(chip, 4, 32, False))
    yield Build(capability, "dequantize", DEQUANTIZE, block_size=32, double_quant=False, dtype="fp32")
    yield Build(capability, "dequantize", DEQUANTIZE, block_size=4096, dtype="fp16")


def amd_builds() -> Iterator[Build]:
    """A sample of each kernel: that AMD's compiler takes it. Nobody has seen these run yet."""
    tiles, *_ = candidates(chip_of(GFX942), 2, False)
    for forward in (True, False):
        yield Build(GFX942, "one_pass", tiles, forward, masked=True, rank=64)
    (wide_fp32,) = candidates(chip_of(GFX942), 4, False)
    yield Build(GFX942, "one_pass", wide_fp32, dtype="fp32", rank=64)
    yield Build(GFX942, "group_input", tiles, forward=False, members=2)
    yield Build(GFX942, "adapter_grads", shipped_grad_tiles(chip_of(GFX942), 2))
    yield Build(GFX942, "mask", MASK)
    yield Build(GFX942, "dequantize", DEQUANTIZE)
    yield Build(GFX942, "gated_backward", GATED)
