"""lora_gated_mlp under torch.compile: one graph, the eager values, and nothing computed again without need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_gated_mlp import ACTIVATIONS, gradients, members_of, mlp
from test_group import HALF, assert_close
from tolerance import relative_error
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_gated_mlp

COMPILED = [("gelu_tanh", 0.0, False), ("silu", 0.4, True)]


@pytest.mark.parametrize(("activation", "p", "nf4"), COMPILED)
def test_compiled_into_one_graph(activation: str, p: float, nf4: bool, device: torch.device, backend: str) -> None:
    torch._dynamo.reset()
    case = mlp(5, 24, 40, torch.float32, nf4=nf4)
    x, members = case.x(device).requires_grad_(), members_of(case, device)
    results = []
    for call in (torch.compile(lora_gated_mlp, backend="aot_eager", fullgraph=True), lora_gated_mlp):
        torch.manual_seed(3)
        y = call(x, *members, activation=activation, dropout_p=p, backend=backend)
        results.append(gradients(y, x, members))
    assert_close(*results)


@pytest.mark.parametrize("tensor_scale", [False, True])
def test_compiled_checkpointing_leaves_the_last_product_out(tensor_scale: bool, device: torch.device) -> None:
    """Nobody reads the output of a block that is computed again, and its S is cheaper by itself."""
    torch._dynamo.reset()
    case = mlp(5, 24, 40, torch.float32)
    x, members = case.x(device).requires_grad_(), members_of(case, device)
    if tensor_scale:
        members = [member._replace(scaling=torch.tensor(0.7, device=device)) for member in members]
    computed: dict[str, list[str]] = {}

    def compiler(name: str) -> Any:
        def compile_(graph: torch.fx.GraphModule, _: Any) -> Any:
            computed[name] = [str(node.target) for node in graph.graph.nodes if "lora_kernels" in str(node.target)]
            return make_boxed_func(graph.forward)  # type: ignore[no-untyped-call]

        return compile_

    def block(x: Tensor) -> Tensor:
        return checkpoint(lora_gated_mlp, x, *members, backend="eager", use_reentrant=False)  # type: ignore[no-any-return]

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    results = [
        gradients(call(x), x, members) for call in (torch.compile(block, backend=backend, fullgraph=True), block)
    ]
    assert_close(*results)
    group, layer = "lora_kernels.group_forward.default", "lora_kernels.forward.default"
    assert computed["forward"] == [group, layer]
    assert computed["backward"] == [group, "lora_kernels.backward.default", "lora_kernels.group_backward.default"]


@pytest.mark.parametrize("compiler", ["aot_eager", "eager"])
@pytest.mark.parametrize("inside", [True, False])
def test_compiled_backward_knows_no_autocast(
    inside: bool, compiler: str, device: torch.device, backend: str
) -> None:
    """A backward may be in a region of autocast that its forward was not in."""
    torch._dynamo.reset()
    case = mlp(5, 24, 40, torch.float32)
    x, members = case.x(device).requires_grad_(), members_of(case, device)

    def block(x: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            return lora_gated_mlp(x, *members, backend=backend)

    results = []
    for call in (torch.compile(block, backend=compiler, fullgraph=True), block):
        with torch.autocast(device.type, HALF):
            y = call(x)
            result = gradients(y, x, members) if inside else None
        results.append(gradients(y, x, members) if result is None else result)
    assert_close(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_by_inductor(activation: str) -> None:
    torch._dynamo.reset()
    device = torch.device("cuda")
    case = mlp(300, 512, 1024, torch.bfloat16, torch.float32)
    x, members = case.x(device).requires_grad_(), members_of(case, device)
    results = []
    with torch._inductor.config.patch(fallback_random=True, force_disable_caches=True):
        for call in (torch.compile(lora_gated_mlp, fullgraph=True), lora_gated_mlp):
            torch.manual_seed(3)
            y = call(x, *members, activation=activation, dropout_p=0.2, backend="triton")
            results.append(gradients(y, x, members))
    for name, value in results[0].items():
        assert value.dtype == results[1][name].dtype
        assert relative_error(value, results[1][name]) < 5e-3, name
