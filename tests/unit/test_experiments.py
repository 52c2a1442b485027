"""Configuration, data, the runner and the command, as a user meets them."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import meristem as ms
from meristem.experiments import data as datasets
from meristem.experiments.config import ConfigError, checked, read
from meristem.experiments.run import Progress, Run, rate, result_of, run
from meristem.experiments.suite import read as read_suite

SMALL: dict[str, Any] = {
    "model": {"mlp": {"hidden": [6, 6]}},
    "data": "digits",
    "train": {
        "epochs": 3,
        "batch_size": 128,
        "optimizer": {"adamw": {"lr": 1e-3}},
        "schedule": {"wsd": {"decay": 0.3}},
    },
    "grow": {
        "when": {"every": "1 epochs"},
        "how": {"gradmax": {"scale": 0.5}},
        "where": "by_gain",
        "amount": 8,
    },
}


def command(
    *words: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "meristem.cli", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "mlp"}, r"unknown key 'modle'. Did you mean 'model'"),
        ({"train": {"epocs": 3}}, r"unknown key 'train.epocs'. Did you mean 'epochs'"),
        ({"grow": {"when": {"every": "2"}}}, r"grow.when: a duration carries its unit"),
        ({"grow": {"when": {"evry": "2 epochs"}}}, r"Did you mean 'every'"),
        (
            {"grow": {"when": {"every": "2 epochs"}, "how": "gradmx"}},
            r"grow.how: .*Did you mean 'gradmax'",
        ),
        (
            {"grow": {"when": {"every": "2 epochs"}, "how": {"gradmax": {"scal": 1}}}},
            r"Did you mean 'scale'",
        ),
        (
            {"grow": {"when": {"every": "2 epochs"}, "budget": {"params": 3}}},
            r"unknown key 'grow.budget.params'",
        ),
        (
            {"grow": {"when": {"every": "2 epochs"}, "care": ["shrnk"]}},
            r"Did you mean 'shrink'",
        ),
        (
            {"train": {"epochs": 1, "schedule": {"wsd": {"decay": 3}}}},
            r"a fraction of training",
        ),
        ({"train": {"epochs": 1, "optimizer": "adm"}}, r"Did you mean 'adam'"),
        ({"train": {}}, r"one of epochs, steps and flops"),
        ({"model": "mpl"}, r"Did you mean 'mlp'"),
    ],
)
def test_configuration_errors_name_the_key_and_the_nearest(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(SMALL | change)


def test_a_run_writes_one_json_file_and_is_not_repeated(tmp_path: Path) -> None:
    experiment = checked(SMALL)
    path = run(experiment, tmp_path, "small")
    result = json.loads(path.read_text())
    wanted = {
        "accuracy",
        "loss",
        "parameters",
        "widths",
        "growths",
        "training_flops",
        "seed",
        "versions",
        "hardware",
    }
    assert wanted <= result.keys()
    assert sum(result["widths"].values()) == 12 + 3 * 8
    assert result["training_flops"] > result["growth_flops"] > 0
    assert [point["step"] for point in result["curve"]] == [11, 22, 33]
    stamp = path.stat().st_mtime_ns
    assert run(experiment, tmp_path, "small").stat().st_mtime_ns == stamp
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path) -> None:
    experiment = checked(SMALL)
    whole = Run(experiment)
    whole.train(tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.step == 17:
            os.kill(os.getpid(), signal.SIGINT)

    from meristem.experiments.run import Interrupted

    first = Run(experiment, stop)
    with pytest.raises(Interrupted, match="step 17"):
        first.train(tmp_path / "part")
    second = Run(experiment)
    second.train(tmp_path / "part")
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            whole.model.parameters(), second.model.parameters(), strict=True
        )
    )
    assert second.progress.flops == pytest.approx(whole.progress.flops)
    assert [p["loss"] for p in second.progress.curve] == [
        p["loss"] for p in whole.progress.curve
    ]


def test_muon_trains_the_matrices_and_adamw_the_rest_through_a_growth(
    tmp_path: Path,
) -> None:
    muon = {"muon": {"lr": 1e-3, "betas": [0.9, 0.95], "momentum": 0.9}}
    table = {
        "model": {"gpt": {"width": 8, "heads": 2, "hidden": 16, "depth": 1}},
        "data": {"shakespeare": {"examples": 64, "test": 8}},
        "train": {"steps": 4, "batch_size": 16, "optimizer": muon},
        "grow": {"when": {"at": 0.5}, "how": "stack", "axes": "depth", "amount": [1]},
    }
    running = Run(checked(table))
    matrices, rest = running.optimizers
    assert len(matrices.param_groups[0]["params"]) == 6
    running.train(tmp_path)
    held = [p for optimizer in (matrices, rest) for p in optimizer.state]
    assert {id(p) for p in held} == {id(p) for p in running.model.parameters()}
    assert all(p.dim() == 2 for p in matrices.state)
    head = running.model.head.weight
    assert len(matrices.state) == 12
    assert head in rest.state
    for p in held:
        assert p.isfinite().all()
    for wrong, words in (
        ({"optimizer": {"muon": {"momentun": 0.9}}}, "Did you mean 'momentum'"),
        ({"optimizer": {"muon": {"lr": "x"}}}, "train.optimizer"),
    ):
        with pytest.raises(ConfigError, match=words):
            Run(checked(table | {"train": table["train"] | wrong}))
    conv = {"model": "convnet", "data": {"digits": {"examples": 32}}}
    with pytest.raises(ConfigError, match="and this net has none"):
        Run(checked({k: v for k, v in table.items() if k != "grow"} | conv))
    stages = {"amount": [8]}
    wrong = {k: v for k, v in table.items() if k not in ("grow", "train")}
    wrong |= {"train": {"optimizer": muon}, "stages": stages}
    wrong["data"] = {"shakespeare": {"validation": 0.2}}
    with pytest.raises(ConfigError, match="muon is two"):
        checked(wrong)


def test_equal_flops_sets_the_length_of_training() -> None:
    fixed = {k: v for k, v in SMALL.items() if k != "grow"}
    long = Run(checked(fixed))
    flops = (
        3 * long.flops_per_example * len(long.data.x_train)
    )  # three epochs, the smaller last batches included
    half = Run(checked(fixed | {"train": {"flops": flops / 2, "batch_size": 128}}))
    assert half.progress.steps == 11 + 5  # 673 of 1,347 examples in batches of 128


def test_schedules() -> None:
    wsd = checked(
        SMALL
        | {"train": {"epochs": 1, "schedule": {"wsd": {"decay": 0.25, "warmup": 0.1}}}}
    )
    assert [rate(wsd, p) for p in (0.05, 0.5, 0.75, 0.875)] == pytest.approx(
        [0.5, 1, 1, 0.5]
    )
    cosine = checked(SMALL | {"train": {"epochs": 1, "schedule": "cosine"}})
    assert [rate(cosine, p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])
    assert rate(checked(SMALL | {"train": {"epochs": 1}}), 0.9) == 1


def test_plain_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERISTEM_DATA", str(tmp_path))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (20, 6, 6, 3), dtype=np.uint8)
    np.savez(
        tmp_path / "cifar10.npz",
        x_train=images,
        y_train=np.arange(20) % 4,
        x_test=images[:4],
        y_test=np.arange(4),
    )
    loaded = datasets.load("cifar10")
    assert loaded.x_train.shape == (20, 3, 6, 6)
    assert loaded.outputs == 4
    assert abs(loaded.x_train.mean().item()) < 1e-5
    (tmp_path / "tabular").mkdir()
    np.savez(
        tmp_path / "tabular" / "toy.npz",
        x=rng.normal(size=(50, 3)),
        y=rng.normal(size=50),
    )
    assert datasets.load("tabular/toy").task == "regression"
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "toy.txt").write_text("to grow is to live " * 100)
    text = datasets.load("text/toy")
    assert torch.equal(text.x_train[0, 1:], text.y_train[0, :-1])
    with pytest.raises(ms.DataError, match="Did you mean 'text/toy'"):
        datasets.load("text/tov")
    with pytest.raises(ms.DataError, match="Did you mean 'digits'"):
        datasets.load("digit")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("tabular/toy", {"mlp": {"hidden": [5]}}),
        ("text/toy", {"gpt": {"width": 8, "heads": 2, "hidden": 12, "depth": 1}}),
    ],
)
def test_regression_and_text_train_and_grow(
    name: str, model: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERISTEM_DATA", str(tmp_path))
    (tmp_path / "tabular").mkdir()
    (tmp_path / "text").mkdir()
    x = np.random.default_rng(0).normal(size=(90, 3))
    np.savez(tmp_path / "tabular" / "toy.npz", x=x, y=x.sum(1))
    (tmp_path / "text" / "toy.txt").write_text("to grow is to live " * 200)
    grow = {
        "when": {"at": "1 epochs"},
        "how": "random",
        "amount": 2,
        "axes": ["*", "!*:heads"],
    }
    one = Run(
        checked(
            {
                "data": name,
                "model": model,
                "train": {"epochs": 2, "batch_size": 16},
                "grow": grow,
            }
        )
    )
    one.train(tmp_path / "run")
    assert len(one.grower.history) == 1
    assert result_of(one)["loss"] > 0


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_downloads_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MERISTEM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    served = tmp_path / "served"
    served.mkdir()
    files = {}
    for name in datasets.SOURCES["mnist"][1]:
        shape = (6, 4, 4) if "images" in name else (6,)
        body = (
            bytes([0, 0, 8, len(shape)])
            + struct.pack(f">{len(shape)}I", *shape)
            + bytes(range(int(np.prod(shape))))
        )
        (served / name).write_bytes(gzip.compress(body))
        files[name] = "md5:" + hashlib.md5((served / name).read_bytes()).hexdigest()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0),
        lambda *a: Quiet(*a, directory=str(served)),  # type: ignore[arg-type]
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_port}/"
        loaded = datasets.load("mnist", {"mnist": (base, files)})
        assert loaded.x_train.shape == (6, 1, 4, 4)
        wrong = dict.fromkeys(files, "md5:" + "0" * 32)
        with pytest.raises(ms.DataError, match="set MERISTEM_DATA"):
            datasets.load("mnist", {"mnist": (base, wrong)})
    finally:
        server.shutdown()
        server.server_close()


def test_the_command_runs_and_resumes_after_a_kill(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import pathlib, torch\n"
        "class Net(torch.nn.Sequential):\n"
        "    calls = 0\n"
        "    def forward(self, x):\n"
        "        if self.training and torch.is_grad_enabled():\n"
        "            Net.calls += 1\n"
        "            if Net.calls == 50:\n"
        "                pathlib.Path('started').touch()\n"
        "        return super().forward(x)\n"
        "def net():\n"
        "    layers = [torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16), torch.nn.ReLU()]\n"
        "    return Net(torch.nn.Flatten(), *layers, torch.nn.Linear(16, 10))\n"
    )
    lines = """
