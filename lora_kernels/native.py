"""The launch path in C++: calls of lora_linear, lora_linear_group and lora_gated_mlp like ones that Python has made.

Python checks, chooses, plans and has Triton compile. Where a kind of call comes again, what was found is handed to the
extension of csrc/host/, by which the next such call allocates, launches and makes its autograd node, and its backward
runs, without Python. The bits are the same. What is not covered (float32, subclasses of tensors, modes, tracing, a
profiler that asked Triton for its launches, the backward of an NF4 weight that is decoded inside of a product) stays in
Python, as does everything where the extension is not compiled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_kernels import autograd_gated, autograd_group
from lora_kernels.autograd import TWICE, Needs, Saved, backward_of, rebuilt
from lora_kernels.autograd_gated import GatedPlan
from lora_kernels.autograd_group import Constants, GroupSaved, Plan
from lora_kernels.backends import Backend, Member, Precision
from lora_kernels.dropout import Dropout, inverse_keep
from lora_kernels.nf4 import NF4Weight
from lora_kernels.nf4_codec import Form
from lora_kernels.switches import is_on
from lora_kernels.weights import Weight

if TYPE_CHECKING:
    from lora_kernels.backends.triton.launches import Foreign, Launch

# 0 leaves every call to Python.
VARIABLE = "LORA_KERNELS_NATIVE"
NOT_COMPILED = "the launch path is not compiled"

# Whether calls should be learned: until it turns out that they cannot be.
enabled = is_on(VARIABLE) and torch.version.cuda is not None
# By positional arguments, the last of them a backend's name: what was computed, or None for a call that should be
# learned, or False for any other that is Python's. There are none before the first call that could be learned.
linear: Callable[..., Tensor | bool | None] | None = None
group: Callable[..., list[Tensor] | bool | None] | None = None
gated: Callable[..., Tensor | bool | None] | None = None
# What a layer of PEFT's works on, where it is as plain as most are; None for any other (integrations/peft_layer.py).
operands: Callable[..., tuple[Any, ...] | None] | None = None
_device_type = "cuda"
# The launches of products that decode their weights themselves, and those of products whose rank is large.
_DECODES, _STREAMS, _WIDE = "nf4_product", "nf4_stream", ["products", "products"]
# Triton unloads kernels that nobody holds; the extension holds their addresses.
_kernels: set[Any] = set()


def noting(learn: bool, backend: Backend, x: Tensor) -> AbstractContextManager[list[Launch | Foreign] | None]:
    """Notes the launches of a call on x, if it is to be learned and can be."""
    if not learn or backend.name != "triton" or x.device.type != _device_type or _extension() is None:
        return nullcontext()
    from lora_kernels.backends.triton import ahead, launches

    # A rehearsal launches nothing that could be noted.
    return nullcontext() if ahead.rehearsing() else launches.noting()


def learn_linear(
    given: tuple[Any, ...],
    made: list[Launch | Foreign] | None,
    backend: Backend,
    precision: Precision,
    dropout: Dropout | None,
) -> None:
    """Has the next call of lora_linear with arguments like these made in C++.

    Args:
        given: the arguments that `linear` takes.
        made: the launches that were noted.
        backend, precision, dropout: what the call was made with after all.
    """
    if made is None:
        return
    _, weight, lora_A, _, bias, *_ = given
    p = 0.0 if dropout is None else dropout.p
    constants = (backend, p, precision, lora_A.dtype, None if bias is None else bias.dtype, _form(weight))
    extension = _extension()
    assert extension is not None
    launches = _handed_over(made, *_products("one_pass", p, weight))
    extension.learn_linear(*given, launches, inverse_keep(p) if p else 1.0, constants)


def learn_group(
    given: tuple[Any, ...], made: list[Launch | Foreign] | None, plan: Plan | GatedPlan, members: Sequence[Member]
) -> None:
    """The same of lora_linear_group, and of lora_gated_mlp, whose plan is a GatedPlan.

    Args:
        given: the arguments that `group` or `gated` takes.
        made: the launches that were noted.
        plan, members: what the call was made with after all.
    """
    if made is None:
        return
    extension = _extension()
    assert extension is not None
    first, weights = members[0], [member.weight for member in members]
    assert first.lora_A is not None
    p = 0.0 if first.dropout is None else first.dropout.p
    constants = (plan, p, first.lora_A.dtype, [_form(weight) for weight in weights])
    if isinstance(plan, GatedPlan):
        learn = extension.learn_gated
        ways = product(_products("group_forward", p, *weights[:2]), _products("one_pass", p, weights[2]))
        names = [[*sharing, "gated_forward", *down] for sharing, down in ways]
    else:
        learn, names = extension.learn_group, _products("group_forward", p, *weights)
    learn(*given, _handed_over(made, *names), inverse_keep(p) if p else 1.0, constants)


def _backward(
    constants: tuple[Backend, float, Precision, torch.dtype, torch.dtype | None, Form | None],
    needs: tuple[bool, bool, bool, bool],
    x: Tensor | None,
    weight: Any,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    s: Tensor | None,
    seed: Tensor | None,
    dy: Tensor,
    scale: float,
    learn: bool,
) -> tuple[Any, ...]:
    """dx, dA, dB and db of a node that was made in C++, and the launches that they took if those are to be learned."""
    backend, p, precision, adapter_dtype, bias_dtype, form = constants
    wanted, saved = Needs(*needs), _saved_layer(form, weight, lora_A, lora_B, s, seed)._replace(x=x)
    with noting(learn, backend, dy) as made:
        gradients = backward_of(backend, wanted, saved, dy, scale, p, precision, adapter_dtype, bias_dtype)
    names = [*_decoding(saved.weight), *_drawing(p, 1)] if wanted.x else []
    products = [["one_pass"], _WIDE] if wanted.x else [[]]
    # Without a launch of theirs, the adapters' gradients are the libraries'.
    grads = [["adapter_grads"], []] if wanted.lora_A or wanted.lora_B else [[]]
    ways = [*([*names, *made_of, *then] for made_of, then in product(products, grads)), [*names, "backward"]]
    return (*gradients, None if made is None else _handed_over(made, *ways))


def _group_backward(
    constants: tuple[Plan | GatedPlan, float, torch.dtype, list[Form | None]],
    shared: list[Tensor],
    layers: list[tuple[Any, ...]],
    dys: list[Tensor | None],
    scales: list[float],
    learn: bool,
) -> tuple[Any, ...]:
    """dx, and each layer's dA and dB, of a group's or a gated MLP's node that was made in C++, and their launches.

    Args:
        shared: x, and before it g and u of a gated MLP.
        layers: weight, lora_A, lora_B, S and the dropout seed of each.
    """
    plan, p, adapter_dtype, forms = constants
    kept = [_saved_layer(form, *layer) for layer, form in zip(layers, forms, strict=True)]
    weights = [saved.weight for saved in kept]
    needs = [Needs(x=True, lora_A=True, lora_B=True, bias=False)] * len(kept)
    group = plan.group if isinstance(plan, GatedPlan) else plan
    precisions = (*group.precisions, plan.precision) if isinstance(plan, GatedPlan) else group.precisions
    settled = [Constants(scale, p, own, adapter_dtype, None) for scale, own in zip(scales, precisions, strict=True)]
    saved = GroupSaved(shared[-1], tuple(kept[: len(group.backends)]))
    count = len(group.backends)
    before = [*_decoding(*weights[:count]), *_drawing(p, count)]
    ways = [[*before, *made_of, *then] for made_of, then in product((["group_input"], _WIDE), (["group_grads"], []))]
    with noting(learn, group.backends[0], shared[-1]) as made:
        if isinstance(plan, GatedPlan):
            (g, u, _), dy = shared, dys[0]
            assert dy is not None
            dx, gradients = autograd_gated.backward(plan, needs, saved, kept[2], g, u, dy, settled)
            down = [*_decoding(weights[2]), *_drawing(p, 1)]
            grads = product((["one_pass"], _WIDE), (["adapter_grads"], []))
            through = [[*down, *made_of, "gated_backward", *then] for made_of, then in grads]
            ways = [[*first, *then] for first, then in product(through, ways)]
        else:
            dx, gradients = autograd_group.backward(plan, needs, saved, dys, settled)
    adapters = [t for dA, dB, _ in gradients for t in (dA, dB)]
    return (dx, *adapters, None if made is None else _handed_over(made, *ways))


def _saved_layer(
    form: Form | None, weight: Any, lora_A: Tensor | None, lora_B: Tensor | None, s: Tensor | None, seed: Tensor | None
) -> Saved:
    """What a node kept of a layer; of an NF4 weight, its tensors."""
    if form is not None and weight is not None:
        weight = rebuilt(weight, form)
    return Saved(None, weight, lora_A, lora_B, s, seed, None)


def _form(weight: Weight | None) -> Form | None:
    return weight.form if isinstance(weight, NF4Weight) else None


def _decoding(*weights: Weight | None) -> list[str]:
    """The launches that come before a product with these weights."""
    return ["dequantize" for weight in weights if isinstance(weight, NF4Weight)]


def _drawing(p: float, count: int) -> list[str]:
    """The launches that draw the masks of so many layers."""
    return ["mask"] * count if p else []


def _products(name: str, p: float, *weights: Weight | None) -> list[list[str]]:
    """The launches that a forward's product with these weights may be: one, two, or, with NF4 weights, one for each."""
    decoding = _decoding(*weights)
    before = [*decoding, *_drawing(p, len(weights))]
    together = [[*before, name], [*before, *_WIDE]]
    if len(decoding) < len(weights):
        return together
    # The kernel past which weights stream draws its mask itself.
    return [*together, [*_drawing(p, 1), _DECODES] * len(weights), [_STREAMS] * len(weights)]


