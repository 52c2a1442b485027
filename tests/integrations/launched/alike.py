"""What every launched program checks at its end."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch import nn


def alike(model: nn.Module) -> None:
    """Print "alike" on rank 0 where all processes hold the same model, bit for bit."""
    mine = [
        (name, p.detach().numpy().tobytes()) for name, p in model.named_parameters()
    ]
    held = [None] * dist.get_world_size()
    dist.all_gather_object(held, mine)
    assert dist.get_world_size() == 2
    assert all(one == held[0] for one in held)
    if dist.get_rank() == 0:
        print("alike", flush=True)
    dist.barrier()
    # A thread of gloo's that outlives Python aborts, now and then, any program.
    os._exit(0)
