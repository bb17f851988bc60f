"""`key=value`: names of one's own, such as those of fields, may contain dots."""

from __future__ import annotations

from typing import Any

import pytest

from tiphys.recipes.overrides import override

FIELDS = "objectives.bc.fields"
STATE = "observation.state"


def changed(*items: str) -> dict[str, Any]:
    values: dict[str, Any] = {"data": {"mixture": [{}]}}
    errors: list[str] = []
    override(values, items, errors)
    assert errors == []
    return values


@pytest.mark.parametrize("key", [f"{FIELDS}.{STATE}", f"{FIELDS}[{STATE}]"])
def test_a_field_is_named_with_or_without_brackets(key: str) -> None:
    wanted = {STATE: {"encoding": "uniform", "bins": 16, "relative": {"to": "a.b"}, "augment": {"crop": 0.9}}}
    found = changed(f"{key}.encoding=uniform", f"{key}.bins=16", f"{key}.relative.to=a.b", f"{key}.augment.crop=0.9")
    assert found["objectives"]["bc"]["fields"] == wanted
    assert changed(f"{key}={{encoding: skip}}")["objectives"]["bc"]["fields"] == {STATE: {"encoding": "skip"}}


@pytest.mark.parametrize(
    ("item", "fields"),
    [
        (f"{FIELDS}.action.chunk=2", {"action": {"chunk": 2}}),
        (f"{FIELDS}.observation.crop.encoding=skip", {"observation.crop": {"encoding": "skip"}}),
        (f"{FIELDS}.observation.image*.resize=64", {"observation.image*": {"resize": 64}}),
        (f"{FIELDS}.{STATE}.encodng=gato", {STATE: {"encodng": "gato"}}),  # so that its message names the key
    ],
)
def test_the_name_ends_before_the_key(item: str, fields: dict[str, Any]) -> None:
    assert changed(item)["objectives"]["bc"]["fields"] == fields


def test_other_names_may_contain_dots_too() -> None:
    assert changed("model.init_map.observation.state=state")["model"] == {"init_map": {STATE: "state"}}
    assert changed("evaluate.prompt.push.v3=data:1")["evaluate"] == {"prompt": {"push.v3": "data:1"}}


def test_other_paths_are_as_written() -> None:
    found = changed(
        "objectives.bc.options.hiding.rc=0.5", "deepspeed.optimizer.params.lr=1", "data.mixture[0].weight=2"
    )
    assert found == {
        "data": {"mixture": [{"weight": 2}]},
        "objectives": {"bc": {"options": {"hiding": {"rc": 0.5}}}},
        "deepspeed": {"optimizer": {"params": {"lr": 1}}},
    }
