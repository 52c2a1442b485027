"""Reports: one file, whole in itself, that a browser shows without a complaint."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import meristem as ms
from meristem.report import Point, Record, figures, of_files, write

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def growth(step: int, before: int, after: int) -> dict[str, Any]:
    looked = {"h.0": {"units": 4.0, "inactive_forward": 0.25}}
    return {
        "step": step,
        "before": {"h.0": before, "h.1": before},
        "after": {"h.0": after, "h.1": after},
        "parameters": [100, 200],
        "max_change": 1e-7,
        "flops": 1e6,
        "votes": {"h.0": {"share": 0.5}},
        "notes": {"h.1": "<zero> fan-out"},
        "health": {"insertion": looked, "1": looked, "10": {"error": "none"}},
    }


def records() -> list[Record]:
    found = []
    for number, name in enumerate(["grown <a>", "fixed"]):
        points = [
            Point(step, 1e9 * step, 2.0 / step + number, 0.5 + step / 100, {"h.0": 8})
            for step in (10, 20, 30, 40)
        ]
        growths = [] if number else [growth(20, 4, 8), growth(30, 8, 12)]
        found.append(Record(name, points, growths, 1000 + number, 1e8, 3.0))
    return found


class Page(HTMLParser):
    """What stands in a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and not str(value).startswith("#"):
                self.links.append(str(value))


def test_a_report_is_whole_in_itself(tmp_path: Path) -> None:
    text = write(records(), tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.links == []
    assert "@import" not in text
    # Loss, accuracy, size and cost, sizes, health.
    assert page.tags.count("svg") == 5
    assert "grown &lt;a&gt;" in text
    assert "&lt;zero&gt; fan-out" in text
    assert "h.0 4 → 8" in text
    assert "<a>" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)


def test_odd_names_and_empty_records(tmp_path: Path) -> None:
    odd = [replace(one, name='a" onload="x cost$x^$') for one in records()]
    text = write(odd, tmp_path / "odd.html").read_text()
    # Letters that are drawn stand in comments, too.
    assert 'onload="x' not in re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    write([Record("a", [Point(0)]), Record("b", [Point(0)])], tmp_path / "empty.html")


@pytest.mark.parametrize("words", [1, 4, 8])
def test_the_names_of_many_runs_hide_no_curve(words: int) -> None:
    few, many = records(), []
    for number in range(40):
        many.append(
            replace(few[number % 2], name=f"run {number}" + words * " and more")
        )
    for make in (
        lambda runs: figures.curves(runs, "loss"),
        lambda runs: figures.pareto(runs, "loss", smaller_is_better=True),
    ):
        small, large = make(few), make(many)
        drawn = {}
        for one in (small, large):
            one.draw_without_rendering()
            panel = one.axes[0].get_window_extent()
            (legend,) = one.legends or [one.axes[0].get_legend()]
            box = legend.get_window_extent()
            # Inside the figure, and beside the panel where it is large.
            assert one.bbox.contains(box.x0, box.y0)
            assert one.bbox.contains(box.x1, box.y1)
            drawn[one] = panel.height, panel.overlaps(box)
        assert drawn[small][1]
        assert not drawn[large][1]
        assert drawn[large][0] > 0.8 * drawn[small][0]


def test_runs_of_other_folders_and_configurations_are_not_averaged(
    tmp_path: Path,
) -> None:
    for folder, seed, width in (("a", 0, 8), ("a", 1, 8), ("b", 0, 8), ("b", 1, 16)):
        point = {"step": 1, "flops": 1e6, "loss": 1.0, "accuracy": None, "sizes": {}}
        result = {
            "curve": [point],
            "growths": [],
            "training_flops": 1e6,
            "parameters": 10,
            "seconds": 1.0,
            "config": {"seed": seed, "width": width},
        }
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"net_seed{seed}.json").write_text(json.dumps(result))
    found = {(record.name, record.seeds) for record in of_files([tmp_path])}
    assert found == {("a/net", 2), ("b/net", 1)}


def test_a_report_is_the_same_every_time(tmp_path: Path) -> None:
    one = write(records(), tmp_path / "one.html").read_bytes()
    assert write(records(), tmp_path / "two.html").read_bytes() == one


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_every_figure_and_sorts(tmp_path: Path) -> None:
    path = write(records(), tmp_path / "report.html")
    # A click on the heading "loss", and what the page has become.
    script = """<script>
        addEventListener("load", () => {
          document.querySelectorAll("thead button")[2].click();
          const seen = [...document.querySelectorAll("svg")].map((one) => one.getBoundingClientRect());
          document.body.dataset.drawn = seen.filter((one) => one.width > 100 && one.height > 50).length;
          document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
        });
    </script></body>"""
    path.write_text(path.read_text().replace("</body>", script))
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                str(CHROMIUM),
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
                "--enable-logging=stderr",
                "--window-size=500,900",
                f"--user-data-dir={folder}",
                "--dump-dom",
                path.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert "CONSOLE" not in done.stderr
    assert 'data-drawn="5"' in done.stdout
    assert 'data-wide="false"' in done.stdout
    body = done.stdout[done.stdout.index("<tbody") :]
    # The largest loss first.
    assert body.index("fixed") < body.index("grown")


def test_results_become_records(tmp_path: Path) -> None:
    for seed, loss in enumerate((1.0, 2.0)):
        result = {
            "curve": [
                {"step": 1, "flops": 1e6, "loss": loss, "accuracy": None, "sizes": {}}
            ],
            "growths": [{"step": 1, "before": {"a": 1}, "after": {"a": 2}}],
            "training_flops": 1e6,
            "parameters": 10,
            "seconds": 1.0,
        }
        (tmp_path / f"net_seed{seed}.json").write_text(json.dumps(result))
    (tmp_path / "other.json").write_text("[]")
    (record,) = of_files([tmp_path])
    assert (record.name, record.seeds, record.final("loss")) == ("net", 2, 1.5)
    write([record], tmp_path / "report.html")
    with pytest.raises(ms.DataError, match="not the result of a run"):
        of_files([tmp_path / "other.json"])
    with pytest.raises(ms.DataError, match="there is no"):
        of_files([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ms.DataError, match="no results of runs in"):
        of_files([tmp_path / "empty"])


def test_a_grower_draws_and_reports(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    grower = ms.Grower(
        net,
        torch.optim.SGD(net.parameters(), lr=0.1),
        loss=lambda net, x: net(x).square().mean(),
        data=[x],
        when=ms.when.Every(steps=400),
        how=ms.how.Random(),
        amount=2,
    )
    assert grower.report(tmp_path / "empty.html").exists()
    for step in range(1500):
        grower.step(1.0 / (step + 1))
    grower.epoch(metric=0.5)
    record = grower.record()
    steps = [point.step for point in record.points if point.loss is not None]
    assert len(steps) <= 512
    assert steps[-1] >= 1498
    assert record.final("accuracy") == 0.5
    assert len(record.growths) == 3
    again = ms.Grower(
        net, None, loss=grower.loss, data=[x], when=grower.when, how=ms.how.Random()
    )
    again.load_state_dict(grower.state_dict())
    assert again.record().points == record.points
    grower.plot().savefig(tmp_path / "plot.png")
    text = grower.report(tmp_path / "report.html", "Mine").read_text()
    assert "<h1>Mine</h1>" in text
    assert Page(text).tags.count("svg") >= 3
