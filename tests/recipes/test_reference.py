"""The tables in docs/recipes.md follow from the schema."""

import pytest

from tiphys.recipes import reference
from tiphys.recipes.keys import leaves
from tiphys.recipes.schema import Recipe


def test_the_tables_in_the_documentation_are_up_to_date():
    page = reference.PAGE.read_text(encoding="utf-8")
    assert reference.updated(page) == page, "run: python -m tiphys.recipes.reference"


def test_the_tables_have_a_row_for_every_key():
    rows = [line for line in reference.tables().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [leaf.path for leaf in leaves(Recipe)]
    assert all(row.count("|") == 7 for row in rows)


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="must contain the lines"):
        reference.updated("# Recipes")
