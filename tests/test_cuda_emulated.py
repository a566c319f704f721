"""The CUDA kernels without a GPU: the same grid, the same accuracy, thread by thread on the CPU.

What is compiled here is csrc/ itself, but for the Hopper kernel and for a page of instructions: cuda_emulation/.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cases import HAS_GPU, SMALL_SIZES, Case, Tensors
from cuda_emulator import COMPILER, load
from test_linear import run
from tolerance import assert_as_exact_as_peft, peft_sequence

from lora_kernels import NF4Weight, lora_linear, lora_linear_reference
from lora_kernels.backends import cuda, eager
from lora_kernels.dropout import Dropout, drop_threshold
from lora_kernels.functional import _choices
from lora_kernels.nf4_codec import BLOCK_SIZES

pytestmark = [
    pytest.mark.skipif(HAS_GPU, reason="the kernels themselves run here"),
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler"),
]
CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module", autouse=True)
def emulated() -> Iterator[None]:
    extension, patch = load(), pytest.MonkeyPatch()
    patch.setattr(cuda, "_extension", lambda device: extension)
    patch.setattr(cuda, "_stream", lambda device: 0)
    patch.setattr(cuda, "BACKEND", replace(cuda.BACKEND, refuses=lambda problem: None))
    patch.setattr("lora_kernels.functional.choose", _choose)
    before = dict(_choices)
    _choices.clear()
    yield
    _choices.clear()
    _choices.update(before)
    patch.undo()


def _choose(problem, name):
    from lora_kernels.dispatch import Choice

    return Choice(problem, cuda.BACKEND if name == "cuda" else eager.BACKEND, {})


def check(case: Case, monkeypatch: pytest.MonkeyPatch, weight: NF4Weight | None = None, autocast: bool = False) -> None:
    tensors = case.tensors(CPU)
    base = tensors.weight if weight is None else weight.dequantize(case.dtype)
    p = drop_threshold(case.dropout) / 65536
    mask = Dropout(case.dropout, torch.tensor([0x0123456789ABCDEF])) if case.dropout else None
    monkeypatch.setattr(Dropout, "draw", staticmethod(lambda p, device: mask))
    keep = None if mask is None else mask.keep(case.M, case.K)

    def ours(x, lora_A, lora_B, bias=None):
        with torch.autocast("cpu", dtype=case.dtype, enabled=autocast):
            return lora_linear(
                x, tensors.weight if weight is None else weight, lora_A, lora_B, scaling=case.scaling, bias=bias,
                dropout_p=case.dropout, backend="cuda",
            )  # fmt: skip

    def peft(x, lora_A, lora_B, bias=None):
        lora_A, lora_B = (t.to(case.dtype) if autocast else t for t in (lora_A, lora_B))
        return peft_sequence(x, base, lora_A, lora_B, case.scaling, bias, keep, p)

    def exact(x, lora_A, lora_B, bias=None):
        return lora_linear_reference(
            x, base.double(), lora_A, lora_B, scaling=case.scaling, bias=bias, keep=keep, dropout_p=case.dropout
        )

    assert_as_exact_as_peft(run(ours, tensors), run(peft, tensors), run(exact, tensors.double()))


SIZES = [*SMALL_SIZES, (130, 264, 136, 16), (40, 64, 200, 20), (34, 520, 72, 70)]


def grid() -> Iterator[Case]:
    for index, (M, K, N, rank) in enumerate(SIZES):
        plain = Case(M, K, N, rank, BF16)
        masked = replace(plain, dropout=(0.1, 0.5, 0.3)[index % 3])
        yield plain
        yield replace(masked, bias=True)
        yield replace(plain, adapter_dtype=FP32, bias=True)
        yield replace(masked, adapter_dtype=FP32)
        yield replace(plain, transposed_weight=True, strided_x=True)
        yield replace(masked, dtype=FP16, transposed_weight=True)
        yield replace(masked, dtype=FP16, adapter_dtype=FP32)
        yield replace(masked, dtype=FP32)
    yield Case(40, 24, 80, 512, BF16, dropout=0.5)
    yield Case(33, 48, 40, 8, FP16, dropout=1.0)
    yield Case(0, 48, 40, 8, BF16, bias=True)


@pytest.mark.parametrize("case", list(grid()), ids=str)
def test_is_as_exact_as_peft(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@pytest.mark.parametrize("M", [16, 65])
def test_float32_adapters_under_autocast(M: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(M, 96, 130, 12, BF16, FP32, dropout=0.3)
    check(case, monkeypatch, autocast=True)
    check(case, monkeypatch, NF4Weight.quantize(case.tensors(CPU).weight), autocast=True)


def test_a_scaling_that_is_a_tensor() -> None:
    t = Case(40, 64, 48, 8, BF16).tensors(CPU)
    arguments = (t.x, t.weight, t.lora_A, t.lora_B)
    by_tensor = lora_linear(*arguments, scaling=torch.tensor(0.7, dtype=torch.float64), backend="cuda")
    assert torch.equal(by_tensor, lora_linear(*arguments, scaling=0.7, backend="cuda"))


@pytest.mark.parametrize("needed", ["x", "lora_A", "lora_B"])
def test_one_gradient_alone(needed: str) -> None:
    tensors = Case(70, 40, 72, 8, FP32).tensors(CPU)

    def gradient(call, t: Tensors) -> torch.Tensor:
        leaf = getattr(t, needed).requires_grad_()
        return torch.autograd.grad(call(t), leaf, t.dy)[0]

    got = gradient(lambda t: lora_linear(t.x, t.weight, t.lora_A, t.lora_B, backend="cuda"), tensors)
    want = gradient(lambda t: lora_linear_reference(t.x, t.weight, t.lora_A, t.lora_B), tensors.double())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    "size",
    # On the emulation's 6 multiprocessors: shares that end with tiles, that cross them, that hold several of them.
    [(1000, 256, 392, 8), (700, 264, 17, 16), (260, 904, 1000, 12), (400, 136, 128, 150), (0, 16, 8, 4)],
    ids=str,
)
def test_adapter_gradients_in_parts(
    size: tuple[int, int, int, int], dtype: torch.dtype, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    M, K, N, rank = size
    generator = torch.Generator().manual_seed(0)
    x, dy, s, t = (torch.randn(M, width, generator=generator).to(dtype) for width in (K, N, rank, rank))
    dropout = Dropout(dropout_p, torch.tensor([0x0123456789ABCDEF])) if dropout_p else None
    zeros = torch.zeros(1000, dtype=torch.int32)
    monkeypatch.setattr(cuda, "zeros_for", lambda device, count: zeros[:count])

    dA, dB = cuda.backward_adapters(x, dy, s, t, dropout, FP32)
    assert dA is not None
    assert dB is not None
    kept = x.double() if dropout is None else torch.where(dropout.keep(M, K), x.double(), 0.0)
    torch.testing.assert_close(dA.double(), t.double().T @ kept, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dB.double(), dy.double().T @ s.double(), rtol=1e-5, atol=1e-4)
    # The counters are as they were found, and each gradient alone has the same values.
    assert not zeros.any()
    alone_A, _ = cuda.backward_adapters(x, dy, None, t, dropout, FP32)
    _, alone_B = cuda.backward_adapters(None, dy, s, None, None, FP32)
    torch.testing.assert_close(alone_A, dA, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(alone_B, dB, rtol=1e-5, atol=1e-4)
    assert not zeros.any()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("block_size", [BLOCK_SIZES[0], 64, BLOCK_SIZES[-1]])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 63), (40, 64), (130, 33)], ids=str)
def test_dequantizes_to_the_bit(shape: tuple[int, int], block_size: int, double_quant: bool) -> None:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight = NF4Weight.quantize(dense, block_size, double_quant)
    for dtype in (BF16, FP16, FP32):
        assert torch.equal(cuda.dequantize(weight, dtype), weight.dequantize(dtype))
    moved = torch.empty(len(weight.packed) + 3, dtype=torch.uint8)[3:]
    moved.copy_(weight.packed)
    assert torch.equal(cuda.dequantize(replace(weight, packed=moved), BF16), weight.dequantize(BF16))


NF4_SIZES = [(1, 32, 8, 1), (3, 160, 70, 8), (9, 1056, 50, 3), (16, 128, 64, 12), (50, 64, 40, 8), (5, 63, 17, 3)]


@pytest.mark.parametrize("size", NF4_SIZES, ids=str)
@pytest.mark.parametrize("block_size", [32, 64])
def test_nf4(size: tuple[int, int, int, int], block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Case(*size, BF16, bias=True)
    weight = NF4Weight.quantize(plain.tensors(CPU).weight, block_size, double_quant=block_size == 64)
    for case in (
        plain,
        replace(plain, adapter_dtype=FP32, dropout=0.3),
        replace(plain, dtype=FP16, strided_x=True),
        replace(plain, dtype=FP32),
    ):
        check(case, monkeypatch, weight)


# Less than a slice of K, slices that end early, K in several groups, more tiles than blocks at once, ranks of
# several tiles.
STREAMED = [(1, 64, 8, 1), (3, 320, 70, 8), (8, 2112, 500, 17), (9, 1088, 50, 40), (16, 128, 2000, 3), (13, 576, 33, 9)]


@pytest.mark.parametrize("size", STREAMED, ids=str)
def test_streams_few_tokens(size: tuple[int, int, int, int]) -> None:
    plain = Case(*size, BF16, bias=True)
    weight = NF4Weight.quantize(plain.tensors(CPU).weight, block_size=64 if size[0] % 2 else 128)
    mask = Dropout(0.3, torch.tensor([0x0123456789ABCDEF]))
    for case, precision, dropout in (
        (plain, "native", None),
        (replace(plain, dtype=FP16, strided_x=True), "native", mask),
        (replace(plain, adapter_dtype=FP32), "rounded", mask),
        (replace(plain, adapter_dtype=FP32), "split", None),
        (replace(plain, dtype=FP16, adapter_dtype=FP32), "split", mask),
    ):
        t = case.tensors(CPU)
        if dropout is None:
            # Of other strides.
            t = replace(t, lora_B=t.lora_B.T.contiguous().T)
        base, keep = weight.dequantize(case.dtype), None if dropout is None else dropout.keep(case.M, case.K)
        p = 0.0 if dropout is None else drop_threshold(dropout.p) / 65536
        scale = case.scaling / (1 - p)
        y, s = cuda.forward(t.x, weight, t.lora_A, t.lora_B, t.bias, scale, dropout, precision, True)
        # Where the arithmetic is that of x's dtype, so are the adapters of whom it is compared with.
        dtype = t.lora_A.dtype if precision == "split" else case.dtype
        lora_A, lora_B = t.lora_A.to(dtype), t.lora_B.to(dtype)
        kept = t.x.double() if keep is None else torch.where(keep, t.x.double(), 0.0)
        exact_s = scale * kept @ t.lora_A.double().T
        exact = t.x.double() @ base.double().T + exact_s @ t.lora_B.double().T + t.bias.double()
        peft = peft_sequence(t.x, base, lora_A, lora_B, case.scaling, t.bias, keep, p)
        rounded_s = torch.nn.functional.linear(kept.to(dtype), lora_A) * scale
        assert_as_exact_as_peft({"y": y, "s": s}, {"y": peft, "s": rounded_s}, {"y": exact, "s": exact_s})


def test_long_rows_stream_where_shared_memory_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulation has the 99 KB of compute capability 8.6, where X of 16 tokens is then in many parts."""
    t = Case(16, 20480, 16, 8, BF16).tensors(CPU)
    weight = NF4Weight.quantize(t.weight)
    arguments = (t.x, weight, t.lora_A, t.lora_B, None, 2.0, None, "native", False)
    y, _ = cuda.forward(*arguments)
    d = t.double()
    want = lora_linear_reference(d.x, weight.dequantize(BF16).double(), d.lora_A, d.lora_B, scaling=2.0)
    torch.testing.assert_close(y.double(), want, rtol=0.01, atol=0.01 * want.abs().max().item())
    # No other kernel of a packed weight has counters.
    monkeypatch.setattr(cuda, "zeros_for", lambda device, count: torch.zeros(0, dtype=torch.int32))
    with pytest.raises(RuntimeError, match="too few counters"):
        cuda.forward(*arguments)


