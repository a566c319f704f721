"""The launch path in C++ over a driver of our own: fixtures, and calls whose bits are compared.

A test module that names this one in `pytest_plugins` has the fixtures.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_driver import FakeDriver
from test_autograd import LEAVES
from torch import Tensor

from lora_kernels import dispatch, lora_linear, native
from lora_kernels.backends import native_build

bf16 = torch.bfloat16
# By their streams it is seen who launched: Python's path, that in C++, or Triton itself.
PYTHON, NATIVE, TRITON = 55, 77, -1

FOLDER = Path(tempfile.gettempdir(), f"lora_kernels_native_{os.getuid()}")


@pytest.fixture(scope="session")
def extension() -> Any:
    return built()


def built() -> Any:
    """The extension, compiled once; it takes a C++ compiler and half a minute."""
    with kept_in(FOLDER):
        return native_build.build()


@contextmanager
def kept_in(folder: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        native_build.folder.cache_clear()
        yield
    native_build.folder.cache_clear()


@dataclass
class LaunchPath:
    """The launch path over a driver of our own."""

    driver: FakeDriver
    extension: Any
    asked_for_zeros: list[int]

    def who(self) -> set[int]:
        """Who made the launches since the last look: by the stream."""
        found = {launched.stream for launched in self.driver.launches}
        self.driver.launches.clear()
        return found

    def launched(self) -> list[str]:
        """The kernels since the last look."""
        names = [launched.name for launched in self.driver.launches]
        self.driver.launches.clear()
        return names


@pytest.fixture
def path(extension: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[LaunchPath]:
    from lora_kernels.backends import sync
    from lora_kernels.backends.triton import (
        backward_launch,
        direct,
        few_rows_launch,
        gated,
        group,
        group_launch,
        launch,
        launches,
        mask_launch,
        nf4_launch,
        wide_ranks,
    )
    from lora_kernels.backends.triton import tiles as tiles_module
    from lora_kernels.backends.triton.tiles import Chip

    driver, asked = FakeDriver(), []

    def zeros_for(device: torch.device, count: int) -> Tensor:
        asked.append(count)
        return torch.zeros(count, dtype=torch.int32)

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(direct, "_driver", lambda: driver)
    chip = Chip((9, 0), 132, 232448, True)
    for module, name, value in (
        # Or all that is small would be few rows: fixture few_rows.
        (tiles_module, "MOST_FEW_ROWS", 0),
        (mask_launch, "mask_kernel", driver.mask),
        (mask_launch, "_launches", {}),
        (launch, "one_pass_kernel", driver.one_pass),
        (few_rows_launch, "few_rows_kernel", driver.few_rows),
        (wide_ranks, "products_kernel", driver.products),
        (wide_ranks, "_launches", {}),
        (wide_ranks, "chip_of", lambda device: chip),
        (backward_launch, "adapter_grads_kernel", driver.adapter_grads),
        (backward_launch, "backward_kernel", driver.backward),
        (backward_launch, "_launches", {}),
        (backward_launch, "_whole", {}),
        (backward_launch, "chip_of", lambda device: chip),
        (launch, "_launches", {}),
        (launches, "_direct_kernels", {}),
        (launches, "_stream", lambda device: PYTHON),
        (launch, "chip_of", lambda device: chip),
        (group_launch, "group_forward_kernel", driver.group_forward),
        (group_launch, "group_input_kernel", driver.group_input),
        (group_launch, "group_grads_kernel", driver.group_grads),
        (group_launch, "_launches", {}),
        (group_launch, "chip_of", lambda device: chip),
        (gated, "gated_forward_kernel", driver.gated_forward),
        (gated, "gated_backward_kernel", driver.gated_backward),
        (gated, "_launches", {}),
        (group, "chip_of", lambda device: chip),
        (nf4_launch, "dequantize_kernel", driver.dequantize),
        (nf4_launch, "nf4_product_kernel", driver.nf4_product),
        (nf4_launch, "_decodings", {}),
        (nf4_launch, "_products", {}),
        (nf4_launch, "chip_of", lambda device: chip),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sync, "zeros_for", zeros_for)
    monkeypatch.setattr(native, "enabled", True)
    for name in ("linear", "group", "gated", "operands", "_device_type"):
        monkeypatch.setattr(native, name, getattr(native, name))
    monkeypatch.setattr(native, "_extension", lambda: extension)
    # With the interpreter's name set, Triton takes CPU tensors: nobody else should find that choice.
    monkeypatch.setattr("lora_kernels.functional._choices", {})
    dispatch.choose.cache_clear()
    extension.clear()
    native.start(extension, driver.addresses(), "cpu")
    yield LaunchPath(driver, extension, asked)
    extension.clear()
    dispatch.choose.cache_clear()


@pytest.fixture
def few_rows(path: LaunchPath, monkeypatch: pytest.MonkeyPatch) -> LaunchPath:
    """The launch path, where up to 16 rows take the kernel that is theirs on Hopper."""
    from lora_kernels.backends.triton import tiles

    monkeypatch.setattr(tiles, "MOST_FEW_ROWS", 16)
    return path


@pytest.fixture
def wide_ranks(path: LaunchPath, monkeypatch: pytest.MonkeyPatch) -> LaunchPath:
    """The launch path, where ranks from 16 on are large, whatever the rows."""
    from lora_kernels.backends.triton import wide_ranks

    monkeypatch.setattr(wide_ranks, "is_wide_rank", lambda rows, rank, members=1: rank >= 16)
    return path


def make(*needed: str, sizes: tuple[int, ...] = (5, 24, 40, 3), dtype: torch.dtype = bf16) -> dict[str, Tensor]:
    *leading, K, N, R = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    shapes = {"x": (*leading, K), "weight": (N, K), "lora_A": (R, K), "lora_B": (N, R), "bias": (N,)}
    return {
        name: torch.randn(shape, generator=generator).to(dtype).requires_grad_(name in needed)
        for name, shape in shapes.items()
    }


def run(tensors: dict[str, Any], dy: Tensor | None = None, **options: Any) -> list[Tensor | None]:
    """y and the gradients of whatever requires them, from a seed."""
    leaves = {k: v.detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for k, v in tensors.items()}
    torch.manual_seed(3)
    y = lora_linear(**({"scaling": 2.0, "backend": "triton"} | leaves | options))
    if y.requires_grad:
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype) if dy is None else dy)
    return [y.detach(), *(leaves[name].grad if isinstance(leaves[name], Tensor) else None for name in LEAVES)]


@contextmanager
def only_python() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "enabled", False)
        yield


def in_python(tensors: dict[str, Any], **options: Any) -> list[Tensor | None]:
    with only_python():
        return run(tensors, **options)


def assert_same(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> None:
    for value, reference in zip(got, want, strict=True):
        if reference is None:
            assert value is None
        else:
            assert value is not None
            assert value.dtype == reference.dtype
            assert torch.equal(value, reference)


def assert_learned(path: LaunchPath, tensors: dict[str, Any], **options: Any) -> None:
    """The forward is learned by the second call, the backward by the third, and then all of it is C++."""
    want = in_python(tensors, **options)
    for _ in range(3):
        assert_same(run(tensors, **options), want)
    path.who()
    for _ in range(2):
        assert_same(run(tensors, **options), want)
        assert path.who() == {NATIVE}


def shifted(t: Tensor) -> Tensor:
    """The same numbers at an address that no vector load takes."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    return memory.copy_(t.detach()).requires_grad_(t.requires_grad)


def with_strides(t: Tensor, *strides: int) -> Tensor:
    size = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True))
    memory = torch.zeros(size, dtype=t.dtype).as_strided(t.shape, strides)
    return memory.copy_(t.detach()).requires_grad_(t.requires_grad)


def native_y(tensors: dict[str, Any], **options: Any) -> Tensor:
    """y whose node was made in C++."""
    for _ in range(3):
        y = lora_linear(**tensors, scaling=2.0, backend="triton", **options)
        if y.requires_grad:
            y.sum().backward(inputs=[t for t in tensors.values() if t.requires_grad])
    y = lora_linear(**tensors, scaling=2.0, backend="triton", **options)
    assert not hasattr(y.grad_fn, "backend"), "the node was made in Python"
    for t in tensors.values():
        t.grad = None
    return y