def _handed_over(made: list[Launch | Foreign], *ways: list[str]) -> list[Any] | None:
    """The launches for C++; None if their names are none of these, or Triton makes one of them."""
    if [launch.name for launch in made] not in ways:
        return None
    launches = [_in_cpp(launch) for launch in made]
    return None if None in launches else launches


def _in_cpp(launch: Launch | Foreign) -> Any:
    """A launch of launches.py in C++; None if Triton makes it."""
    from lora_kernels.backends.triton.launches import Foreign

    extension = _extension()
    assert extension is not None
    if isinstance(launch, Foreign):
        memory = (launch.workspace_size, launch.counters)
        return extension.Launch(launch.address, 0, (0, 0, 0), 0, 0, [], {}, [], *memory, launch.name)
    bound = launch.bound
    if bound is None:
        return None
    kernel = bound.kernel
    _kernels.add(kernel)
    parameters = [tuple(parameter) for parameter in kernel.parameters]
    return extension.Launch(
        kernel.function,
        kernel.context,
        bound.grid,
        kernel.threads,
        kernel.shared,
        parameters,
        bound.numbers,
        [tuple(shape) for shape in bound.maps],
        launch.workspace_size,
        launch.counters,
        launch.name,
    )


@cache
def _extension() -> ModuleType | None:
    """The extension, ready to be called; None, and nothing is learned any more, where there is none."""
    global enabled
    if why_not() is not None:
        enabled = False
        return None
    from lora_kernels.backends import native_build

    extension = native_build.load()
    assert extension is not None
    start(extension, [ctypes.cast(f, ctypes.c_void_p).value for f in _functions()], "cuda")
    return extension


