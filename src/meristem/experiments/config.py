"""What a TOML file may say, checked before anything runs: errors name the key and the
nearest valid one.
"""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from meristem.care import CARES
from meristem.core.errors import MeristemError, nearest
from meristem.event.amounts import Amount, check_amount, is_fraction
from meristem.how import METHODS
from meristem.methods import When, check_part
from meristem.when import TRIGGERS, At, Every, moment
from meristem.where import PLACES


class ConfigError(MeristemError, ValueError):
    """A configuration file asks for something that does not exist."""


Choice = str | dict[str, dict[str, Any]]
"""A name, or {name = {parameter = value}}."""

OPTIMIZERS = ("sgd", "adam", "adamw", "muon")
SCHEDULES = ("constant", "cosine", "wsd")
MODELS = ("mlp", "convnet", "vgg", "resnet", "gpt")


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True
    )


def imported(name: str) -> Any:
    """What "package.module:attribute" names.

    The current folder counts as a place to import from.
    """
    module_name, _, attribute = name.partition(":")
    if module_name.endswith(".py"):
        bare = module_name.removesuffix(".py").replace("/", ".")
        raise ConfigError(f"{name!r} is a file. hint: {bare}:{attribute}")
    # As python -m does: a module beside the file is found.
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{module_name!r} cannot be imported: {error}") from None
    if not hasattr(module, attribute):
        close = nearest(attribute, dir(module))
        raise ConfigError(f"module {module_name!r} has no {attribute!r}.{close}")
    return getattr(module, attribute)


def named(
    choice: Choice, known: Mapping[str, Any] | tuple[str, ...], key: str
) -> tuple[str, dict[str, Any]]:
    """The name and parameters of a choice; raises where the name is unknown."""
    if isinstance(choice, dict) and len(choice) != 1:
        raise ValueError(f"{key} takes one name; got {', '.join(choice) or 'none'}")
    name, parameters = (
        (choice, {}) if isinstance(choice, str) else next(iter(choice.items()))
    )
    if name not in known:
        raise ValueError(
            f"{key} = {name!r} is not known.{nearest(name, known)} Known: "
            f"{', '.join(known)}"
        )
    return name, dict(parameters)


def built(choice: Choice, known: Mapping[str, Any], key: str) -> Any:
    """The object that a choice names, made with its parameters.

    A name is one of the registry, or "package.module:Class" from anywhere. "none"
    stands for None, which TOML does not have.
    """
    name = choice if isinstance(choice, str) else next(iter(choice), "")
    if ":" in name:
        kind = imported(name)
        given = {} if isinstance(choice, str) else dict(choice[name])
    else:
        name, given = named(choice, known, key)
        kind = known[name]
    valid = [field.name for field in fields(kind)] if is_dataclass(kind) else []
    parameters = {}
    for parameter, value in given.items():
        if parameter not in valid:
            listed = ", ".join(valid) or "none"
            raise ValueError(
                f"{key}.{name} has no parameter {parameter!r}."
                f"{nearest(parameter, valid)} Known: {listed}"
            )
        parameters[parameter] = None if value == "none" else value
    part = kind(**parameters)
    try:
        check_part(key, part, known)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return part


def trigger(choice: Mapping[str, Any], steps: int | None = None) -> When:
    """A trigger from { every = "2 epochs" }, { at = ["4 epochs", "6 epochs"] }, { at =
    0.5 }, a fraction of training, or a table of its parameters: { plateau = { patience
    = 3 } }.

    Without the `steps` of the whole run a fraction is only checked.
    """
    name, value = next(iter(choice.items()), ("", None))
    if ":" in name:
        own: When = built({name: dict(value or {})}, TRIGGERS, "when")
        return own
    if name not in TRIGGERS or len(choice) != 1:
        raise ValueError(
            f"when = {dict(choice)} is not known.{nearest(name, TRIGGERS)} Known: "
            f"{', '.join(TRIGGERS)}"
        )
    if name not in ("every", "at") or isinstance(value, Mapping):
        try:
            found: When = built({name: dict(value or {})}, TRIGGERS, "when")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"when.{name} = {value!r}: {error}. hint: its parameters are a table, "
                f"as {{ senn = {{ budget = 0.05 }} }}"
            ) from None
        return found
    listed: list[Any] = value if isinstance(value, list) else [value]
    if name == "at" and listed and all(isinstance(one, float) for one in listed):
        return At(steps=tuple(moment(one, steps or 10**9) for one in listed))
    return At(listed) if name == "at" else Every(value)


