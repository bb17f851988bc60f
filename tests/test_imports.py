"""The rule of imports: one direction, no torch where data becomes tokens, no circle that docs/architecture.md does not name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import REPOSITORY

FOLDERS = ("launch", "pretrain", "dataio", "recipes")
MAY_IMPORT = {
    "launch": {"launch", "pretrain", "dataio", "recipes"},
    "pretrain": {"pretrain", "dataio", "recipes"},
    "dataio": {"dataio"},
    "recipes": {"recipes"},
}
SHARED = {"paths", "plain_yaml"}  # tiphys/*.py, which import nothing of ours
ROOMS_WITHOUT_TORCH = ("dataio", "recipes", "pretrain/tokens", "pretrain/objectives.py")
FILES = [p.relative_to(REPOSITORY) for name in FOLDERS for p in sorted((REPOSITORY / name).rglob("*.py"))]
MODULES = {"tiphys." + ".".join(p.with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """Modules that a file imports, without those for type checkers; `lazy`: also inside functions."""
    return set(_imports(ast.parse((REPOSITORY / path).read_text(encoding="utf-8")), lazy))


def _imports(node: ast.AST, lazy: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not lazy:
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                name = f"{child.module}.{alias.name}"
                yield name if name in MODULES else child.module or "."
        else:
            yield from _imports(child, lazy)


def circles(*, lazy: bool) -> set[frozenset[str]]:
    """Groups of files that import each other, directly or through others."""
    graph = {m: imports(p, lazy=lazy) & MODULES.keys() for m, p in MODULES.items()}
    reach = {m: _reachable(graph, m) for m in graph}
    groups = {m: frozenset(n for n in reach[m] if m in reach[n]) for m in graph}
    return {group for group in groups.values() if group}


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph[waiting.pop()] - seen
        seen |= new
        waiting += new
    return seen


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_one_way(folder):
    for path in FILES:
        if path.parts[0] == folder:
            ours = {name.split(".")[1] for name in imports(path) if name.startswith("tiphys.")}
            assert ours <= MAY_IMPORT[folder] | SHARED, path


def test_shared_files_import_none_of_ours():
    for name in SHARED:
        assert not any(module.startswith("tiphys") for module in imports(Path("tiphys", f"{name}.py")))


def test_data_and_tokens_do_not_import_torch():
    for path in FILES:
        if str(path).startswith(ROOMS_WITHOUT_TORCH):
            heavy = {name for name in imports(path) if name.split(".")[0] in ("torch", "deepspeed", "transformers")}
            assert not heavy, path


def test_no_two_files_import_each_other_when_loaded():
    assert circles(lazy=False) == set()


def test_circles_through_functions_are_named_in_the_architecture():
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8").partition("## The rule of imports")[2]
    for circle in circles(lazy=True):
        for module in circle:
            assert f"`{MODULES[module]}`" in text, f"{MODULES[module]} is part of a circle: {', '.join(sorted(circle))}"
