"""The Triton kernels for groups that read the same x, called through their launchers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import HAS_GPU
from tolerance import assert_as_exact_as_peft, peft_sequence
from torch import Tensor

from lora_kernels import lora_linear_reference
from lora_kernels.backends import Member, Precision, Problem
from lora_kernels.dropout import Dropout, drop_threshold, inverse_keep, keep_mask

pytest.importorskip("triton", reason="Triton is not installed")


from lora_kernels.backends.triton import group_input, group_launch, group_operands, sharing
from lora_kernels.backends.triton.tiles import (
    INTERPRETER,
    MAX_PARTS,
    Chip,
    candidates,
    group_input_tiles,
    group_share_out,
    group_sharers,
    group_tiles,
    sharers,
)

Results = dict[str, Tensor]
HALF = torch.bfloat16 if HAS_GPU else torch.float16
HOPPER = Chip((9, 0), 132, 232448, True)


@dataclass(frozen=True)
class GroupCase:
    """Members that read one x; every second scale is a tensor, and B is never zero."""

    M: int
    K: int
    Ns: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype = HALF
    adapter_dtype: torch.dtype | None = None
    precision: Precision = "native"
    dropout: float = 0.0
    biases: int = 0
    transposed: bool = False
    mixed: bool = False
    strided: bool = False

    def __str__(self) -> str:
        sizes = "-".join([f"{self.M}x{self.K}", *[f"{N}r{r}" for N, r in zip(self.Ns, self.ranks, strict=True)]])
        flags = [name for name in ("transposed", "mixed", "strided") if getattr(self, name)]
        dtypes = [str(t).removeprefix("torch.") for t in (self.dtype, self.adapter_dtype) if t is not None]
        return "-".join([sizes, *dtypes, f"p{self.dropout}", f"{self.biases}biases", *flags])

    def tensors(self, device: torch.device) -> Group:
        generator = torch.Generator(device).manual_seed(self.M * 11 + self.K * 7 + sum(self.Ns) * 5 + sum(self.ranks))

        def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = self.dtype) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

        def rows(length: int) -> Tensor:
            return randn(self.M, length + 24)[:, 8 : length + 8] if self.strided else randn(self.M, length)

        members, adapters = [], self.adapter_dtype or self.dtype
        for i, (N, rank) in enumerate(zip(self.Ns, self.ranks, strict=True)):
            weight = randn(N, self.K, scale=self.K**-0.5)
            if self.transposed or (self.mixed and i == 1):
                weight = weight.T.contiguous().T
            scale = (1.7 - 0.4 * i) * inverse_keep(self.dropout)
            members.append(
                Member(
                    weight,
                    randn(rank, self.K, scale=self.K**-0.5, dtype=adapters),
                    randn(N, rank, scale=rank**-0.5, dtype=adapters),
                    randn(N) if i < self.biases else None,
                    torch.full((1,), scale, device=device) if i % 2 else scale,
                    Dropout.draw(self.dropout, device),
                )
            )
        return Group(rows(self.K), members, [rows(N) for N in self.Ns])


@dataclass(frozen=True)
class Group:
    x: Tensor
    members: list[Member]
    dys: list[Tensor]


def computed(case: GroupCase, group: Group, functions: Any = group_launch, **forced: object) -> Results:
    """Everything that the three launches give."""
    x, members, dys = group.x, group.members, group.dys
    dtype = case.adapter_dtype or case.dtype
    ys, ss = functions.forward(x, members, case.precision, True, **forced)
    dx, ts = functions.backward_input(dys, members, case.precision, True, **forced)
    dropouts = [member.dropout for member in members]
    dAs, dBs = functions.backward_adapters(x, dys, ss, list(ts), dropouts, dtype)
    assert dx is not None
    results = {"dx": dx}
    for i, values in enumerate(zip(ys, ss, ts, dAs, dBs, strict=True)):
        named = zip(("y", "s", "t", "dA", "dB"), values, strict=True)
        results |= {f"{name}{i}": value for name, value in named if value is not None}
    return results


def by_autograd(case: GroupCase, group: Group, exact: bool) -> Results:
    """The same from the definition in float64, or from PEFT's operations."""

    def leaf(t: Tensor) -> Tensor:
        return (t.double() if exact else t).detach().requires_grad_()

    x, results, leaves, sums = leaf(group.x), {}, {}, []
    for i, (member, dy) in enumerate(zip(group.members, group.dys, strict=True)):
        assert isinstance(member.weight, Tensor)
        assert member.lora_A is not None
        assert member.lora_B is not None
        weight, bias = member.weight, member.bias
        lora_A, lora_B = leaf(member.lora_A), leaf(member.lora_B)
        scaling = float(member.scale) / inverse_keep(case.dropout)
        keep = None if member.dropout is None else keep_mask(member.dropout.seed, case.M, case.K, case.dropout)
        if exact:
            bias = None if bias is None else bias.double()
            y = lora_linear_reference(
                x, weight.double(), lora_A, lora_B, scaling=scaling, bias=bias, keep=keep, dropout_p=case.dropout
            )
        else:
            p = drop_threshold(case.dropout) / 65536
            y = peft_sequence(x, weight, lora_A, lora_B, scaling, bias, keep, p)
        results[f"y{i}"] = y.detach()
        leaves |= {f"dA{i}": lora_A, f"dB{i}": lora_B}
        sums.append((y * dy.to(y.dtype)).sum() if exact else y)
    leaves["dx"] = x
    dys = None if exact else [dy.to(y.dtype) for dy, y in zip(group.dys, sums, strict=True)]
    return results | dict(zip(leaves, torch.autograd.grad(sums, list(leaves.values()), dys), strict=True))