class Train(_Strict):
    """How to train, for so many epochs, steps, or floating-point operations."""

    epochs: int | None = Field(None, ge=1)
    """Passes over the training data; one of epochs, steps and flops is said."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps."""
    flops: float | None = Field(None, gt=0)
    """Floating-point operations of training."""
    batch_size: int = Field(128, ge=1)
    """Examples per step, over all processes."""
    optimizer: Choice = "adamw"
    """sgd, adam, adamw, or muon beside adamw, with parameters: { sgd = { lr = 0.1 } }."""
    schedule: Choice = "constant"
    """constant, cosine or wsd; `warmup` and, of wsd, `decay` are fractions of training."""
    clip: float | None = Field(None, gt=0)
    """The largest norm of a gradient."""
    evaluate: int | None = Field(None, ge=1)
    """Steps between two points of the curve; an epoch where nothing is said."""
    precision: Literal["no", "bf16"] = "no"
    """bf16 trains under autocast."""

    @field_validator("optimizer")
    @classmethod
    def _optimizer(cls, value: Choice) -> Choice:
        named(value, OPTIMIZERS, "optimizer")
        return value

    @field_validator("schedule")
    @classmethod
    def _schedule(cls, value: Choice) -> Choice:
        name, parameters = named(value, SCHEDULES, "schedule")
        valid = {
            "constant": ["warmup"],
            "cosine": ["warmup"],
            "wsd": ["warmup", "decay"],
        }[name]
        for key, part in parameters.items():
            if key not in valid:
                raise ValueError(
                    f"schedule.{name} has no parameter {key!r}.{nearest(key, valid)}"
                )
            if not 0 <= part < 1:
                raise ValueError(
                    f"schedule.{name}.{key} is a fraction of training in [0, 1); got "
                    f"{part}"
                )
        return value


class BudgetTable(_Strict):
    """Upper limits."""

    parameters: int | None = Field(None, ge=1)
    """Of the whole model."""
    flops: int | None = Field(None, ge=1)
    """Of one forward pass, per example."""
    units: int | None = Field(None, ge=1)
    """Sum of all widths."""
    growths: int | None = Field(None, ge=1)
    """Number of growths."""
    sizes: dict[str, int] = {}
    """Largest size by axis, or by a word of all layers (mlp = 64)."""


def _part(value: Choice | list[Choice], info: ValidationInfo) -> Choice | list[Choice]:
    known: dict[str, Mapping[str, Any]] = {"how": METHODS, "where": PLACES}
    key = str(info.field_name)
    for one in value if isinstance(value, list) else [value]:
        if one is not None:
            built(one, known[key], key)
    return value


