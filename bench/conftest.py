"""The option --suite, and the cases that it chooses."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.cli.bench.cases import SUITES


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", choices=list(SUITES), help="which cases (default: quick; on a CPU tiny)")


def pytest_configure(config: pytest.Config) -> None:
    """A provider that takes no part is named with its reason, as with -rs."""
    config.option.reportchars += "s"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        default = "quick" if torch.cuda.is_available() else "tiny"
        cases = SUITES[metafunc.config.getoption("--suite") or default]
        metafunc.parametrize("case", cases, ids=str)


@pytest.fixture(scope="session")
def bench_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
