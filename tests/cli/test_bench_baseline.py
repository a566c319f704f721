"""Results on disk and the comparison with earlier ones."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_kernels.cli.bench.baseline import compare, require_comparable
from lora_kernels.cli.bench.cases import Case
from lora_kernels.cli.bench.clock import Times
from lora_kernels.cli.bench.results import (
    RESULTS_FILE,
    Measurement,
    ModelMeasurement,
    Results,
    environment,
    read_results,
)
from lora_kernels.cli.bench.roofline import Ceilings
from lora_kernels.cli.bench.table import layer_tables, loss_gap, model_table
from lora_kernels.cli.errors import UserError

CASE = Case(8192, 4096, 4096)


def times(median: float, spread: float = 0.005) -> Times:
    return Times(median, median * (1 - spread), median * (1 + spread), 30)


def measurement(provider: str, median: float, **changes: object) -> Measurement:
    plain = Measurement(
        CASE, provider, "step", "warm", "graph", times(median), None, 1 << 28, 4e8, 5e11, roofline_us=700.0
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def model(provider: str, median: float) -> ModelMeasurement:
    return ModelMeasurement(
        "llama-8b", 32, 32, 2, 4096, 16, None, True, provider, times(median), 30 << 30, None, (11.5, 11.25), 0.01
    )


def results(*measurements: Measurement, models: tuple[ModelMeasurement, ...] = ()) -> Results:
    found = Results({"device": "NVIDIA H100"}, {"warm, graph": Ceilings(3e12, 7e14)})
    found.measurements, found.models = list(measurements), list(models)
    return found


def test_round_trip(tmp_path: Path) -> None:
    before = results(
        measurement("frozen", 800.0),
        measurement("cuda", 0.0, times=None, reason="it is not there", peak_bytes=None),
        models=(model("frozen", 8e5), model("triton", 9e5)),
    )
    before.note_gpu("now")
    before.interrupted = True
    before.left_out = {"peft-compile": "it was left out"}
    before.write(tmp_path)
    assert read_results(tmp_path / RESULTS_FILE) == before
    assert [path.name for path in tmp_path.iterdir()] == [RESULTS_FILE]


def test_the_environment_is_complete() -> None:
    found = environment(torch.device("cpu"))
    assert set(found) == {"command", "date", "commit", "versions", "device", "gpu_state"}
    assert found["versions"]["torch"]
    json.dumps(found)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "environment": {}, "ceilings": 3}']
)
def test_files_that_are_no_results_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"file\.json: not a file of results"):
        read_results(path)


def test_a_baseline_of_another_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="measured on NVIDIA H100, but this is cpu"):
        require_comparable(results(), {"device": "cpu"})
    require_comparable(results(), {"device": "NVIDIA H100"})


def test_files_from_before_there_were_groups_are_read(tmp_path: Path) -> None:
    before = results(measurement("frozen", 800.0))
    before.write(tmp_path)
    data = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert data["measurements"][0]["case"].pop("others") == []
    assert data.pop("left_out") == {}
    (tmp_path / RESULTS_FILE).write_text(json.dumps(data))
    assert read_results(tmp_path / RESULTS_FILE) == before


@pytest.mark.parametrize("launches", ["graph", "eager"])
@pytest.mark.parametrize("provider", ["triton", "eager"])
@pytest.mark.parametrize(
    ("median", "worse", "better"), [(880.0, 0, 0), (885.0, 0, 0), (980.0, 1, 0), (820.0, 0, 1)]
)
def test_beyond_the_noise(provider: str, launches: str, median: float, worse: int, better: int) -> None:
    before = results(measurement("frozen", 800.0, launches=launches), measurement(provider, 880.0, launches=launches))
    # The whole chip is slower now: no regression of anybody.
    now = results(
        measurement("frozen", 1200.0, launches=launches), measurement(provider, 1.5 * median, launches=launches)
    )
    comparison = compare(before, now)
    assert (len(comparison.worse), len(comparison.better), comparison.compared) == (worse, better, 1)


def test_noise_is_what_was_measured() -> None:
    before = results(measurement("frozen", 800.0), measurement("triton", 880.0, times=times(880.0, 0.15)))
    now = results(measurement("frozen", 800.0), measurement("triton", 980.0))
    assert compare(before, now).worse == []


def test_medians_of_many_samples_are_better_known_than_one_sample() -> None:
    """Spreads of 3 % in all four: 12 % together, but a median of 30 is known to 1 %."""
    floor, triton = measurement("frozen", 800.0, times=times(800.0, 0.03)), measurement("triton", 880.0)
    before = results(floor, replace(triton, times=times(880.0, 0.03)))
    for median, worse in ((930.0, 0), (960.0, 1)):
        now = results(floor, replace(triton, times=times(median, 0.03)))
        assert len(compare(before, now).worse) == worse
    few = replace(times(960.0, 0.03), samples=3)
    assert compare(before, results(floor, replace(triton, times=few))).worse == []


def test_what_has_figures() -> None:
    """A model that is interrupted while it is prepared is an entry, and no figure."""
    begun = replace(model("triton", 1.0), times=None, peak_bytes=None, reason="interrupted before its first step")
    assert not results(models=(begun,)).has_figures
    assert results(models=(begun, model("peft", 1e6))).has_figures
    assert results(measurement("frozen", 800.0)).has_figures


def test_a_figure_that_is_gone_is_worse() -> None:
    before = results(measurement("frozen", 800.0), measurement("triton", 880.0))
    now = results(measurement("frozen", 800.0), measurement("triton", 0.0, times=None, reason="wrong answer: dA"))
    [line] = compare(before, now).worse
    assert "has no time any more: wrong answer: dA" in line


def test_memory_that_is_gone_is_worse() -> None:
    """As of a run with --memory, which has no times."""
    floor, triton = (measurement(name, 0.0, times=None, regime="memory") for name in ("frozen", "triton"))
    wrong = replace(triton, peak_bytes=None, reason="wrong answer: y")
    comparison = compare(results(floor, triton), results(floor, wrong))
    [line] = comparison.worse
    assert "triton, step, memory, graph: has no peak memory any more: wrong answer: y" in line
    timed, gone = model("triton", 1e6), replace(model("triton", 0.0), times=None, peak_bytes=None, reason="no room")
    [line] = compare(results(models=(timed,)), results(models=(gone,))).worse
    assert line.endswith("triton: has no time and no peak memory any more: no room")


def test_memory_and_models_are_compared() -> None:
    before = results(measurement("frozen", 800.0), measurement("triton", 880.0), models=(model("frozen", 1e6), model("triton", 1.1e6)))  # noqa: E501
    now = results(
        measurement("frozen", 800.0),
        measurement("triton", 880.0, peak_bytes=2 << 28),
        models=(model("frozen", 1e6), model("triton", 1.2e6)),
    )
    memory, speed = compare(before, now).worse
    assert "peak memory 256.0 -> 512.0 MiB" in memory
    assert speed.startswith("llama-8b")
    assert "1.100 -> 1.200" in speed


def test_what_has_no_counterpart_is_counted() -> None:
    before = results(
        measurement("frozen", 800.0),
        measurement("peft", 1200.0),
        measurement("eager", 1000.0),
        measurement("cuda", 0.0, times=None, reason="no compiler", peak_bytes=None),
        models=(model("frozen", 8e5), model("peft", 9e5)),
    )
    now = results(measurement("frozen", 800.0), measurement("eager", 1000.0), measurement("triton", 880.0))
    comparison = compare(before, now)
    assert (comparison.compared, comparison.not_compared) == (1, 1)
    assert comparison.gone == {"peft": 2}
    assert "1 figures compared, 1 have no counterpart, 2 of the baseline are gone (peft 2)" in str(comparison)


def test_a_comparison_of_nothing_is_refused() -> None:
    floor, triton = measurement("frozen", 800.0), measurement("triton", 880.0)
    with pytest.raises(UserError, match="nothing could be compared: 1 figures of this run are not in it, and 0 of"):
        compare(results(floor), results(floor, triton))
    with pytest.raises(UserError, match=r"nothing could be compared: 0 figures .* and 1 of its figures are not in"):
        compare(results(floor, triton), results(floor))
    other = replace(CASE, M=2048)
    with pytest.raises(UserError, match=r"nothing could be compared: 1 figures .* and 1 of its figures are not in"):
        compare(results(floor, triton), results(replace(floor, case=other), replace(triton, case=other)))


def test_the_table_shows_every_number_and_every_reason() -> None:
    text = layer_tables(
        results(
            measurement("frozen", 800.0),
            measurement("triton", 880.0),
            measurement("cuda", 0.0, times=None, reason="no compiler", peak_bytes=None),
        )
    )
    assert "3.00 TB/s, 700.0 TFLOP/s" in text
    assert "800.0 us ±0.5%" in text
    assert "1.10 ±0.01" in text
    assert "88%" in text
    assert "256.0" in text
    assert "381.5" in text
    assert "cuda          no compiler (1 case)" in text


def test_a_reduced_model_says_so() -> None:
    text = model_table([replace(model("frozen", 8e5), layers=4), replace(model("triton", 1e6), layers=4)], {})
    assert "REDUCED to 4 of 32 layers" in text
    assert "10,240" in text
    assert "0.800" in text
    assert "30.00" in text
    assert "REDUCED" not in model_table([model("frozen", 8e5)], {})


def test_losses_are_held_against_stock_peft_of_the_same_dtypes() -> None:
    losses = {
        "frozen": (12.0, 12.0, 12.0),
        "peft": (10.0, 8.0, 5.0),
        "peft-float32": (10.0, 8.0, 4.0),
        "triton": (10.1, 7.6, 5.0),
        # Interrupted before the last step.
        "triton-float32": (10.0, 8.2),
    }
    text = model_table([replace(model(name, 1e6), losses=values) for name, values in losses.items()], {})
    rows = {line.split()[0]: line.split() for line in text.splitlines()[2:]}
    assert text.splitlines()[1].endswith("loss gap")
    assert {name: " ".join(row[9:]) for name, row in rows.items()} == {
        "frozen": "-",
        "peft": "-",
        "peft-float32": "-",
        "triton": "1.0e-02 to 5.0e-02",
        "triton-float32": "1.2e-02 to 2.5e-02",
    }
    assert rows["triton"][5:9] == ["10.100", "->", "5.000", "1.0e-02"]
    assert all(map(math.isnan, loss_gap((10.0, float("nan"), 5.0), losses["peft"])))
    alone = model_table([model("triton", 1e6)], {})
    assert alone.splitlines()[-1].endswith("11.500 -> 11.250   1.0e-02                   -")


def test_losses_are_held_against_float32_where_it_took_part() -> None:
    losses = {"frozen": (12.0, 12.0), "peft": (10.0, 8.0), "peft-exact": (8.0, 8.0), "triton": (10.0, 6.0)}
    text = model_table([replace(model(name, 1e6), losses=values) for name, values in losses.items()], {})
    assert text.splitlines()[1].endswith("from float32")
    assert [line[-20:].strip() for line in text.splitlines()[2:]] == [
        "-",
        "1.2e-01 to 2.5e-01",
        "-",
        "2.5e-01 to 2.5e-01",
    ]


def test_who_was_left_out_is_named() -> None:
    left_out = {"peft-compile": "left out, because it would be compiled"}
    layers = results(measurement("frozen", 800.0))
    layers.left_out = left_out
    assert layer_tables(layers).endswith("no figure:\n  peft-compile  left out, because it would be compiled")
    [*_, line] = model_table([model("frozen", 8e5)], left_out).splitlines()
    assert line.split(None, 2) == ["peft-compile", "-", "left out, because it would be compiled"]
    assert layer_tables(replace(layers, measurements=[])) == ""
    assert model_table([], left_out) == ""