class Grow(_Strict):
    """When, where and how to grow."""

    when: dict[str, Any]
    """{ every = "2 epochs" }, { at = ["4 epochs"] }, { at = 0.5 }, or a table of parameters."""
    how: Choice | list[Choice] = "random"
    """The method, or several for several kinds of axes; `meristem methods` lists them."""
    where: Choice | None = None
    """Which axis gets how many units; proportional where amount is a fraction, else uniform."""
    care: list[Choice] = ["warm_moments", "fresh_statistics"]
    """What optimizer and old weights get."""
    amount: int | float | list[int | float] | dict[str, int] = 32
    """Units over all axes, a fraction of the present widths, a list, or { axis = units }."""
    budget: BudgetTable = BudgetTable()
    """Upper limits."""
    axes: str | list[str] = "*"
    """Names, patterns or words of the axes that may grow; a leading "!" excludes."""
    round_to: int = Field(1, ge=1)
    """Grown sizes are multiples of this."""

    @model_validator(mode="after")
    def _where(self) -> Grow:
        # Written out, so that results say what was done.
        if self.where is None:
            fraction = is_fraction(self.amount)
            name = "proportional" if fraction else "uniform"
            object.__setattr__(self, "where", name)
        return self

    @field_validator("when", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        # A trigger of one's own may have nothing to set.
        return {value: {}} if isinstance(value, str) and ":" in value else value

    @field_validator("when")
    @classmethod
    def _when(cls, value: dict[str, Any]) -> dict[str, Any]:
        trigger(value)
        return value

    _part = field_validator("how", "where")(_part)

    @field_validator("amount")
    @classmethod
    def _amount(cls, value: Amount) -> Amount:
        check_amount(value)
        return value

    @field_validator("care")
    @classmethod
    def _care(cls, value: list[Choice]) -> list[Choice]:
        for one in value:
            built(one, CARES, "care")
        return value


class StagesTable(_Strict):
    """Train to early stop, expand, train on with a fresh optimizer: one stage more than
    there are amounts.
    """

    amount: list[int | float]
    """Units over all axes, or fractions of the present widths, one entry per growth."""
    how: Choice = "swe"
    """The method."""
    where: Choice = "svod"
    """Which axis gets how many units."""
    epochs: int = Field(250, ge=1)
    """Most epochs of a stage."""
    patience: int = Field(20, ge=1)
    """Epochs without a better validation loss that end a stage."""
    last_patience: int | None = Field(None, ge=1)
    """The same for the last stage."""
    adjust_batch_size: int = Field(100, ge=1)
    """Of the batches, not shuffled, that votes and adjustment read."""
    budget: BudgetTable = BudgetTable()
    """Upper limits."""
    axes: str | list[str] = "*"
    """Names, patterns or words of the axes that may grow."""

    _part = field_validator("how", "where")(_part)


class DataOptions(_Strict):
    """What may be said of a data set: { digits = { examples = 500 } }."""

    examples: int | None = Field(None, ge=1)
    """Train on so many examples, chosen at random once and for all."""
    validation: float = Field(0.0, ge=0, lt=1)
    """The fraction of the training data to hold out, in every class alike."""
    augment: bool = False
    """Crop and mirror training images at random."""
    mean: list[float] | None = None
    """What images are normalised by, per channel; their own where nothing is said."""
    std: list[float] | None = None
    """See mean."""
    test: int | None = Field(None, ge=1)
    """Score on so many of the test examples."""
    context: int | None = Field(None, ge=1)
    """Characters per example of a text, 64 where nothing is said."""


class Experiment(_Strict):
    """One training run."""

    model: Choice
    """mlp, convnet, vgg, resnet or gpt with its parameters, or "package.module:factory"."""
    data: Choice
    """digits, shakespeare, mnist, fashion_mnist, cifar10, cifar100, text/NAME or tabular/NAME."""
    seed: int = 0
    """Of weights, order of the data, and growth."""
    sizes: dict[str, int] = {}
    """Sizes of axes that the net starts with, freshly drawn, where they are not the model's."""
    train: Train
    """How to train."""
    grow: Grow | None = None
    """When, where and how to grow; a net that does not grow has none."""
    stages: StagesTable | None = None
    """Growth between stages that stop early, in the place of [grow]."""

    @property
    def data_options(self) -> tuple[str, DataOptions]:
        """Name and options of the data set."""
        name, options = (
            (self.data, {})
            if isinstance(self.data, str)
            else next(iter(self.data.items()))
        )
        return name, DataOptions.model_validate(options)

    @field_validator("data")
    @classmethod
    def _data(cls, value: Choice) -> Choice:
        if isinstance(value, dict):
            if len(value) != 1:
                raise ValueError(
                    f"data takes one name; got {', '.join(value) or 'none'}"
                )
            for options in value.values():
                try:
                    DataOptions.model_validate(options)
                except ValidationError as error:
                    raise ValueError("; ".join(readable(error, DataOptions))) from None
        return value

    @field_validator("model")
    @classmethod
    def _model(cls, value: Choice) -> Choice:
        name = value if isinstance(value, str) else next(iter(value), "")
        if ":" not in name:
            named(value, MODELS, "model")
        return value


def toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file.

    Raises:
        ConfigError: There is no such file, or it is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def read(path: Path, **overrides: Any) -> Experiment:
    """The experiment in a TOML file, with top-level keys overridden.

    Raises:
        ConfigError: The file is missing, is no TOML, or says something unknown; the
            message names the key.
    """
    table = toml(path)
    if "methods" in table and "tasks" in table:
        raise ConfigError(f"{path} is a suite. hint: meristem compare {path}")
    return checked(table | overrides, str(path))


def checked(table: Mapping[str, Any], source: str = "the configuration") -> Experiment:
    """The experiment that a table describes."""
    try:
        experiment = Experiment.model_validate(table)
    except ValidationError as error:
        told = readable(error, Experiment)
        raise ConfigError("\n".join(f"{source}: {line}" for line in told)) from None
    train = experiment.train
    # Two ways to say how long would contradict each other.
    lengths = [train.epochs, train.steps, train.flops, experiment.stages]
    if sum(length is not None for length in lengths) != 1:
        raise ConfigError(
            f"{source}: [train] takes one of epochs, steps and flops, to say how long "
            "to train, or [stages] does"
        )
    if experiment.stages is not None:
        if experiment.grow is not None:
            raise ConfigError(
                f"{source}: [grow] and [stages] are two ways to grow; choose one"
            )
        if not experiment.data_options[1].validation:
            raise ConfigError(
                f"{source}: [stages] stop early on held-out data. hint: data = "
                f"{{ name = {{ validation = 0.2 }} }}"
            )
        if named(experiment.train.optimizer, OPTIMIZERS, "optimizer")[0] == "muon":
            raise ConfigError(
                f"{source}: [stages] make one fresh optimizer each, and muon is two. hint: "
                'train.optimizer = "adamw"'
            )
        if experiment.train.schedule != "constant":
            raise ConfigError(
                f"{source}: [stages] end by early stopping, so train.schedule can only "
                "be 'constant'"
            )
    return experiment


# What a value can be, by the beginning of pydantic's name for the error.
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "list": "a list",
    "dict": "a table",
    "model": "a table",
    "string": "text",
    "bool": "true or false",
}
# Where pydantic names the alternatives that it tried, and not a key.
_TRIED = re.compile(r"(int|float|str|bool|(list|dict)\[.*|function-.*)$")


