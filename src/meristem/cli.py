"""The command line: data on stdout, everything else on stderr; exit code 2 for a user's
mistake, 130 for an interrupt.
"""

from __future__ import annotations

import json
import os
import sys
import tomllib
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
except ImportError as error:
    sys.exit(
        f"error: the command needs the extra [cli] ({error.name} is missing)\nhint: "
        "pip install 'meristem-torch[cli]'"
    )

from meristem.core import VERSION
from meristem.core.errors import MeristemError
from meristem.core.example import Example

if TYPE_CHECKING:
    from meristem.experiments.run import Progress as RunProgress

app = typer.Typer(no_args_is_help=True)
_err = Console(stderr=True)


def _version(asked: bool) -> None:
    if asked:
        print(f"meristem {VERSION}, torch {metadata.version('torch')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, help="Say which this is.")
    ] = False,
) -> None:
    """Grow neural networks while they train."""


def main() -> None:
    """Run the command; a user's mistake is told in two lines, without a traceback."""
    from meristem.experiments.run import Interrupted

    try:
        app()
    except Interrupted as stopped:
        _err.print(
            f"interrupted: {stopped}\nhint: run the same command again to resume",
            markup=False,
        )
        sys.exit(130)
    except KeyboardInterrupt:
        _err.print("interrupted before training began")
        sys.exit(130)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (MeristemError, ValueError, TypeError) as error:
        _fail(str(error))


def _fail(told: str) -> NoReturn:
    message, _, hint = told.partition(" hint: ")
    lines = f"error: {message}" + (f"\nhint: {hint}" if hint else "")
    _err.print(lines, markup=False, soft_wrap=True)
    sys.exit(2)


def _check_writable(path: Path) -> None:
    """Raise now where a file cannot be written in the end."""
    new = not path.exists()
    with open(path, "ab"):
        pass
    if new:
        path.unlink()


def _advance(bars: Progress, task: Any, done: int, name: str) -> None:
    # The name of the run that has just ended.
    bars.update(task, completed=done, state=name)


def _bars() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=_err, disable=not _speaks())


def _speaks() -> bool:
    """Whether this process speaks: under torchrun one of them does."""
    return os.environ.get("RANK", "0") == "0"


def _state(progress: RunProgress) -> str:
    last = progress.curve[-1] if progress.curve else None
    score = ""
    if last is not None:
        score = f"loss {last['loss']:.3f}"
        if last["accuracy"] is not None:
            score = f"acc {last['accuracy']:.3f}"
    return f"{score} widths {'-'.join(map(str, progress.sizes.values()))} {progress.beside}"


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seed of all three runs.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the report goes.")] = Path(
        "meristem-demo.html"
    ),
    plot: Annotated[
        Path | None, typer.Option(help="A picture of the curves, too.")
    ] = None,
) -> None:
    """A GPT gets half of its blocks half-way, beside six blocks from the start and three
    that stay three. Half a minute on two cores.
    """
    from meristem.experiments import demo as demonstration
    from meristem.report import figures, write

    for path in (out, plot):
        if path is not None:
            _check_writable(path)
    with _bars() as bars:
        tasks: dict[str, Any] = {}

        def report(name: str, step: int, loss: float) -> None:
            if name not in tasks:
                total = demonstration.STEPS
                tasks[name] = bars.add_task(name, total=total, state="")
            bars.update(tasks[name], completed=step, state=f"loss {loss:.3f}")

        outcomes = demonstration.demo(report, seed)
    table = Table("net", "loss", "parameters", "training GFLOPs", "seconds")
    table.title = "a character GPT on Shakespeare, held-out text"
    for outcome in outcomes:
        r = outcome.result
        table.add_row(
            outcome.name,
            f"{r['loss']:.3f}",
            f"{r['parameters']:,}",
            f"{r['training_flops'] / 1e9:.0f}",
            f"{r['seconds']:.0f}",
        )
    Console().print(table)
    print(demonstration.verdict(outcomes))
    records = [outcome.record for outcome in outcomes]
    if plot is not None:
        figures.curves(records, "loss").savefig(plot, dpi=120)
    _err.print(f"report: {write(records, out, 'Meristem demo')}", markup=False)


