"""`${key}` is the value of a key of the same recipe; it reaches nothing else, and cannot grow without bound."""

import json

import pytest

from tiphys.recipes.load import RecipeError, from_dict, load_recipe, to_dict

BASE = {"name": "a", "run": {"dir": "runs/a"}, "data": {"mixture": [{"dataset": "d"}]}}


def load(tmp_path, **changes):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(BASE | changes, indent=1))
    return load_recipe(file)


def test_a_reference_has_the_value_and_the_type_of_its_key(tmp_path):
    recipe = load(
        tmp_path,
        name="n-${train.seed}",
        train={"steps": "${validate.rows}", "seed": 7},
        validate={"rows": "${data.requests}"},  # a default
        run={"dir": "runs/${name}"},
        deepspeed={"optimizer": {"params": {"lr": 1e-3}}, "scheduler": {"params": "${deepspeed.optimizer.params}"}},
        evaluate={"tasks": ["${data.mixture[0].dataset}"]},
    )
    assert (recipe.name, recipe.run.dir, recipe.train.steps) == ("n-7", "runs/n-7", 64)
    assert recipe.deepspeed["scheduler"]["params"] == {"lr": 1e-3}
    assert recipe.evaluate.tasks == ["d"]


@pytest.mark.parametrize(
    "resolver",
    ["oc.env:SECRET", "oc.env:SECRET,x", "oc.decode:x", "oc.create:x", "oc.select:name", "mine:", " oc.env : SECRET"],
)
def test_every_resolver_is_refused_by_name_and_nothing_is_read(tmp_path, monkeypatch, resolver):
    monkeypatch.setenv("SECRET", "hunter2")
    name = resolver.partition(":")[0].strip()
    values = {"mixture": [{"dataset": f"http://host/${{{resolver}}}"}]}
    for read in (lambda: load(tmp_path, data=values), lambda: from_dict(BASE | {"data": values})):
        with pytest.raises(RecipeError, match=rf"data\.mixture\[0\]\.dataset: .*calls the resolver '{name}") as caught:
            read()
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "${nme}"}, "name: .*the recipe has no key 'nme'"),
        ({"name": "${train}"}, "must be a text|no key 'train'"),
        ({"name": "x${data}"}, "is not a text or number"),
        ({"name": "${.run.dir}"}, "write its whole path"),
        ({"name": "${run.${x}}"}, "no key|begins a reference"),
        ({"name": "${run.dir"}, "begins a reference"),
        ({"name": "${name}"}, "would contain itself"),
        ({"name": "${run.dir}", "run": {"dir": "${name}"}}, "would contain itself"),
        ({"objectives": {"x": "${objectives}"}}, "would contain itself"),
        ({"train": {"steps": "${validate.every}"}, "validate": {"every": 0}}, r"train\.steps: 0 is out of range"),
        ({"train": {"steps": "${run.dir}"}}, r"train\.steps: must be a whole number, not 'runs/a'"),
    ],
)
def test_what_cannot_be_resolved_is_an_error_of_its_key(tmp_path, changes, words):
    with pytest.raises(RecipeError, match=words):
        load(tmp_path, **changes)


def test_references_that_multiply_are_bounded(tmp_path):
    texts = {f"t{i}": f"${{deepspeed.t{i - 1}}}" * 2 for i in range(1, 60)} | {"t0": "x" * 50}
    lists = {f"l{i}": [f"${{deepspeed.l{i - 1}}}"] * 9 for i in range(1, 19)} | {"l0": ["x"]}
    chain = {f"c{i}": f"${{deepspeed.c{i + 1}}}" for i in range(60)} | {"c60": 1}
    for values, words in (
        (texts, "more than 10000 characters|refer to each other"),
        (lists, "more than 5000 values"),
        (chain, "more than 20 keys"),
    ):
        with pytest.raises(RecipeError, match=words):
            load(tmp_path, deepspeed=values)


def test_a_recipe_made_in_python_is_not_resolved_either(tmp_path, monkeypatch):
    from dataclasses import replace

    monkeypatch.setenv("SECRET", "hunter2")
    recipe = replace(load(tmp_path), name="${oc.env:SECRET}")
    assert to_dict(recipe)["name"] == "${oc.env:SECRET}"
