"""A checkpoint knows its shape."""

from __future__ import annotations

import json
from pathlib import Path

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
