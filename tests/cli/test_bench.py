"""`bench` from its options to its files, on a CPU."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from terminal import on_a_terminal

from lora_kernels.backends import cuda_build
from lora_kernels.cli.bench import command, options
from lora_kernels.cli.bench.cases import SUITES, Case
from lora_kernels.cli.bench.clock import Times
from lora_kernels.cli.bench.layers import Plan
from lora_kernels.cli.bench.plots import write_plots
from lora_kernels.cli.bench.providers import PROVIDERS
from lora_kernels.cli.bench.results import RESULTS_FILE, Measurement, ModelMeasurement, Results, read_results
from lora_kernels.cli.bench.roofline import Ceilings
from lora_kernels.cli.main import build_parser, main

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SMALL = ["bench", "--device", "cpu", "--samples", "3", "--providers", "eager", "peft"]


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "out"
    assert main([*SMALL, "--shapes", "5x48x40", "1x17x3", "--ranks", "3", "--out", str(out)]) == 0
    found = read_results(out / RESULTS_FILE)
    assert {m.provider for m in found.measurements} == {"frozen", "eager", "peft"}
    assert len(found.measurements) == 2 * 2 * 3
    assert [m.reason for m in found.measurements if m.times is None] == []
    assert all(m.roofline_us and m.bytes and m.flops for m in found.measurements)
    assert not found.interrupted
    printed = capsys.readouterr().out
    assert "on a CPU" in printed
    assert "5x48x40 r3 float32" in printed
    for name in ("ratios-cpu-eager.png", "roofline-cpu-eager.png"):
        assert (out / name).read_bytes().startswith(PNG_SIGNATURE)


def test_a_group_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SMALL, "--group", "5x48x40+17+8", "5x48x40+17", "--ranks", "3"]
    assert main([*argv, "--out", str(tmp_path)]) == 0
    found = read_results(tmp_path / RESULTS_FILE)
    three = Case(5, 48, 40, 3, dtype="float32", adapters="float32", others=(17, 8))
    assert {m.case for m in found.measurements} == {three, replace(three, others=(17,))}
    assert {(m.provider, m.part) for m in found.measurements} == {
        (provider, part) for provider in ("frozen", "eager", "peft") for part in ("forward", "step")
    }
    assert [m.reason for m in found.measurements if m.times is None] == []
    printed = capsys.readouterr().out
    assert "5x48x40+17+8 r3 float32" in printed
    for name in ("ratios-cpu-eager.png", "roofline-cpu-eager.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG_SIGNATURE)

    # Every figure is found again in the JSON of the same groups.
    again = [*argv, "--no-plots", "--out", str(tmp_path / "now"), "--baseline", str(tmp_path / RESULTS_FILE)]
    assert main(again) in (0, command.EXIT_WORSE)
    assert "8 figures compared, 0 have no counterpart" in capsys.readouterr().out


def test_cpu_time(tmp_path: Path) -> None:
    assert main([*SMALL, "--shapes", "5x48x40", "--cpu-time", "--no-plots", "--out", str(tmp_path)]) == 0
    found = read_results(tmp_path / RESULTS_FILE).measurements
    assert {(m.part, m.regime) for m in found} == {("step", "cpu time")}
    assert all(m.times for m in found)
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS_FILE]


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Every case has the same figures at once; the list tells which cases were measured."""
    seen: list[Case] = []

    def measure(case: Case, plan: Plan, ceilings: dict[str, Ceilings]) -> Iterator[Measurement]:
        seen.append(case)
        for name, median in (("frozen", 100.0), ("eager", 140.0)):
            for part in ("forward", "step"):
                times = Times(median, median * 0.99, median * 1.01, 30)
                yield Measurement(case, name, part, "cpu", "eager", times)

    monkeypatch.setattr(command, "measure_case", measure)
    monkeypatch.setattr(command, "measure_ceilings", lambda *arguments: Ceilings(1e10, 1e12))
    return seen


