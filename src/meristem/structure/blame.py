"""What the line of code that failed names: the numbers that it reads are tried first."""

from __future__ import annotations

import itertools
import linecache
import re
from types import CodeType, TracebackType

from meristem.structure.tracer import is_models

_NAME = re.compile(r"[A-Za-z_]\w*")


def names_in_line(error: BaseException) -> frozenset[str]:
    """The names in the expression of the model's own code, the innermost one, in which
    an error was raised; empty where its source is not at hand.
    """
    found: TracebackType | None = None
    step = error.__traceback__
    while step is not None:
        if is_models(step.tb_frame.f_code.co_filename):
            found = step
        step = step.tb_next
    if found is None:
        return frozenset()
    return frozenset(_NAME.findall(_expression(found.tb_frame.f_code, found.tb_lasti)))


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
