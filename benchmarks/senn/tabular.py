"""Nets that find their own size against nets that are given one, on tables: one file per finished run.

    python benchmarks/senn/tabular.py benchmarks/senn/results/tabular
    python benchmarks/senn/tabular.py benchmarks/senn/results/tabular --report

Every set keeps its own test rows where it has some, else a fifth; at most 5,000 rows are trained on, drawn by the seed, so that
the 5-fold grid stays payable. Every method sees the same rows, with standardised inputs and targets. Needs MERISTEM_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.base import BaseEstimator
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

MOST = 5000
"""Rows that are trained on."""
ARCHITECTURES = [(25,), (100,), (400,), (25, 25), (100, 100), (100, 100, 100)]


def load(
    path: Path, seed: int
) -> tuple[bool, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Whether it is a classification, and x, y of the training and of the test rows."""
    found = np.load(path)
    if "x_num_train" in found:
        eye = [np.eye(len(names.split("|"))) for names in found["categories"]]
        parts = []
        for part in ("train", "test"):
            codes = found[f"x_cat_{part}"]
            one_hot = [
                eye[column][codes[:, column]] for column in range(codes.shape[1])
            ]
            parts.append(np.concatenate([found[f"x_num_{part}"], *one_hot], 1))
        x, x_test, y, y_test = *parts, found["y_train"], found["y_test"]
    elif "test_mask" in found:
        test = found["test_mask"][seed]
        x, x_test, y, y_test = (
            found["x"][~test],
            found["x"][test],
            found["y"][~test],
            found["y"][test],
        )
    else:
        x, x_test, y, y_test = train_test_split(
            found["x"], found["y"], test_size=0.2, random_state=seed
        )
    kept = np.random.default_rng(seed).permutation(len(x))[:MOST]
    return (
        y.dtype == np.uint8,
        x[kept].astype(float),
        y[kept],
        x_test.astype(float),
        y_test,
    )


def mlp(classes: bool, seed: int, **options: Any) -> BaseEstimator:
    one = MLPClassifier if classes else MLPRegressor
    return make_pipeline(StandardScaler(), one(random_state=seed, **options))


def grid(classes: bool, seed: int) -> BaseEstimator:
    name = "mlpclassifier" if classes else "mlpregressor"
    return GridSearchCV(
        mlp(classes, seed), {f"{name}__hidden_layer_sizes": ARCHITECTURES}, cv=5
    )


def hist(classes: bool, seed: int) -> BaseEstimator:
    return (
        HistGradientBoostingClassifier if classes else HistGradientBoostingRegressor
    )(random_state=seed)


def growing(classes: bool, seed: int) -> BaseEstimator:
    from meristem.sklearn import GrowingClassifier, GrowingRegressor

    return (GrowingClassifier if classes else GrowingRegressor)(random_state=seed)


def fixed(classes: bool, seed: int, hidden: list[int]) -> BaseEstimator:
    """The training of the growing net, from a drawn net of the shape that it has found."""
    from torch import nn

    from meristem import PReLU
    from meristem.sklearn import GrowingClassifier, GrowingRegressor

    class Fixed(GrowingClassifier if classes else GrowingRegressor):
        def _start(self, x: Any, weights: Any, outputs: int) -> None:
            super()._start(x, weights, outputs)
            layers, inputs = [], self._columns.count
            for width in hidden:
                layers += [nn.Linear(inputs, width), PReLU(width)]
                layers[-1].slope.data.fill_(0.25)
                inputs = width
            self._trainer.take(nn.Sequential(*layers, nn.Linear(inputs, outputs)))

        def _fit(self, *arguments: Any) -> None:
            self.warm_start = True
            x, _, weights, outputs, _ = arguments
            if hidden:
                self._start(x, weights, outputs)
            super()._fit(*arguments)

    return Fixed(random_state=seed, max_growths=0)


def realmlp(classes: bool, seed: int) -> BaseEstimator:
    """The tuned defaults of a plain MLP (arXiv 2407.04491); needs pytabkit 1.7."""
    from pytabkit import RealMLP_TD_S_Classifier, RealMLP_TD_S_Regressor

    one = RealMLP_TD_S_Classifier if classes else RealMLP_TD_S_Regressor
    return one(random_state=seed, n_threads=1, device="cpu")


METHODS: dict[str, Callable[..., BaseEstimator]] = {
    "growing": growing,
    "its final net": fixed,
    "mlp": mlp,
    "mlp grid": grid,
    "hist": hist,
    "realmlp": realmlp,
}


