"""What docs/model.md and docs/metrics.md say an equation is computed by is there, under that name."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REFERENCE = re.compile(r"`((?:foundation|adapters|data|cluster|tests)/[\w/]+\.py)::([\w.]+)`((?:, `[\w.]+`)*)")


def references(page: str) -> list[tuple[str, str]]:
    """Each file that is named with something in it, and the name."""
    found = REFERENCE.findall((ROOT / "docs" / page).read_text())
    return [(file, name) for file, first, more in found for name in (first, *re.findall(r"`([\w.]+)`", more))]


def names_in(file: Path) -> set[str]:
    """Functions, classes and methods; methods with their class and without."""
    tree = ast.parse(file.read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
    for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        names |= {f"{owner.name}.{node.name}" for node in owner.body if isinstance(node, kinds)}
    return names


@pytest.mark.parametrize(("file", "name"), sorted({*references("model.md"), *references("metrics.md")}))
def test_the_equations_are_where_the_pages_say(file, name):
    assert name in names_in(ROOT / file)


@pytest.mark.parametrize(("page", "least"), [("model.md", 30), ("metrics.md", 20)])
def test_there_are_references_to_check(page, least):
    assert len(references(page)) > least
