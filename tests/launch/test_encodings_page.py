"""docs/encodings.md shows what `tiphys tokens` shows, for every encoding and every setting of an objective."""

from __future__ import annotations

import pytest

from tiphys.launch import encodings
from tiphys.recipes.keys import key_of, section_fields
from tiphys.recipes.sections.objective import FieldTokens, Objective


def test_the_page_is_up_to_date() -> None:
    page = encodings.PAGE.read_text(encoding="utf-8")
    assert encodings.updated(page) == page, "run: python -m tiphys.launch.encodings"


@pytest.mark.parametrize(("section", "examples"), [(FieldTokens, encodings.ENCODINGS), (Objective, encodings.SETTINGS)])
def test_every_key_and_choice_has_an_excerpt(section: type, examples: tuple[encodings.Example, ...]) -> None:
    set_by = "".join(str(dict(one.settings)) for one in examples)
    shown = {one.key.partition(":")[0] for one in examples}
    fields = section_fields(section)
    assert [n for n in fields.keys() - encodings.UNSEEN[section] - shown if f"'{n}'" not in set_by] == []
    for name in ("encoding", "scheme", "discretise", "head", "softmax"):
        if name in fields:
            for choice in set(key_of(fields[name][1]).choices) - {"auto"}:
                assert f"{name}: {choice}" in {one.key for one in examples}


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="must contain the lines"):
        encodings.updated("# Encodings")
