"""The figures of the overview, from the raw results of the suites.

python benchmarks/figures.py          # writes docs/images/bench_*.png
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from meristem.report import Record, figures, of_files

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
SUITES: dict[str, tuple[str, dict[str, str]]] = {
    "quickstart": (
        "accuracy",
        {
            "grown, GradMax": "quickstart/results/fashion_mnist",
            "grown, random": "quickstart/results/fashion_mnist_random",
            "large, equal FLOPs": "quickstart/results/fashion_mnist_equal",
            "large, all epochs": "quickstart/results/fashion_mnist_large",
        },
    ),
    "gpt": (
        "loss",
        {
            "three blocks, then six": "gpt/results/short/tinyshakespeare_3_6_stack",
            "six blocks": "gpt/results/short/tinyshakespeare_final_shape_of_stack_at_50_fixed",
            "six blocks, equal FLOPs": "gpt/results/short/tinyshakespeare_final_shape_of_3_6_stack_equal_flops",
            "three blocks, equal FLOPs": "gpt/results/controls/three_fixed_equal",
        },
    ),
    "resnet": (
        "accuracy",
        {
            "zero blocks at 50 %": "resnet/results/cifar10/cifar10_zero_block_at_50",
            "stacked at 50 %": "resnet/results/cifar10/cifar10_stack_at_50",
            "large, equal FLOPs": "resnet/results/cifar10/cifar10_final_shape_of_zero_block_at_50_equal_flops",
            "large, all epochs": "resnet/results/cifar10/cifar10_final_shape_of_zero_block_at_50_fixed",
        },
    ),
    "methods": (
        "accuracy",
        {
            "random": "methods/results/fashion_mnist/mlp_random",
            "GradMax": "methods/results/fashion_mnist/mlp_gradmax",
            "SWE": "methods/results/fashion_mnist/mlp_swe",
            "final size, equal FLOPs": "methods/results/fashion_mnist/mlp_final_shape_of_random_equal_flops",
            "final size, all epochs": "methods/results/fashion_mnist/mlp_final_shape_of_random_fixed",
        },
    ),
    "swe_svod": (
        "accuracy",
        {
            "SWE + SVoD": "swe_svod/results/mlp/fashion_mnist_swe_svod",
            "SWE + uniform": "swe_svod/results/mlp/fashion_mnist_swe_uniform",
            "random + uniform": "swe_svod/results/mlp/fashion_mnist_random_uniform",
            "final size, equal FLOPs": "swe_svod/results/mlp/fashion_mnist_final_shape_of_swe_svod_warm_equal_flops",
        },
    ),
}


def record(name: str, stem: str) -> Record:
    """The mean over the seeds of one row."""
    (found,) = of_files(sorted(HERE.glob(f"{stem}_seed*.json")))
    return replace(found, name=name)


def main() -> None:
    for suite, (key, rows) in SUITES.items():
        records = [record(name, stem) for name, stem in rows.items()]
        drawn = figures.curves(records, key)
        drawn.savefig(IMAGES / f"bench_{suite}.png", dpi=110)


if __name__ == "__main__":
    main()
