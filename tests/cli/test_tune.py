"""`tune`: what it chooses, the table that it writes, and the use of that table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from terminal import on_a_terminal

from lora_kernels.backends.triton import tiles as tiles_module
from lora_kernels.backends.triton import tuned
from lora_kernels.backends.triton.tiles import (
    INTERPRETER,
    Chip,
    GradTiles,
    OnePassTiles,
    shipped_grad_tiles,
    shipped_tiles,
)
from lora_kernels.backends.triton.tuned import (
    GradEntry,
    OnePassEntry,
    TableRefused,
    TunedTable,
    grad_tiles,
    one_pass_tiles,
    read_table,
)
from lora_kernels.cli.bench.clock import Times
from lora_kernels.cli.main import main
from lora_kernels.cli.tune.search import choose, grad_candidates, one_pass_candidates

HOPPER = Chip((9, 0), 132, 232448, True)
AMPERE = Chip((8, 0), 108, 166912, False)
SQUARE, WIDE = OnePassTiles(128, 128, 64, 8, 4, True, 1.0), OnePassTiles(64, 256, 64, 4, 4, True, 1.0)
TABLE = TunedTable(
    HOPPER,
    "some day",
    (OnePassEntry(2, True, 2048, 4096, WIDE), OnePassEntry(2, True, 8192, 4096, SQUARE)),
    (GradEntry(2, GradTiles(128, 64, 4, 4)),),
)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No table of this machine's user, and none of another test."""
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for cached in (tuned.tuned_table, tuned.grad_tiles):
        cached.cache_clear()
    yield
    for cached in (tuned.tuned_table, tuned.grad_tiles):
        cached.cache_clear()


def _times(median: float) -> Times:
    return Times(median, median, median, 10)


def test_the_fastest_over_all_problems_is_chosen() -> None:
    a, b, c = SQUARE, WIDE, replace(SQUARE, num_stages=3)
    # a wins the long problem by little, b the short one by much; c does not run everywhere.
    problems = [{a: _times(1000.0), b: _times(1050.0), c: _times(1.0)}, {a: _times(20.0), b: _times(10.0), c: "no"}]
    assert choose(problems[1:], a, lambda _: True) == (b, 2.0)
    del problems[0][c]
    chosen = choose(problems, a, lambda _: True)
    assert chosen is not None
    assert chosen[0] == b
    assert chosen[1] == pytest.approx((1 + 2) / (1.05 + 1))


def test_what_does_not_hold_everywhere_is_passed_over() -> None:
    problems = [{SQUARE: _times(10.0), WIDE: _times(9.0)}]
    assert choose(problems, SQUARE, lambda tiles: tiles != WIDE) == (SQUARE, 1.0)
    assert choose(problems, SQUARE, lambda tiles: False) is None
    assert choose([{SQUARE: "does not compile"}], SQUARE, lambda tiles: True) is None


@pytest.mark.parametrize("chip", [HOPPER, AMPERE])
@pytest.mark.parametrize("use_tma", [True, False])
def test_candidates_fit_the_chip(chip: Chip, use_tma: bool) -> None:
    found = one_pass_candidates(chip, 2, use_tma)
    assert shipped_tiles(chip, 2, use_tma, 8192, 4096) in found
    assert len(found) > 4
    assert len(set(found)) == len(found)
    for candidate in found:
        assert candidate.shared_memory(2) <= chip.shared_memory
        assert candidate.use_tma == (use_tma and chip.has_tma)
    assert grad_candidates(chip, 2)[0] == shipped_grad_tiles(chip, 2)