@app.command()
def run(
    file: Annotated[
        Path, typer.Argument(help="A TOML file; see the guide for its keys.")
    ],
    seed: Annotated[int | None, typer.Option(help="Overrides the file's seed.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the result; `results` beside the file by default."
        ),
    ] = None,
    track: Annotated[
        str | None,
        typer.Option(
            help="A tracker of Accelerate that follows the run, as tensorboard; it writes "
            "to the folder tracking beside the result."
        ),
    ] = None,
) -> None:
    """Run one experiment, or what is left of it; the last line on stdout is the path of
    its JSON file.
    """
    from meristem.experiments.config import read
    from meristem.experiments.run import finished_before
    from meristem.experiments.run import run as run_experiment

    experiment = read(file, **({} if seed is None else {"seed": seed}))
    folder = out if out is not None else file.parent / "results"
    known = finished_before(experiment, folder, file.stem)
    if known is not None:
        _err.print(f"finished before, not run again: {known}", markup=False)
    with _bars() as bars:
        task = bars.add_task(
            f"{file.stem}, seed {experiment.seed}", total=None, state=""
        )

        def report(progress: RunProgress) -> None:
            bars.update(
                task,
                completed=progress.step,
                total=progress.steps,
                state=_state(progress),
            )

        path = run_experiment(
            experiment,
            folder,
            file.stem,
            report,
            track,
        )
    if _speaks():
        if experiment.grow is not None and not json.loads(path.read_text())["growths"]:
            _err.print("nothing has grown: [grow] was never due, or found no room")
        print(path)


@app.command()
def advise(
    file: Annotated[
        Path, typer.Argument(help="A TOML file of one planned run with [grow].")
    ],
    share: Annotated[
        float | None,
        typer.Option(
            help="What the probes cost, as a share of the run; 0.05 by default."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the probes' results; `results/advise` beside the file by default."
        ),
    ] = None,
) -> None:
    """Say whether a planned growth pays, and when, or which size to train instead; two short
    probes are run for it.
    """
    from meristem.experiments.advise import advised

    with _bars() as bars:
        tasks: dict[str, Any] = {}

        def report(probe: str, step: int, steps: int) -> None:
            if probe not in tasks:
                tasks[probe] = bars.add_task(f"probe: {probe}", total=steps, state="")
            bars.update(tasks[probe], completed=step)

        advice = advised(file, out, share, report)
    if _speaks():
        print(advice)


@app.command()
def compare(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Suites: tasks, methods, seeds; see the guide for their keys."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results, one folder a suite; `results` beside each file by default."
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            help="Runs at a time, one thread each; 1 uses all cores for one run.", min=1
        ),
    ] = 1,
) -> None:
    """Run tasks x methods x seeds and the baselines; what is finished is not run again.

    The tables go to stdout.
    """
    from meristem.experiments import suite, tables

    comparisons = [
        suite.read(file, out / file.stem if out is not None else None) for file in files
    ]
    with _bars() as bars:
        tasks = [
            bars.add_task(one.path.stem, total=one.runs(), state="")
            for one in comparisons
        ]
        for task, one in zip(tasks, comparisons, strict=True):
            one.finish(
                workers,
                partial(_advance, bars, task),
            )
    for one in comparisons:
        table = tables.markdown(one)
        (one.out / "table.md").write_text(table)
        tables.draw(one, one.out / "accuracy_over_flops.png")
        print(table, end="")
        _err.print(
            f"written: {one.out / 'table.md'}, accuracy_over_flops.png", markup=False
        )


@app.command()
def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Result files, or folders of them; seeds are averaged."),
    ],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path(
        "meristem-report.html"
    ),
    title: Annotated[str, typer.Option(help="Its heading.")] = "Meristem report",
) -> None:
    """Write one HTML page of finished runs; the last line on stdout is its path."""
    from meristem.report import of_files, write

    _check_writable(out)
    print(write(of_files(results), out, title))