def awkward(N: int, K: int, block_size: int, dtype: torch.dtype) -> NF4Weight:
    """Codes of every kind, and scales: zeros, the largest and the least that `dtype` has, others that it rounds."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(256, (N * K // 2,), generator=generator, dtype=torch.uint8)
    scales = torch.randn(N * K // block_size, generator=generator)
    largest, least = torch.finfo(dtype).max * 0.99, torch.finfo(dtype).tiny
    first = torch.tensor([0.0, -0.0, largest, -largest, least, least / 3, 1e-45, 1.17e-38, 1 / 3, -1e-3])
    scales[: len(first)] = first
    form = NF4Weight.quantize(torch.randn(N, K, generator=generator), block_size, double_quant=False)
    return replace(form, packed=codes, absmax=scales)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("block_size", [64, 256])
def test_a_streamed_weight_has_the_bits_of_a_decoded_one(block_size: int, dtype: torch.dtype) -> None:
    """Tokens with a single one in them give the weight itself, of every code and of scales of every kind."""
    N, K = 40, 640
    weight = awkward(N, K, block_size, dtype)
    want = weight.dequantize(dtype)
    lora_A, lora_B = torch.ones(1, K, dtype=dtype), torch.zeros(N, 1, dtype=dtype)
    for tokens in (8, 16, 40):
        for first in range(0, K, tokens):
            x = torch.zeros(tokens, K, dtype=dtype)
            x[torch.arange(tokens), torch.arange(first, first + tokens)] = 1
            got, _ = cuda.forward(x, weight, lora_A, lora_B, None, 1.0, None, "native", False)
            assert torch.equal(got.T, want[:, first : first + tokens])


def test_what_streams_leaves_its_counters_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the same bits when it finds them so again."""
    t = Case(12, 2368, 300, 24, BF16).tensors(CPU)
    weight = NF4Weight.quantize(t.weight)
    zeros = torch.zeros(1000, dtype=torch.int32)
    asked = []
    monkeypatch.setattr(cuda, "zeros_for", lambda device, count: asked.append(count) or zeros[:count])
    first, second = (cuda.forward(t.x, weight, t.lora_A, t.lora_B, None, 2.0, None, "native", True) for _ in range(2))
    assert max(asked) <= len(zeros)
    assert not zeros.any()
    for value, want in zip(second, first, strict=True):
        assert torch.equal(value, want)  # type: ignore[arg-type]