def test_a_table_is_used(tmp_path: Path) -> None:
    path = tuned.table_path(HOPPER)
    assert path == tmp_path / "cache" / "lora_kernels" / "tiles-9.0-132.json"
    TABLE.write(path)
    assert read_table(path, HOPPER) == TABLE
    assert one_pass_tiles(HOPPER, 2, True, 2048, 4096) == WIDE
    assert one_pass_tiles(HOPPER, 2, True, 8192, 4096) == SQUARE
    assert one_pass_tiles(HOPPER, 2, True, 6000, 4096) == SQUARE
    assert grad_tiles(HOPPER, 2) == GradTiles(128, 64, 4, 4)
    assert tuned.describe(HOPPER) == f"tuned on this GPU (some day): {path}"


@pytest.mark.parametrize(("M", "N", "itemsize", "use_tma"), [(512, 4096, 2, True), (2048, 1024, 2, True), (2048, 4096, 2, False), (2048, 4096, 4, True)])  # noqa: E501
def test_what_was_not_measured_gets_the_shipped_one(M: int, N: int, itemsize: int, use_tma: bool) -> None:
    path = tuned.table_path(HOPPER)
    assert path is not None
    TABLE.write(path)
    assert one_pass_tiles(HOPPER, itemsize, use_tma, M, N) == shipped_tiles(HOPPER, itemsize, use_tma, M, N)
    assert grad_tiles(HOPPER, 4) == shipped_grad_tiles(HOPPER, 4)


def test_without_a_table_the_shipped_ones_are_used() -> None:
    for chip in (HOPPER, AMPERE, INTERPRETER):
        assert tuned.tuned_table(chip) is None
        assert one_pass_tiles(chip, 2, True, 2048, 4096) == shipped_tiles(chip, 2, True, 2048, 4096)
    assert "measured on an H100 with 132 multiprocessors (this is a 9.0 with 132)" in tuned.describe(HOPPER)
    assert "(this is a 9.0 with 78)" in tuned.describe(replace(HOPPER, multiprocessors=78))
    assert "not measured on this GPU" in tuned.describe(AMPERE)


def test_the_variable_names_a_table_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = tuned.table_path(HOPPER)
    assert default is not None
    TABLE.write(default)
    monkeypatch.setenv(tuned.VARIABLE, "")
    assert tuned.tuned_table(HOPPER) is None
    tuned.tuned_table.cache_clear()
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "nosuch.json"))
    with pytest.raises(TableRefused, match=r"nosuch\.json: cannot be read \(No such file"):
        tuned.tuned_table(HOPPER)
    other = replace(TABLE, made="another")
    other.write(tmp_path / "other.json")
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "other.json"))
    assert tuned.tuned_table(HOPPER) == other


def test_a_home_that_cannot_be_seen_holds_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose HOME is another user's, or that has none."""

    def forbidden(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", forbidden)
        assert tuned.tuned_table(HOPPER) is None
    tuned.tuned_table.cache_clear()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert tuned.table_path(HOPPER) is None
    assert tuned.tuned_table(HOPPER) is None


def _spoil(**changes: Any) -> dict[str, Any]:
    data = {"format": 1} | json.loads(json.dumps(tuned.asdict(TABLE)))
    for name, value in changes.items():
        if name in data:
            data[name] = value
        else:
            data["one_pass"][0]["tiles"][name] = value
    return data


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("{", "its JSON is damaged"),
        ([], "not a table of format 1"),
        (_spoil(format=2), "not a table of format 1"),
        (_spoil(one_pass=3), "an entry is damaged"),
        (_spoil(one_pass=[{"M": 1}]), "an entry is damaged"),
        (_spoil(colour="red"), "an entry is damaged"),
        (_spoil(use_tma="no"), "an entry is damaged (use_tma is 'no')"),
        (_spoil(num_stages="four"), "an entry is damaged (num_stages is 'four')"),
        (_spoil(block_m=100), "blocks must be powers of two"),
        (_spoil(adapter_grads=[{"itemsize": 2, "tiles": vars(GradTiles(48, 64, 4, 4))}]), "blocks must be powers"),
        (_spoil(num_warps=3), "warps one of"),
        (_spoil(num_stages=9), "bytes of shared memory"),
        (_spoil(chip=AMPERE.__dict__), "measured on Chip(capability=(8, 0)"),
    ],
)
def test_wrong_tables_are_refused(data: object, reason: str, tmp_path: Path) -> None:
    path = tuned.table_path(HOPPER)
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(TableRefused) as refusal:
        one_pass_tiles(HOPPER, 2, True, 2048, 4096)
    assert str(path) in str(refusal.value)
    assert reason in str(refusal.value)
    assert "python -m lora_kernels tune" in str(refusal.value)
    with pytest.raises(TableRefused):
        grad_tiles(HOPPER, 2)


