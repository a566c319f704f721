"""docs/benchmarks.md and docs/benchmarks-h200.md beside the files that their figures come from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lora_kernels.cli.bench.results import read_results

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "bench/results").glob("*.json"))


@pytest.fixture(scope="module")
def text() -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("benchmarks*.md")))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_file_has_its_exact_command(path: Path, text: str) -> None:
    # A command goes on in the next line after a backslash.
    lines = re.sub(r"\\\n +", "", text).splitlines()
    assert lines[lines.index(f"# {path.name}") + 1] == read_results(path).environment["command"]


def test_every_picture_has_the_command_that_draws_it(text: str) -> None:
    pictures = {path.parent for path in map(Path, re.findall(r"\]\((plots/\S+\.png)\)", text))}
    drawn = dict(re.findall(r"^python -m lora_kernels bench --plot (\S+) --out docs/(\S+)$", text, re.MULTILINE))
    assert {Path(folder) for folder in drawn.values()} == pictures
    assert all((ROOT / file).is_file() for file in drawn)