def run(path: Path, method: str, seed: int, **options: Any) -> dict[str, Any]:
    classes, x, y, x_test, y_test = load(path, seed)
    if not classes:
        centre, spread = y.mean(), y.std()
        y, y_test = (y - centre) / spread, (y_test - centre) / spread
    estimator = METHODS[method](classes, seed, **options)
    began, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        estimator.fit(x, y)
    result: dict[str, Any] = {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - cpu,
    }
    if classes:
        probabilities = estimator.predict_proba(x_test)
        result["error"] = float((estimator.predict(x_test) != y_test).mean())
        result["log_loss"] = float(log_loss(y_test, probabilities, labels=np.unique(y)))
    else:
        result["error"] = float(
            np.sqrt(np.mean((estimator.predict(x_test) - y_test) ** 2))
        )
    for name in ("hidden_", "n_parameters_", "n_iter_", "flops_", "best_params_"):
        if hasattr(estimator, name):
            result[name] = getattr(estimator, name)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sklearn": sklearn.__version__,
    }
    about = {
        "set": path.stem,
        "method": method,
        "seed": seed,
        "rows": len(x),
        "inputs": x.shape[1],
        "classes": classes,
    }
    return {
        **about,
        **result,
        "versions": versions,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def report(folder: Path) -> str:
    """The table: mean error by set, rank over sets, time."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for file in sorted(folder.glob("*.json")):
        one = json.loads(file.read_text())
        found.setdefault(one["set"], {}).setdefault(one["method"], []).append(one)
    methods = [name for name in METHODS if any(name in rows for rows in found.values())]
    lines = [
        "| set | rows | " + " | ".join(methods) + " | found |",
        "|---|---|" + "---|" * (len(methods) + 1),
    ]
    ranks: dict[str, list[float]] = {name: [] for name in methods}
    for name, rows in found.items():
        means = {
            m: np.mean([one["error"] for one in rows[m]]) for m in methods if m in rows
        }
        spread = {m: np.std([one["error"] for one in rows[m]]) for m in means}
        if len(means) == len(methods):
            order = sorted(means, key=means.__getitem__)
            for m in methods:
                ranks[m].append(1 + order.index(m))
        hidden = ", ".join(str(one.get("hidden_")) for one in rows.get("growing", []))
        cells = [
            f"{means[m]:.4f} ± {spread[m]:.4f}" if m in means else "–" for m in methods
        ]
        size = next(iter(rows.values()))[0]["rows"]
        lines.append(f"| {name} | {size} | " + " | ".join(cells) + f" | {hidden} |")
    lines.append(
        f"| mean rank ({len(ranks[methods[0]])} sets) | | "
        + " | ".join(f"{np.mean(ranks[m]):.2f}" for m in methods)
        + " | |"
    )
    total = {
        m: sum(one["cpu_seconds"] for rows in found.values() for one in rows.get(m, []))
        for m in methods
    }
    lines.append(
        "| fit, CPU seconds in all | | "
        + " | ".join(f"{total[m]:,.0f}" for m in methods)
        + " | |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--sets", nargs="*", help="all by default")
    own = [name for name in METHODS if name != "realmlp"]
    parser.add_argument(
        "--methods",
        nargs="*",
        default=own,
        choices=list(METHODS),
        help="all but realmlp by default, which needs pytabkit",
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--report", action="store_true", help="print the table of what is there"
    )
    args = parser.parse_args()
    if args.report:
        print(report(args.results))
        return
    torch.set_num_threads(1)
    args.results.mkdir(parents=True, exist_ok=True)
    for path in sorted((Path(os.environ["MERISTEM_DATA"]) / "tabular").glob("*.npz")):
        for seed in args.seeds:
            for method in args.methods:
                file = (
                    args.results / f"{path.stem}-{method.replace(' ', '_')}-{seed}.json"
                )
                if file.exists() or (args.sets and path.stem not in args.sets):
                    continue
                options = {}
                if method == "its final net":  # after the growing net
                    options["hidden"] = json.loads(
                        (args.results / f"{path.stem}-growing-{seed}.json").read_text()
                    )["hidden_"]
                result = run(path, method, seed, **options)
                file.with_suffix(".tmp").write_text(json.dumps(result, indent=1))
                file.with_suffix(".tmp").replace(file)
                print(
                    f"{file.stem}: error {result['error']:.4f} in {result['cpu_seconds']:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
