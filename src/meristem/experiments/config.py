"""What a TOML file may say, checked before anything runs: errors name the key and the nearest valid one."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from meristem.care import CARES
from meristem.errors import MeristemError, nearest
from meristem.how import METHODS
from meristem.when import TRIGGERS, At, Every
from meristem.where import PLACES


class ConfigError(MeristemError, ValueError):
    """A configuration file asks for something that does not exist."""


Choice = str | dict[str, dict[str, Any]]
"""A name, or {name = {parameter = value}}."""

OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "cosine", "wsd")
MODELS = ("mlp", "convnet", "gpt")
_DURATION = re.compile(r"\s*(\d+)\s*(steps?|epochs?)\s*")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def named(choice: Choice, known: Mapping[str, Any] | tuple[str, ...], key: str) -> tuple[str, dict[str, Any]]:
    """The name and parameters of a choice; raises where the name is unknown."""
    name, parameters = (choice, {}) if isinstance(choice, str) else next(iter(choice.items()))
    if isinstance(choice, dict) and len(choice) != 1:
        raise ValueError(f"{key} takes one name; got {', '.join(choice)}")
    if name not in known:
        raise ValueError(f"{key} = {name!r} is not known.{nearest(name, known)} Known: {', '.join(known)}")
    return name, dict(parameters)


def built(choice: Choice, known: Mapping[str, Any], key: str) -> Any:
    """The object that a choice names, made with its parameters."""
    name, parameters = named(choice, known, key)
    kind = known[name]
    valid = [f.name for f in fields(kind)] if is_dataclass(kind) else []
    for parameter in parameters:
        if parameter not in valid:
            raise ValueError(
                f"{key}.{name} has no parameter {parameter!r}.{nearest(parameter, valid)} Known: {', '.join(valid) or 'none'}"
            )
    return kind(**parameters)


def trigger(choice: Mapping[str, Any]) -> Every | At:
    """A trigger from { every = "2 epochs" } or { at = ["4 epochs", "6 epochs"] }."""
    name, value = next(iter(choice.items()))
    if name not in TRIGGERS or len(choice) != 1:
        raise ValueError(f"when = {dict(choice)} is not known.{nearest(name, TRIGGERS)} Known: {', '.join(TRIGGERS)}")
    moments = [duration(text) for text in (value if isinstance(value, list) else [value])]
    units = {unit for _, unit in moments}
    if len(units) != 1:
        raise ValueError(f"when.{name} mixes steps and epochs: {value}")
    numbers = tuple(number for number, _ in moments)
    if name == "at":
        return At(**{units.pop(): numbers})
    if len(numbers) != 1:
        raise ValueError(f"when.every takes one duration; got {value}")
    return Every(**{units.pop(): numbers[0]})


def duration(text: Any) -> tuple[int, Literal["steps", "epochs"]]:
    """The number and unit of "500 steps" or "2 epochs"."""
    match = _DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f'a duration carries its unit, as in "500 steps" or "2 epochs"; got {text!r}')
    return int(match[1]), "steps" if match[2].startswith("step") else "epochs"


class Train(_Strict):
    """How to train."""

    epochs: int | None = Field(None, ge=1)
    flops: float | None = Field(None, gt=0)
    batch_size: int = Field(128, ge=1)
    optimizer: Choice = "adamw"
    schedule: Choice = "constant"
    precision: Literal["no", "bf16"] = "no"

    @field_validator("optimizer")
    @classmethod
    def _optimizer(cls, value: Choice) -> Choice:
        named(value, OPTIMIZERS, "optimizer")
        return value

    @field_validator("schedule")
    @classmethod
    def _schedule(cls, value: Choice) -> Choice:
        name, parameters = named(value, SCHEDULES, "schedule")
        valid = {"constant": ["warmup"], "cosine": ["warmup"], "wsd": ["warmup", "decay"]}[name]
        for key, part in parameters.items():
            if key not in valid:
                raise ValueError(f"schedule.{name} has no parameter {key!r}.{nearest(key, valid)}")
            if not 0 <= part < 1:
                raise ValueError(f"schedule.{name}.{key} is a fraction of training in [0, 1); got {part}")
        return value


class BudgetTable(_Strict):
    """Upper limits."""

    parameters: int | None = Field(None, ge=1)
    flops: int | None = Field(None, ge=1)
    units: int | None = Field(None, ge=1)
    growths: int | None = Field(None, ge=1)
    sizes: dict[str, int] = {}


class Grow(_Strict):
    """When, where and how to grow."""

    when: dict[str, Any]
    how: Choice = "random"
    where: Choice = "uniform"
    care: list[Choice] = ["warm_moments"]
    amount: int | float | list[int | float] | dict[str, int] = 32
    budget: BudgetTable = BudgetTable()
    axes: str | list[str] = "*"
    round_to: int = Field(1, ge=1)

    @field_validator("when")
    @classmethod
    def _when(cls, value: dict[str, Any]) -> dict[str, Any]:
        trigger(value)
        return value

    @field_validator("how", "where")
    @classmethod
    def _part(cls, value: Choice, info: ValidationInfo) -> Choice:
        known: dict[str, Mapping[str, Any]] = {"how": METHODS, "where": PLACES}
        key = str(info.field_name)
        built(value, known[key], key)
        return value

    @field_validator("care")
    @classmethod
    def _care(cls, value: list[Choice]) -> list[Choice]:
        for one in value:
            built(one, CARES, "care")
        return value


class Experiment(_Strict):
    """One training run."""

    model: Choice
    data: str
    seed: int = 0
    train: Train
    grow: Grow | None = None

    @field_validator("model")
    @classmethod
    def _model(cls, value: Choice) -> Choice:
        name = value if isinstance(value, str) else next(iter(value))
        if ":" not in name:
            named(value, MODELS, "model")
        return value


def read(path: Path, **overrides: Any) -> Experiment:
    """The experiment in a TOML file, with top-level keys overridden.

    Raises:
        ConfigError: The file is missing, is no TOML, or says something unknown; the message names the key.
    """
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    return checked(table | overrides, str(path))


def checked(table: Mapping[str, Any], source: str = "the configuration") -> Experiment:
    """The experiment that a table describes."""
    try:
        experiment = Experiment.model_validate(table)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{source}: {_readable(problem)}" for problem in error.errors())) from None
    if (experiment.train.epochs is None) == (experiment.train.flops is None):
        raise ConfigError(f"{source}: [train] takes either epochs or flops, to say how long to train")
    return experiment


def _readable(problem: Any) -> str:
    location = [str(part) for part in problem["loc"] if not str(part).startswith(("dict[", "function-"))]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        tables: dict[str, type[BaseModel]] = {"train": Train, "grow": Grow, "budget": BudgetTable}
        table: type[BaseModel] = Experiment
        for part in location[:-1]:
            table = tables.get(part, table)
        valid = list(table.model_fields)
        return f"unknown key {key!r}.{nearest(location[-1], valid)} Known here: {', '.join(valid)}"
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    return f"{key}: {problem['msg'].removeprefix('Value error, ')}"
