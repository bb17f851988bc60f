"""Every key of a mapping file has an effect, or is refused with a message that names it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.processes import REPOSITORY
from tiphys.dataio.convert.mapping import Mapping, tables
from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec

TASK = TaskSpec(
    "t",
    (
        FieldSpec("action", "action", "discrete", "int64", (2,), (0.0,), (1.0, 4.0), values=5),
        FieldSpec("observation", "observation", "continuous", "float32", (2,)),
        FieldSpec("observation.image", "observation", "image", "uint8", (20, 20, 3)),
    ),
)


def mapped(**raw: Any) -> TaskSpec:
    mapping = Mapping.from_dict(raw)
    (task,) = mapping.tasks([TASK])
    mapping.encodings([TASK])
    return task


def test_the_settings_of_a_task_are_stored():
    task = mapped(environment="mine:Env-v0", normalise="success", random=0, expert=0.9, max_steps=50)
    assert (task.environment, task.normalise, task.random, task.expert, task.max_steps) == (
        *("mine:Env-v0", "success", 0, 0.9, 50),
    )


def test_values_override_the_range_of_the_source():
    field = mapped(fields={"action": {"values": 7}}).field("action")
    assert (field.values, field.low, field.high) == (7, None, None)
    field = mapped(fields={"action": {"low": 1, "high": [2, 5]}}).field("action")
    assert (field.low, field.high) == ((1.0,), (2.0, 5.0))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"normalise": "sucess"}, "normalise 'sucess'"),
        ({"max_steps": "50"}, "max_steps '50'"),
        ({"expert": "high"}, "expert: 'high'"),
        ({"random": float("nan")}, "random: nan"),
        ({"environment": 3}, "environment: must be a text"),
        ({"fields": {"action": {"values": "7"}}}, "fields.action.values: '7'"),
        ({"fields": {"action": {"values": 7, "low": 0, "high": 2}}}, "`values` is 7, but low and high make 3"),
        ({"fields": {"action": {"low": [0, 0, 0]}}}, r"'action'.*shape \(2,\).*has 3"),
        ({"fields": {"action": {"low": 3, "high": 2}}}, "low 3 is above high 2"),
        ({"fields": {"observation": {"low": 0}}}, "give both"),
        ({"fields": {"observation": {"values": 3}}}, "`values` has no effect on a continuous field"),
        ({"fields": {"observation.image": {"frames": 8}}}, "frames has an effect only with `encoding`"),
        ({"fields": {"observation.image": {"quality": 8}}}, "quality has an effect only with `encoding`"),
    ],
)
def test_what_would_have_no_effect_or_means_nothing_is_refused(raw, words):
    with pytest.raises(DataError, match=words):
        mapped(**raw)


def test_the_tables_in_the_documentation_are_up_to_date():
    page = (REPOSITORY / "docs" / "converting.md").read_text(encoding="utf-8")
    assert tables() in page, "write what `tables()` returns between the markers in docs/converting.md"