model = "mine:net"
data = "digits"
[train]
epochs = 60
batch_size = 32
optimizer = { adamw = { lr = 1e-3 } }
[grow]
when = { every = "20 epochs" }
amount = 8
"""
    (tmp_path / "long.toml").write_text(lines)
    words = [sys.executable, "-m", "meristem.cli", "run", "long.toml"]
    process = subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if (tmp_path / "started").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    if process.returncode != 0:  # a fast machine may have finished
        assert process.returncode == 130, err
        assert "run the same command again" in err
        assert list(tmp_path.glob("results/checkpoints/long_seed0-*/meristem.json"))
        assert out == ""
    done = command("run", "long.toml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    path = tmp_path / done.stdout.strip().splitlines()[-1]
    assert len(json.loads(path.read_text())["growths"]) == 3


def test_empty_choices_and_odd_files_are_told(tmp_path: Path) -> None:
    for change in (
        {"model": {}},
        {"data": {}},
        {"grow": {"when": {}}},
        {"grow": {"when": {"at": "1 epochs"}, "how": {}}},
    ):
        with pytest.raises(ConfigError):
            checked(SMALL | change)
    with pytest.raises(ConfigError, match="takes one name; got none"):
        checked(SMALL | {"train": {"epochs": 1, "optimizer": {}}})
    with pytest.raises(ConfigError, match="cannot be built"):
        Run(checked(SMALL | {"model": {"mlp": {"hidden": [-1]}}}))
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "odd.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML"):
        read(tmp_path / "odd.toml")


def test_the_benchmarks_files_are_valid() -> None:
    files = list((Path(__file__).parents[2] / "benchmarks").rglob("*.toml"))
    assert files
    for file in files:
        read_suite(file) if "[methods]" in file.read_text() else read(file)


def test_a_run_grows_depth_at_a_fraction_of_its_steps(tmp_path: Path) -> None:
    table = {
        "model": {"resnet": {"width": 4, "blocks": 1}},
        "data": {"digits": {"examples": 256}},
        "train": {
            "steps": 8,
            "batch_size": 64,
            "clip": 1.0,
            "evaluate": 2,
            "optimizer": {"sgd": {"lr": 0.1}},
        },
        "grow": {
            "when": {"at": 0.5},
            "how": ["stack", "net2net"],
            "axes": "stage?",
            "amount": [3],
        },
    }
    result = json.loads(run(checked(table), tmp_path, "deep").read_text())
    assert [point["step"] for point in result["curve"]] == [2, 4, 6, 8]
    (growth,) = result["growths"]
    assert growth["step"] == 4
    assert growth["after"] == {"stage1": 2, "stage2": 2, "stage3": 2}
    fixed = {k: v for k, v in table.items() if k != "grow"} | {"sizes": growth["after"]}
    again = json.loads(run(checked(fixed), tmp_path, "fixed").read_text())
    assert again["parameters"] == result["parameters"]
    for wrong in (0.0, 1.0, 1.5):
        with pytest.raises(ConfigError, match="fraction of training"):
            checked(table | {"grow": {"when": {"at": wrong}}})
    with pytest.raises(ConfigError, match="one of epochs, steps and flops"):
        checked(table | {"train": {"steps": 8, "epochs": 1}})


def test_parts_come_from_any_import_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the page "Write a method" shows, from a file beside the configuration."""
    page = (Path(__file__).parents[2] / "docs/write_a_method.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "my_growth.py").write_text("\n".join(blocks[:2]))
    (tmp_path / "my_care.py").write_text(
        "from meristem.care import Shrink\n"
        "class Late:\n"
        "    def due(self, clock):\n"
        "        return clock.epoch_ended and clock.epoch == 1\n"
        "class Gentle:\n"
        "    def treat(self, model, plan, axes):\n"
        "        return Shrink(0.9).treat(model, plan, axes)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    grow = {
        "when": "my_care:Late",
        "how": {"my_growth:Orthogonal": {"scale": 0.5}},
        "where": "my_growth:ThinnestFirst",
        "care": ["my_care:Gentle"],
        "amount": 4,
    }
    model = {"mlp": {"hidden": [6, 8]}}
    table = {**SMALL, "model": model, "grow": grow}
    one = Run(checked({**table, "train": {"epochs": 2, "batch_size": 256}}))
    one.train(tmp_path / "saved")
    assert one.grower is not None
    assert [growth.added for growth in one.grower.history] == [{"1": 4}]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nowhere:Method", "'nowhere' cannot be imported"),
        ("collections:OrderedDict", "lacks kinds"),
        ("collections:OrderedDikt", "Did you mean"),
        ({"meristem.how:Random": {"scal": 1}}, "Did you mean 'scale'"),
    ],
)
def test_a_wrong_import_path_is_told(how: Any, message: str) -> None:
    table = {**SMALL, "grow": {"when": {"every": "1 epochs"}, "how": how}}
    with pytest.raises(ConfigError, match=message):
        checked(table)


def test_a_tracker_of_accelerate_follows_a_run(tmp_path: Path) -> None:
    from accelerate.tracking import GeneralTracker

    seen: list[tuple[int, dict[str, float]]] = []

    class Notes(GeneralTracker):
        name = "notes"
        requires_logging_directory = False
        main_process_only = True

        def __init__(self) -> None:
            super().__init__()

        @property
        def tracker(self) -> object:
            return seen

        def store_init_configuration(self, values: object) -> None: ...

        def log(self, values: dict[str, float], step: int, **_: object) -> None:
            seen.append((step, values))

    path = run(checked(SMALL), tmp_path, "small", track=Notes())
    curve = json.loads(path.read_text())["curve"]
    assert [step for step, _ in seen] == [point["step"] for point in curve]
    assert seen[-1][1]["accuracy"] == curve[-1]["accuracy"]
    assert any(name.startswith("size/") for name in seen[-1][1])
    with (
        pytest.raises(ConfigError, match="not installed"),
        pytest.warns(UserWarning, match="trackers"),
    ):
        run(checked(SMALL | {"seed": 5}), tmp_path, "small", track="dvclive")