def test_a_regression_is_exit_status_1(
    instant: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--no-plots", "--out", str(tmp_path)]) == 0
    path = tmp_path / RESULTS_FILE
    again = [*SMALL, "--no-plots", "--out", str(tmp_path / "now"), "--baseline", str(path)]
    assert main(again) == 0
    assert "0 got worse" in capsys.readouterr().out

    before = read_results(path)
    for index, m in enumerate(before.measurements):
        if m.provider == "eager" and m.part == "step":
            before.measurements[index] = replace(m, times=Times(120.0, 119.0, 121.0, 30))
    before.write(tmp_path)
    assert main(again) == 1
    assert "WORSE:  128x256x320 r16 float32, eager, step, cpu, eager: 1.200 -> 1.400" in capsys.readouterr().out


def test_quick_starts_nothing_after_its_time(
    instant: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter(range(0, 1000, 30))
    monkeypatch.setattr(command.time, "perf_counter", lambda: float(next(now)))
    assert main(["bench", "--device", "cpu", "--quick", "--no-plots", "--out", str(tmp_path)]) == 0
    assert len(instant) == 1
    assert "time is up: 3 of 4 cases were not measured" in capsys.readouterr().err


def test_quick_names_whom_it_left_out(
    instant: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = ["bench", "--device", "cpu", "--quick", "--no-plots", "--out", str(tmp_path)]
    assert main(argv) == 0
    assert set(read_results(tmp_path / RESULTS_FILE).left_out) == {"peft-compile", "auto"}
    _, reasons = capsys.readouterr().out.split("no figure:\n")
    assert "peft-compile  left out of --quick, because it is not compiled yet: --quick --providers" in reasons
    assert main([*argv, "--providers", "peft-compile"]) == 0
    assert read_results(tmp_path / RESULTS_FILE).left_out == {}
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("built", "missing", "takes_part"), [(True, None, True), (False, None, False), (False, "there is no nvcc", True)]
)
def test_quick_has_cuda_where_it_need_not_be_compiled(
    built: bool, missing: str | None, takes_part: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(cuda_build, "is_built", lambda capability: built)
    monkeypatch.setattr(cuda_build, "missing", lambda: missing)
    monkeypatch.setattr(cuda_build, "cannot_keep", lambda: None)
    quick, everything = _options("--quick"), _options()
    assert isinstance(quick, options.LayerOptions)
    assert isinstance(everything, options.LayerOptions)
    assert ("cuda" in quick.providers, "cuda" in quick.left_out) == (takes_part, not takes_part)
    assert takes_part or "`python -m lora_kernels build --cuda` compiles it, once" in quick.left_out["cuda"]
    assert set(everything.left_out) == {"auto"}


def test_a_baseline_of_other_cases_is_an_error(
    instant: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--no-plots", "--shapes", "5x48x40", "--out", str(tmp_path)]) == 0
    again = ["--out", str(tmp_path / "now"), "--baseline", str(tmp_path / RESULTS_FILE)]
    capsys.readouterr()
    assert main([*SMALL, "--no-plots", "--shapes", "6x48x40", *again]) == 2
    captured = capsys.readouterr()
    assert "nothing could be compared: 2 figures of this run are not in it, and 2 of its figures" in captured.err
    # What was measured is not lost with it.
    assert "6x48x40" in captured.out
    assert (tmp_path / "now" / RESULTS_FILE).exists()


def test_a_baseline_that_the_run_would_replace_is_refused(
    instant: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--no-plots", "--out", str(tmp_path)]) == 0
    before = (tmp_path / RESULTS_FILE).read_bytes()
    itself = str(tmp_path / "." / RESULTS_FILE)
    assert main([*SMALL, "--no-plots", "--out", str(tmp_path), "--baseline", itself]) == 2
    assert "this run would replace it; name another folder with --out" in capsys.readouterr().err
    assert (tmp_path / RESULTS_FILE).read_bytes() == before


def test_interrupt_before_anything_was_finished(
    instant: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an earlier run left is worth more than nothing."""
    assert main([*SMALL, "--no-plots", "--out", str(tmp_path)]) == 0
    before = (tmp_path / RESULTS_FILE).read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure_case", interrupted)
    assert main([*SMALL, "--no-plots", "--out", str(tmp_path)]) == 130
    assert f"nothing was finished; {tmp_path} is as it was" in capsys.readouterr().out
    assert (tmp_path / RESULTS_FILE).read_bytes() == before


def test_a_disk_that_fills_up_during_the_run(
    instant: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = json.dump

    def dump(data: Any, file: Any, **options: Any) -> None:
        if len(instant) == 2:
            file.write("{")
            raise OSError(28, "No space left on device")
        whole(data, file, **options)

    monkeypatch.setattr(json, "dump", dump)
    assert main([*SMALL, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    path = tmp_path / RESULTS_FILE
    assert captured.err == f"lora_kernels: error: {path}: cannot be written (No space left on device)\n"
    assert len(instant) == 2
    # Both are in the terminal; in the file is what could still be written, and nothing is left beside it.
    assert all(str(case) in captured.out for case in instant)
    assert {m.case for m in read_results(path).measurements} == {instant[0]}
    assert list(tmp_path.iterdir()) == [path]


def test_a_picture_that_cannot_be_written(
    instant: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ratios-cpu-eager.png").mkdir()
    assert main([*SMALL, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "ratios-cpu-eager.png: cannot be written (Is a directory)" in captured.err
    assert "128x256x320 r16 float32" in captured.out
    assert (tmp_path / RESULTS_FILE).exists()


def test_ceilings_have_a_progress_bar(
    instant: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = on_a_terminal(monkeypatch)
    assert main([*SMALL, "--no-plots", "--out", str(tmp_path)]) == 0
    assert re.search(r"ceilings: 100%.* 1/1 ", terminal.getvalue())


def test_no_progress_bar_where_there_is_no_terminal(
    instant: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--no-plots", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


def test_interrupt_leaves_what_was_finished(tmp_path: Path) -> None:
    """A real Ctrl-C, after the first case is on disk."""
    shapes = [f"{M}x64x48" for M in range(1, 400)]
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_kernels", *SMALL, "--shapes", *shapes, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    while not (tmp_path / RESULTS_FILE).exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    found = read_results(tmp_path / RESULTS_FILE)
    assert found.interrupted
    assert 3 * 2 <= len(found.measurements) < 3 * 2 * len(shapes)
    assert "of what was finished" in stdout
    assert (tmp_path / "ratios-cpu-eager.png").read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shapes", "1x2"], "must be MxKxN, three whole numbers from 1 up, not '1x2'"),
        (["--shapes", "0x2x3"], "must be MxKxN"),
        (["--group", "1x2x3"], "must be MxKxN+N, whole numbers from 1 up and two N or more, not '1x2x3'"),
        (["--group", "1x2x3+0"], "must be MxKxN+N"),
        (["--group", "1x2x3+"], "must be MxKxN+N"),
        (["--group", "1x2x3+4", "--shapes", "1x2x3"], "not allowed with"),
        (["--m", "8", "--group", "1x2x3+4"], "--m goes with --projections: --group has its own"),
        (["--providers", "nosuch"], "--providers nosuch: must be of frozen, bitsandbytes, peft"),
        (["--ranks", "8"], "--ranks goes with --shapes, --group or --projections"),
        (["--m", "8", "--shapes", "1x2x3"], "--m goes with --projections"),
        (["--layers", "2"], "--layers goes with --model"),
        (["--no-checkpointing"], "--no-checkpointing goes with --model"),
        (["--steps", "2"], "--steps goes with --model"),
        (["--model", "llama-8b", "--samples", "5"], "--samples does not go with --model"),
        (["--cpu-time", "--launches", "graph"], "--launches does not go with --cpu-time"),
        (["--model", "llama-8b", "--layers", "33"], "--layers 33: llama-8b has 32"),
        (["--regimes", "warm"], "a CPU has neither"),
        (["--memory"], "--memory: only a GPU's memory is accounted for"),
        (["--quick", "--suite", "m"], "not allowed with"),
        (["--baseline", "/nosuch"], "/nosuch: cannot be read"),
        (["--samples", "1"], "--samples: must be a whole number from 2 up"),
    ],
)
def test_refusals_come_before_any_measurement(
    argv: list[str], message: str, instant: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--device", "cpu", *argv, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert instant == []


@pytest.mark.parametrize(
    "ignored",
    ["--m 8", "--ranks 8", "--dropout 0", "--dtype float32", "--adapters float32", "--nf4", "--regimes warm",
     "--launches graph", "--samples 5", "--cpu-time", "--memory", "--layers 2", "--batch 1", "--seq 8", "--rank 8",
     "--quantize nf4", "--no-checkpointing", "--steps 2", "--providers peft", "--device cpu", "--baseline /nosuch",
     "--note text", "--no-plots"],
)  # fmt: skip
def test_plot_refuses_what_it_would_ignore(ignored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _sweep().write(tmp_path)
    argv = ["bench", "--plot", str(tmp_path / RESULTS_FILE), "--out", str(tmp_path / "out"), *ignored.split()]
    assert main(argv) == 2
    name = ignored.split()[0]
    expected = f"lora_kernels: error: {name} does not go with --plot, which measures nothing\n"
    assert capsys.readouterr() == ("", expected)
    assert not (tmp_path / "out").exists()


def test_plot_of_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--plot", "/nosuch", "--out", str(tmp_path)]) == 2
    assert "/nosuch: cannot be read" in capsys.readouterr().err


def test_unwritable_output(instant: list[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main([*SMALL, "--out", str(file / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"lora_kernels: error: --out {file / 'out'}: cannot be written")
    assert instant == []


def test_a_full_disk(
    instant: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main([*SMALL, "--out", str(tmp_path)]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert instant == []


def test_missing_packages(
    instant: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else name)
    assert main([*SMALL, "--out", str(tmp_path)]) == 2
    assert 'pip install "lora-kernels[bench]", or --no-plots' in capsys.readouterr().err
    assert main([*SMALL, "--no-plots", "--out", str(tmp_path)]) == 0


def test_a_gpu_that_is_not_there(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "--device cuda: there is no GPU that torch can use" in capsys.readouterr().err


def _options(*argv: str, has_gpu: bool = True) -> options.Options:
    return options.from_args(build_parser().parse_args(["bench", *argv]), has_gpu=has_gpu)


def test_defaults_depend_on_the_device() -> None:
    everything, quick, cpu = _options(), _options("--quick"), _options(has_gpu=False)
    assert isinstance(everything, options.LayerOptions)
    assert isinstance(quick, options.LayerOptions)
    assert isinstance(cpu, options.LayerOptions)
    assert set(everything.cases) == {case for name in options.EVERYTHING for case in SUITES[name]}
    assert len(set(everything.cases)) == len(everything.cases)
    assert everything.providers == tuple(name for name in PROVIDERS if name != "auto")
    assert everything.regimes == ("warm", "cool")
    assert quick.cases == SUITES["quick"]
    assert quick.seconds < 60
    assert "peft-compile" not in quick.providers
    assert "peft-compile" in quick.left_out
    assert cpu.cases == SUITES["tiny"]
    one = _options("--projections", "gemma-9b", "--m", "7", "--ranks", "4", "8", "--nf4")
    assert isinstance(one, options.LayerOptions)
    assert {(case.M, case.rank, case.nf4, case.dtype) for case in one.cases} == {
        (7, 4, True, "bfloat16"),
        (7, 8, True, "bfloat16"),
    }
    assert len(one.cases) == 10


def _sweep() -> Results:
    """As if measured: NF4 is faster below 64 tokens."""
    found = Results({"device": "NVIDIA H100, compute capability 9.0"}, {"warm, graph": Ceilings(3e12, 7e14)})
    for M in (1, 16, 64, 256):
        for nf4, provider, median in ((False, "frozen", 50 + M / 10), (True, "triton", 20 + M / 1.5)):
            case, times = Case(M, 4096, 14336, nf4=nf4), Times(median, median, median, 30)
            for part in ("forward", "step"):
                found.measurements.append(
                    Measurement(case, provider, part, "warm", "graph", times, bytes=1e8, flops=1e9 * M)
                )
    return found


def test_pictures_of_a_sweep(tmp_path: Path) -> None:
    written = {path.name: path for path in write_plots(_sweep(), tmp_path)}
    assert {"time-against-m-warm-graph.png", "roofline-warm-graph.png"} <= set(written)
    for path in written.values():
        assert path.read_bytes().startswith(PNG_SIGNATURE)
        assert path.stat().st_size > 5000


def test_the_crossover() -> None:
    from lora_kernels.cli.bench.plots import _crossovers

    assert _crossovers([m for m in _sweep().measurements if m.part == "forward"]) == [64]


def test_the_floor_of_a_run_with_nf4_alone_is_drawn_and_crossed() -> None:
    """As of `--nf4 --shapes ...`: the frozen 16-bit layer was measured in turn with them."""
    from lora_kernels.cli.bench.plots import _crossovers, _lines

    forward = [m for m in _sweep().measurements if m.part == "forward"]
    quantized = [replace(m, case=replace(m.case, nf4=True)) for m in forward]
    assert _crossovers(quantized) == [64]
    lines = {label: (style, line) for label, style, _, line in _lines(quantized)}
    assert set(lines) == {"frozen", "triton, NF4"}
    assert lines["frozen"] == ("o-", {M: 50 + M / 10 for M in (1, 16, 64, 256)})
    # Where both were measured, it is the one that took turns with NF4.
    slower = [replace(m, times=Times(90.0, 90.0, 90.0, 30)) for m in forward if m.provider == "frozen"]
    assert _crossovers([*quantized, *slower]) == [64]
    [(_, _, _, floor)] = [found for found in _lines([*quantized, *slower]) if found[0] == "frozen"]
    assert floor == lines["frozen"][1]


def test_plot_draws_earlier_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Layers and whole models may be in one file; every kind of picture comes of it."""
    found = _sweep()
    found.measurements.append(replace(found.measurements[1], provider="triton", times=Times(60.0, 59.0, 61.0, 30)))
    for provider, median in (("frozen", 8e5), ("triton", 9e5)):
        times, losses = Times(median, median, median, 10), tuple(12 - step / 100 for step in range(10))
        found.models.append(
            ModelMeasurement("llama-8b", 32, 32, 2, 4096, 16, None, True, provider, times, losses=losses)
        )
    found.write(tmp_path)
    out = tmp_path / "out"
    assert main(["bench", "--plot", str(tmp_path / RESULTS_FILE), "--out", str(out)]) == 0
    kinds = ("ratios-warm-graph", "roofline-warm-graph", "time-against-m-warm-graph", "models", "losses")
    assert {path.name for path in out.iterdir()} == {f"{kind}.png" for kind in kinds}
    for path in out.iterdir():
        assert path.read_bytes().startswith(PNG_SIGNATURE)
    printed = capsys.readouterr().out
    assert "warm, graph" in printed
    assert "llama-8b: 2 x 4096 tokens" in printed


def test_results_are_json_for_others(instant: list[Case], tmp_path: Path) -> None:
    assert main([*SMALL, "--no-plots", "--note", "a branch", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert data["environment"]["note"] == "a branch"
    assert data["measurements"][0]["case"]["K"] == 256
    assert data["measurements"][0]["times"]["median"] == 100.0
    assert data["environment"]["versions"]["torch"] == importlib.metadata.version("torch")
