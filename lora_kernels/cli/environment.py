"""Which versions and which device a result was obtained with."""

import importlib.metadata
import platform

import torch

import lora_kernels

PACKAGES = ("torch", "triton", "peft", "transformers", "accelerate", "bitsandbytes", "gguf")


def versions() -> dict[str, str | None]:
    """The version of Python and of each package that matters here; None where one is not installed."""
    found: dict[str, str | None] = {
        "lora-kernels": lora_kernels.__version__,
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    found["rocm"] = torch.version.hip
    return found


def gpu_names() -> list[str]:
    """One line for each GPU that torch sees: its name, compute capability and memory."""
    lines = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 2**30
        lines.append(f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {memory:.1f} GiB")
    return lines
