"""What the pages show runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from meristem.experiments.config import read
from meristem.experiments.suite import read as read_suite

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name
)
def test_python_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), scope)


def test_the_configurations_in_the_guide_are_valid(tmp_path: Path) -> None:
    experiment, suite = blocks(ROOT / "docs/guide.md", "toml")
    (tmp_path / "experiment.toml").write_text(experiment)
    (tmp_path / "suite.toml").write_text(suite)
    read(tmp_path / "experiment.toml")
    read_suite(tmp_path / "suite.toml")


def test_the_readme_holds_the_two_commands_and_ci_runs_one_of_them() -> None:
    commands = blocks(ROOT / "README.md", "console")[0].splitlines()
    assert commands == [
        'pip install -c constraints.txt -e ".[cli]" && meristem demo',
        'pip install -c constraints.txt -e ".[dev]" && pytest',
    ]
    assert commands[1] in (ROOT / ".ci/run").read_text().splitlines()
