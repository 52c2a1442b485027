"""The same growth of a digits MLP by gromo, in the same process: CPU seconds per event.

pip install --no-deps gromo==0.1.0
python benchmarks/cost/peers.py > benchmarks/cost/results/peers.json

Eight units more per event in a 64-16-16-10 MLP, once training has run. Here two layers
share them; gromo grows the one layer that its first-order gain names, as its tutorials
do, with statistics over all of the data, or over one batch, which is what Meristem's
methods take by default. Methods follow each other round by round, so that all of them see
the same machine.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable
from typing import Any

import torch
from methods import digits_batches, digits_event, loss, seconds, trained
from torch import nn

import meristem as ms

EVENTS = 6


def theirs(looked_at: int | None, **options: Any) -> Callable[[], float]:
    """An event of gromo on its own layers, with an optimizer made anew."""
    from gromo.containers.growing_mlp import GrowingMLP

    torch.manual_seed(0)
    data = digits_batches()
    model = GrowingMLP(64, 10, 16, 2, activation=nn.ReLU())

    def grow() -> torch.optim.Optimizer:
        model.init_computation()
        for batch in data[:looked_at]:
            model.zero_grad()
            loss(model, batch).backward()
            model.update_computation()
        model.compute_optimal_updates(
            maximum_added_neurons=8, compute_delta=False, **options
        )
        model.reset_computation()
        model.select_best_update()
        model.currently_updated_layer.scaling_factor = 0.5
        model.apply_change()
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def event() -> float:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for batch in data[:3]:
            trained(model, optimizer, batch)
        return seconds(grow)

    return event


GRADMAX = {
    "use_covariance": False,
    "alpha_zero": True,
    "use_projection": False,
    "ignore_singular_values": True,
}


def main() -> None:
    torch.set_num_threads(1)
    events = {
        "random": digits_event(ms.how.Random()),
        "GradMax": digits_event(ms.how.GradMax()),
        "TINY": digits_event(ms.how.TINY()),
        "gromo, GradMax, all data": theirs(None, **GRADMAX),
        "gromo, GradMax, one batch": theirs(1, **GRADMAX),
        "gromo, TINY, all data": theirs(None),
        "gromo, TINY, one batch": theirs(1),
    }
    spent: dict[str, list[float]] = {name: [] for name in events}
    for _ in range(EVENTS):
        for name, event in events.items():
            spent[name].append(event())
    # The first event of a process pays what torch does once.
    later = {name: statistics.mean(each[1:]) for name, each in spent.items()}
    about = {"torch": torch.__version__, "machine": platform.machine()}
    print(json.dumps({"CPU seconds per event": later, "all": spent, **about}, indent=1))


if __name__ == "__main__":
    main()
