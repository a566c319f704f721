"""The mask is as specified, the same wherever it is drawn, and drawn anew for every call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear, dropout, explain, lora_linear, lora_linear_reference
from lora_kernels.autograd import LoRALinearFunction
from lora_kernels.dropout import Dropout, drop_threshold, inverse_keep, keep_mask

WORD = 0xFFFFFFFF


def philox4x32_7(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32 with seven rounds as the paper of Salmon et al. writes it, in Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(7):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & WORD, (p0 >> 32) ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def specified_mask(seed: int, rows: int, columns: int, p: float) -> Tensor:
    def keep(m: int, k: int) -> bool:
        words = philox4x32_7((k // 8, m, 0, 0), (seed & WORD, seed >> 32 & WORD))
        return words[k % 8 // 2] >> 16 * (k % 2) & 0xFFFF >= round(p * 65536)

    return torch.tensor([[keep(m, k) for k in range(columns)] for m in range(rows)])


def test_philox_itself() -> None:
    """The known answers of the authors' library (Random123, kat_vectors) for philox4x32 with 7 rounds."""
    assert philox4x32_7((0, 0, 0, 0), (0, 0)) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    ones = philox4x32_7((WORD,) * 4, (WORD,) * 2)
    assert ones == (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**62 - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize(("rows", "columns", "p"), [(1, 1, 0.5), (3, 17, 0.1), (6, 40, 0.75), (2, 8, 1e-9)])
def test_the_mask_is_the_specified_one(seed: int, rows: int, columns: int, p: float, device: torch.device) -> None:
    mask = keep_mask(torch.tensor([seed], device=device), rows, columns, p)
    assert torch.equal(mask.cpu(), specified_mask(seed, rows, columns, p))


@pytest.mark.parametrize("p", [1e-9, 0.0001, 0.1, 0.4999, 0.5, 0.5001, 0.9, 0.9999, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 17), (5, 64), (17, 200), (130, 513)])
def test_the_bits_that_kernels_read(rows: int, columns: int, p: float, device: torch.device) -> None:
    pytest.importorskip("triton")
    from lora_kernels.backends.triton.mask_launch import bits_of

    draw = Dropout(p, torch.tensor([0x0123456789ABCDEF], device=device))
    bits = bits_of(draw, rows, columns)
    assert bits is not None
    k = torch.arange(columns, device=device)
    kept = bits[:, k // 32] >> (16 * (k % 2) + k % 32 // 2) & 1
    assert torch.equal(kept == 1, keep_mask(draw.seed, rows, columns, p))
    assert bits_of(draw, rows, columns) is bits, "dx and dA of one backward share it"
    assert bits_of(None, rows, columns) is None


def test_a_mask_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = torch.tensor([77])
    whole = keep_mask(seed, 50, 33, 0.3)
    monkeypatch.setattr(dropout, "_CPU_BLOCK", 16)
    assert torch.equal(keep_mask(seed, 50, 33, 0.3), whole)
    assert torch.equal(whole, specified_mask(77, 50, 33, 0.3))


def test_what_is_kept_and_its_factor(device: torch.device) -> None:
    seed = torch.tensor([3], device=device)
    assert not keep_mask(seed, 20, 20, 1.0).any()
    assert keep_mask(seed, 20, 20, 0.0).all()
    assert inverse_keep(1.0) == 0.0
    assert inverse_keep(0.0) == 1.0
    assert inverse_keep(1 - 2.0**-18) == 0.0, "nothing is kept where p rounds to 1"
    for p in (0.05, 0.1, 1 / 3, 0.999):
        assert inverse_keep(p) * (65536 - drop_threshold(p)) == pytest.approx(65536, rel=1e-15)


def test_statistics(device: torch.device) -> None:
    mask = keep_mask(torch.tensor([11], device=device), 2000, 500, 0.1).double()
    deviation = (0.1 * 0.9) ** 0.5
    assert abs(mask.mean() - 0.9) < 5 * deviation / 1000
    assert ((mask.mean(0) - 0.9).abs() < 5.5 * deviation / 2000**0.5).all()
    assert ((mask.mean(1) - 0.9).abs() < 5.5 * deviation / 500**0.5).all()
    for shifted in (mask.roll(1, 0), mask.roll(1, 1), mask.roll(8, 1)):
        assert abs((mask * shifted).mean() - 0.81) < 6e-4 * 2, "neighbours are correlated"


def make(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = {"x": (9, 24), "weight": (40, 24), "lora_A": (3, 24), "lora_B": (40, 3)}
    return {
        name: torch.randn(shape, generator=generator, device=device).requires_grad_(name != "weight")
        for name, shape in shapes.items()
    }


def step(tensors: dict[str, Tensor], p: float, backend: str, seed: int, training: bool = True) -> list[Tensor]:
    torch.manual_seed(seed)
    y = lora_linear(**tensors, scaling=2.0, dropout_p=p, training=training, backend=backend)
    leaves = [t for t in tensors.values() if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    """Alike but for the order of additions, by the norm: a single element may cancel."""
    for a, b in zip(left, right, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


def test_a_backend_draws_the_specified_mask(backend: str, device: torch.device) -> None:
    """The adapter copies single elements of x to y: the mask can be read there."""
    x, weight = torch.ones(5, 24, device=device), torch.zeros(24, 24, device=device)
    eye = torch.eye(24, device=device)
    torch.manual_seed(4)
    y = lora_linear(x, weight, eye, eye, dropout_p=0.4, backend=backend)
    torch.manual_seed(4)
    drawn = Dropout.draw(0.4, device)
    assert drawn is not None
    keep = specified_mask(int(drawn.seed), 5, 24, 0.4)
    torch.testing.assert_close(y.cpu(), keep.float() * inverse_keep(0.4))


def test_triton_and_eager_agree(device: torch.device) -> None:
    assert_same(step(make(device), 0.4, "eager", 5), step(make(device), 0.4, "triton", 5))


def test_against_the_reference(backend: str, device: torch.device) -> None:
    tensors = make(device)
    torch.manual_seed(6)
    seed = Dropout.draw(0.25, device).seed  # type: ignore[union-attr]
    leaves = {k: t.detach().double().requires_grad_(k != "weight") for k, t in tensors.items()}
    keep = keep_mask(seed, 9, 24, 0.25)
    y = lora_linear_reference(**leaves, scaling=2.0, keep=keep, dropout_p=0.25)
    wanted = [t for t in leaves.values() if t.requires_grad]
    expected = [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]
    assert_same([t.double() for t in step(tensors, 0.25, backend, 6)], expected)


def test_the_seed_of_torch_repeats_a_run(backend: str, device: torch.device) -> None:
    tensors = make(device)
    first, again, other = (step(tensors, 0.5, backend, seed) for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], other[0])


def test_no_dropout_draws_no_number(backend: str, device: torch.device) -> None:
    tensors = make(device)
    exact = step(tensors, 0.0, backend, 1)
    assert_same(step(tensors, 0.5, backend, 2, training=False), exact)
    torch.manual_seed(3)
    expected = torch.rand(1, device=device)
    torch.manual_seed(3)
    lora_linear(**tensors, dropout_p=0.0, backend=backend)
    lora_linear(**tensors, dropout_p=0.9, training=False, backend=backend)
    assert torch.equal(torch.rand(1, device=device), expected)


def test_everything_dropped(backend: str, device: torch.device) -> None:
    tensors = make(device)
    y, dx, dA, dB = step(tensors, 1.0, backend, 1)
    base = tensors["x"].detach() @ tensors["weight"].T
    torch.testing.assert_close(y, base, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dx, 2 * base @ tensors["weight"], rtol=1e-4, atol=1e-3)
    assert not dA.any()
    assert not dB.any()


def test_an_infinity_that_is_dropped_is_zero(backend: str, device: torch.device) -> None:
    """In the adapter, that is: the frozen product sees all of x, and here has a weight of zero for it."""
    tensors = make(device)
    torch.manual_seed(8)
    keep = Dropout.draw(0.5, device).keep(9, 24)  # type: ignore[union-attr]
    row, column = next(map(tuple, (~keep).nonzero().tolist()))
    x = tensors["x"].detach().clone()
    x[row, column] = float("inf")
    weight, lora_A, lora_B = (tensors[k].detach() for k in ("weight", "lora_A", "lora_B"))
    s, t = torch.randn(9, 3, device=device), torch.randn(9, 3, device=device)
    chosen = explain(x, weight, lora_A, lora_B, backend=backend).backend
    torch.manual_seed(8)
    mask = Dropout.draw(0.5, device)
    _, s = chosen.forward(x, torch.zeros_like(weight), lora_A, lora_B, None, 1.0, mask, "native", True)
    assert s is not None
    assert s.isfinite().all()
    dA, _ = chosen.backward_adapters(x, torch.randn(9, 40, device=device), None, t, mask, torch.float32)
    assert dA is not None
    assert dA.isfinite().all()


def test_each_module_has_its_own_mask(device: torch.device) -> None:
    torch.manual_seed(0)
    layer = LoRALinear(24, 40, r=24, alpha=24, dropout=0.5, device=device)
    with torch.no_grad():
        layer.lora_B.normal_()
    twin = copy.deepcopy(layer)
    x = torch.randn(9, 24, device=device)
    assert not torch.equal(layer(x), twin(x))
    assert not torch.equal(layer(x), layer(x)), "each call has its own mask too"
    assert torch.equal(layer.eval()(x), twin.eval()(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    layers = [LoRALinear(24, 24, r=4, alpha=8, dropout=0.4, device=device) for _ in range(3)]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(6, 24, device=device)

    def gradients(checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(12)
        h = leaf = x.clone().requires_grad_()
        for layer in layers:
            h = checkpoint(layer, h, use_reentrant=use_reentrant) if checkpointed else layer(h)
            h = torch.nn.functional.dropout(h.tanh(), 0.2)
        parameters = [leaf, *(p for layer in layers for p in (layer.lora_A, layer.lora_B))]
        # Reentrant checkpointing takes no torch.autograd.grad.
        for p in parameters:
            p.grad = None
        h.square().sum().backward()
        return [p.grad for p in parameters if p.grad is not None]

    plain, recomputed = gradients(False), gradients(True)
    assert len(plain) == 7
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


def test_eager_draws_one_mask_for_a_forward_and_one_for_a_backward(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, int]] = []

    def counting(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
        drawn.append((rows, columns))
        return keep_mask(seed, rows, columns, p)

    monkeypatch.setattr(dropout, "keep_mask", counting)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = lora_linear(**make(device), dropout_p=0.5, backend="eager")
    assert drawn == [(9, 24)]
    assert all(t.dtype != torch.bool for t in kept)
    assert not any(isinstance(v, Dropout) for v in vars(y.grad_fn).values()), "ctx holds the mask"
    assert isinstance(y.grad_fn, LoRALinearFunction._backward_cls)  # type: ignore[attr-defined]
    y.sum().backward()
    assert drawn == [(9, 24)] * 2
