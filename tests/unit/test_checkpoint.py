"""A checkpoint knows its shape."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from zoo import MLP, ZOO, make

import meristem as ms
from meristem.checkpoint import MANIFEST


@pytest.mark.parametrize("zoo_name", [n for n in ZOO if n != "resnet18"])
def test_any_grown_model_is_rebuilt_from_its_class(
    zoo_name: str, tmp_path: Path
) -> None:
    model, x = make(zoo_name)
    for name in list(ms.find_axes(model, x))[:2]:
        for times in (2, 1):
            ms.grow_(model, {name: times * ms.find_axes(model, x)[name].multiple}, x)
    ms.save(tmp_path, model)
    loaded = ms.load(tmp_path, ZOO[zoo_name][0]())
    model.eval()
    loaded.eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert [m.extra_repr() for m in loaded.modules()] == [
        m.extra_repr() for m in model.modules()
    ]
    assert ms.find_axes(loaded, x).keys() == ms.find_axes(model, x).keys()


FULL_DISK = """
import resource, signal, sys, torch, meristem as ms

def net(width):
    torch.manual_seed(width)
    return torch.nn.Sequential(
        torch.nn.Linear(9, width), torch.nn.ReLU(), torch.nn.Linear(width, 2)
    )

folder, small, what = sys.argv[1], net(4), sys.argv[2]
ms.save(folder, small)
large = net(40_000 if what == "weights" else 40)
optimizer = torch.optim.AdamW(large.parameters())
extra = {"much": torch.zeros(500_000)} if what == "training" else None
# No file may grow beyond this: the system refuses to write, as on a full disk.
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    ms.save(folder, large, optimizer=optimizer, extra=extra)
except ms.CheckpointError as error:
    print(error)
for old, new in zip(small.parameters(), ms.load(folder, net(4)).parameters()):
    assert torch.equal(old, new)
