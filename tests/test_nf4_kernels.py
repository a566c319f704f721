"""The Triton kernels for NF4 weights, called through their launchers: bits of the decoding, both paths, every split."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from cases import HAS_GPU
from graphs import captured
from tolerance import assert_as_exact_as_peft
from torch import Tensor

from lora_kernels import explain
from lora_kernels.backends import Precision
from lora_kernels.dropout import Dropout, keep_mask
from lora_kernels.nf4 import NF4Weight

pytest.importorskip("triton", reason="Triton is not installed")

from lora_kernels.backends.triton import launches, nf4_launch
from lora_kernels.backends.triton.nf4_tiles import (
    NF4Tiles,
    fly_table,
    path_for,
    product_parts,
    product_tiles,
)
from lora_kernels.backends.triton.tiles import Chip, chip_of, share_parts

# Triton's interpreter cuts float32 off where it converts to bfloat16, and multiplies bfloat16 as integers.
DTYPES = (torch.float16, torch.float32, *((torch.bfloat16,) if HAS_GPU else ()))
HALF = torch.bfloat16 if HAS_GPU else torch.float16
HOPPER = Chip((9, 0), 132, 232448, True)


def quantized(device: torch.device, N: int, K: int, block_size: int = 64, double_quant: bool = True) -> NF4Weight:
    generator = torch.Generator(device).manual_seed(N * 7 + K * 3 + block_size)
    dense = torch.randn(N, K, generator=generator, device=device) * K**-0.5
    return NF4Weight.quantize(dense, block_size, double_quant)


def assert_same_bits(value: Tensor, expected: Tensor) -> None:
    assert value.dtype == expected.dtype
    assert torch.equal(value.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("N", "K", "block_size", "double_quant"),
    [
        (1, 1, 64, True),
        (3, 17, 32, True),
        (63, 65, 64, False),
        (500, 63, 128, True),
        (17, 2000, 256, True),
        (64, 96, 64, True),
        (40, 512, 1024, False),
        (33, 500, 2048, True),
        (5, 4096, 4096, True),
        (129, 1024, 64, True),
    ],
)
def test_decodes_the_same_bits_as_the_format(
    N: int, K: int, block_size: int, double_quant: bool, dtype: torch.dtype, device: torch.device
) -> None:
    weight = quantized(device, N, K, block_size, double_quant)
    assert_same_bits(nf4_launch.dequantize(weight, dtype), weight.dequantize(dtype))


@pytest.mark.parametrize("block", [256, 1024, 8192])
def test_every_size_of_block_decodes_the_same_bits(block: int, device: torch.device) -> None:
    for block_size in (32, 512, 4096):
        weight = quantized(device, 37, 330, block_size)
        assert_same_bits(nf4_launch.dequantize(weight, HALF, block=block), weight.dequantize(HALF))


@pytest.mark.parametrize("offset", [1, 4, 8])
def test_codes_may_start_anywhere(offset: int, device: torch.device) -> None:
    """A shard of a flattened parameter starts where the one before it ended."""
    weight = quantized(device, 40, 128)
    packed = torch.empty(offset + weight.packed.numel(), dtype=torch.uint8, device=device)[offset:]
    moved = replace(weight, packed=packed.copy_(weight.packed))
    assert_same_bits(nf4_launch.dequantize(moved, HALF), weight.dequantize(HALF))
    left = torch.randn(3, 128, device=device).to(HALF)
    down, up = torch.randn(128, 2, device=device).to(HALF), torch.randn(2, 40, device=device).to(HALF)
    assert path_for(chip_of(device), left, moved, True) == ("scratch", "the packed codes do not start on 16 bytes")
    out, _ = nf4_launch.one_pass(left, moved, down, up, None, 1.0, None, True, "native")
    expected, _ = nf4_launch.one_pass(left, weight, down, up, None, 1.0, None, True, "native", path="scratch")
    assert torch.equal(out, expected)


@dataclass(frozen=True)
class ProductCase:
    """One product that decodes on the fly."""

    M: int
    K: int
    N: int
    rank: int
    block_size: int = 64
    forward: bool = True
    parts: int | None = None
    double_quant: bool = True
    dropout: float = 0.0
    bias: bool = False
    precision: Precision = "native"
    tiles: NF4Tiles | None = None

    def __str__(self) -> str:
        words = [f"{self.M}x{self.K}x{self.N}r{self.rank}b{self.block_size}", "forward" if self.forward else "backward"]
        if self.parts is not None:
            words.append(f"parts{self.parts}")
        if self.tiles is not None:
            words.append(f"tiles{self.tiles.block_m}x{self.tiles.block_c}x{self.tiles.block_l}")
        return "-".join([*words, self.precision, f"p{self.dropout}"])

    @property
    def wide(self) -> int:
        """The length of the reduction."""
        return self.K if self.forward else self.N


PLAIN = [
    ProductCase(1, 32, 1, 1, 32),
    ProductCase(3, 64, 17, 3, parts=1),
    ProductCase(17, 192, 63, 8, parts=3, double_quant=False),
    ProductCase(63, 96, 130, 12, 32, parts=2, dropout=0.3, bias=True),
    ProductCase(16, 512, 40, 16, 512, parts=4),
    ProductCase(5, 256, 500, 64, 128, parts=5, dropout=0.1),
    ProductCase(70, 128, 33, 100),
    ProductCase(17, 128, 48, 8, tiles=NF4Tiles(16, 64, 128, 4, 4, 1)),
    ProductCase(17, 320, 48, 8, tiles=NF4Tiles(16, 128, 64, 4, 4, 1)),
    ProductCase(33, 192, 80, 8, precision="rounded", parts=2),
]
if HAS_GPU:
    # The interpreter has no products of bfloat16, which split adapters are made of.
    PLAIN += [
        ProductCase(17, 192, 63, 8, precision="split", parts=2),
        ProductCase(63, 512, 130, 40, precision="split", dropout=0.3),
        ProductCase(1, 4096, 14336, 16),
        ProductCase(16, 14336, 4096, 64, dropout=0.1),
        ProductCase(64, 4096, 2000, 16, bias=True),
        ProductCase(300, 2048, 512, 256),
    ]
CASES = [replace(case, forward=forward) for case in PLAIN for forward in (True, False)]


def operands(case: ProductCase, device: torch.device) -> tuple[Tensor, NF4Weight, Tensor, Tensor, Tensor | None]:
    """left, weight, down, up and bias."""
    generator = torch.Generator(device).manual_seed(case.M + case.K + case.N)

    def randn(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    adapters = HALF if case.precision == "native" else torch.float32
    # As wide as the tensors that lora_linear has are, from their second column on.
    left = randn(case.M, case.wide + 8)[:, 8:]
    lora_A = randn(case.rank, case.K, dtype=adapters) / case.K**0.5
    lora_B = randn(case.N, case.rank, dtype=adapters) / case.rank**0.5
    down, up = (lora_A.T, lora_B.T) if case.forward else (lora_B, lora_A)
    bias = randn(up.shape[1]) if case.bias and case.forward else None
    return left, quantized(device, case.N, case.K, case.block_size, case.double_quant), down, up, bias


def chain(
    left: Tensor, weight: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, keep: Tensor | None, forward: bool,
    scale: float,
) -> dict[str, Tensor]:
    """What the kernel computes, from library products in the dtypes of the arguments; weight is op(W)."""
    masked = left if keep is None or not forward else torch.where(keep, left, 0.0)
    s = scale * (masked.to(down.dtype) @ down)
    branch = s @ up
    if keep is not None and not forward:
        branch = torch.where(keep, branch, 0.0)
    out = (left @ weight + branch).to(left.dtype)
    return {"out": out if bias is None else out + bias, "s": s}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_decode_on_the_fly(case: ProductCase, device: torch.device) -> None:
    left, weight, down, up, bias = operands(case, device)
    dropout = Dropout.draw(case.dropout, device)
    keep = None if dropout is None else keep_mask(dropout.seed, case.M, case.K, case.dropout)
    out, s = nf4_launch.product(
        left, weight, down, up, bias, 1.7, dropout, case.forward, case.precision, tiles=case.tiles, parts=case.parts
    )
    decoded = weight.dequantize(HALF)
    decoded = decoded.T if case.forward else decoded
    tensors = (left, decoded, down, up, bias)
    exact = chain(*(None if t is None else t.double() for t in tensors), keep, case.forward, 1.7)  # type: ignore[arg-type]
    if case.precision == "rounded":
        tensors = (left, decoded, down.to(HALF), up.to(HALF), bias)
    assert_as_exact_as_peft({"out": out, "s": s}, chain(*tensors, keep, case.forward, 1.7), exact)  # type: ignore[arg-type]


def test_the_scale_may_be_a_tensor(device: torch.device) -> None:
    left, weight, down, up, bias = operands(ProductCase(5, 128, 40, 3), device)
    expected = nf4_launch.product(left, weight, down, up, bias, 1.75, None, True, "native")
    scale = torch.full((1,), 1.75, device=device)
    for value, want in zip(
        nf4_launch.product(left, weight, down, up, bias, scale, None, True, "native"), expected, strict=True
    ):
        assert torch.equal(value, want)


def test_an_empty_batch_has_an_empty_product(device: torch.device) -> None:
    left, weight, down, up, bias = operands(ProductCase(0, 128, 40, 3), device)
    out, s = nf4_launch.one_pass(left, weight, down, up, bias, 1.0, None, True, "native")
    assert out.shape == (0, 40)
    assert s.shape == (0, 3)


@pytest.mark.parametrize("forward", [True, False])
def test_both_paths_take_the_same_decoded_values(forward: bool, device: torch.device) -> None:
    """Rows of the identity pick single weights, which no sum rounds."""
    N, K = 48, 64
    weight = quantized(device, N, K)
    wide, columns = (K, N) if forward else (N, K)
    left = torch.eye(wide, device=device, dtype=HALF)
    down = torch.zeros(wide, 1, device=device, dtype=HALF)
    up = torch.zeros(1, columns, device=device, dtype=HALF)
    decoded = weight.dequantize(HALF)
    for path in ("fly", "scratch"):
        out, _ = nf4_launch.one_pass(left, weight, down, up, None, 1.0, None, forward, "native", path=path)
        assert torch.equal(out, decoded.T if forward else decoded)


def test_counters_are_zero_after_every_launch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Tensor] = []

    def zeros(device: torch.device, count: int) -> Tensor:
        kept.append(torch.zeros(count, dtype=torch.int32, device=device))
        return kept[-1]

    monkeypatch.setattr(nf4_launch, "zeros_for", zeros)
    for case in CASES:
        left, weight, down, up, bias = operands(case, device)
        nf4_launch.product(
            left, weight, down, up, bias, 1.0, None, case.forward, case.precision, tiles=case.tiles, parts=case.parts
        )
        assert not kept[-1].any()


def test_every_run_has_the_same_bits(device: torch.device) -> None:
    left, weight, down, up, bias = operands(ProductCase(17, 512, 63, 8), device)
    first, *others = (
        nf4_launch.product(left, weight, down, up, bias, 1.0, None, True, "native", parts=4) for _ in range(4)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_table_chooses_the_path(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    weight, x = quantized(device, 128, 128), torch.zeros(1000, 128, dtype=HALF, device=device)
    for forward in (True, False):
        most = fly_table(HOPPER, forward).most_rows
        assert path_for(HOPPER, x[:most], weight, forward) == ("fly", f"{most} rows are at most {most}")
        reason = f"{most + 1} rows are more than {most}"
        assert path_for(HOPPER, x[: most + 1], weight, forward) == ("scratch", reason)
    for left, other, reason in (
        (x.float(), weight, "float32 products are not written for tensor cores"),
        (x[:, 32:], quantized(device, 8, 96), "96 columns are no multiple of the block size, 64"),
        (x[:, 1:], weight, "the rows of the left operand do not start on 16 bytes"),
        (x.view(-1)[: 8 * 129].view(8, 129), weight, "the rows of the left operand do not start on 16 bytes"),
    ):
        assert path_for(HOPPER, left[:8], other, True) == ("scratch", reason)
    reason = "the tensor cores of this chip take no operand from registers"
    assert path_for(replace(HOPPER, capability=(10, 0)), x[:1], weight, True) == ("scratch", reason)
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = "looking codes up in the lanes of a warp is written for CUDA"
    assert path_for(HOPPER, x[:1], weight, True) == ("scratch", reason)


def test_tiles_hold_all_rows_where_they_can() -> None:
    for forward in (True, False):
        largest = fly_table(HOPPER, forward).tiles[-1].block_m
        for M in (1, 16, 17, 64, 65, 128, 1000):
            for C in (64, 4096, 14336):
                assert product_tiles(HOPPER, M, C, forward).block_m >= min(M, largest)
    assert product_tiles(HOPPER, 64, 14336, True).block_c == 128
    assert product_tiles(HOPPER, 64, 4096, True).block_c == 64


def test_parts_fill_the_chip() -> None:
    tiles = product_tiles(HOPPER, 1, 4096, True)
    for tile_count, steps in ((64, 112), (224, 32), (1, 1), (1, 1000), (4096, 8)):
        parts = product_parts(HOPPER, tiles, tile_count, steps)
        assert 1 <= parts <= min(16, steps)
        assert parts * tile_count >= min(HOPPER.multiprocessors, tile_count * min(16, steps))
        assert 1 <= share_parts(steps) <= 8


def test_parts_are_those_that_were_the_best_of_a_sweep() -> None:
    """docs/kernels.md has the sweep: 4096 -> 14336, 14336 -> 4096 and the first one's dx at 1 to 16 rows, and at 64."""
    for M, forward, tile_count, steps, best in ((1, True, 112, 64, 4), (16, True, 32, 224, 8), (1, False, 64, 112, 6),
                                                (64, True, 64, 112, 6)):  # fmt: skip
        assert product_parts(HOPPER, product_tiles(HOPPER, M, 4096, forward), tile_count, steps) == best


