"""One of two processes that train fused models together: python two_processes.py DEVICE RANK FOLDER.

The first one leaves the losses and the trained adapters, by kind, in FOLDER/results.pt.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from group_models import adapted, grouped, quantized
from peft_models import VOCABULARY
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

WORLD, STEPS = 2, 3
KINDS = ["ddp", "ddp-checkpointing", "fsdp2", "fsdp2-checkpointing"]
if importlib.util.find_spec("bitsandbytes") is not None:
    KINDS.append("fsdp2-nf4")


def model_of(device: str, kind: str) -> nn.Module:
    """With adapters in all linears, so that q, k and v run as a group and the MLP as one node."""
    # FSDP shards parameters of one dtype together.
    return adapted(device=device, model=quantized(device, torch.float32, torch.float32) if "nf4" in kind else None)


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (2 * WORLD, 9), generator=torch.Generator().manual_seed(2))


def train(model: nn.Module, rows: Tensor) -> list[float]:
    """The losses of a few steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [float(loss) for loss in losses]


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """Every adapter, whole, by the name that it has in a model that nothing wraps."""
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            found[name.removeprefix("module.")] = value.detach().cpu()
    return found


def main(device_type: str, rank: int, folder: Path) -> None:
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", store=store, rank=rank, world_size=WORLD)
    results = {kind: learned(kind, device, rank) for kind in KINDS}
    if rank == 0:
        torch.save(results, folder / "results.pt")
    dist.destroy_process_group()


def learned(kind: str, device: torch.device, rank: int) -> dict[str, Any]:
    """The losses over all rows and the trained adapters."""
    model: Any = grouped(model_of(str(device), kind))
    if "checkpointing" in kind:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if "ddp" in kind:
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh(device.type, (WORLD,))
        for block in model.base_model.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    losses = torch.tensor(train(model, tokens().chunk(WORLD)[rank].to(device)), device=device)
    dist.all_reduce(losses)
    # Gathering is for everybody to do.
    return {"losses": (losses / WORLD).tolist(), "adapters": adapters(model)}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
