"""The scripts of the benchmarks import, and their methods are what a method should be."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from meristem.event.steps import methods
from meristem.experiments import suite
from meristem.testing import check_how

SCRIPTS = sorted((Path(__file__).parents[2] / "benchmarks").rglob("*.py"))


def loaded(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as Python does with a script
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module


@pytest.mark.parametrize(
    "path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_scripts_import(path: Path) -> None:
    module = loaded(path)
    for how in getattr(module, "HOWS", {}).values():
        methods(how)


def test_the_methods_of_the_student_teacher_task_offer_what_they_should() -> None:
    script = next(path for path in SCRIPTS if path.parent.name == "student_teacher")
    how = loaded(script).HOWS["random, Gaussian"]  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="receive no gradient"):
        check_how(how)  # zero fan-in under ReLU, as published: dead, and said so


@pytest.mark.parametrize("name", ["cpu", "war_and_peace"])
def test_advice_is_right_on_the_settings_of_the_sweeps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = next(path for path in SCRIPTS if path.name == "advise.py")
    # A method of the suite is a script of the benchmarks.
    monkeypatch.syspath_prepend(str(script.parents[2]))
    comparison = suite.read(script.parent / f"{name}.toml")
    comparison.load()
    found = list(loaded(script).verdicts(comparison))  # type: ignore[attr-defined]
    assert len(found) >= 10
    assert sum(one.is_right for one in found) >= 0.8 * len(found)
    assert sum(one.is_within for one in found) >= 0.8 * len(found)
    # Of both kinds, and both of them told.
    for grow in (True, False):
        same = [one for one in found if (one.found.value > 1) == grow]
        assert sum(one.is_right for one in same) >= 3
