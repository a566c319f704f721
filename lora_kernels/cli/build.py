"""Compiles the parts in C++ and CUDA C++ for this machine's PyTorch, once: later processes load them from the cache."""

import argparse

from lora_kernels.cli.errors import UserError
from lora_kernels.cli.waiting import elapsed

HELP = "compile the launch path, which makes eager steps cheaper, and with --cuda the CUDA backend"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of build."""
    parser.add_argument("--cuda", action="store_true", help="compile the CUDA backend for this machine's GPU as well")


def run(args: argparse.Namespace) -> int:
    """Compiles what is not compiled yet.

    Raises:
        UserError: something is missing here, or a compiler failed; what it said is in the message.
    """
    from lora_kernels.backends import native_build

    try:
        with elapsed("compiling the launch path"):
            module = native_build.build()
    except (ImportError, RuntimeError) as error:
        raise UserError(f"the launch path: {error}") from None
    print(f"launch path   {module.__file__}")
    if args.cuda:
        print(f"CUDA backend  {_build_cuda()}")
    return 0


def _build_cuda() -> str:
    import torch

    from lora_kernels.backends import cuda_build

    missing = cuda_build.missing() or cuda_build.cannot_keep()
    if missing is None and not torch.cuda.is_available():
        missing = "there is no GPU to compile for"
    if missing is not None and not cuda_build.has_prebuilt():
        raise UserError(f"the CUDA backend: {missing}")
    try:
        with elapsed("compiling the CUDA backend"):
            return str(cuda_build.load(torch.cuda.get_device_capability()).__file__)
    except (ImportError, RuntimeError) as error:
        raise UserError(f"the CUDA backend: {error}") from None