def test_a_path_that_a_weight_cannot_go_is_refused(device: torch.device) -> None:
    left, weight, down, up, bias = operands(ProductCase(5, 96, 40, 3, 64), device)
    with pytest.raises(ValueError, match="path was 'fly', but must be 'scratch': 96 columns are no multiple"):
        nf4_launch.one_pass(left, weight, down, up, bias, 1.0, None, True, "native", path="fly")


def test_explain_prints_the_paths(device: torch.device) -> None:
    left, weight, down, up, bias = operands(ProductCase(5, 128, 40, 3), device)
    text = str(explain(left, weight, down.T, up.T, bias=bias, backend="triton"))
    most = fly_table(chip_of(device), True).most_rows
    assert f"the NF4 weight is decoded inside of the product up to {most} rows forward" in text


@pytest.mark.gpu
def test_on_the_fly_there_is_no_decoded_copy(device: torch.device) -> None:
    case = ProductCase(4, 4096, 4096, 16)
    left, weight, down, up, bias = operands(case, device)
    peaks = {}
    for path in ("fly", "scratch"):
        nf4_launch.one_pass(left, weight, down, up, bias, 1.0, None, True, "native", path=path)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        nf4_launch.one_pass(left, weight, down, up, bias, 1.0, None, True, "native", path=path)
        peaks[path] = torch.cuda.max_memory_allocated() - before
        assert torch.cuda.memory_allocated() - before == 0
    assert peaks["scratch"] >= 2 * case.N * case.K
    assert peaks["fly"] < 2 * case.N * case.K // 4


