"""The command: what good and bad calls print, and the codes they exit with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from meristem import cli
from meristem.experiments import models

TOML = """
model = { mlp = { hidden = [8] } }
data = { digits = { examples = 64 } }
[train]
epochs = 1
batch_size = 32
"""
SUITE = """
reference = "random"
[tasks.small]
model = { mlp = { hidden = [8] } }
data = "digits"
[tasks.small.train]
epochs = 1
[tasks.small.grow]
when = { at = 0.5 }
[methods.random]
how = "random"
"""
GROW = TOML + '[grow]\nwhen = { every = "1 epochs" }\n'
FILES = {
    "good.toml": TOML,
    "suite.toml": SUITE,
    "lots.toml": GROW + 'amount = "lots"\n',
    "none.toml": GROW + "amount = -1\n",
    "half.toml": GROW.replace("1 epochs", "1"),
    "twice.toml": GROW + 'care = "shrink"\naxes = [1]\n',
    "torn.toml": "model = ",
    "plan.toml": """
model = { gpt = { width = 8, heads = 2, hidden = 16, depth = 1 } }
data = { shakespeare = { examples = 512, test = 8 } }
train = { steps = 100, batch_size = 8, optimizer = { adamw = { lr = 1e-2 } } }
grow = { when = { at = 0.5 }, how = "stack", axes = "depth", amount = [1] }
""",
    "table.toml": GROW.replace("epochs = 1", "steps = 100"),
    "mine.py": (
        "from torch import nn\n"
        "class Two(nn.Module):\n"
        "    def __init__(self, hidden=8):\n"
        "        super().__init__()\n"
        "        self.words, self.out = nn.Embedding(9, hidden), nn.Linear(hidden, 2)\n"
        "    def forward(self, x, scale=None):\n"
        "        h = self.words(x)\n"
        "        return self.out(h if scale is None else h * scale)\n"
        "net = 3\n"
    ),
}
GOOD = {
    "--version": "meristem 0.1.0",
    "--help": "Grow neural networks",
    "methods": "gradmax",
    "axes mine:Two --input 2,4:int": "words",
    "axes mine:Two --input 2,4 --integers --set hidden=16": "words",
    "axes mine:Two --input 2,4:int --input scale=2,4,1": "words",
    "run good.toml": "results/good_seed0.json",
    "run good.toml --seed 3 --out other": "other/good_seed3.json",
    "compare suite.toml": "### small",
    "advise plan.toml --share 0.8": "cost of this advice",
}
BAD = {
    "": "",
    "gorw": "No such command",
    "run": "Missing argument",
    "run absent.toml": "there is no file absent.toml",
    "run torn.toml": "torn.toml is not TOML",
    "run suite.toml": "hint: meristem compare suite.toml",
    "compare good.toml": "hint: meristem run good.toml",
    "run lots.toml": "grow.amount must be a whole number or a number or a list or a table",
    "run none.toml": "amount must be positive",
    "run half.toml": "carries its unit",
    "run twice.toml": "grow.care must be a list; got 'shrink'",
    "run good.toml --out good.toml": "good.toml",
    "run good.toml --seed x": "Invalid value for '--seed'",
    "advise good.toml": "nothing to advise on without [grow]",
    "advise table.toml --share 0.8": "is one of texts",
    "advise plan.toml --share 2": "in (0, 1)",
    "advise plan.toml --share 0.1": "hint: a larger share",
    "advise plan.toml": "100 steps are too few for probes of 0.3 of them",
    "advise suite.toml": "hint: meristem compare suite.toml",
    "demo --plot absent/plot.png": "absent/plot.png: No such file or directory",
    "report absent": "there is no absent",
    "report good.toml": "not the result of a run",
    "report . --out absent/report.html": "absent/report.html: No such file",
    "axes mine:Tow --input 2,4": "Did you mean 'Two'",
    "axes mine:Two --input 2,x": "--input takes sizes",
    "axes mine:Two --input 0,4": "sizes in [1, inf)",
    "axes mine:Two --input 2,4:int --set hiden=3": "does not take these arguments",
    "axes mine:Two --input 2,4:int --set hidden": "NAME=VALUE",
    "axes mine:Two --input 2,4": "fails on the example",
    "axes mine:net --input 2,4": "neither a module nor makes one",
    "axes nowhere:net --input 2,4": "cannot be imported",
    "expand absent --to depth=+1 --out new": "absent is no directory",
    "expand . --to deep=+1 --out new": "Did you mean 'depth'",
    "expand . --to depth=+1": "hint: name it with --out",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def call(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["meristem", *line.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize("line", GOOD)
def test_good_calls(
    line: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(line, monkeypatch) == 0
    assert GOOD[line] in capsys.readouterr().out


@pytest.mark.parametrize("line", BAD)
def test_bad_calls(
    line: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(line, monkeypatch) == 2
    told = capsys.readouterr()
    assert BAD[line] in told.err.replace("│", "")
    assert "Traceback" not in told.err
    if line:
        assert told.out == ""
    # Nothing but the given files is left behind.
    assert {path.name for path in folder.iterdir()} <= {*FILES, "__pycache__"}


def test_a_result_is_never_overwritten(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run good.toml", monkeypatch) == 0
    result = folder / "results/good_seed0.json"
    kept = result.read_bytes()
    assert call("run good.toml", monkeypatch) == 0
    assert "finished before" in capsys.readouterr().err
    (folder / "good.toml").write_text(TOML.replace("epochs = 1", "epochs = 2"))
    assert call("run good.toml", monkeypatch) == 2
    assert "result of another configuration" in capsys.readouterr().err
    assert result.read_bytes() == kept
    result.write_text("{")
    assert call("run good.toml", monkeypatch) == 2
    assert "good_seed0.json is not the result of a run" in capsys.readouterr().err


def test_damaged_data_name_their_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MERISTEM_DATA", str(folder))
    for kind in ("text", "tabular"):
        (folder / kind).mkdir()
    (folder / "text/torn.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "tabular/torn.npz").write_bytes(b"PK\x03\x04torn")
    (folder / "torn.npz").write_text("no archive")
    for name in ("text/torn", "tabular/torn", "torn"):
        asked = TOML.replace("{ digits = { examples = 64 } }", f'"{name}"')
        (folder / "good.toml").write_text(asked)
        assert call("run good.toml", monkeypatch) == 2
        told = capsys.readouterr().err
        assert str(folder / name) in told.replace("\n", "")
        assert "damaged" in told


def test_a_report_of_results(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("run good.toml", monkeypatch) == 0
    assert call("report results --out page.html --title Mine", monkeypatch) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "page.html"
    assert "<h1>Mine</h1>" in (folder / "page.html").read_text()


def test_a_file_that_was_there_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "mine.html").touch()
    assert call("report absent --out mine.html", monkeypatch) == 2
    assert (folder / "mine.html").exists()


def test_a_module_is_not_shared_by_runs(folder: Path) -> None:
    (folder / "shared.py").write_text("import torch\nnet = torch.nn.Linear(2, 2)\n")
    first, second = (models.build("shared:net", None) for _ in range(2))  # type: ignore[arg-type]
    assert first is not second


def test_python_m_meristem() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "meristem", "--version"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.startswith("meristem ")


def test_the_page_of_all_keys_is_the_one_that_is_checked() -> None:
    from meristem.experiments.reference import page

    kept = Path(__file__).parents[2] / "docs/configuration.md"
    assert kept.read_text() == page()
    for line in page().splitlines():
        if line.startswith("| `"):
            # A docstring of several lines would end a row early.
            assert line.endswith("|"), line
            assert line.split("|")[2].strip(), line
    assert "None" not in page()
