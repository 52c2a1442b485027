"""Which ATen operations have no row: a dimension that meets one is frozen.

    python benchmarks/operations.py            # minutes; torch's own samples of its operators
    python benchmarks/operations.py --table    # what every row does to an axis, as in the docs

Samples are torch's own (OpInfo), in float32 on a CPU; what they run is recorded below autograd, as a trace sees it.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meristem.structure.ops import OPERATIONS, operation_of
from meristem.structure.tracer import Call, tensors

SAMPLES = 3
EFFECTS = {
    "keeps": "view permute unsqueeze squeeze expand repeat pointwise prelu created stack as_real as_complex restrided written_to weight_norm",
    "cuts or joins it": "slice_ split glu cat constant_pad from_channels into_channels channel_shuffle",
    "freezes the dimension that it picks from, turns or orders": "select index gather scatter put ordered picked turned fourier diagonal",
    "freezes positions, keeps channels": "spatial",
    "makes units of a weight, or reads them": "embedding bag matmul bilinear grouped convolution attention",
    "mixes the dimension that it runs over": "layer_norm group_norm batch_norm softmax class_loss reduce loss distances",
}


class Seen(TorchDispatchMode):
    """Counts the operations without a row."""

    def __init__(self) -> None:
        super().__init__()
        self.unknown: Counter[str] = Counter()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "aten":
            return result
        inputs, outputs = tensors((args, kwargs)), tensors(result)
        if inputs and outputs:
            name = func._schema.name.split("::")[1]
            self.names.add(name)
            if operation_of(Call(func, name, {}, inputs, outputs)) is None:
                self.unknown[name] += 1
        return result


def unknown() -> tuple[Counter[str], int]:
    """Operations without a row, with how many samples met them; and how many there are in all."""
    from torch.testing._internal.common_methods_invocations import op_db

    seen = Seen()
    for entry in op_db:
        if torch.float32 not in entry.dtypes:
            continue
        samples = entry.sample_inputs("cpu", torch.float32, requires_grad=False)
        for sample in itertools.islice(samples, SAMPLES):
            try:
                with warnings.catch_warnings(), torch.no_grad(), seen:
                    warnings.simplefilter("ignore")
                    entry.op(sample.input, *sample.args, **sample.kwargs)
            except Exception as error:
                print(f"not run: {entry.name}: {type(error).__name__}")
                break
    return seen.unknown, len(seen.names)


def table() -> str:
    """The rows by what they do to an axis."""
    effects = {}
    for effect, rules in EFFECTS.items():
        effects |= dict.fromkeys(rules.split(), effect)
    listed: dict[str, list[str]] = {effect: [] for effect in EFFECTS}
    for name, operation in OPERATIONS.items():
        listed[effects[operation.rule.__name__]].append(f"`{name}`")
    lines = ["| what it does to an axis | operations |", "|---|---|"]
    for effect, names in listed.items():
        lines.append(f"| {effect} | {' '.join(sorted(names))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="print the rows")
    if parser.parse_args().table:
        print(table())
        return
    found, total = unknown()
    print(f"{len(found)} of {total} operations have no row: {', '.join(sorted(found))}")


if __name__ == "__main__":
    main()
