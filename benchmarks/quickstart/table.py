"""The table of the quickstart, from the results beside it.

python benchmarks/quickstart/table.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS = {
    "fashion_mnist": "grown 16 -> 32 at 50 %, GradMax",
    "fashion_mnist_random": "grown 16 -> 32 at 50 %, random (B5)",
    "fashion_mnist_equal": "large, stopped at equal FLOPs (B3)",
    "fashion_mnist_large": "large, all epochs (B2)",
}


def results(name: str) -> list[dict[str, Any]]:
    return [
        json.loads(path.read_text())
        for path in sorted((HERE / "results").glob(f"{name}_seed?.json"))
    ]


def spread(values: list[float], digits: int) -> str:
    error = (
        statistics.stdev(values) / len(values) ** 0.5
        if len(values) > 1
        else float("nan")
    )
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def main() -> None:
    large = {run["seed"]: run for run in results("fashion_mnist_equal")}
    print(
        "| net | test accuracy | test loss | training TFLOP | parameters | accuracy minus B3, paired |"
    )
    print("|---|---|---|---|---|---|")
    for name, title in ROWS.items():
        runs = results(name)
        gains = [
            run["accuracy"] - large[run["seed"]]["accuracy"]
            for run in runs
            if run["seed"] in large
        ]
        print(
            f"| {title} | {spread([run['accuracy'] for run in runs], 4)} | {spread([run['loss'] for run in runs], 4)} "
            f"| {statistics.mean(run['training_flops'] for run in runs) / 1e12:.1f} | {runs[0]['parameters']:,} "
            f"| {'–' if name == 'fashion_mnist_equal' else spread(gains, 4)} |"
        )


if __name__ == "__main__":
    main()