@pytest.mark.gpu
def test_a_new_number_of_rows_compiles_nothing(device: torch.device) -> None:
    from lora_kernels.backends.triton.nf4_product import nf4_product_kernel

    left, weight, down, up, bias = operands(ProductCase(16, 512, 256, 16), device)
    tiles = product_tiles(chip_of(device), 16, 256, True)

    def compiled(rows: int) -> int:
        nf4_launch.product(left[:rows], weight, down, up, bias, 1.0, None, True, "native", tiles=tiles)
        return len(nf4_product_kernel.device_caches[torch.cuda.current_device()][0])

    before = compiled(16)
    assert {compiled(rows) for rows in (1, 2, 3, 8, 15)} == {before}


@pytest.mark.gpu
def test_a_captured_graph_replays(device: torch.device) -> None:
    left, weight, down, up, bias = operands(ProductCase(4, 1024, 512, 16), device)

    def step() -> Tensor:
        return nf4_launch.one_pass(left, weight, down, up, bias, 1.0, None, True, "native", path="fly")[0]

    graph, out = captured(step)
    for _ in range(3):
        left.normal_()
        graph.replay()
        assert torch.equal(out, step())


@pytest.mark.gpu
def test_direct_launches_give_the_bits_of_tritons_own(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    left, weight, down, up, bias = operands(ProductCase(4, 1024, 512, 16), device)

    def step() -> tuple[Tensor, ...]:
        return (
            *nf4_launch.product(left, weight, down, up, bias, 1.0, None, True, "native"),
            nf4_launch.dequantize(weight, HALF),
        )

    step()
    names = {kind[0] for kind, direct in launches._direct_kernels.items() if direct is not None}
    assert {"nf4_product", "dequantize"} <= names
    direct = step()
    monkeypatch.setattr(launches, "_has_hooks", lambda: True)
    for value, want in zip(direct, step(), strict=True):
        assert torch.equal(value, want)