"""


@pytest.mark.parametrize("what", ["weights", "training"])
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    what: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{tmp_path}: the checkpoint could not be written" in done.stdout
    assert len(list(tmp_path.iterdir())) == 3


def test_a_write_that_dies_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = MLP(), torch.randn(3, 10)
    ms.save(tmp_path, model)
    out = model(x).detach()
    ms.grow_(model, {"fc1": 2}, x)
    with torch.no_grad():
        model.fc1.weight.add_(1)
    for target in ("save_file", "torch.save", "os.replace"):
        with monkeypatch.context() as patch:

            def die(*_: object, **__: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(f"meristem.checkpoint.{target}", die)
            with pytest.raises(KeyboardInterrupt):
                ms.save(tmp_path, model)
        assert torch.equal(ms.load(tmp_path, MLP())(x), out)
    ms.save(tmp_path, model)
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [
        ".json",
        ".pt",
        ".safetensors",
    ]


def test_wrong_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(ms.CheckpointError, match="holds no checkpoint"):
        ms.load(tmp_path, MLP())
    ms.save(tmp_path, torch.nn.Linear(3, 4))
    model = MLP()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ms.CheckpointError, match="does not belong to this MLP"):
        ms.load(tmp_path, model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ms.CheckpointError, match="not readable"):
        ms.load(tmp_path, model)


def test_the_lineage_lists_the_growths(tmp_path: Path) -> None:
    model, x = MLP(), torch.randn(3, 10)
    ms.grow_(model, {"fc1": 2}, x)
    ms.narrow_(model, {"fc2": 3}, x)
    ms.save(tmp_path, model)
    lineage = json.loads((tmp_path / MANIFEST).read_text())["lineage"]
    assert [entry["after"] for entry in lineage] == [{"fc1": 14}, {"fc2": 6}]


def grown_folder(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    model = MLP()
    ms.grow_(model, {"fc1": 3}, torch.randn(2, 10))
    ms.save(tmp_path, model)
    return tmp_path, model


def refuses(folder: Path, match: str, model: torch.nn.Module | None = None) -> None:
    target = model if model is not None else MLP()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ms.CheckpointError, match=match):
        ms.load(folder, target)
    after = target.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", ["weights", "training"])
def test_flipped_bytes_are_found(tmp_path: Path, kind: str) -> None:
    folder, _ = grown_folder(tmp_path)
    (path,) = folder.glob(f"{kind}-*")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(bytes(damaged))
    refuses(folder, f"{path.name} is damaged")
    path.unlink()
    refuses(folder, f"{path.name} is missing")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 77}, "is not of format"),
        ({"lineage": None}, "is damaged: lineage is missing"),
    ],
)
def test_other_manifests_are_refused(
    tmp_path: Path, change: dict[str, Any], match: str
) -> None:
    folder, _ = grown_folder(tmp_path)
    path = folder / "meristem.json"
    manifest = json.loads(path.read_text()) | change
    path.write_text(
        json.dumps({key: value for key, value in manifest.items() if value is not None})
    )
    refuses(folder, match)


def test_a_lineage_sets_nothing_but_sizes(tmp_path: Path) -> None:
    folder, _ = grown_folder(tmp_path)
    path = folder / "meristem.json"
    manifest = json.loads(path.read_text())
    manifest["lineage"][0]["attributes"].append(["fc1", "training", False])
    path.write_text(json.dumps(manifest))
    refuses(folder, "fc1.training, which holds no size")


def test_a_model_of_another_input_width_is_refused(tmp_path: Path) -> None:
    def make(features: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(features, 8), torch.nn.Linear(8, 2))

    model = make(6)
    ms.grow_(model, {"0": 3}, torch.randn(2, 6))
    ms.save(tmp_path, model)
    refuses(tmp_path, r"\(8, 7\), and its growth starts from \(8, 6\)", make(7))


def test_shapes_are_regrown_for_a_foreign_state() -> None:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, batch_first=True, norm_first=True
        )
        return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    x = torch.randn(2, 3, 8)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(net: torch.nn.Module, one: torch.optim.Optimizer) -> None:
        net(x).square().mean().backward()
        one.step()
        one.zero_grad()

    for wish, how in (
        ({"layers.0.linear1": 4}, None),
        ({"layers": 1}, ms.how.Stack()),
        ({"layers.1.linear1": 2}, None),
    ):
        step(model, optimizer)
        ms.grow_(model, wish, x, how, optimizer=optimizer)
    step(model, optimizer)
    line = json.loads(json.dumps(ms.lineage(model)))
    again = make()
    other = torch.optim.AdamW(again.parameters(), fused=True)
    assert ms.regrow_(again, line, optimizer=other) is again
    again.load_state_dict(model.state_dict())
    # torch takes the tensors of a state as they are: two optimizers would share them.
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        step(model, optimizer)
        step(again, other)
    for (name, first), second in zip(
        model.named_parameters(), again.parameters(), strict=True
    ):
        assert torch.equal(first, second), name
    # Once more is no growth; another model is refused, and stays as it is.
    ms.regrow_(again, line)
    wrong = torch.nn.TransformerEncoder(make().layers[0], 1, enable_nested_tensor=False)
    shapes = [p.shape for p in wrong.parameters()]
    with pytest.raises(ms.CheckpointError):
        ms.regrow_(wrong, line)
    assert [p.shape for p in wrong.parameters()] == shapes
    with pytest.raises(ms.OptimizerError, match="takes a fresh one"):
        ms.regrow_(make(), line, optimizer=optimizer)


class Typed(torch.nn.Module):
    """Holds a word for every block, as the configs of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = ["full", "sliding"]
        layer = torch.nn.TransformerEncoderLayer(
            8, 2, 16, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = torch.nn.TransformerEncoder(layer, 2, None, False).layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            assert self.kinds[number] in ("full", "sliding")
            x = layer(x)
        return x


def test_words_that_count_blocks_are_rebuilt(tmp_path: Path) -> None:
    model = Typed()
    ms.grow_(model, {"layers": 2}, torch.randn(2, 3, 8))
    assert len(model.kinds) == 4
    ms.save(tmp_path, model)
    again = ms.load(tmp_path, Typed())
    assert again.kinds == model.kinds


def test_groups_are_regrown_in_their_own_order() -> None:
    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer, torch.Tensor]:
        torch.manual_seed(0)
        model = Typed()
        beside = torch.nn.Parameter(torch.ones(2))
        listed = [*model.parameters()][::-1]
        return model, torch.optim.Adagrad([*listed, beside], lr=0.1), beside

    x = torch.randn(2, 3, 8)

    def step(model: torch.nn.Module, one: torch.optim.Optimizer, beside: Any) -> None:
        (model(x).square().mean() + beside.square().sum()).backward()
        one.step()
        one.zero_grad()

    model, optimizer, beside = make()
    step(model, optimizer, beside)
    for wish in ({"layers.0.linear1": 3}, {"layers": 1}):
        ms.grow_(model, wish, x, optimizer=optimizer)
    again, other, alone = make()
    ms.regrow_(again, ms.lineage(model), optimizer=other)
    again.load_state_dict(model.state_dict())
    alone.data = beside.detach().clone()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step(model, optimizer, beside)
        step(again, other, alone)
    for first, second in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(first, second)
    assert torch.equal(beside, alone)