@app.command()
def axes(
    model: Annotated[
        str, typer.Argument(help='A module or factory, as "package.module:name".')
    ],
    input: Annotated[
        list[str],
        typer.Option(
            help="Shape of an input, as 1,3,32,32; several in the order of the "
            "arguments, or by name: --input mask=1,16. With :int it holds token "
            "indices: 1,16:int."
        ),
    ],
    integers: Annotated[
        bool, typer.Option(help="All inputs hold token indices.")
    ] = False,
    set: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="An argument of the class or factory: hidden=64."
        ),
    ] = None,
) -> None:
    """List what can grow in a model, and why the rest cannot."""
    from meristem.experiments.models import imported_model
    from meristem.growing import find_axes

    net = imported_model(model if ":" in model else f"{model}:", _arguments(set or []))
    print(find_axes(net, _call(input, integers)))


def _arguments(texts: list[str]) -> dict[str, Any]:
    """Arguments of a class, their values as TOML has them; other words are strings."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, as hidden=64; got {text!r}")
        try:
            found[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = value
    return found


def _call(inputs: list[str], integers: bool) -> Any:
    """The arguments of a call, from their shapes."""
    import torch

    args, kwargs = [], {}
    for text in inputs:
        name, _, sizes = text.rpartition("=")
        sizes, _, dtype = sizes.partition(":")
        numbers = sizes.split(",")
        if not all(number.strip().isdigit() for number in numbers) or dtype not in (
            "",
            "int",
        ):
            raise ValueError(
                f"--input takes sizes with commas, as 1,3,32,32 or 1,16:int; got {text!r}"
            )
        shape = [int(number) for number in numbers]
        if min(shape) < 1:
            raise ValueError(f"--input takes sizes in [1, inf); got {text!r}")
        whole = integers or dtype == "int"
        tensor = torch.zeros(shape, dtype=torch.long) if whole else torch.randn(shape)
        if name:
            kwargs[name] = tensor
        else:
            args.append(tensor)
    return Example(tuple(args), kwargs)


@app.command()
def expand(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A directory that transformers' save_pretrained wrote."),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="What grows in every layer: depth=+4,mlp=x1.5,heads=+2,kv_heads=+1,"
            "width=x1.25,vocabulary=+128,classes=+3."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The directory to write; it must not exist.")
    ] = None,
    how: Annotated[
        str | None,
        typer.Option(help="A method, or several with commas; see `meristem methods`."),
    ] = None,
    at: Annotated[
        str,
        typer.Option(
            help="Where new blocks stand: even, middle, end, or how many of the present "
            "blocks stand before each: 8,16,24."
        ),
    ] = "even",
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what would change.")
    ] = False,
) -> None:
    """Write a larger copy of a pretrained model that computes the same; the last line on
    stdout is its directory.
    """
    from meristem.experiments.config import built
    from meristem.how import METHODS
    from meristem.integrations.checkpoints import expand_checkpoint, plan_checkpoint

    chosen = [built(name, METHODS, "how") for name in how.split(",")] if how else None
    numbers = at.split(",")
    places: Any = at
    if all(number.strip().isdigit() for number in numbers):
        places = [int(number) for number in numbers]
    if plan:
        print(plan_checkpoint(checkpoint, to, chosen, places))
        return
    if out is None:
        raise ValueError(
            "expand writes a directory. hint: name it with --out, or ask for --plan"
        )
    done = expand_checkpoint(checkpoint, to, out, chosen, places, _err.print)
    _err.print(f"largest change of an output: {done.change:.1e} of the largest")
    print(done.out)


@app.command()
def methods() -> None:
    """List the methods, choices, triggers and cares with their parameters, as a
    configuration file names them.
    """
    from dataclasses import MISSING, Field, fields

    from meristem.care import CARES
    from meristem.how import METHODS
    from meristem.when import TRIGGERS
    from meristem.where import PLACES

    def said(field: Field[Any]) -> str:
        return (
            field.name
            if field.default is MISSING
            else f"{field.name}={field.default!r}"
        )

    table = Table("role", "name", "what it does", "parameters", box=None)
    roles = {"how": METHODS, "where": PLACES, "when": TRIGGERS, "care": CARES}
    for role, known in roles.items():
        for name, kind in known.items():
            first = (kind.__doc__ or "").partition("\n\n")[0]
            sentence = " ".join(first.split())
            parameters = ", ".join(map(said, fields(kind)))
            table.add_row(role, name, sentence, parameters or "-")
    Console().print(table)


if __name__ == "__main__":
    main()
