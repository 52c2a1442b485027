"""The shape of the house: imports go down, the core stays lean, registries are complete."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import meristem

SRC = Path(meristem.__file__).parent
LEVELS = [
    ["activations", "core", "report"],
    ["structure"],
    ["surgery"],
    ["lab"],
    ["statistics", "methods"],
    ["how", "where", "when", "care"],
    ["event"],
    ["growing", "pruning"],
    ["grower", "pretrained"],
    ["stages", "checkpoint"],
    ["integrations", "recipes", "sklearn", "testing"],
    ["experiments"],
    ["cli", "advice"],
]
ORDER = {name: level for level, names in enumerate(LEVELS) for name in names}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] == "meristem"
        ):
            parts = (node.module or "").split(".")
            found |= (
                {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
            )
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("meristem.")
            }
    return found & ORDER.keys()


def test_imports_go_downwards() -> None:
    for path in SRC.rglob("*.py"):
        part = path.relative_to(SRC).parts[0].removesuffix(".py")
        if part not in ("__init__", "__main__"):
            assert part in ORDER, f"{part} has no level"
            higher = {name for name in imports(path) if ORDER[name] > ORDER[part]}
            assert not higher, f"{path.relative_to(SRC)} imports {higher} from above"


def test_the_map_in_the_docs_is_the_one_that_is_held() -> None:
    page = (SRC.parents[1] / "docs/concepts.md").read_text()
    drawn = page.split("a test holds it.\n\n```\n")[1].split("```")[0]
    lines = [set(line.split()) for line in drawn.splitlines()]
    assert lines == [set(names) for names in reversed(LEVELS)]


def test_only_surgery_swaps_tensors() -> None:
    writers = {
        p.relative_to(SRC).as_posix()
        for p in SRC.rglob("*.py")
        if "swap_tensors(" in p.read_text()
    }
    assert writers == {"surgery/swap.py"}


def test_only_surgery_opens_a_model() -> None:
    openers = {
        p.relative_to(SRC).as_posix()
        for p in SRC.rglob("*.py")
        if "with opened(" in p.read_text()
    }
    assert openers == {"surgery/exchange.py", "surgery/lineage.py"}


def test_importing_the_core_imports_no_extra_and_touches_no_device() -> None:
    code = (
        "import sys, torch, meristem; "
        "bad = {'typer', 'rich', 'pydantic', 'accelerate', 'matplotlib', 'sklearn', 'pooch'} & set(sys.modules); "
        "assert not bad, bad; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
