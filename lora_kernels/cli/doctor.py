"""Shows what is installed and which backends work here; exit status 0 only if the automatic choice works."""

import argparse
import importlib.util

from lora_kernels.cli.waiting import elapsed

HELP = "versions, GPUs, and each backend with 'works' or the reason why it does not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """doctor takes no options."""


def run(args: argparse.Namespace) -> int:
    """Prints the report; 0 if the automatic choice of a backend works."""
    from lora_kernels.cli.environment import gpu_names, versions
    from lora_kernels.selftest import backend_report

    for name, version in versions().items():
        print(f"{name:<14}{version or '-'}")
    for line in gpu_names() or ["none that torch can use"]:
        print(f"{'GPU':<14}{line}")

    tiles = _tiles()
    if tiles is not None:
        print(f"{'tiles':<14}{tiles}")
        print(f"{'launches':<14}{_launches()}")

    print("\nbackends, in the order in which the automatic choice tries them")
    with elapsed("testing the backends"):
        statuses = backend_report()
    for status in statuses:
        verdict = "works" if status.works else f"refuses because {status.reason}"
        mark = "   <- the automatic choice" if status.automatic else ""
        print(f"  {status.name:<12}{verdict}{mark}")
    if any(status.automatic and status.works for status in statuses):
        return 0
    print("\nThe automatic choice of a backend does not work here.")
    return 1


def _tiles() -> str | None:
    """Which tile configurations the Triton kernels use here; None where they do not run."""
    import torch

    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return None
    from lora_kernels.backends.triton.tiles import chip_of
    from lora_kernels.backends.triton.tuned import TableRefused, describe

    try:
        return describe(chip_of(torch.device("cuda", torch.cuda.current_device())))
    except TableRefused as refusal:
        return f"refused: {refusal}"


def _launches() -> str:
    """Whether calls are launched from C++, and if not, why."""
    from lora_kernels import native

    reason = native.why_not()
    if reason is None:
        return "native"
    remedy = "; `python -m lora_kernels build` makes an eager step several times cheaper to launch"
    return f"Python: {reason}{remedy if reason == native.NOT_COMPILED else ''}"