def start(extension: ModuleType, addresses: list[int | None], device_type: str) -> None:
    """Makes the extension ready, with the functions that it calls for tensors of a kind of device."""
    global linear, group, gated, operands, _device_type
    import triton

    from lora_kernels.backends import sync

    extension.use_driver(*addresses, device_type)
    knobs = getattr(triton, "knobs", None)
    hooked = None if knobs is None else knobs.runtime
    extension.use_python(_backward, _group_backward, sync.zeros_for, hooked, NF4Weight, TWICE)
    extension.use_modules(nn.Linear, nn.ModuleDict, nn.Dropout, nn.Identity)
    linear, group, gated, operands = extension.linear, extension.group, extension.gated, extension.operands
    _device_type = device_type


def _functions() -> list[Any]:
    """What the extension calls of the CUDA driver and of PyTorch, in the order of launch.h's Driver.

    Raises:
        AttributeError: one is missing.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    pytorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"))
    return [
        driver.cuLaunchKernel,
        driver.cuTensorMapEncodeTiled,
        driver.cuStreamIsCapturing,
        driver.cuCtxSetCurrent,
        pytorch.aoti_torch_get_current_cuda_stream,
    ]


def advice() -> str | None:
    """What would make calls cheaper to launch on this machine; None where there is nothing to do, or no GPU."""
    if not torch.cuda.is_available() or why_not() != NOT_COMPILED:
        return None
    return "launches come from Python, and short steps wait for them: `python -m lora_kernels build` compiles the path"


def why_not() -> str | None:
    """Why calls are launched from Python here; None if they are launched from C++."""
    from lora_kernels.backends import native_build

    if not is_on(VARIABLE):
        return f"{VARIABLE} is 0"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    try:
        if native_build.load() is None:
            return NOT_COMPILED
        _functions()
    except (ImportError, OSError, AttributeError) as error:
        return f"the compiled launch path cannot be used: {error}"
    return None
