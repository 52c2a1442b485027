"""Suites: every run and baseline, resumable, safe side by side; and what the data options do."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

import meristem as ms
from meristem.experiments import tables
from meristem.experiments.config import ConfigError, checked
from meristem.experiments.data import Batches, crop_and_flip, prepared
from meristem.experiments.models import build, sized
from meristem.experiments.run import Run, result_of
from meristem.experiments.suite import Comparison, Row, lent, read

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SUITE = """
seeds = [0, 1]
reference = "random"
baselines = ["small", "final", "equal"]
baselines_of = ["voted"]
[tasks.digits]
model = { mlp = { hidden = [4, 4] } }
data = "digits"
train = { epochs = 2, batch_size = 128, optimizer = { adam = { lr = 3e-3 } } }
grow = { when = { at = "1 epochs" }, amount = 6 }
[methods]
voted = { how = "swe", where = "svod" }
random = { how = "random" }
"""


def suite(folder: Path, text: str = SUITE) -> Comparison:
    folder.mkdir(exist_ok=True)
    (folder / "suite.toml").write_text(text)
    return read(folder / "suite.toml")


def test_a_suite_runs_everything_once_with_its_baselines(tmp_path: Path) -> None:
    comparison = suite(tmp_path)
    told: list[str] = []
    comparison.finish(1, lambda done, name: told.append(name))
    assert len(told) == comparison.runs() == 5 * 2
    rows = {row.title: tables.of(comparison, row) for row in comparison.rows("digits")}
    method, final, equal = (
        rows[title]
        for title in (
            "voted",
            "final shape of voted, fixed",
            "final shape of voted, equal FLOPs",
        )
    )
    for seed in (0, 1):
        assert final[seed]["widths"] == equal[seed]["widths"] == method[seed]["widths"]
        assert sum(method[seed]["widths"].values()) == 8 + 6
        step = equal[seed]["training_flops"] / equal[seed]["steps"]
        assert (
            abs(equal[seed]["training_flops"] - method[seed]["training_flops"]) <= step
        )
        assert final[seed]["steps"] == 2 * 11
        assert method[seed]["growth_flops"] == method[seed]["growths"][0]["flops"]
        halves = [
            final[seed]["training_flops"],
            rows["small, fixed"][seed]["training_flops"],
        ]
        assert method[seed]["training_flops"] - method[seed][
            "growth_flops"
        ] == pytest.approx(sum(halves) / 2)
        assert method[seed]["growth_flops"] > rows["random"][seed]["growth_flops"]
        assert set(method[seed]["health"]) == {"all", "new"}
        assert method[seed]["growths"][0]["votes"]
    files = sorted((tmp_path / "results" / "suite").glob("*.json"))
    assert len(files) == 10
    before = [file.stat().st_mtime_ns for file in files]
    again = suite(tmp_path)
    again.finish(1, lambda done, name: None)
    assert [file.stat().st_mtime_ns for file in files] == before
    table = tables.markdown(again)
    assert table.count("\n| ") == 1 + 5
    assert "minus its B3" in table
    assert "- voted: " in table
    tables.draw(again, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_two_processes_share_the_smoke_of_the_benchmark(tmp_path: Path) -> None:
    shutil.copy(BENCHMARKS / "swe_svod" / "smoke.toml", tmp_path)
    command = [
        sys.executable,
        "-m",
        "meristem.cli",
        "compare",
        str(tmp_path / "smoke.toml"),
    ]
    both = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [one.communicate(timeout=300) for one in both]
    assert [one.returncode for one in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][0].startswith("### digits")
    assert len(list((tmp_path / "results" / "smoke").glob("*.json"))) == 2 * 5 * 2
    assert (tmp_path / "results" / "smoke" / "table.md").read_text() == outputs[0][0]


def test_learning_rates_are_tuned_for_every_row_on_held_out_data(
    tmp_path: Path,
) -> None:
    text = SUITE.replace(
        "seeds = [0, 1]", "seeds = [0]\nlearning_rates = [1e-5, 1e-2]"
    ).replace('"small", "final", ', "")
    comparison = suite(tmp_path, text)
    comparison.finish(1, lambda done, name: None)
    tuning = sorted((tmp_path / "results" / "suite" / "tuning").glob("*.json"))
    assert len(tuning) == 3 * 2
    assert all(
        json.loads(file.read_text())["config"]["data"]
        == {"digits": {"validation": 0.1}}
        for file in tuning
    )
    for result in comparison.done.values():
        assert result["config"]["train"]["optimizer"] == {"adam": {"lr": 1e-2}}
        assert result["config"]["data"] == "digits"


def test_a_row_that_is_not_tuned_takes_the_rate_of_its_kind_in_whatever_order_runs_end() -> (
    None
):
    rows = [
        Row("a", "final of m", "m", "final"), Row("a", "equal of m", "m", "equal"), Row("a", "equal of n", "n", "equal"),
        Row("a", "small", None, "small"), Row("b", "equal of m", "m", "equal"),
    ]  # fmt: skip
    found = {rows[1]: 4e-3, rows[0]: 8e-3}
    assert (
        lent(rows, found)
        == lent(rows, dict(reversed(found.items())))
        == {**found, rows[2]: 4e-3}
    )
    assert lent(rows, {rows[0]: 8e-3})[rows[2]] == 8e-3


def test_a_rate_that_diverges_is_not_chosen_and_a_run_that_diverges_is_named(
    tmp_path: Path,
) -> None:
    text = SUITE.replace("adam", "sgd").replace(
        "seeds = [0, 1]", "seeds = [0]\nlearning_rates = [1e12, 1e-2]"
    )
    text = text.replace('"small", "final", "equal"', '"small"').replace(
        'voted = { how = "swe", where = "svod" }', "voted = {}"
    )
    comparison = suite(tmp_path, text)
    comparison.finish(1, lambda done, name: None)
    assert {
        result["config"]["train"]["optimizer"]["sgd"]["lr"]
        for result in comparison.done.values()
    } == {1e-2}
    wild = suite(
        tmp_path / "wild",
        text.replace("lr = 3e-3", "lr = 1e30").replace("learning_rates", "# "),
    )
    with pytest.raises(ms.DataError, match="digits_voted_seed0: the loss"):
        wild.finish(1, lambda done, name: None)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('reference = "random"', 'reference = "randon"', "Did you mean 'random'"),
        ("seeds =", "seed =", "Did you mean 'seeds'"),
        ('how = "swe"', 'how = "swee"', "Did you mean 'swe'"),
        (
            'baselines_of = ["voted"]',
            'baselines_of = ["voter"]',
            "Did you mean 'voted'",
        ),
        ('"small", "final"', '"tiny", "final"', "'small', 'final', 'equal' or 'best'"),
        (
            'how = "swe"',
            'how = { swe = { coupling = "half" } }',
            '"full" or "factored"',
        ),
        (
            'where = "svod"',
            'where = { svod = { score = "best" } }',
            '"signed" or "absolute"',
        ),
        ("grow = {", "sizes = {} #", "neither"),
        (
            "voted = {",
            '"random!" = { how = "net2net" }\nvoted = {',
            "share the file name",
        ),
        (
            'data = "digits"',
            "data = { digits = { validations = 0.1 } }",
            "Known here: examples, validation",
        ),
    ],
)
def test_mistakes_in_a_suite_are_told_before_anything_runs(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    assert old in SUITE
    with pytest.raises(ConfigError, match=".*" + message.replace("(", "\\(")):
        suite(tmp_path, SUITE.replace(old, new))


STAGED: dict[str, Any] = {
    "model": {"mlp": {"hidden": [4, 4]}},
    "data": {"digits": {"validation": 0.2}},
    "train": {"batch_size": 64, "optimizer": {"adam": {"lr": 3e-3}}},
    "stages": {"amount": [4], "epochs": 3, "patience": 1},
}


def test_stages_run_from_a_file_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from meristem.experiments import run as runner

    experiment = checked(STAGED)
    whole = Run(experiment)
    whole.train(tmp_path / "whole")
    want = result_of(whole)
    assert len(want["curve"]) == 2
    assert want["curve"][1]["health"]["new"]
    assert sum(want["widths"].values()) == 12

    def stop(progress: Any) -> None:
        if progress.step == 2 * len(cut.batches):
            cut.stopping = True

    cut = Run(experiment, stop)
    with pytest.raises(runner.Interrupted):
        cut.train(tmp_path / "cut")
    resumed = Run(experiment)
    resumed.train(tmp_path / "cut")
    found = result_of(resumed)
    assert found["curve"] == want["curve"]
    assert found["training_flops"] == want["training_flops"]
    beside = Run(
        experiment, lambda progress: setattr(beside, "stopping", bool(progress.beside))
    )
    with pytest.raises(runner.Interrupted, match="which is dropped"):
        beside.train(tmp_path / "beside")
    again = Run(experiment)
    again.train(tmp_path / "beside")
    assert result_of(again)["curve"] == want["curve"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": "digits"}, "held-out data"),
        ({"grow": {"when": {"at": "1 epochs"}}}, "choose one"),
        ({"train": {"epochs": 3}}, "one of epochs, steps and flops"),
        ({"train": {"schedule": "cosine"}}, "only be 'constant'"),
        ({"stages": {"amount": [4], "patience": 0}}, "patience"),
        ({"stages": {"amounts": [4]}}, "Did you mean 'amount'"),
    ],
)
def test_stages_are_checked(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(STAGED | change)


def test_the_released_protocol_has_its_numbers() -> None:
    comparison = read(BENCHMARKS / "swe_svod" / "cifar100.toml")
    experiment = comparison.experiment(comparison.rows("cifar100")[0], 0)
    assert experiment.stages is not None
    assert sum(experiment.stages.amount) == 819 - 186
    images = torch.randn(50, 3, 32, 32)
    from meristem.experiments.data import Data

    data = Data(
        "cifar100",
        "classification",
        images,
        torch.arange(50),
        images,
        torch.arange(50),
        100,
    )
    model = build(experiment.model, data)
    assert sum(p.numel() for p in model.parameters()) == 333_786
    assert all((model.get_submodule(f"fc{i}").bias >= 0).all() for i in (1, 2, 3))
    grown = ms.find_axes(model, images[:2], axes=experiment.stages.axes).values()
    assert [axis.name for axis in grown if axis.kind == "width"] == [
        "fc1",
        "fc2",
        "fc3",
    ]


def test_sizes_give_a_fresh_net_of_another_shape() -> None:
    data = prepared("digits")
    torch.manual_seed(0)
    model = sized(
        build({"mlp": {"hidden": [4, 4]}}, data), data.x_train[:4], {"1": 40, "3": 4}
    )
    assert model[1].out_features == model[3].in_features == 40
    assert model[3].weight.std().item() == pytest.approx(
        (1 / 40 / 3) ** 0.5, rel=0.2
    )  # drawn for 40 inputs, not for 4
    protocol = build(
        {"vgg": {"convs": [[4]], "hidden": [6], "positive_bias": True}}, data
    )
    assert (sized(protocol, data.x_train[:4], {"fc1": 30}).fc1.bias >= 0).all()
    with pytest.raises(ConfigError, match="smaller"):
        sized(build({"mlp": {"hidden": [4, 4]}}, data), data.x_train[:4], {"1": 2})


def test_validation_is_held_out_of_every_class_alike() -> None:
    data, whole = prepared("digits", validation=0.2), prepared("digits")
    assert data.held_out is not None
    x, y = data.held_out
    assert len(x) + len(data.x_train) == len(whole.x_train)
    for label in range(10):
        share = (y == label).sum().item() / (whole.y_train == label).sum().item()
        assert share == pytest.approx(0.2, abs=0.01)
    assert torch.equal(y, prepared("digits", validation=0.2).held_out[1])
    assert len(prepared("digits", examples=100).x_train) == 100
    with pytest.raises(ms.DataError, match="more than the 1347"):
        prepared("digits", examples=10_000)


def test_images_are_normalised_cropped_and_mirrored_as_asked() -> None:
    plain, scaled = (
        prepared("digits"),
        prepared("digits", mean=[0.5], std=[0.25], augment=True),
    )
    assert plain.scale is not None
    raw = plain.x_train * plain.scale[1] + plain.scale[0]
    assert torch.allclose(scaled.x_train, (raw - 0.5) / 0.25, atol=1e-5)
    assert scaled.black is not None
    assert scaled.black.tolist() == [-2.0]
    x = torch.arange(2 * 8 * 8).float().reshape(2, 1, 8, 8)
    still = crop_and_flip(
        x, torch.tensor([-1.0]), torch.full((2, 2), 4), torch.tensor([False, True])
    )
    assert torch.equal(still[0], x[0])
    assert torch.equal(still[1], x[1].flip(-1))
    moved = crop_and_flip(
        x,
        torch.tensor([-1.0]),
        torch.tensor([[0, 4], [8, 8]]),
        torch.tensor([False, False]),
    )
    assert torch.equal(moved[0, 0, 4:], x[0, 0, :4])
    assert (moved[0, 0, :4] == -1).all()
    assert torch.equal(moved[1, 0, :4, :4], x[1, 0, 4:, 4:])
    with pytest.raises(ms.DataError, match="one number per channel"):
        prepared("digits", mean=[0.5, 0.5, 0.5])


def test_batches_can_be_read_again_and_from_the_middle() -> None:
    x, y = torch.randn(10, 3), torch.arange(10)
    batches = Batches(x, y, 4, shuffle=True)
    assert len(batches) == 3
    whole = [b[1].tolist() for b in batches.epoch(torch.Generator().manual_seed(1))]
    rest = [
        b[1].tolist() for b in batches.epoch(torch.Generator().manual_seed(1), skip=1)
    ]
    assert rest == whole[1:]
    assert sorted(np.concatenate(whole).tolist()) == list(range(10))
    # Of nearly one size: a small last batch would own a batch norm's statistics.
    assert [b[1].tolist() for b in Batches(x, y, 4)] == [
        [0, 1, 2, 3],
        [4, 5, 6],
        [7, 8, 9],
    ]


BEST = """
seeds = [0, 1]
reference = "random"
score = "loss"
baselines = ["equal", "best"]
budgets = [0.6, 1.0]
[best]
four = { model = { mlp = { hidden = [4] } } }
sixteen = { model = { mlp = { hidden = [16] } } }
wide = { model = { mlp = { hidden = [64] } } }
[tasks.digits]
model = { mlp = { hidden = [8] } }
data = { digits = { examples = 256 } }
train = { epochs = 2, batch_size = 64, optimizer = { adam = { lr = 3e-3 } } }
grow = { when = { at = "1 epochs" }, amount = 8 }
[methods]
random = { how = "random" }
"""


def test_the_best_fixed_size_is_swept_at_equal_cost(tmp_path: Path) -> None:
    comparison = suite(tmp_path, BEST)
    comparison.finish(1, lambda done, name: None)
    swept = tables.sweep_of(comparison, "digits")
    method = tables.of(comparison, Row("digits", "random", "random"))
    cost = sum(result["training_flops"] for result in method.values()) / 2
    assert sorted(swept) == [0.6 * cost, cost]
    assert {len(by_size) for by_size in swept.values()} == {3}
    for row in comparison.rows("digits"):
        for seed, result in tables.of(comparison, row).items():
            if row.baseline == "best":
                wanted = row.budget * method[seed]["training_flops"]
                # To half a step of the budget, which is one of a few here.
                assert abs(result["training_flops"] / wanted - 1) < 0.3
    again = suite(tmp_path, BEST)
    again.load()
    assert again.done == comparison.done
    text = tables.markdown(comparison)
    rows = [line for line in text.splitlines() if line.startswith("| random |")]
    # In the table of all nets, and in that of the multipliers.
    assert len(rows) == 2
    assert re.search(r"\| \d+\.\d\d \[|cannot be told", rows[1])
    assert text.count("parameters |") >= 3
    tables.draw(comparison, tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('wide = { model = { mlp = { hidden = [64] } } }\n', "", "three at least"),
        ('"equal", "best"', '"equal"', "go together"),
        ("budgets = [0.6, 1.0]", "budgets = [1.0]", "budgets"),
        ("[16]", '["x"]', "hidden"),
    ],
)  # fmt: skip
def test_a_sweep_that_cannot_be_fitted_is_told(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    with pytest.raises((ConfigError, ms.DataError), match=words):
        suite(tmp_path, BEST.replace(old, new)).finish(1, lambda done, name: None)


def test_texts_are_read_as_bytes_without_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERISTEM_DATA", str(tmp_path))
    (tmp_path / "text").mkdir()
    drawn = np.random.default_rng(0).integers(256, size=64 * 40 + 1, dtype=np.uint8)
    (tmp_path / "text/b.train.bin").write_bytes(drawn.tobytes())
    (tmp_path / "text/b.valid.bin").write_bytes(drawn[: 64 * 9 + 1].tobytes())
    data = prepared("text/b", test=5)
    assert (data.task, data.outputs) == ("language", 256)
    assert data.x_train.dtype == torch.uint8
    assert data.x_train.shape == (40, 64)
    assert torch.equal(data.y_train[0, :-1], data.x_train[0, 1:])
    assert len(data.x_test) == 5
    x, y = next(iter(Batches(data.x_train, data.y_train, 8)))
    assert x.dtype == y.dtype == torch.int64
    table = {
        "model": {"gpt": {"width": 8, "heads": 2, "hidden": 16, "depth": 1}},
        "data": {"text/b": {"test": 5}},
        "train": {"steps": 2, "batch_size": 8},
    }
    running = Run(checked(table))
    running.train(tmp_path / "run")
    assert result_of(running)["loss"] < 7
    longer = prepared("text/b", context=256)
    assert longer.x_train.shape == (10, 256)
    assert torch.equal(longer.x_train.flatten(), data.x_train.flatten())
    assert torch.equal(longer.y_train[:, :-1], longer.x_train[:, 1:])
    with pytest.raises(ms.DataError, match="longer than x_test"):
        prepared("text/b", context=64 * 9 + 1)
    with pytest.raises(ms.DataError, match="context is for texts"):
        prepared("digits", context=8)
    (tmp_path / "text/b.valid.bin").write_bytes(b"short")
    with pytest.raises(ms.DataError, match=r"b.valid.bin is damaged"):
        prepared("text/b")


def test_a_budget_below_a_step_is_told() -> None:
    table = {"model": "mlp", "data": "digits", "train": {"flops": 10.0}}
    with pytest.raises(ConfigError, match="less than half a step"):
        Run(checked(table))


def test_the_workers_of_a_suite_save_and_end_with_it(tmp_path: Path) -> None:
    # A worker holds a lock of its own from its 50th step until it ends.
    (tmp_path / "mine.py").write_text(
        "import os, pathlib, torch\n"
        "from filelock import FileLock\n"
        "alive = FileLock(f'{os.getpid()}.alive')\n"
        "class Net(torch.nn.Sequential):\n"
        "    calls = 0\n"
        "    def forward(self, x):\n"
        "        Net.calls += 1\n"
        "        if Net.calls == 50:\n"
        "            alive.acquire()\n"
        "            pathlib.Path(f'{os.getpid()}.trains').touch()\n"
        "        return super().forward(x)\n"
        "def net():\n"
        "    return Net(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    lines = """
seeds = [0, 1, 2, 3]
reference = "a"
[tasks.t]
model = "mine:net"
data = "digits"
[tasks.t.train]
steps = 10_000_000
[tasks.t.grow]
when = { at = 0.5 }
[methods]
a = {}
"""
    (tmp_path / "long.toml").write_text(lines)
    words = ["-m", "meristem.cli", "compare", "long.toml", "--workers", "2"]
    process = subprocess.Popen([sys.executable, *words], cwd=tmp_path)
    workers: list[Path] = []
    while len(workers) < 2 and process.poll() is None:
        time.sleep(0.1)
        workers = list(tmp_path.glob("*.trains"))
    process.kill()
    process.wait()
    assert len(workers) == 2
    for worker in workers:
        with FileLock(worker.with_suffix(".alive")).acquire(timeout=60):
            pass
    saved = tmp_path.glob("results/long/checkpoints/*/meristem.json")
    assert len(list(saved)) >= 2
