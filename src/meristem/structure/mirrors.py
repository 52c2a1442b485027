"""Numbers that mirror a size and stand outside of the traced forward: a config, z_dim,
num_classes, the rank in an adapter's table.

They follow where one reading alone is possible: the name speaks of such a size, and
within the modules that hold the number everything of that size changes alike. Where the
name fits and some of it stays, the number is told of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from meristem.core.change import AttributeChange, Plan
from meristem.structure.discover import Structure
from meristem.structure.labels import Label, atoms, size
from meristem.structure.twin import table_of

_COUNTS_HEADS = re.compile(r"(^|_)n?_?heads?$|groups?$|(^|_)n_head", re.IGNORECASE)
_PER_KEY = re.compile(r"groups?$|n_rep", re.IGNORECASE)
_OF_KEYS = re.compile(r"kv|key_value", re.IGNORECASE)
_COUNTS_ENDS = re.compile(
    r"vocab|classes|labels|(^|_)n?cls$|num_embeddings|n_tokens", re.IGNORECASE
)
_COUNTS_UNITS = re.compile(
    r"(^|_)(d|dims?|sizes?|widths?|channels?|chans?|features?|planes|hidden|inner|"
    r"intermediate|embd?|embeds?|embedding|ffn?|mlp|latent|z|nz|units|rank|r|in|out|"
    r"inputs?|outputs?|model|nf|ndf|ngf|ch)(_|$)",
    re.IGNORECASE,
)
# Which of these may speak of what the model gives.
_OUTER = re.compile(r"(^|_)(out|outputs?|features?|dims?)(_|$)", re.IGNORECASE)
# Numbers of other things that such words go with.
_OTHERS = re.compile(
    r"layer|depth|block|kernel|stride|pad|patch|image|img|window|length|position|"
    r"context|head|step|epoch|batch|seed|token_id|_id$|_idx$|dropout|dilation",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class _Held:
    """A number that a module holds, itself or in a plain object or table."""

    module: str
    attribute: str
    value: int
    in_object: bool = False

    @property
    def name(self) -> str:
        """The word that says what it is: the key of a table is a name of ours."""
        first, _, rest = self.attribute.partition(".")
        return rest.rpartition(".")[2] if self.in_object else first


def mirrors(
    structure: Structure, plan: Plan, done: Sequence[AttributeChange]
) -> tuple[list[AttributeChange], list[str]]:
    """The numbers that follow a sized plan beside those `done`, and those that hold the
    old size.

    Returns:
        Changes; and sentences about the others.
    """
    taken = {(edit.module, edit.attribute) for edit in done}
    follow, stale = [], []
    numbering: set[Label] = set()
    for label in structure.trace.heads:
        numbering.update(atoms(label))
    for held in _numbers(structure.model):
        if (held.module, held.attribute) in taken:
            continue
        labels = _meant(structure, held, numbering)
        news = {size(label, plan.changes) for label in labels}
        if not news or news == {held.value}:
            continue
        if len(news) == 1:
            (new,) = news
            edit = AttributeChange(held.module, held.attribute, held.value, new)
            follow.append(edit)
        else:
            stale.append(told(held.module, held.attribute, held.value))
    return follow, stale


def told(module: str, attribute: str, value: int) -> str:
    """What is said of a number that does not follow."""
    where = f"{module}.{attribute}".lstrip(".")
    return f"{where} holds the old size: {value}"


def _numbers(model: nn.Module) -> Iterator[_Held]:
    """Ints beside the model's tensors, an object under the first module that holds it."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        # The numbers of torch's own layers follow from the shapes of their weights; a
        # cell has one that its forward does not read.
        is_torchs = type(module).__module__.startswith("torch.nn.modules")
        if is_torchs and not isinstance(module, nn.RNNCellBase):
            continue
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or isinstance(value, (nn.Module, Tensor)):
                continue
            if type(value) is int:
                yield _Held(name, attribute, value)
            elif id(value) not in seen:
                seen.add(id(value))
                in_object = not isinstance(value, dict)
                yield from _entries(name, attribute, table_of(value), in_object)
                if not isinstance(value, dict):
                    continue
                # A table of objects: the configs of several adapters.
                for key, inner in table_of(value).items():
                    path = f"{attribute}.{key}"
                    if not isinstance(inner, dict) and "." not in key:
                        yield from _entries(name, path, table_of(inner), True)


def _entries(
    module: str, attribute: str, table: Mapping[str, Any], in_object: bool
) -> Iterator[_Held]:
    for key, value in table.items():
        plain = "." not in key and not key.startswith("_")
        if plain and type(value) is int:
            yield _Held(module, f"{attribute}.{key}", value, in_object)


def _meant(structure: Structure, held: _Held, numbering: set[Label]) -> list[Label]:
    """The labels that a number may mirror: of its size and its kind, within the module
    that holds it. None where its name speaks of something else.

    `numbering` are the atoms that number heads.
    """
    heads = bool(_COUNTS_HEADS.search(held.name))
    ends = bool(_COUNTS_ENDS.search(held.name))
    units = bool(_COUNTS_UNITS.search(held.name))
    outer = bool(_OUTER.search(held.name))
    if not heads and not ends and (not units or _OTHERS.search(held.name)):
        return []
    prefix = f"{held.module}." if held.module else ""
    # What a norm runs over may be given as well, and is still more than an end.
    streams: set[Label] = set()
    for norms in structure.norms.values():
        for norm in norms:
            streams.update(atoms(norm.label))
    found: dict[Label, None] = {}
    # Of units the stream comes before heads x width, which may be as large.
    inside: dict[Label, None] = {}
    for name, labels in structure.labels.items():
        if not name.startswith(prefix):
            continue
        for label in labels:
            for part in _parts(label):
                of_heads = all(atom in numbering for atom in atoms(part))
                if heads and of_heads and not _right_heads(structure, held, part):
                    continue
                of_ends = any(
                    _is_end(atom) and atom not in streams for atom in atoms(part)
                )
                fits = not of_heads and (outer or not of_ends)
                if heads or ends:
                    fits = of_heads if heads else of_ends
                if part.size != held.value or part.size == 1 or not fits:
                    continue
                mixed = not of_heads and any(a in numbering for a in atoms(part))
                (inside if mixed else found)[part] = None
    return list(found or inside)


def _is_end(atom: Label) -> bool:
    return atom.end not in (None, "input")


def _right_heads(structure: Structure, held: _Held, part: Label) -> bool:
    """Whether heads are the ones that a name speaks of: those of keys and values, the
    queries that share one of these, or all queries.
    """
    keys = structure.trace.key_heads
    of_keys = [any(atom in atoms(key) for key in keys) for atom in atoms(part)]
    if _PER_KEY.search(held.name):
        return not any(of_keys)
    if _OF_KEYS.search(held.name):
        return all(of_keys)
    return any(of_keys) or not keys


def _parts(label: Label) -> Iterator[Label]:
    """A label, what it is made of, and the runs of factors in it: groups x queries."""
    root = label.root
    yield root
    for part in root.parts:
        yield from _parts(part)
    if root.is_product:
        count = len(root.parts)
        for start in range(count):
            for end in range(start + 2, count + 1):
                if end - start < count:
                    run = Label(1)
                    run.composition, run.parts = "product", root.parts[start:end]
                    run.size = 1
                    for part in run.parts:
                        run.size *= part.root.size
                    yield run
