"""Every key of the schema says what is allowed, and the schema check enforces it."""

import subprocess
import sys

import pytest
from hypothesis import given as generated
from hypothesis import settings

from tests.recipes.schema_walk import NUMBERS, WORDS, given, outside, place, sections
from tiphys.dataio.plan.preferences import RULES
from tiphys.recipes.keys import key_of, leaves, section_fields
from tiphys.recipes.load import RecipeError, from_dict, to_dict
from tiphys.recipes.resume import may_change
from tiphys.recipes.schema import Recipe
from tiphys.recipes.sections.data import Entry


def named(leaves):
    return {"argvalues": leaves, "ids": [leaf.path for leaf in leaves]}


@pytest.mark.parametrize("leaf", **named(list(leaves(Recipe))))
def test_every_key_has_a_help_sentence(leaf):
    assert leaf.key.help
    assert leaf.key.help[0].isupper()
    assert not leaf.key.help.endswith(".")


@pytest.mark.parametrize("leaf", **named(NUMBERS))
def test_every_number_has_a_range_that_holds_its_default(leaf):
    assert leaf.key.low is not None or leaf.key.above is not None, "give low= or above="
    assert leaf.key.problem(leaf.default) == ""


@pytest.mark.parametrize("leaf", **named(WORDS))
def test_every_string_has_choices_or_is_a_size_or_says_what_text_it_holds(leaf):
    kinds = [bool(leaf.key.choices), leaf.key.size, leaf.key.target, bool(leaf.key.text)]
    assert sum(kinds) == 1, "give choices= for a fixed set of words, size=True, target=True, or text= for free text"
    if leaf.key.choices or leaf.key.size:
        assert leaf.key.problem(leaf.default) == ""


@pytest.mark.parametrize("leaf", **named(NUMBERS))
def test_a_value_just_outside_the_range_is_an_error_that_names_key_value_and_range(leaf):
    for value in outside(leaf):
        with pytest.raises(RecipeError) as caught:
            from_dict(given(leaf, value))
        [line] = caught.value.errors
        assert line == f"recipe: {place(leaf)}: {value!r} is out of range; allowed: {leaf.key.allowed()}"


@pytest.mark.parametrize("leaf", **named([leaf for leaf in NUMBERS if leaf.key.also]))
def test_a_special_value_outside_the_range_is_allowed(leaf):
    for value in leaf.key.also:
        from_dict(given(leaf, value))


@pytest.mark.parametrize("leaf", **named([leaf for leaf in WORDS if not leaf.key.text and leaf.type is str]))
def test_an_unknown_word_or_size_is_an_error_that_names_the_key(leaf):
    with pytest.raises(RecipeError) as caught:
        from_dict(given(leaf, "5 apples"))
    [line] = caught.value.errors
    assert line.startswith(f"recipe: {place(leaf)}: '5 apples' is not ")


def test_the_rules_of_preference_are_the_choices_of_the_key():
    assert key_of(section_fields(Entry)["prefer"][1]).choices == RULES


@settings(max_examples=10, deadline=None)
@generated(sections(Recipe))
def test_a_recipe_survives_its_plain_form(values):
    recipe = from_dict(values)
    assert to_dict(recipe) == values
    assert from_dict(to_dict(recipe)) == recipe


FREE = """
    name run.dir parallel.pipeline parallel.expert parallel.measure parallel.auto model.checkpointing model.init_std
    data.cache.dir data.cache.memory data.cache.disk data.on_bad_value data.requests data.prefetch data.timeout data.attempts
    data.unit_rows
    train.steps train.log_every train.compile train.rollbacks restart.attempts restart.shrink
    checkpoint.every checkpoint.minutes checkpoint.keep checkpoint.asynchronous checkpoint.patience checkpoint.deadline
    objectives.*.target_return evaluate.objectives evaluate.target_return evaluate.target_returns evaluate.prompt evaluate.goal
    evaluate.query evaluate.future
    validate.every validate.rows evaluate.every evaluate.tasks evaluate.modules evaluate.episodes evaluate.processes evaluate.seed
    evaluate.sample evaluate.videos evaluate.minutes evaluate.devices
    track.to track.project track.name
    publish.dtype publish.weights publish.to publish.every publish.keep publish.rate publish.grace
    publish.take_over publish.private publish.license
""".split()


def test_exactly_these_keys_may_change_on_resume():
    assert {leaf.path for leaf in leaves(Recipe) if may_change(leaf.path)} == set(FREE)


@pytest.mark.parametrize(
    ("path", "free"),
    [
        ("evaluate.tasks[3]", True),
        ("data.mixture[0].weight", False),
        ("objectives.gato.context", False),
        ("deepspeed.zero_optimization.stage", True),
        ("deepspeed.zero_optimization", True),
        ("deepspeed.train_micro_batch_size_per_gpu", True),
        ("deepspeed.flops_profiler.enabled", True),
        ("deepspeed.optimizer.params.torch_adam", True),
        ("deepspeed.optimizer.params.lr", False),
        ("deepspeed.train_batch_size", False),
    ],
)
def test_whether_a_path_may_change_on_resume(path, free):
    assert may_change(path) == free


def test_reading_recipes_imports_neither_torch_nor_deepspeed():
    code = "import sys, tiphys.recipes.load, tiphys.recipes.resume; print(*{'torch', 'deepspeed', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
