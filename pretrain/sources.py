"""Source code for a published policy: all modules of Tiphys that `Policy` and `DecisionModel` import, in one flat folder."""

from __future__ import annotations

import ast
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOTS = ("tiphys.pretrain.model.transformer", "tiphys.pretrain.acting.policy")
_OURS = re.compile(r"tiphys(\.|$)")
_IMPORT = re.compile(r"^(\s*from )tiphys\.(?:\w+\.)*(\w+) import\b")


def code_files() -> dict[str, str]:
    """File name -> source code of every module that `ROOTS` import, directly or indirectly.

    Imports of this project's modules become relative: `from tiphys.pretrain.tokens.batch import X` -> `from .batch import X`.
    Imports for type checkers are removed. Raises ValueError if an import has another form, or two modules have the same name.
    """
    files: dict[str, str] = {}
    origin: dict[str, str] = {}
    waiting = list(ROOTS)
    while waiting:
        module = waiting.pop()
        name = module.rsplit(".", 1)[1] + ".py"
        if origin.setdefault(name, module) != module:
            raise ValueError(
                f"{origin[name]} and {module} have the same file name, but a policy has only one folder; rename one of them"
            )
        if name in files:
            continue
        files[name], imported = flat_source(module, _path(module).read_text(encoding="utf-8"))
        waiting += sorted(imported)
    return dict(sorted(files.items()))


def _path(module: str) -> Path:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"{module} has no source file, so it cannot be part of a policy")
    return Path(spec.origin)


def flat_source(module: str, source: str) -> tuple[str, set[str]]:
    """The source code of a module with relative imports, and the modules of this project that it imports."""
    lines = source.splitlines()
    imported: set[str] = set()
    tree = ast.parse(source)
    for_types = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {line for n in for_types for line in range(n.lineno, (n.end_lineno or n.lineno) + 1)}
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)) or node.lineno in skipped:
            continue
        if isinstance(node, ast.Import):
            mine = [a.name for a in node.names if _OURS.match(a.name)]
        else:
            mine = [node.module or ""] if node.level or _OURS.match(node.module or "") else []
        if not mine:
            continue
        line, count = _IMPORT.subn(r"\1.\2 import", lines[node.lineno - 1])
        if not count or any(_path(name).name == "__init__.py" for name in mine):
            raise ValueError(
                f"{module}, line {node.lineno}: write imports of code that is published as "
                f"`from tiphys.….NAME import …`, not as `{lines[node.lineno - 1].strip()}`"
            )
        lines[node.lineno - 1] = line
        imported.update(mine)
    kept = [line for number, line in enumerate(lines, 1) if number not in skipped]
    head = f"# {module.replace('.', '/')}.py of Tiphys {_version()}. SPDX-License-Identifier: Apache-2.0"
    return "\n".join([head, *kept]) + "\n", imported


def _version() -> str:
    try:
        return version("tiphys")
    except PackageNotFoundError:  # a source tree on the Python path
        return "(uninstalled)"
