"""What `make sanitize` runs is what its backends take: a case that one refuses would end it before the others."""

from __future__ import annotations

import pytest
import sanitize


@pytest.mark.gpu
def test_every_case_is_taken(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    sanitize.run_all(backend, initcheck=False)
    ran = capsys.readouterr().out.count(f"ran on {backend}")
    nf4 = 2 * len(sanitize.NF4_CASES)
    groups = len(sanitize.GROUP_CASES) + len(sanitize.WIDE_GROUP_CASES) + len(sanitize.NF4_GROUP_CASES)
    assert ran == len(sanitize.CASES) + len(sanitize.AUTOCAST_CASES) + nf4 + groups + len(sanitize.GATED_CASES)
