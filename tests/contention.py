"""Another kernel that holds multiprocessors while a launch is looked at."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def hold_multiprocessors(flag_ptr, limit):
    """Keeps its multiprocessor busy until the flag is raised, or for `limit` looks at it."""
    looks = 0
    while (tl.load(flag_ptr, volatile=True) == 0) & (looks < limit):
        looks += 1


def while_held(held: int, call: Callable[[], Any]) -> Any:
    """What `call` computes while so many multiprocessors are held. Whatever it launches has been compiled before.

    It has ten seconds, which it does not need on a GPU that it has to itself.
    """
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    holder, main = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(holder):
        # 1024 threads beside a kernel that takes every register of a multiprocessor: they cannot share one.
        hold_multiprocessors[(held,)](flag, 1 << 24, num_warps=32)
    with torch.cuda.stream(main):
        result = call()
        done = torch.cuda.Event()
        done.record()
    end = time.monotonic() + 10
    while not done.query() and time.monotonic() < end:
        time.sleep(0.001)
    finished, still_held = done.query(), not holder.query()
    with torch.cuda.stream(torch.cuda.Stream()):
        flag.fill_(1)
    torch.cuda.synchronize()
    assert still_held, "the holder ended too early to show anything"
    assert finished, "a kernel waited for multiprocessors that another kernel held"
    return result
