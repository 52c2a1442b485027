"""The page of all keys, written from the models that check them.

python -m meristem.experiments.reference > docs/configuration.md
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from meristem.experiments.config import (
    BudgetTable,
    DataOptions,
    Experiment,
    Grow,
    StagesTable,
    Train,
)
from meristem.experiments.models import DEFAULTS
from meristem.experiments.suite import Suite

HEAD = """# Configuration files

Every key that a file may have, written from the models that check it. `meristem run FILE`
reads an experiment, `meristem compare FILE` a suite; a key that is not here is refused with
the nearest one that is.
"""
TABLES: dict[str, tuple[str, type[BaseModel]]] = {
    "An experiment": ("", Experiment),
    "Training": ("[train]", Train),
    "Growth": ("[grow]", Grow),
    "Growth in stages": ("[stages]", StagesTable),
    "Budget": ("[grow.budget]", BudgetTable),
    "Data": ("data = { NAME = { ... } }", DataOptions),
    "A suite": ("", Suite),
}


def page() -> str:
    """The page in Markdown."""
    parts = [HEAD]
    for title, (place, model) in TABLES.items():
        words = " ".join((model.__doc__ or "").split())
        parts.append(f"## {title}\n")
        parts.append(f"`{place}`: {words}\n" if place else f"{words}\n")
        parts.append("| key | meaning | default |\n|---|---|---|")
        parts += [_row(name, field) for name, field in model.model_fields.items()]
        parts.append("")
    parts.append("## Models\n")
    parts.append("`model = { NAME = { ... } }`; the rest is made to fit the data.\n")
    parts.append("| name | parameters and their defaults |\n|---|---|")
    for name, defaults in DEFAULTS.items():
        listed = ", ".join(
            f"`{key} = {_toml(value)}`" for key, value in defaults.items()
        )
        parts.append(f"| `{name}` | {listed} |")
    return "\n".join(parts) + "\n"


def _row(name: str, field: Any) -> str:
    default = field.default
    shown = "" if default is None else f"`{_toml(default)}`"
    if default is PydanticUndefined:
        shown = "required"
    return f"| `{name}` | {field.description} | {shown} |"


def _toml(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "{}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value)


if __name__ == "__main__":
    print(page(), end="")
