"""The models of benchmarks/zoo: what is offered grows exactly, survives a checkpoint, and narrows back."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

ZOO = Path(__file__).parents[2] / "benchmarks" / "zoo"
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def zoo() -> Any:
    """The script of the benchmark, with its neighbours."""
    sys.path.insert(0, str(ZOO))
    try:
        spec = importlib.util.spec_from_file_location("zoo_run", ZOO / "run.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ZOO))
    return module


def names() -> list[str]:
    listed: list[str] = zoo().names()
    return [name for name in listed if name.startswith(("styles/", "transformers/"))]


@pytest.mark.parametrize("name", names())
def test_what_is_offered_grows(name: str) -> None:
    script = zoo()
    record = script.examine(name)
    assert record["axes"]
    for axis, tried in record["grown"].items():
        assert "error" not in tried, f"{axis}: {tried['error']}"
        assert tried["change"] <= script.EXACT, axis
        assert tried.get("round_trip", 0.0) <= script.EXACT, axis