# M, in_features, out_features and rank: fewer rows than a step, columns that are no multiple of a panel or a strip,
# rows in several groups, every number of tokens that blocks are compiled for, ranks of several chunks.
INSIDE = [
    (1, 64, 8, 1),
    (3, 320, 264, 66),
    (8, 96, 72, 20),
    (12, 192, 2056, 3),
    (17, 160, 200, 20),
    (33, 320, 1000, 64),
    (64, 64, 40, 9),
]


@pytest.mark.parametrize("block_size", [32, 64, 256])
@pytest.mark.parametrize("size", INSIDE, ids=str)
def test_dx_of_few_tokens(size: tuple[int, int, int, int], block_size: int) -> None:
    plain = Case(*size, BF16)
    weight = NF4Weight.quantize(plain.tensors(CPU).weight, block_size, double_quant=block_size == 64)
    mask = Dropout(0.3, torch.tensor([0x0123456789ABCDEF]))
    for case, precision, dropout in (
        (plain, "native", None),
        (replace(plain, dtype=FP16), "native", mask),
        (replace(plain, adapter_dtype=FP32), "rounded", mask),
        (replace(plain, adapter_dtype=FP32), "split", mask),
    ):
        t = case.tensors(CPU)
        base, keep = weight.dequantize(case.dtype), None if dropout is None else dropout.keep(case.M, case.K)
        # Of any strides.
        lora_A, lora_B = t.lora_A.T.contiguous().T, t.lora_B.T.contiguous().T
        first, second = (
            cuda.backward_input(t.dy, weight, lora_A, lora_B, 0.7, dropout, precision, True) for _ in range(2)
        )
        (dx, got_t), dtype = first, t.lora_A.dtype if precision == "split" else case.dtype
        exact_t = 0.7 * t.dy.double() @ t.lora_B.double()
        rounded_t = t.dy.to(dtype) @ t.lora_B.to(dtype) * 0.7
        branch, exact_branch = rounded_t @ t.lora_A.to(dtype), exact_t @ t.lora_A.double()
        if keep is not None:
            branch, exact_branch = torch.where(keep, branch, 0), torch.where(keep, exact_branch, 0.0)
        chain = t.dy @ base + branch.to(case.dtype)
        exact = t.dy.double() @ base.double() + exact_branch
        assert_as_exact_as_peft({"dx": dx, "t": got_t}, {"dx": chain, "t": rounded_t}, {"dx": exact, "t": exact_t})
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_dx_has_the_bits_of_a_decoded_weight(block_size: int, dtype: torch.dtype) -> None:
    """Rows of dy with a single one in them give the weight itself, of every code and of scales of every kind."""
    N, K = 72, 640
    weight = awkward(N, K, block_size, dtype)
    want = weight.dequantize(dtype)
    lora_A, lora_B = torch.zeros(1, K, dtype=dtype), torch.ones(N, 1, dtype=dtype)
    for tokens in (8, 16, 32, 64):
        for first in range(0, N, tokens):
            dy = torch.eye(N, dtype=dtype)[first : first + tokens]
            dx, _ = cuda.backward_input(dy, weight, lora_A, lora_B, 1.0, None, "native", True)
            assert dx is not None
            assert torch.equal(dx, want[first : first + tokens])


