"""What the kernels of the launch path compute, in plain PyTorch, from the addresses and numbers of a launch.

Arguments are counted as the signatures of the Triton kernels count them, options are their constexprs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels import NF4Weight
from lora_kernels.dropout import keep_mask

Dtypes, Options, Arguments = dict[int, torch.dtype], dict[str, Any], dict[int, Any]


def _view(address: int, dtype: torch.dtype, rows: int, columns: int, row_stride: int, column_stride: int) -> Tensor:
    count = 1 + (rows - 1) * row_stride + (columns - 1) * column_stride
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided((rows, columns), (row_stride, column_stride))


class _Matrices:
    """The arguments that are matrices with contiguous rows."""

    def __init__(self, dtypes: Dtypes, a: Arguments) -> None:
        self._dtypes, self._arguments = dtypes, a

    def __call__(self, index: int, rows: int, columns: int, stride: int | None = None) -> Tensor:
        """One of them, behind a pointer or a tensor map; without a stride it is contiguous."""
        address, dtype, stride = self._arguments[index], self._dtypes[index], columns if stride is None else stride
        if isinstance(address, tuple):
            address, *described = address
            assert described == [rows, columns, stride * dtype.itemsize]
        return _view(address, dtype, rows, columns, stride, 1)

    def masked(self, t: Tensor, bits: int, masked: bool) -> Tensor:
        """`t` in float64, without what a mask drops."""
        if not masked:
            return t.double()
        k = torch.arange(t.shape[1])
        words = self(bits, t.shape[0], 4 * -(-t.shape[1] // 128))[:, k // 32]
        return torch.where(words >> (16 * (k % 2) + k % 32 // 2) & 1 == 1, t.double(), 0.0)

    def scale(self, tensor: int, number: int) -> float:
        """What is known of a scale on the device, times what is known on the host."""
        given = self._arguments[tensor]
        return self._arguments[number] * (1.0 if given is None else float(self(tensor, 1, 1)))


def _mask(dtypes: Dtypes, options: Options, a: Arguments) -> None:
    rows, columns = a[3], a[4]
    bits = _Matrices(dtypes, a)(1, rows, 4 * -(-columns // 128))
    keep = keep_mask(_view(a[0], dtypes[0], 1, 1, 1, 1).view(1), rows, columns, a[2] / 65536)
    # The even elements of a word are its lower half.
    order = F.pad(keep, (0, -columns % 128)).view(rows, -1, 16, 2).transpose(2, 3).reshape(rows, -1, 32).long()
    bits.copy_((order << torch.arange(32)).sum(2).to(torch.int32))


def _one_pass(dtypes: Dtypes, options: Options, a: Arguments) -> None:
    M, N, K, R = a[13], a[14], a[15], a[16]
    matrix, transposed = _Matrices(dtypes, a), options["W_IS_NK"]
    left, out = matrix(0, M, K, a[21]), matrix(2, M, N, a[23])
    stored = matrix(1, *((N, K) if transposed else (K, N)), a[22])
    down, up = _view(a[3], dtypes[3], K, R, a[24], a[25]), _view(a[4], dtypes[4], R, N, a[26], a[27])
    s = matrix(6, M, R, a[28])
    assert int(matrix(8, 1, 1)) == 0
    s.copy_(matrix.masked(left, 9, options["MASK_X"]) @ down.double() * matrix.scale(10, 11))
    branch = matrix.masked(s.double() @ up.double(), 9, options["MASK_OUT"])
    total = left.double() @ (stored.T if transposed else stored).double() + branch
    if options["HAS_BIAS"]:
        total += matrix(5, 1, N).double()
    out.copy_(total)


def _few_rows(dtypes: Dtypes, options: Options, a: Arguments) -> None:
    M, N, K, R = a[12], a[13], a[14], a[15]
    matrix, transposed = _Matrices(dtypes, a), options["W_IS_NK"]
    left, out = matrix(0, M, K, a[18]), matrix(2, M, N, N)
    stored = matrix(1, *((N, K) if transposed else (K, N)), a[19])
    down, up = _view(a[3], dtypes[3], K, R, a[20], a[21]), _view(a[4], dtypes[4], R, N, a[22], a[23])
    s = matrix(6, M, R, R)
    assert int(matrix(8, 1, 1)) == 0
    s.copy_(matrix.masked(left, 9, options["MASK_X"]) @ down.double() * matrix.scale(10, 11))
    branch = matrix.masked(s.double() @ up.double(), 9, options["MASK_OUT"])
    total = left.double() @ (stored.T if transposed else stored).double() + branch
    if a[5] is not None:
        total += matrix(5, 1, N).double()
    out.copy_(total)


def _products(dtypes: Dtypes, options: Options, a: Arguments) -> None:
    M, matrix, pairs = a[24], _Matrices(dtypes, a), options["PAIRS"]
    for i in range(options["MEMBERS"]):
        N, total = a[25 + i], torch.zeros(1, dtype=torch.float64)
        for pair in range(i * pairs, (i + 1) * pairs):
            L, transposed = a[28 + pair], options["RIGHT_IS_NK"]
            left, shape = matrix(3 + 2 * pair, M, L, a[40 + pair]), (N, L) if transposed else (L, N)
            stored = matrix(4 + 2 * pair, *shape, a[46 + pair]).double()
            total = total + left.double() @ (stored.T if transposed else stored)
        if pairs == 1:
            total *= matrix.scale(18 + i, 21 + i)
        if options["HAS_BIAS"]:
            total += matrix(15 + i, 1, N).double()
        matrix(i, M, N).copy_(total)


def _adapter_grads(dtypes: Dtypes, options: Options, a: Arguments) -> None:
    M, K, N, R = a[9], a[10], a[11], a[12]
    matrix = _Matrices(dtypes, a)
    if options["WANT_A"]:
        x = matrix.masked(matrix(0, M, K, a[13]), 8, options["MASKED"])
        matrix(4, R, K).copy_(matrix(2, M, R).double().T @ x)
    if options["WANT_B"]:
        matrix(5, N, R).copy_(matrix(1, M, N, a[14]).double().T @ matrix(3, M, R).double())


def _backward(dtypes: Dtypes, options: Options, a: Arguments) -> None:
    M, N, K, R = a[17], a[18], a[19], a[20]
    matrix, transposed = _Matrices(dtypes, a), options["W_IS_NK"]
    dy, dx, t = matrix(0, M, N, a[27]), matrix(2, M, K), matrix(5, M, R)
    stored = matrix(1, *((K, N) if transposed else (N, K)), a[28])
    lora_B, lora_A = _view(a[3], dtypes[3], N, R, a[30], a[31]), _view(a[4], dtypes[4], R, K, a[32], a[33])
    assert int(matrix(7, 1, 1)) == 0
    assert a[11] == (a[0][0] if isinstance(a[0], tuple) else a[0])
    t.copy_(dy.double() @ lora_B.double() * matrix.scale(9, 15))
    branch = matrix.masked(t.double() @ lora_A.double(), 8, options["MASKED"])
    dx.copy_(dy.double() @ (stored.T if transposed else stored).double() + branch)
    if options["WANT_A"]:
        x = matrix.masked(matrix(10, M, K, a[29]), 8, options["MASKED"])
        matrix(13, R, K).copy_(t.double().T @ x)
    if options["WANT_B"]:
        matrix(14, N, R).copy_(dy.double().T @ matrix(12, M, R).double())


def _group_forward(dtypes: Dtypes, options: Options, a: Arguments) -> None:
    M, K, matrix = a[31], a[32], _Matrices(dtypes, a)
    assert int(matrix(26, 1, 1)) == 0
    x = matrix(0, M, K, a[43])
    for i in range(options["MEMBERS"]):
        N, R = a[33 + i], a[36 + i]
        stored = matrix(1 + 2 * i, *((N, K) if options["W_IS_NK"] else (K, N)), a[44 + i])
        s = matrix(16 + i, M, R)
        masked = matrix.masked(x, 19 + i, options["MASK_X"])
        s.copy_(masked @ matrix(7 + i, R, K).double().T * matrix.scale(22 + i, 27 + i))
        total = x.double() @ (stored.T if options["W_IS_NK"] else stored).double()
        total += s.double() @ matrix(10 + i, N, R).double().T
        if options["HAS_BIAS"]:
            total += matrix(13 + i, 1, N).double()
        matrix(2 + 2 * i, M, N).copy_(total)


def _group_input(dtypes: Dtypes, options: Options, a: Arguments) -> None:
    M, K, matrix = a[28], a[29], _Matrices(dtypes, a)
    assert int(matrix(23, 1, 1)) == 0
    dx = torch.zeros(M, K, dtype=torch.float64)
    for i in range(options["MEMBERS"]):
        N, R = a[30 + i], a[33 + i]
        dy = matrix(1 + 2 * i, M, N, a[42 + i]).double()
        stored = matrix(2 + 2 * i, *((K, N) if options["W_IS_NK"] else (N, K)), a[45 + i])
        t = matrix(13 + i, M, R)
        t.copy_(dy @ matrix(7 + i, N, R).double() * matrix.scale(19 + i, 24 + i))
        dx += dy @ (stored.T if options["W_IS_NK"] else stored).double()
        dx += matrix.masked(t.double() @ matrix(10 + i, R, K).double(), 16 + i, options["MASKED"])
    matrix(0, M, K).copy_(dx)


def _group_grads(dtypes: Dtypes, options: Options, a: Arguments) -> None:
    M, K, matrix = a[21], a[22], _Matrices(dtypes, a)
    assert int(matrix(20, 1, 1)) == 0
    for i in range(options["A_COUNT"]):
        x = matrix.masked(matrix(0, M, K, a[32]), 16 + i, options["MASKED"])
        matrix(10 + i, a[26 + i], K).copy_(matrix(4 + i, M, a[26 + i]).double().T @ x)
    for i in range(options["B_COUNT"]):
        N, R = a[23 + i], a[29 + i]
        matrix(13 + i, N, R).copy_(matrix(1 + i, M, N, a[33 + i]).double().T @ matrix(7 + i, M, R).double())


def _activated(g: Tensor, options: Options) -> Tensor:
    return F.silu(g) if options["ACTIVATION"] == "silu" else F.gelu(g, approximate="tanh")


def _gated_forward(dtypes: Dtypes, options: Options, a: Arguments) -> None:
    g, u, h = (_Matrices(dtypes, a)(index, 1, a[3]) for index in range(3))
    h.copy_(_activated(g.double(), options) * u.double())


def _gated_backward(dtypes: Dtypes, options: Options, a: Arguments) -> None:
    matrix, elements = _Matrices(dtypes, a), a[5]
    (dh, du), (g, u) = (matrix(i, 1, elements) for i in (0, 3)), (matrix(i, 1, elements).double() for i in (1, 2))
    activated, past_u = _activated(g, options), dh.double() * u
    du.copy_(dh.double() * activated)
    if options["ACTIVATION"] == "silu":
        dh.copy_(torch.ops.aten.silu_backward(past_u, g))
    else:
        dh.copy_(torch.ops.aten.gelu_backward(past_u, g, approximate="tanh"))
    if a[4] is not None:
        matrix(4, 1, elements).copy_(activated * u)


def _nf4_weight(
    dtypes: Dtypes, a: Arguments, first: int, shape: tuple[int, int], block_size: int, dtype: torch.dtype
) -> Tensor:
    """The weight whose packed codes are the argument `first`, and its scales those after it."""
    matrix, elements = _Matrices(dtypes, a), shape[0] * shape[1]
    blocks, nested = -(-elements // block_size), (None, None, None)
    if a[first + 2] is not None:
        sizes = (-(-blocks // 256), 256, 1)
        nested = tuple(matrix(first + 2 + i, 1, size)[0] for i, size in enumerate(sizes))  # type: ignore[assignment]
    count = (elements + 1) // 2
    packed, absmax = _view(a[first], torch.uint8, 1, count, count, 1)[0], matrix(first + 1, 1, blocks)[0]
    return NF4Weight(packed, absmax, *nested, block_size, torch.Size(shape), dtype).dequantize()


def _dequantize(dtypes: Dtypes, options: Options, a: Arguments) -> None:
    shape = (1, a[6])
    assert a[7] == (a[6] + 1) // 2
    _Matrices(dtypes, a)(5, *shape).copy_(_nf4_weight(dtypes, a, 0, shape, options["BLOCK_SIZE"], dtypes[5]))


def _nf4_product(dtypes: Dtypes, options: Options, a: Arguments) -> None:
    M, N, K, R = a[16], a[17], a[18], a[19]
    matrix, forward = _Matrices(dtypes, a), options["FORWARD"]
    L, C = (K, N) if forward else (N, K)
    left, s, out = matrix(0, M, L, a[22]), matrix(10, M, R), matrix(6, M, C)
    weight = _nf4_weight(dtypes, a, 1, (N, K), options["BLOCK_SIZE"], dtypes[0]).double()
    down, up = _view(a[7], dtypes[7], L, R, a[23], a[24]), _view(a[8], dtypes[8], R, C, a[25], a[26])
    assert int(matrix(12, 1, 1)) == 0
    s.copy_(matrix.masked(left, 13, options["MASKED"] and forward) @ down.double() * matrix.scale(14, 15))
    branch = matrix.masked(s.double() @ up.double(), 13, options["MASKED"] and not forward)
    total = left.double() @ (weight.T if forward else weight) + branch
    if a[9] is not None:
        total += matrix(9, 1, C).double()
    out.copy_(total)


KERNELS: dict[str, Callable[[Dtypes, Options, Arguments], None]] = {
    "mask": _mask,
    "one_pass": _one_pass,
    "few_rows": _few_rows,
    "products": _products,
    "adapter_grads": _adapter_grads,
    "backward": _backward,
    "group_forward": _group_forward,
    "group_input": _group_input,
    "group_grads": _group_grads,
    "gated_forward": _gated_forward,
    "gated_backward": _gated_backward,
    "dequantize": _dequantize,
    "nf4_product": _nf4_product,
}
