"""Pages of the site that are pages of the repository, with their links made to fit."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
PAGES = {
    "index.md": "README.md",
    "benchmarks.md": "benchmarks/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "examples.md": "examples/README.md",
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the text of a page of the repository in the place of its stub."""
    source = PAGES.get(page.file.src_uri)
    if source is None:
        return markdown
    text = (ROOT / source).read_text(encoding="utf-8")
    return _LINK.sub(lambda link: _fitted(link, Path(source).parent), text)


def _fitted(link: re.Match[str], folder: Path) -> str:
    """A link as the site needs it; its words alone where it leads out of the site."""
    mark, words, target, anchor = link.groups()
    if "://" in target:
        return link[0]
    path = os.path.normpath(folder / target)
    known = {source: page for page, source in PAGES.items()}
    known |= {"examples": "examples.md"}
    if path in known:
        path = known[path]
    elif path.startswith("docs" + os.sep):
        path = path.removeprefix("docs" + os.sep)
    else:
        return words
    return f"{mark}[{words}]({path}{anchor or ''})"