CASES = [
    GroupCase(65, 96, (130, 40), (16, 16)),
    GroupCase(65, 96, (130, 40, 17), (16, 3, 40), biases=3),
    GroupCase(63, 80, (40, 64, 96), (8, 8, 8), dropout=0.3, biases=1),
    GroupCase(17, 33, (40, 70, 1), (100, 1, 8), torch.float32, dropout=0.5, biases=2),
    GroupCase(3, 500, (17, 63), (70, 5), torch.float32, transposed=True),
    GroupCase(34, 48, (40, 33, 72), (4, 4, 4), mixed=True, strided=True),
    GroupCase(1, 1, (1, 3), (1, 2)),
]
if HAS_GPU:
    CASES += [replace(case, dtype=torch.float16) for case in CASES if case.dtype == torch.bfloat16]
    # float32 adapters over a 16-bit base; rounded is what autocast does.
    CASES += [replace(case, adapter_dtype=torch.float32, precision="split") for case in CASES[:3]]
    CASES += [replace(case, adapter_dtype=torch.float32, precision="rounded") for case in CASES[:1]]
    CASES += [
        GroupCase(M, K, Ns, ranks, dropout=dropout, adapter_dtype=adapters, precision="split" if adapters else "native")
        for M, K, Ns in (
            (2048, 1024, (1024, 256, 256)),
            (500, 2000, (2000, 504, 504)),
            (1000, 512, (1408, 1408)),
            (129, 64, (64, 264)),
            (4096, 1024, (512, 512, 1024)),
        )
        for ranks in ((16, 16, 16), (64, 64, 64), (16, 256, 100), (8, 24, 8))
        for dropout in (0.0, 0.2)
        for adapters in (None, torch.float32)
    ]
    CASES = [replace(case, ranks=case.ranks[: len(case.Ns)]) for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_as_exact_as_peft(case: GroupCase, device: torch.device) -> None:
    torch.manual_seed(case.M)
    group = case.tensors(device)
    exact, peft = by_autograd(case, group, True), by_autograd(case, group, False)
    ours = computed(case, group)
    for name, value in ours.items():
        if name[0] == "d" and name != "dx":
            assert value.dtype == (case.adapter_dtype or case.dtype)
    rounded = case.precision == "rounded"
    # PEFT's sequence without autocast keeps float32 adapters as they are; rounded ones are those of a 16-bit PEFT.
    if rounded:
        group_16 = replace(group, members=[_rounded(member, case.dtype) for member in group.members])
        peft = by_autograd(case, group_16, False)
        exact = by_autograd(case, group_16, True)
    assert_as_exact_as_peft(ours, peft, exact)


def _rounded(member: Member, dtype: torch.dtype) -> Member:
    assert member.lora_A is not None
    assert member.lora_B is not None
    return member._replace(lora_A=member.lora_A.to(dtype), lora_B=member.lora_B.to(dtype))


@pytest.mark.parametrize("ranks", [(16, 3, 8), (64, 40, 24)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_same_bits_whoever_computes_s(dropout: float, ranks: tuple[int, ...], device: torch.device) -> None:
    """In every run; and where tiles cannot wait, or few programs take all tiles.

    The latter compute S in pieces of 16 columns, of whichever width shares are.
    """
    sizes = (300, 128, (200, 96, 72)) if HAS_GPU else (40, 64, (70, 40, 33))
    case = GroupCase(*sizes, ranks, dropout=dropout)
    torch.manual_seed(1)
    group = case.tensors(device)
    for programs in (1, None) if HAS_GPU else (None,):
        expected = computed(case, group, programs=programs)
        for spin_limit in (0, None):
            got = computed(case, group, programs=programs, spin_limit=spin_limit)
            for name, value in got.items():
                assert torch.equal(value, expected[name]), name


def plans_of(monkeypatch: pytest.MonkeyPatch) -> list[group_operands.GroupPlan]:
    """The plans that are made from now on: of a forward, and of dx."""
    plans: list[group_operands.GroupPlan] = []
    for name in ("plan_forward", "plan_input"):
        plan = getattr(group_operands, name)
        monkeypatch.setattr(group_launch, name, lambda *sizes, plan=plan: plans.append(plan(*sizes)) or plans[-1])
    monkeypatch.setattr(group_launch, "_launches", {})
    return plans


def have_sharers(monkeypatch: pytest.MonkeyPatch, parts: int, own: int) -> None:
    """So many programs compute S and T before their first tiles, in so many parts."""
    for name in ("sharers", "group_sharers"):
        monkeypatch.setattr(group_operands, name, lambda *sizes: (parts, own))


@pytest.mark.parametrize("own", [1, 3])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("ranks", [(16, 3, 8), (20, 32)], ids=str)
def test_right_whichever_programs_compute_s(
    ranks: tuple[int, ...], parts: int, own: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By some programs before their first tiles, in parts or not, with the bits of tiles that wait for none of them."""
    have_sharers(monkeypatch, parts, own)
    plans = plans_of(monkeypatch)
    case = GroupCase(70, 200, (130, 90, 170)[: len(ranks)], ranks)
    group = case.tensors(device)
    exact, peft = by_autograd(case, group, True), by_autograd(case, group, False)
    got = computed(case, group, programs=4)
    assert_as_exact_as_peft(got, peft, exact)
    for name, value in computed(case, group, programs=4, spin_limit=0).items():
        assert torch.equal(value, got[name]), name
    assert [(plan.sharers, plan.shares, plan.programs) for plan in plans] == [(own, 0, 4)] * 4
    assert [plan.k_parts for plan in plans] == [(parts,) * len(ranks)] * 4


@pytest.mark.skipif(HAS_GPU, reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("ranks", [(16, 3, 8), (20, 32)], ids=str)
def test_what_was_computed_before_the_tiles_is_found(ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every member: a flag that is not raised costs time alone, for a tile computes S itself then."""

    def compute_s(*_: object) -> None:
        raise AssertionError("a tile computes S that is stored")

    have_sharers(monkeypatch, 1, 1)
    monkeypatch.setattr(group_launch, "_launches", {})
    for module in (sharing, group_input):
        monkeypatch.setattr(module, "compute_s", compute_s)
    case = GroupCase(70, 200, (130, 90, 170)[: len(ranks)], ranks)
    group = case.tensors(torch.device("cpu"))
    exact, peft = by_autograd(case, group, True), by_autograd(case, group, False)
    assert_as_exact_as_peft(computed(case, group, programs=1, spin_limit=0), peft, exact)


def test_programs_compute_t_on_their_own_where_none_has_too_much_of_the_longest_member() -> None:
    query, key = 64, 16
    # 8192 tokens of q, k and v: six shares of each, two of every member. Gate and up are as long as one another.
    assert group_sharers(132, 64, 16, (query, key, key), 1) == (1, 32)
    assert group_sharers(132, 64, 16, (224, 224), 1) == (1, 32)
    # In parts, where many have a tile less.
    assert group_sharers(132, 16, 10, (16, 16), 1) == (3, 104)
    # 1152 x 3584: of six, two would have all of q. Of five, all have some of everything.
    assert group_sharers(132, 9, 14, (56, 8, 8), 1) == (1, 5)
    # 3072 tokens: of twelve, four would have all of q; fewer are too few.
    assert sharers(132, 24, 16, key, 1) == (1, 12)
    assert group_sharers(132, 24, 16, (query, key, key), 1) == (1, 0)
    # Nobody has a tile less, or too few.
    assert group_sharers(128, 64, 16, (query, key, key), 1) == (1, 0)
    assert group_sharers(132, 64, 12, (48, key, key), 1) == (1, 0)


def test_masks_and_halves_leave_s_in_the_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    have_sharers(monkeypatch, 1, 1)
    plans = plans_of(monkeypatch)
    case = GroupCase(40, 64, (70, 40), (16, 8))
    for dropout in (0.0, 0.3):
        masked = replace(case, dropout=dropout)
        computed(masked, masked.tensors(device))
    # Masks on x: what is masked in dx is what T A adds.
    assert [plan.sharers for plan in plans] == [1, 1, 0, 1]
    if HAS_GPU:
        halves = replace(case, adapter_dtype=torch.float32, precision="split")
        computed(halves, halves.tensors(device))
        assert [plan.sharers for plan in plans[4:]] == [0, 0]


def test_a_share_has_64_columns_at_most(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    have_sharers(monkeypatch, 1, 1)
    plans = plans_of(monkeypatch)
    for ranks in ((16, 16, 3), (32, 17), (17, 3, 8), (33, 33), (64, 16)):
        case = GroupCase(40, 64, (70, 40, 33)[: len(ranks)], ranks)
        computed(case, case.tensors(device))
    # dx has one for each member.
    assert [plan.sharers for plan in plans] == [1, 1, 1, 1, 0, 1, 0, 1, 0, 1]


def test_right_where_l2_does_not_hold_what_is_read(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_operands, "NUMBERS_THAT_STAY", 0)
    monkeypatch.setattr(group_launch, "_launches", {})
    case = GroupCase(40, 200, (130, 90, 170), (16, 3, 8))
    group = case.tensors(device)
    exact, peft = by_autograd(case, group, True), by_autograd(case, group, False)
    assert_as_exact_as_peft(computed(case, group), peft, exact)


@pytest.mark.parametrize(
    ("needs_a", "needs_b"),
    [("101", "011"), ("000", "010"), ("010", "000"), ("111", "000"), ("000", "000")],
)
def test_only_the_gradients_that_are_wanted(needs_a: str, needs_b: str, device: torch.device) -> None:
    case = GroupCase(40, 48, (33, 64, 72), (3, 16, 20), torch.float32, dropout=0.2)
    group = case.tensors(device)
    everything = computed(case, group)
    ts = [everything[f"t{i}"] if needed == "1" else None for i, needed in enumerate(needs_a)]
    ss = [everything[f"s{i}"] if needed == "1" else None for i, needed in enumerate(needs_b)]
    dropouts = [member.dropout for member in group.members]
    dAs, dBs = group_launch.backward_adapters(
        group.x if "1" in needs_a else None, group.dys, ss, ts, dropouts, torch.float32
    )
    for i in range(3):
        for name, value, needed in (("dA", dAs[i], needs_a[i]), ("dB", dBs[i], needs_b[i])):
            if needed == "0":
                assert value is None
            else:
                assert value is not None
                torch.testing.assert_close(value, everything[f"{name}{i}"], rtol=1e-5, atol=1e-5)


def test_without_dx_there_are_only_ts(device: torch.device) -> None:
    case = GroupCase(20, 48, (33, 64), (3, 16), torch.float32)
    group = case.tensors(device)
    members = [member._replace(weight=None, lora_A=None) for member in group.members]
    dx, ts = group_launch.backward_input(group.dys, members, "native", False)
    assert dx is None
    for i, t in enumerate(ts):
        torch.testing.assert_close(t, computed(case, group)[f"t{i}"], rtol=1e-4, atol=1e-4)


def test_no_rows_at_all(device: torch.device) -> None:
    results = computed(case := GroupCase(0, 48, (33, 64), (3, 16)), case.tensors(device))
    assert results["y1"].shape == (0, 64)
    assert results["dx"].shape == (0, 48)
    assert all(not results[name].any() for name in ("dA0", "dA1", "dB0", "dB1"))


def test_groups_that_the_kernels_do_not_take_are_refused(device: torch.device) -> None:
    problem = Problem.of(device, torch.float16, "native", 64, 64, 8)
    assert group_launch.refuses([problem] * 2) is None
    assert group_launch.refuses([problem] * 3) is None
    assert "has 4" in str(group_launch.refuses([problem] * 4))


def test_parts_of_the_members_steps_follow_their_lengths() -> None:
    for programs, row_tiles, columns, steps, chunks in (
        (132, 16, 16, (64, 16, 16), 1),
        (132, 64, 16, (64, 16, 16), 1),
        (132, 16, 16, (224, 224), 1),
        (132, 1, 64, (3, 1), 2),
    ):
        parts, shares = group_share_out(programs, row_tiles, columns, steps, chunks)
        assert shares == sum(parts) * chunks <= columns
        assert all(1 <= p <= min(MAX_PARTS, n) for p, n in zip(parts, steps, strict=True))
    assert group_share_out(132, 16, 16, (64, 16, 16), 1) == ((5, 2, 1), 8)
    assert group_share_out(132, 16, 2, (64, 16, 16), 1) == ((1, 1, 1), 0)


def test_tiles_are_chosen_for_the_waves_of_all_members() -> None:
    # 384 tiles of 128 x 256: three waves of 132, where q alone fills two, and k and v half a wave each.
    assert group_tiles(HOPPER, 2, True, 2048, [4096, 1024, 1024]).block_n == 256
    # dx of 512 rows would be a wave of 64 x 256; of 1536 it is three, and a layer's has them anyhow.
    dx = {M: group_input_tiles(HOPPER, 2, True, M, 4096) for M in (256, 384, 512, 1024, 1536)}
    assert {M: (tiles.block_m, tiles.block_n) for M, tiles in dx.items()} == {
        256: (64, 128), 384: (128, 128), 512: (128, 128), 1024: (128, 256), 1536: (64, 256)
    }  # fmt: skip
    assert group_tiles(HOPPER, 2, True, 512, [4096]).block_m == 64
    assert group_input_tiles(INTERPRETER, 2, False, 64, 64) in candidates(INTERPRETER, 2, False)
    for Ns in ([64], [64, 64]):
        assert group_tiles(INTERPRETER, 2, False, 64, Ns) in candidates(INTERPRETER, 2, False)
