"""lora_linear over an NF4 weight: exact over the values that it decodes to, forward and backward, whatever holds it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from cases import HAS_GPU, SMALL_SIZES, Case, Tensors, backends_of
from tolerance import assert_as_exact_as_peft, peft_sequence
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear, NF4Weight, compiled, explain, lora_linear, lora_linear_reference, use_backend
from lora_kernels.backends import cuda
from lora_kernels.dropout import Dropout, drop_threshold, keep_mask
from lora_kernels.limits import BASE_DTYPES

LEAVES = ("x", "lora_A", "lora_B", "bias")


@dataclass(frozen=True)
class NF4Case:
    case: Case
    block_size: int = 64
    double_quant: bool = True
    # None: the dtype that is computed in.
    original: torch.dtype | None = None

    def __str__(self) -> str:
        words = [str(self.case), f"b{self.block_size}", "double" if self.double_quant else "plain"]
        return "-".join([*words, *([] if self.original is None else [f"from-{str(self.original)[6:]}"])])

    def weight(self, dense: Tensor) -> NF4Weight:
        return NF4Weight.quantize(dense.to(self.original or self.case.dtype), self.block_size, self.double_quant)


# K is a multiple of the block size, smaller, a divisor of it, odd; N K is odd; a block spans many rows.
_SIZES = [*SMALL_SIZES[:-1], (33, 256, 96, 100)]
_LARGE = [(500, 2000, 500, 16), (1, 4096, 1024, 8), (16, 1024, 4096, 16), (2048, 1024, 520, 64), (129, 500, 2000, 512)]


def grid() -> list[NF4Case]:
    half = torch.bfloat16 if HAS_GPU else torch.float16
    cases = []
    for index, (M, K, N, rank) in enumerate(_SIZES + (_LARGE if HAS_GPU else [])):
        plain = Case(M, K, N, rank, half)
        masked = replace(plain, dropout=(0.1, 0.5, 0.3)[index % 3], bias=True)
        cases += [
            NF4Case(plain),
            NF4Case(masked, (32, 128, 4096)[index % 3], double_quant=False),
            NF4Case(replace(masked, dtype=torch.bfloat16, adapter_dtype=torch.float32), 32),
            NF4Case(replace(plain, strided_x=True), original=torch.float32),
            NF4Case(replace(plain, dtype=torch.bfloat16), 256, original=torch.float16),
            NF4Case(replace(masked, dtype=torch.float32), 64, original=torch.bfloat16),
        ]
    return [*cases, NF4Case(Case(0, 48, 40, 8, half, bias=True))]


# The third is skipped where it cannot be compiled.
BACKENDS = ("eager", "triton", *(["cuda"] if HAS_GPU else []))
GRID = [(nf4, backend) for nf4 in grid() for backend in (*backends_of(nf4.case, HAS_GPU), *BACKENDS[2:])]


def run(call: Callable[..., Tensor], tensors: Tensors) -> dict[str, Tensor]:
    leaves = {k: t.detach().requires_grad_() for k, t in vars(tensors).items() if k in LEAVES and t is not None}
    y = call(**leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), tensors.dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}}


@pytest.mark.parametrize(("nf4", "backend"), GRID, ids=str)
def test_is_as_exact_as_peft_over_the_decoded_weight(nf4: NF4Case, backend: str, device: torch.device) -> None:
    case = nf4.case
    tensors = case.tensors(device)
    weight = nf4.weight(tensors.weight)
    decoded = weight.dequantize(case.dtype)
    torch.manual_seed(0)
    ours = run(
        lambda x, lora_A, lora_B, bias=None: lora_linear(
            x, weight, lora_A, lora_B, scaling=1.7, bias=bias, dropout_p=case.dropout, backend=backend
        ),
        tensors,
    )
    torch.manual_seed(0)
    dropout = Dropout.draw(case.dropout, device)
    keep = None if dropout is None else keep_mask(dropout.seed, case.M, case.K, case.dropout)
    p = drop_threshold(case.dropout) / 65536
    peft = run(
        lambda x, lora_A, lora_B, bias=None: peft_sequence(x, decoded, lora_A, lora_B, 1.7, bias, keep, p), tensors
    )
    exact = run(
        lambda x, lora_A, lora_B, bias=None: lora_linear_reference(
            x, decoded.double(), lora_A, lora_B, scaling=1.7, bias=bias, keep=keep, dropout_p=case.dropout
        ),
        tensors.double(),
    )
    assert_as_exact_as_peft(ours, peft, exact)


def make(device: torch.device, double_quant: bool = True) -> tuple[dict[str, Tensor], NF4Weight]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = {"x": (5, 96), "lora_A": (3, 96), "lora_B": (40, 3), "bias": (40,)}
    tensors = {
        name: torch.randn(shape, generator=generator, device=device).requires_grad_() for name, shape in shapes.items()
    }
    dense = torch.randn(40, 96, generator=generator, device=device, dtype=torch.float32)
    return tensors, NF4Weight.quantize(dense, 64, double_quant)


def gradients(y: Tensor, tensors: dict[str, Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y.square().sum(), [tensors[k] for k in LEAVES]))


# Triton's interpreter has no bfloat16.
DECODED = [(b, d) for b in BACKENDS for d in BASE_DTYPES if HAS_GPU or b == "eager" or d != torch.bfloat16]


@pytest.mark.parametrize(("backend", "dtype"), DECODED, ids=str)
def test_forward_and_backward_decode_the_same_bits(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """Rows of the identity read the weight out, one element a product."""
    dense = torch.randn(40, 96, device=device, dtype=torch.float16)
    weight = NF4Weight.quantize(dense)
    expected = weight.dequantize(dtype)
    adapter = torch.zeros(1, 96, dtype=dtype, device=device), torch.zeros(40, 1, dtype=dtype, device=device)
    x = torch.eye(96, dtype=dtype, device=device, requires_grad=True)
    y = lora_linear(x, weight, *adapter, backend=backend)
    assert torch.equal(y.detach().T, expected)
    x = torch.zeros(40, 96, dtype=dtype, device=device, requires_grad=True)
    lora_linear(x, weight, *adapter, backend=backend).backward(torch.eye(40, dtype=dtype, device=device))
    assert x.grad is not None
    assert torch.equal(x.grad, expected)


def test_the_eager_backend_keeps_nothing_of_the_size_of_the_weight(device: torch.device) -> None:
    tensors, weight = make(device)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = lora_linear(**tensors, weight=weight, backend="eager")
    own = {t.data_ptr() for t in weight.tensors()}
    assert own <= {t.data_ptr() for t in kept}
    assert all(t.numel() < 40 * 96 for t in kept)
    gradients(y, tensors)


@pytest.mark.parametrize("needed", [("lora_A", "lora_B"), ("bias",), ("x",)], ids="+".join)
def test_the_weight_is_kept_for_dx_alone(needed: tuple[str, ...], device: torch.device) -> None:
    tensors, weight = make(device)
    tensors = {k: t.detach().requires_grad_(k in needed) for k, t in tensors.items()}
    alive = weakref.ref(weight.packed)
    y = lora_linear(**tensors, weight=weight, backend="eager")
    del weight
    gc.collect()
    assert (alive() is not None) == ("x" in needed)
    y.sum().backward()
    assert {k for k, t in tensors.items() if t.grad is not None} == set(needed)


@pytest.mark.parametrize("double_quant", [False, True])
def test_writing_to_the_weight_before_the_backward_is_an_error(double_quant: bool, device: torch.device) -> None:
    for index in range(5 if double_quant else 2):
        tensors, weight = make(device, double_quant)
        parts = [t.clone() for t in weight.tensors()]
        y = lora_linear(**tensors, weight=NF4Weight.of(parts, weight.form), backend="eager")
        parts[index].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(y, tensors)


def test_freed_storage_is_an_error_and_filled_storage_is_read(device: torch.device) -> None:
    tensors, weight = make(device)
    expected = gradients(lora_linear(**tensors, weight=weight, backend="eager"), tensors)
    storage, held = weight.packed.untyped_storage(), weight.packed.clone()
    y = lora_linear(**tensors, weight=weight, backend="eager")
    size = storage.nbytes()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match="packed storage was freed between forward and backward"):
        torch.autograd.grad(y.square().sum(), tensors["x"], retain_graph=True)
    storage.resize_(size)
    with torch.autograd._unsafe_preserve_version_counter(weight.packed):
        weight.packed.copy_(held)
    for left, right in zip(gradients(y, tensors), expected, strict=True):
        assert torch.equal(left, right)


def test_saved_tensors_may_be_moved_away_and_back(device: torch.device) -> None:
    tensors, weight = make(device)
    expected = gradients(lora_linear(**tensors, weight=weight, backend="eager"), tensors)
    with torch.autograd.graph.save_on_cpu():
        y = lora_linear(**tensors, weight=weight, backend="eager")
    for left, right in zip(gradients(y, tensors), expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool, device: torch.device) -> None:
    tensors, weight = make(device)

    def call(*leaves: Tensor) -> Tensor:
        return lora_linear(**dict(zip(LEAVES, leaves, strict=True)), weight=weight, dropout_p=0.3, backend="eager")

    torch.manual_seed(4)
    expected = gradients(call(*(tensors[k] for k in LEAVES)), tensors)
    torch.manual_seed(4)
    y = checkpoint(call, *(tensors[k] for k in LEAVES), use_reentrant=use_reentrant)
    y.square().sum().backward()
    for name, right in zip(LEAVES, expected, strict=True):
        left = tensors[name].grad
        assert left is not None
        assert torch.equal(left, right)


def test_autocast(device: torch.device) -> None:
    """The weight is not cast: it is decoded to the autocast dtype."""
    tensors, weight = make(device)
    with torch.autocast(device.type, torch.bfloat16):
        y = lora_linear(**tensors, weight=weight, backend="eager")
    assert y.dtype == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16):
        expected = lora_linear(**tensors, weight=weight.dequantize(torch.bfloat16), backend="eager")
    assert torch.equal(y, expected)
    for left, right in zip(gradients(y, tensors), gradients(expected, tensors), strict=True):
        assert torch.equal(left, right)


def test_a_dense_and_an_nf4_weight_of_one_shape_take_turns(device: torch.device) -> None:
    """What was checked and chosen for the one does not serve the other."""
    tensors, weight = make(device)
    for _ in range(2):
        for base in (weight, weight.dequantize()):
            torch.testing.assert_close(
                lora_linear(**tensors, weight=base),
                lora_linear_reference(**{k: t for k, t in tensors.items()}, weight=weight.dequantize()),
                rtol=1e-4,
                atol=1e-4,
            )


def test_explain(device: torch.device) -> None:
    tensors, weight = make(device)
    with use_backend("eager"):
        choice = explain(**tensors, weight=weight)
    assert choice.problem.nf4
    assert "the NF4 weight is decoded into a temporary" in str(choice)
    with use_backend("eager"):
        assert "NF4" not in str(explain(**tensors, weight=weight.dequantize()))
    assert choice.nf4_paths is None


def paths(M: int, N: int, K: int, backend: str, device: torch.device, offset: int = 0) -> list[str]:
    """What explain() prints of how this call goes."""
    x = torch.ones(M * K + offset, dtype=torch.float16, device=device)[offset:].view(M, K).requires_grad_()
    lora_A, lora_B = (torch.ones(shape, dtype=torch.float16, device=device) for shape in ((2, K), (N, 2)))
    weight = NF4Weight.quantize(torch.ones(N, K, device=device), 64)
    lines = str(explain(x.view(1, M, K), weight, lora_A, lora_B, backend=backend)).splitlines()
    return [line for line in lines if "of this call: the NF4 weight is decoded" in line]


def test_explain_says_how_this_very_call_goes(device: torch.device) -> None:
    from lora_kernels.backends.triton.nf4_tiles import cannot_fly, fly_table
    from lora_kernels.backends.triton.tiles import chip_of

    chip = chip_of(device)
    weight = NF4Weight.quantize(torch.ones(64, 128, device=device), 64)
    if (reason := cannot_fly(chip, torch.ones(1, 128, dtype=torch.float16, device=device), weight)) is not None:
        for line in paths(5, 64, 128, "triton", device):
            assert line.endswith(f"by a launch of its own, because {reason}")
        return
    most = [fly_table(chip, forward).most_rows for forward in (True, False)]
    inside, alone = "decoded inside of the product, because", "decoded by a launch of its own, because"
    for M in sorted({1, *most, *(rows + 1 for rows in most)}):
        assert paths(M, 64, 128, "triton", device) == [
            f"{product} of this call: the NF4 weight is "
            + (f"{inside} {M} rows are at most {rows}" if rows >= M else f"{alone} {M} rows are more than {rows}")
            for product, rows in zip(("forward", "backward"), most, strict=True)
        ]
    # x where it lies, and a dy as a backward gets it: only one of the two products cannot load its rows.
    unaligned = f"{alone} the rows of the left operand do not start on 16 bytes"
    assert [line.endswith(unaligned) for line in paths(4, 64, 128, "triton", device, offset=1)] == [True, False]
    assert [line.endswith(unaligned) for line in paths(4, 42, 128, "triton", device)] == [False, True]
    for line in paths(4, 64, 96, "triton", device):
        assert line.endswith(f"{alone} 96 columns are no multiple of the block size, 64")


def test_explain_knows_when_a_backward_decodes_nothing(device: torch.device) -> None:
    tensors, weight = make(device)
    nowhere = "backward of this call: the NF4 weight is decoded nowhere, because"
    tensors["x"].requires_grad_(False)
    assert f"{nowhere} x needs no gradient" in str(explain(**tensors, weight=weight, backend="triton"))
    tensors["x"].requires_grad_()
    assert nowhere not in str(explain(**tensors, weight=weight, backend="triton"))
    with torch.no_grad():
        assert f"{nowhere} gradients are off" in str(explain(**tensors, weight=weight, backend="triton"))


def test_the_cuda_backend_says_how_a_call_goes(device: torch.device) -> None:
    weight = NF4Weight.quantize(torch.ones(40, 96, device=device), 64)
    narrow, odd = (NF4Weight.quantize(torch.ones(shape, device=device), 64) for shape in ((40, 80), (42, 96)))
    off = replace(weight, packed=torch.cat([weight.packed[:1], weight.packed])[1:])
    x = torch.ones(65, 96, dtype=torch.float16, device=device)
    alone, inside = "by a launch of its own", "inside of the product"
    of_dtype = (alone, "float32 products are not written for packed weights")
    off_16 = (alone, "the packed codes do not start on 16 bytes")
    for left, packed, forward, backward in (
        (x[:48], weight, (inside, "48 rows are at most 48"), (inside, "48 rows are at most 64")),
        (x[:49], weight, (alone, "49 rows are more than 48"), (inside, "49 rows are at most 64")),
        (x, weight, (alone, "65 rows are more than 48"), (alone, "65 rows are more than 64")),
        (x[:5, :80], narrow, *[(alone, "80 columns are no multiple of 32")] * 2),
        (x[:5], odd, (inside, "5 rows are at most 48"), (alone, "42 columns of dy are no multiple of 8")),
        (x[:5].float(), weight, of_dtype, of_dtype),
        (x[:5], off, off_16, off_16),
        # x where it lies, and a dy as a backward gets it.
        (
            x.flatten()[1 : 1 + 5 * 96].view(5, 96),
            weight,
            (alone, "the rows of x do not start on 16 bytes"),
            (inside, "5 rows are at most 64"),
        ),
    ):
        assert cuda._nf4_paths(left, packed) == (forward, backward)
    dy = x.flatten()[1:41].view(1, 40)
    assert cuda._nf4_path(dy, weight, forward=False) == (alone, "the rows of dy do not start on 16 bytes")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(5, 95)}, ValueError, "x had shape"),
        ({"x": torch.zeros(5, 96, dtype=torch.float64)}, TypeError, r"x was torch\.float64"),
        ({"lora_A": torch.zeros(3, 96, dtype=torch.float16)}, TypeError, r"lora_A was torch\.float16"),
        ({"lora_B": torch.zeros(41, 3)}, ValueError, "lora_B had shape"),
        ({"weight": "nf4"}, TypeError, "weight was a str, but must be a tensor or an NF4Weight"),
        (
            {"bias": NF4Weight.quantize(torch.ones(1, 1))},
            TypeError,
            "bias was a NF4Weight, but must be a tensor or None",
        ),
    ],
)
def test_bad_arguments(changes: dict[str, Tensor], error: type[Exception], message: str) -> None:
    tensors, weight = make(torch.device("cpu"))
    with pytest.raises(error, match=message):
        lora_linear(**({**tensors, "weight": weight} | changes))  # type: ignore[arg-type]


def test_a_weight_on_another_device_is_named() -> None:
    tensors, weight = make(torch.device("cpu"))
    with pytest.raises(ValueError, match="weight was on meta, but must be on x's device, cpu"):
        lora_linear(**tensors, weight=weight.to("meta"))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_compiled(p: float, double_quant: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    tensors, weight = make(device, double_quant)
    call = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    results = []
    for function in (lora_linear, call):
        torch.manual_seed(1)
        y = function(**tensors, weight=weight, dropout_p=p, backend="eager")
        results.append([y.detach(), *gradients(y, tensors)])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_a_compiled_module(device: torch.device) -> None:
    torch._dynamo.reset()
    layer = LoRALinear(96, 40, r=3, quantize="nf4", device=device)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 5, 96, device=device, requires_grad=True)
    with use_backend("eager"):
        y, expected = torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    left, right = (torch.autograd.grad(out.square().sum(), [x, layer.lora_A, layer.lora_B]) for out in (y, expected))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("double_quant", [False, True])
def test_operators_follow_the_rules_of_torch_library(double_quant: bool, device: torch.device) -> None:
    tensors, weight = make(device, double_quant)
    leaves = (tensors[k] for k in LEAVES)
    arguments = (*leaves, None, 2.0, None, 0.0, "native", "eager", 64, True, list(weight.tensors()))
    torch.library.opcheck(compiled._forward, arguments)