def test_tma_on_a_chip_without_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    without = replace(HOPPER, has_tma=False)
    replace(TABLE, chip=without).write(path)
    with pytest.raises(TableRefused, match="TMA is not used for it"):
        read_table(path, without)


def test_doctor_speaks_of_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kernels.cli import doctor

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tiles_module, "chip_of", lambda device: HOPPER)
    assert "measured on an H100" in str(doctor._tiles())
    path = tuned.table_path(HOPPER)
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_text("{")
    tuned.tuned_table.cache_clear()
    assert str(doctor._tiles()).startswith(f"refused: {path}: its JSON is damaged")


@pytest.mark.interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_command_in_the_interpreter(tmp_path: Path) -> None:
    out = tmp_path / "new" / "table.json"
    options = ["--shapes", "33x64x48", "--rank", "3", "--dtype", "float16", "--samples", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "lora_kernels", "tune", *options, "--out", str(out)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = read_table(out, INTERPRETER)
    assert {(entry.M, entry.N) for entry in table.one_pass} == {(33, 48), (33, 64)}
    assert table.adapter_grads[0].itemsize == 2
    assert "outputs 33 x 48: 32x32x32" in done.stdout


@pytest.mark.interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_a_wrong_configuration_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kernels.cli.bench.cases import Case, Operands
    from lora_kernels.cli.bench.clock import CpuClock
    from lora_kernels.cli.tune import measure

    operands = Operands.make(Case(33, 64, 48, rank=3, dtype="float16", adapters="float16"), torch.device("cpu"))
    good, wrong = tiles_module._INTERPRETED[0], replace(tiles_module._INTERPRETED[0], group_m=4)
    launched = measure.launch.one_pass

    def spoiled(*arguments: Any, tiles: OnePassTiles) -> tuple[torch.Tensor, torch.Tensor]:
        out, s = launched(*arguments, tiles=tiles)
        return (out * 1.1 if tiles == wrong else out), s

    monkeypatch.setattr(measure.launch, "one_pass", spoiled)
    for problem in measure.OnePass.of(operands):
        told: list[float] = []
        found = measure.measure_one_pass(problem, [good, wrong], CpuClock("cpu"), 2, told.append)
        # The check of each configuration, and the samples of the one that is right.
        assert told == pytest.approx([0.0, 0.4, 0.8, 0.9, 1.0])
        assert isinstance(found[good], Times)
        assert str(found[wrong]).startswith("wrong answer: off by 1.0e-01")


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Every configuration takes the same time and holds; after `stop_after` problems comes a Ctrl-C."""
    pytest.importorskip("tqdm")
    from lora_kernels.cli.tune import tuning

    state = SimpleNamespace(stop_after=99, measured=0)

    def measure(problem: object, tried: Any, clock: object, samples: int, progress: Any) -> dict[Any, Times]:
        if state.measured == state.stop_after:
            raise KeyboardInterrupt
        state.measured += 1
        return {tiles: _times(10.0 + index) for index, tiles in enumerate(tried)}

    for name in ("measure_one_pass", "measure_grads"):
        monkeypatch.setattr(tuning, name, measure)
    monkeypatch.setattr(tuning, "holds", lambda *arguments: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return state


TWO = ["tune", "--shapes", "33x64x48", "17x64x40", "--rank", "3", "--out"]


def test_a_second_run_keeps_what_the_first_measured(
    instant: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    tune = ["tune", "--rank", "3", "--out", str(path), "--shapes"]
    assert main([*tune, "33x64x48", "--dtype", "float32"]) == 0
    assert main([*tune, "17x64x40", "--dtype", "float16"]) == 0
    assert "beside what it had of other layers" in capsys.readouterr().out
    both = read_table(path, INTERPRETER)
    assert {(e.itemsize, e.M, e.N) for e in both.one_pass} == {(4, 33, 48), (4, 33, 64), (2, 17, 40), (2, 17, 64)}
    assert {e.itemsize for e in both.adapter_grads} == {2, 4}
    # What is measured again is replaced.
    assert main([*tune, "17x64x40", "--dtype", "float16"]) == 0
    assert len(read_table(path, INTERPRETER).one_pass) == 4
    # So it is where the earlier run was interrupted.
    replace(both, made=f"{both.made}, interrupted after 1 of 2 cases, with 3 choices made").write(path)
    assert main([*tune, "17x64x40", "--dtype", "float16"]) == 0
    assert len(read_table(path, INTERPRETER).one_pass) == 4
    # Other versions make other kernels.
    replace(both, made="2026-01-01, lora_kernels 0.0.1, triton 3.0.0").write(path)
    assert main([*tune, "17x64x40", "--dtype", "float16"]) == 0
    assert {(e.M, e.N) for e in read_table(path, INTERPRETER).one_pass} == {(17, 40), (17, 64)}


def test_interrupt_keeps_the_cases_that_were_finished(
    instant: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    # Forward, dx and gradients of the first case, and the forward of the second.
    instant.stop_after = 4
    assert main([*TWO, str(path)]) == 130
    table = read_table(path, INTERPRETER)
    assert {(entry.M, entry.N) for entry in table.one_pass} == {(33, 48), (33, 64)}
    assert len(table.adapter_grads) == 1
    assert table.made.endswith("interrupted after 1 of 2 cases, with 3 choices made")
    printed = capsys.readouterr()
    assert f"table       {path}, interrupted after 1 of 2 cases, with 3 choices made\n" in printed.out
    assert printed.err == ""


def test_interrupt_leaves_an_earlier_table_alone(
    instant: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    assert main([*TWO, str(path)]) == 0
    earlier = path.read_text()
    assert len(read_table(path, INTERPRETER).one_pass) == 4
    instant.measured, instant.stop_after = 0, 3
    assert main([*TWO, str(path)]) == 130
    assert path.read_text() == earlier
    assert len(read_table(tmp_path / "table.interrupted.json", INTERPRETER).one_pass) == 2
    assert f"{path} stays as it was, and LORA_KERNELS_TUNED can name this one" in capsys.readouterr().out


def test_interrupt_before_anything_is_complete(
    instant: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    instant.stop_after = 2
    assert main([*TWO, str(tmp_path / "table.json")]) == 130
    assert list(tmp_path.iterdir()) == []
    assert "table       none: nothing was complete" in capsys.readouterr().out


def test_interrupt_of_the_choice_keeps_what_was_chosen(
    instant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_kernels.cli.tune import tuning

    chosen: list[object] = []

    def choose_two(*arguments: Any) -> Any:
        if len(chosen) == 2:
            raise KeyboardInterrupt
        chosen.append(arguments)
        return choose(*arguments)

    monkeypatch.setattr(tuning, "choose", choose_two)
    assert main([*TWO, str(tmp_path / "table.json")]) == 130
    table = read_table(tmp_path / "table.json", INTERPRETER)
    assert (len(table.one_pass), len(table.adapter_grads)) == (2, 0)
    assert table.made.endswith("interrupted after 2 of 2 cases, with 2 choices made")


def test_a_full_disk(
    instant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main([*TWO, str(tmp_path / "table.json")]) == 2
    assert capsys.readouterr().err.endswith(f"--out {tmp_path}: cannot be written (No space left on device)\n")
    assert instant.measured == 0
    monkeypatch.setattr(TunedTable, "write", full)
    assert main([*TWO, str(tmp_path / "table.json")]) == 2
    captured = capsys.readouterr()
    assert captured.err.endswith("table.json: cannot be written (No space left on device)\n")
    assert "adapter gradients: " in captured.out


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(["tune"]) == 2
    assert capsys.readouterr().err == "lora_kernels: error: tune needs a GPU that torch can use, and there is none\n"


def test_shapes_have_their_own_m(
    instant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TWO, str(tmp_path / "table.json"), "--m", "8"]) == 2
    assert capsys.readouterr().err == "lora_kernels: error: --m goes with --projections: --shapes has its own\n"
    assert instant.measured == 0


def test_few_tokens_are_refused_where_their_kernel_is_not_tuned(
    instant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiles_module, "chip_of", lambda device: HOPPER)
    out = ["--out", str(tmp_path / "table.json")]
    # Of 100 x 14336 -> 4096 only the forward takes it.
    for shape in ("64x64x48", "128x2048x2048", "64x14336x4096", "256x4096x4096"):
        assert main(["tune", "--shapes", "257x64x48", "100x14336x4096", shape, *out]) == 2
        reason = "take a kernel for few tokens on this chip, whose tiles are not tuned: more must be asked for"
        assert capsys.readouterr().err == f"lora_kernels: error: {shape}: forward and dx {reason}\n"
    assert instant.measured == 0
    assert main(["tune", "--shapes", "257x64x48", "200x63x48", "1x63x48", *out]) == 0


def test_large_ranks_are_refused_where_their_kernels_are_not_tuned(
    instant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiles_module, "chip_of", lambda device: HOPPER)
    tune = ["tune", "--shapes", "600x64x48", "--out", str(tmp_path / "table.json"), "--rank"]
    assert main([*tune, "72"]) == 2
    reason = "takes kernels on this chip whose tiles are not tuned: a smaller one must be asked for"
    assert capsys.readouterr().err == f"lora_kernels: error: 600x64x48: rank 72 {reason}\n"
    assert instant.measured == 0
    # One that TMA does not take is the one-pass kernel's.
    assert main([*tune, "70"]) == 0


def test_tokens_of_projections() -> None:
    from lora_kernels.cli.main import build_parser
    from lora_kernels.cli.tune.command import _cases

    def tokens(*argv: str) -> set[int]:
        return {case.M for case in _cases(build_parser().parse_args(["tune", *argv]))}

    assert tokens() == {512, 2048, 8192}
    assert tokens("--m", "8", "16") == {8, 16}
    assert tokens("--shapes", "33x64x48") == {33}


def test_progress_names_what_is_measured(instant: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_kernels.cli.tune import tuning

    def measure(problem: object, tried: Any, clock: object, samples: int, progress: Any) -> dict[Any, Times]:
        progress(0.5)
        return {tiles: _times(10.0) for tiles in tried}

    for name in ("measure_one_pass", "measure_grads"):
        monkeypatch.setattr(tuning, name, measure)
    terminal = on_a_terminal(monkeypatch)
    assert main([*TWO, str(tmp_path / "table.json")]) == 0
    shown = terminal.getvalue()
    for percent, what in ((8, "forward"), (25, "dx"), (42, "adapter gradients")):
        assert re.search(rf"measuring: +{percent}%.*33x64x48 r3 bfloat16, {what}", shown), shown


def test_unwritable_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (tmp_path / "file").touch()
    assert main(["tune", "--out", str(tmp_path / "file" / "table.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["tune", "--out", str(tmp_path)]) == 2
    assert "is a directory" in capsys.readouterr().err
