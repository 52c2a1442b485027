"""What the pages show runs."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meristem.experiments.config import read
from meristem.experiments.suite import read as read_suite

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# Their text stands elsewhere in the repository.
STUBS = ("index.md", "benchmarks.md", "contributing.md", "examples.md")
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
    text = page.read_text()
    for found in re.finditer(
        r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", text, re.DOTALL
    ):
        torch.manual_seed(0)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(found[1], str(page), "exec"), scope)
        # What a page says is printed is printed.
        assert found[2] in (None, printed.getvalue())


def test_the_configurations_in_the_guide_are_valid(tmp_path: Path) -> None:
    experiment, suite = blocks(ROOT / "docs/guide.md", "toml")
    (tmp_path / "experiment.toml").write_text(experiment)
    (tmp_path / "suite.toml").write_text(suite)
    read(tmp_path / "experiment.toml")
    read_suite(tmp_path / "suite.toml")


def test_the_readme_is_short_of_breath() -> None:
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    for line in text.splitlines():
        if line.startswith(("|", "#", "!")):
            continue
        for sentence in re.split(r"(?<=[.:;!?])\s+", line):
            words = re.sub(r"\]\([^)]*\)", "]", sentence).split()
            assert len(words) <= 25, sentence


def test_links_between_pages_lead_somewhere() -> None:
    for page in (*PAGES, *(ROOT / "benchmarks").rglob("*.md"), *EXAMPLES.glob("*.md")):
        if "results" in page.parts or page.name in STUBS:
            continue
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            to = page.parent / target
            known = to.exists() or to.name in STUBS
            assert known, f"{page.relative_to(ROOT)}: {target}"


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_examples_run(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_run(file: Path, tmp_path: Path) -> None:
    cells = json.loads(file.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    command = [sys.executable, "-c", "\n".join(code)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_holds_the_two_commands_and_ci_runs_one_of_them() -> None:
    commands = blocks(ROOT / "README.md", "console")[0].splitlines()
    assert commands == [
        'pip install -c constraints.txt -e ".[cli]" && meristem demo',
        'pip install -c constraints.txt -e ".[dev]" && pytest',
    ]
    assert commands[1] in (ROOT / ".ci/run").read_text().splitlines()
