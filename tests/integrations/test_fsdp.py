"""Growth of sharded models, on several processes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import shards
import torch.multiprocessing as mp


def grown(world: int) -> dict[int, Any]:
    results = mp.Manager().dict()
    mp.spawn(shards.work, (world, random.randint(20000, 40000), results), nprocs=world)
    return dict(results)


def check(told: dict[int, Any]) -> None:
    for rank in told.values():
        assert rank["sharded"]
        assert rank["sizes"] == [12, 4]
        assert max(rank["changes"]) < 1e-5
        # Shards are what replicas are: weights and moments.
        assert rank["difference"] < 1e-5


def test_shards_grow_as_replicas_do() -> None:
    check(grown(2))


@pytest.mark.slow
def test_four_shards_grow_as_replicas_do() -> None:
    check(grown(4))
