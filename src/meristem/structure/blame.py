"""What the line of code that failed names: the numbers that it reads are tried first."""

from __future__ import annotations

import itertools
import linecache
import re
from dataclasses import dataclass
from types import CodeType, TracebackType

from meristem.structure.tracer import is_models

_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Line:
    """A line of a model's own code.

    Attributes:
        place: As "model.py:12"; "" where none is known.
        names: The names in the expression that failed; none where its source is not at
            hand.
    """

    place: str = ""
    names: frozenset[str] = frozenset()


def failing_line(error: BaseException) -> Line:
    """The innermost line of the model's own code that an error went through."""
    found: TracebackType | None = None
    step = error.__traceback__
    while step is not None:
        if is_models(step.tb_frame.f_code.co_filename):
            found = step
        step = step.tb_next
    if found is None:
        return Line()
    code = found.tb_frame.f_code
    file = code.co_filename.rpartition("/")[2]
    names = _NAME.findall(_expression(code, found.tb_lasti))
    return Line(f"{file}:{found.tb_lineno}", frozenset(names))


def _expression(code: CodeType, instruction: int) -> str:
    """The source of the expression that an instruction belongs to."""
    positions = itertools.islice(code.co_positions(), instruction // 2, None)
    first, last, start, end = next(positions)
    if first is None or last is None:
        return ""
    lines = linecache.getlines(code.co_filename)[first - 1 : last]
    if lines and end is not None and start is not None:
        # Columns count bytes.
        lines[-1] = lines[-1].encode()[:end].decode(errors="ignore")
        lines[0] = lines[0].encode()[start:].decode(errors="ignore")
    return " ".join(lines)
