"""README and docs/ are true of the tree: names, files, links, code and command lines in them exist."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.processes import REPOSITORY
from tiphys.launch.cli import _parse, _parser
from tiphys.launch.statuses import Status

TOP = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted((REPOSITORY / "docs").glob("*.md"))]
SOURCES = ("dataio", "pretrain", "recipes", "launch")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The fenced code blocks of a page in one of these languages."""
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        if language in languages:
            yield code


def house() -> Iterator[tuple[str, list[str]]]:
    """(folder, names) of each row of the table of rooms."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("## The house")[2].partition("\n## ")[0]
    for line in table.splitlines():
        if line.startswith("| `"):
            room, files = line.strip("|").split("|")
            folder = re.search(r"`([\w/]+)/`", room)
            assert folder, f"this row names no folder: {line}"
            yield folder[1], re.findall(r"`([\w.-]+)`", files)


def test_the_house_names_every_source_file_once():
    named = [
        f"{folder}/{name}" if "." in name else f"{folder}/{name}.py"
        for folder, names in house()
        if folder != "tiphys"
        for name in names
    ]
    files = (p for name in SOURCES for p in (REPOSITORY / name).rglob("*") if p.suffix in (".py", ".yaml", ".css"))
    wanted = [str(p.relative_to(REPOSITORY)) for p in files if p.stat().st_size]
    assert sorted(named) == sorted(wanted)


def test_the_architecture_is_one_page():
    assert len((REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()) <= 125


@pages
def test_python_blocks_use_what_exists(page):
    for code in blocks(page, "python"):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tiphys":
                assert not node.level
                for alias in node.names:
                    assert _find(f"{node.module}.{alias.name}") is not None
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.partition(".")[0] == "tiphys":
                        import_module(alias.name)
            elif isinstance(node, ast.Attribute) and (dotted := _dotted(node)).startswith("tiphys."):
                assert _find(dotted) is not None, f"{page.name}: {dotted}"


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _find(dotted: str) -> Any:
    """A module, or an attribute of one, by its dotted name."""
    head, *rest = dotted.split(".")
    found: Any = import_module(head)
    for name in rest:
        if not hasattr(found, name):
            import_module(f"{found.__name__}.{name}")
        found = getattr(found, name)
    return found


@pages
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert heading in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, target


@pages
def test_files_that_are_named_exist(page):
    """Paths such as `dataio/loader.py` from the top of the repository, or from a source folder."""
    folders = [REPOSITORY, *(REPOSITORY / name for name in SOURCES)]
    for path in re.findall(r"`([\w./]+/[\w.]+\.(?:py|yaml|json|md))`", page.read_text(encoding="utf-8")):
        assert any((folder / path).is_file() for folder in folders), f"{page.name}: {path}"


@pages
def test_command_lines_are_valid(page, capsys):
    text = page.read_text(encoding="utf-8")
    lines = [line.strip() for code in blocks(page, "sh", "") for line in code.splitlines()]
    for line in lines + re.findall(r"`(tiphys [^`]*)`", text):
        if line.startswith("tiphys ") and not any(mark in line for mark in "[…|"):  # those say how to write a command
            assert _is_valid(shlex.split(line, comments=True)[1:]), f"{page.name}: {line}: {capsys.readouterr().err}"


def _is_valid(words: list[str]) -> bool:
    """Whether the command's parser takes these words; words in capital letters stand for values."""
    if all(re.fullmatch("[a-z-]+", word) for word in words):  # only the name of a command
        words = [*words, "--help"]
    try:
        _parse(_parser(), ["1" if word == "N" else word for word in words])
    except SystemExit as end:
        return not end.code
    return True


def test_exit_statuses_are_those_of_the_program():
    text = (REPOSITORY / "docs" / "runs.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.+?) \|.*\|$", text, re.M)
    assert [(int(number), meaning) for number, meaning in rows] == [(s.value, s.meaning) for s in Status]


def test_the_readme_explains_every_extra():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8").partition("| extra |")[2].partition("\n\n")[0]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    explained = [name for line in text.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert sorted(explained) == sorted(project["optional-dependencies"])


def test_recipes_of_the_pages_for_beginners_are_valid(tmp_path):
    from tiphys.launch.check import check

    pages = (REPOSITORY / "README.md", REPOSITORY / "docs" / "lerobot.md")
    recipes = [code for page in pages for code in blocks(page, "yaml") if "deepspeed:" in code]
    assert len(recipes) == 3
    for recipe in recipes:
        (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
        check(tmp_path / "recipe.yaml", world=16, data=False)


@pytest.mark.parametrize("page", sorted((REPOSITORY / "docs").glob("*.md")), ids=lambda p: p.name)
def test_the_whole_recipes_of_a_page_are_valid(page, tmp_path):
    from tiphys.launch.check import check

    whole = [code for code in blocks(page, "yaml") if "\ndeepspeed:" in code and "\nrun:" in code]
    for recipe in (code for code in whole if "text_tokenizer:" not in code):  # its file is not here
        (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
        check(tmp_path / "recipe.yaml", world=1, data=False)


def test_the_messages_of_the_troubleshooting_table_exist():
    page = (REPOSITORY / "docs" / "glossary.md").read_text(encoding="utf-8")
    phrases = [
        p for line in page.splitlines() if line.startswith('| "') for p in re.findall(r'"([^"]+)"', line.split("|")[1])
    ]
    sources = "".join(p.read_text() for name in SOURCES for p in (REPOSITORY / name).rglob("*.py"))
    assert len(phrases) > 4
    assert [p for p in phrases if p not in sources] == []
