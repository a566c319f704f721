"""The zeros that kernels count in: two streams never share them."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from lora_kernels.backends import sync


def test_streams_of_threads_get_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread stands for a stream; the interpreter switches between them as often as it can."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: threading.get_ident(), raising=False)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(1000):
            monkeypatch.setattr(sync, "_pieces", {})
            monkeypatch.setattr(sync, "_slabs", {0: torch.zeros(1 << 20, dtype=torch.int32)})
            assert len(_addresses(4)) == 4
    finally:
        sys.setswitchinterval(before)


def _addresses(count: int) -> set[int]:
    found: list[torch.Tensor] = []
    barrier = threading.Barrier(count)

    def ask() -> None:
        barrier.wait()
        found.append(sync.zeros_for(torch.device("cuda", 0), 100))

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {t.data_ptr() for t in found}
