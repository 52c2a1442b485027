"""One file per finished run, and the table of all of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def kept(path: Path, make: Callable[[], Result]) -> Result:
    """The result in a file, which is made where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make(), indent=1) + "\n")
        print(path, file=sys.stderr)
    found: Result = json.loads(path.read_text())
    return found


def tell(out: Path, text: str) -> None:
    """Print a table, and put it beside its results."""
    (out / "table.md").write_text(text + "\n")
    print(text)
