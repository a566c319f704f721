"""torch.compile: one graph, the eager values, and no compilation more than a new shape or backend needs."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from lora_kernels import LoRALinear, compiled, lora_linear, use_backend
from lora_kernels.backends import eager
from lora_kernels.dispatch import BackendRefused, choose

LEAVES = ("x", "lora_A", "lora_B", "bias")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def make(device: torch.device, rows: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = {"x": (2, rows, 24), "weight": (40, 24), "lora_A": (3, 24), "lora_B": (40, 3), "bias": (40,)}
    return {
        name: torch.randn(shape, generator=generator, device=device).requires_grad_(name != "weight")
        for name, shape in shapes.items()
    }


def step(call: Any, tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    y = call(**tensors, **options)
    wanted = [tensors[k] for k in LEAVES if tensors[k].requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), wanted)]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# The graph is the same for every compiler: inductor compiles it once with dropout and once without.
GRAPHS = [("aot_eager", b, p, t) for b in ("eager", "triton") for p in (0.0, 0.4) for t in (False, True)]
GRAPHS += [("inductor", "eager", p, False) for p in (0.0, 0.4)]
ON_CUDA = [pytest.param("aot_eager", "cuda", p, t, marks=pytest.mark.gpu) for p in (0.0, 0.4) for t in (False, True)]


@pytest.mark.parametrize(("compiler", "backend", "p", "tensor"), GRAPHS + ON_CUDA)
def test_one_graph_with_the_values_of_eager_code(
    compiler: str, backend: str, p: float, tensor: bool, device: torch.device
) -> None:
    tensors = make(device)
    scaling = torch.tensor(2.0, device=device) if tensor else 2.0
    options = {"scaling": scaling, "dropout_p": p, "backend": backend}
    torch.manual_seed(1)
    expected = step(lora_linear, tensors, **options)
    torch.manual_seed(1)
    if compiler == "inductor":
        # Inductor has random numbers of its own unless it is asked not to, and caches that outlive this run.
        with torch._inductor.config.patch(fallback_random=True, force_disable_caches=True):
            got = step(torch.compile(lora_linear, fullgraph=True), tensors, **options)
    else:
        got = step(torch.compile(lora_linear, backend=compiler, fullgraph=True), tensors, **options)
    assert_same(got, expected)


@pytest.mark.parametrize("needed", [("x",), ("lora_A",), ("lora_B",), ("bias",), ("x", "lora_B")], ids="+".join)
def test_some_gradients(needed: tuple[str, ...], device: torch.device) -> None:
    tensors = {k: t.detach().requires_grad_(k in needed) for k, t in make(device).items()}
    call = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    assert_same(step(call, tensors, scaling=2.0), step(lora_linear, tensors, scaling=2.0))


def test_a_module_with_dropout_draws_anew_and_repeatably(device: torch.device) -> None:
    layer = LoRALinear(24, 24, r=24, alpha=24, dropout=0.5, device=device)
    torch.nn.init.normal_(layer.lora_B)
    call, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(5, 24, device=device)
    torch.manual_seed(3)
    first, second = call(x), call(x)
    torch.manual_seed(3)
    again = call(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), first)


def test_a_new_number_of_rows_compiles_nothing(device: torch.device) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(lora_linear, backend=counter, fullgraph=True)
    for rows in (9, 16, 5, 33, 100):
        tensors = make(device, rows)
        assert_same(step(call, tensors, scaling=2.0), step(lora_linear, tensors, scaling=2.0))
    assert counter.frame_count == 2, "one for the first shape, and one that holds for all others"


def test_rows_marked_dynamic_compile_once(device: torch.device) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(lora_linear, backend=counter, fullgraph=True)
    for rows in (9, 16, 5):
        tensors = make(device, rows)
        torch._dynamo.mark_dynamic(tensors["x"], 1)
        assert_same(step(call, tensors, dropout_p=0.0), step(lora_linear, tensors))
    assert counter.frame_count == 1


def test_a_scaling_tensor_may_change(device: torch.device) -> None:
    counter, tensors = CompileCounterWithBackend("aot_eager"), make(device)
    call = torch.compile(lora_linear, backend=counter, fullgraph=True)
    for value in (1.0, 2.0, -3.0):
        scaling = torch.full((1,), value, device=device)
        assert_same(step(call, tensors, scaling=scaling), step(lora_linear, tensors, scaling=value))
    assert counter.frame_count == 1


def test_use_backend_reaches_forward_and_backward(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def recording(problem: Any, name: Any) -> Any:
        asked.append(name)
        return choose(problem, name)

    monkeypatch.setattr(compiled, "choose", recording)
    call = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    tensors = make(device)
    for name in ("auto", "eager", "auto"):
        asked.clear()
        with use_backend(name):  # type: ignore[arg-type]
            y = call(**tensors)
        # The backward of CUDA tensors runs on a thread of autograd's, which is in no block. Nor is this one.
        thread = threading.Thread(target=y.sum().backward)
        thread.start()
        thread.join()
        assert asked == [name, name]
        assert tensors["x"].grad is not None
    asked.clear()
    with use_backend("cuda"):
        call(**tensors, backend="eager")
    assert asked == ["eager"], "backend= wins"


def test_use_backend_inside_of_compiled_code(device: torch.device) -> None:
    def function(**tensors: Tensor) -> Tensor:
        with use_backend("eager"):
            return lora_linear(**tensors)

    call = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(step(call, make(device)), step(function, make(device)))


@pytest.mark.usefixtures("cuda_refuses")
def test_a_backend_that_refuses_does_not_fall_back(device: torch.device) -> None:
    call = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    with pytest.raises(BackendRefused, match="backend='cuda' cannot run this call"):
        call(**make(device), backend="cuda")


def test_bad_input_is_named(device: torch.device) -> None:
    call = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    # PyTorch 2.8 says where, and not what.
    says_what = Version(torch.__version__) >= Version("2.9")
    with pytest.raises(Exception, match="lora_A had shape" if says_what else r"ValueError(.|\n)*_check\(x, weight"):
        call(**(make(device) | {"lora_A": torch.zeros(3, 25, device=device)}))


def test_operators_follow_the_rules_of_torch_library(device: torch.device) -> None:
    tensors = make(device)
    call = (tensors["x"][0], *(tensors[k] for k in ("lora_A", "lora_B", "bias")))
    for scale, keep_s in itertools.product((None, torch.ones(1, device=device)), (True, False)):
        arguments = (*call, scale, 2.0, None, 0.0, "native", "eager", 0, keep_s, [tensors["weight"]])
        torch.library.opcheck(compiled._forward, arguments)


def test_the_backend_of_the_record_is_called(device: torch.device) -> None:
    tensors = make(device)
    call = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    y = call(**tensors, backend="eager")
    rows = tensors["x"].detach().flatten(0, 1)
    weight, lora_A, lora_B, bias = (tensors[k].detach() for k in ("weight", "lora_A", "lora_B", "bias"))
    expected, _ = eager.forward(rows, weight, lora_A, lora_B, bias, 1.0, None, "native", True)
    assert torch.equal(y, expected.view(y.shape))