@pytest.mark.parametrize(
    ("M", "K", "N", "offset"), [(65, 64, 40, 0), (5, 48, 40, 0), (5, 64, 44, 0), (5, 64, 40, 1)], ids=str
)
def test_dx_of_what_must_be_decoded_first(M: int, K: int, N: int, offset: int) -> None:
    """Too many rows, columns and rows of which some would be left over, a dy that does not start on 16 bytes."""
    t = Case(M, K, N, 4, BF16).tensors(CPU)
    weight = NF4Weight.quantize(t.weight)
    dy = torch.empty(M * N + offset, dtype=BF16)[offset:].view(M, N).copy_(t.dy)
    assert cuda._nf4_path(dy, weight, forward=False).where == "by a launch of its own"
    dx, _ = cuda.backward_input(dy, weight, t.lora_A, t.lora_B, 1.0, None, "native", True)
    exact = dy.double() @ (weight.dequantize(BF16).double() + t.lora_B.double() @ t.lora_A.double())
    assert dx is not None
    assert (dx.double() - exact).norm() / exact.norm() < 5e-3


def test_the_weight_may_have_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(20, 48, 40, 4, BF16)
    t = case.tensors(CPU)
    spread = torch.zeros(80, 96, dtype=BF16)[::2, ::2]
    spread.copy_(t.weight)
    arguments = (t.lora_A, t.lora_B)
    for x in (t.x, t.x[:1]):
        got = lora_linear(x, spread, *arguments, backend="cuda")
        torch.testing.assert_close(got, lora_linear(x, t.weight, *arguments, backend="cuda"), rtol=0.01, atol=0.01)