def readable(error: ValidationError, table: type[BaseModel]) -> list[str]:
    """One sentence for every key of a table that is wrong."""
    by_key: dict[str, list[Any]] = {}
    for problem in error.errors():
        path = [part for part in map(str, problem["loc"]) if not _TRIED.match(part)]
        by_key.setdefault(".".join(path), []).append(problem)
    told = []
    for key, listed in by_key.items():
        # What lies inside of a wrong value was tried in vain.
        if key.rpartition(".")[0] not in by_key:
            told.append(_sentence(key, listed, table))
    return told


def _sentence(key: str, problems: Sequence[Any], table: type[BaseModel]) -> str:
    first = problems[0]
    if first["type"] == "extra_forbidden":
        return _unknown(key, table)
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    words = {_WORDS.get(one["type"].partition("_")[0]): None for one in problems}
    got = f"got {first['input']!r}"
    if None not in words and all(one["input"] == first["input"] for one in problems):
        return f"{key} must be {' or '.join(map(str, words))}; {got}"
    said = [one["msg"] for one in problems if one["type"] == "value_error"]
    if said:
        return f"{key}: {said[0].removeprefix('Value error, ')}"
    return f"{key}: {first['msg'].replace('Input should', 'it should')}; {got}"


def _unknown(key: str, table: type[BaseModel]) -> str:
    tables: dict[str, type[BaseModel]] = {
        "train": Train,
        "grow": Grow,
        "stages": StagesTable,
        "budget": BudgetTable,
    }
    *above, last = key.split(".")
    for part in above:
        table = tables.get(part, table)
    valid = list(table.model_fields)
    return f"unknown key {key!r}.{nearest(last, valid)} Known here: {', '.join(valid)}"
