"""A recipe file becomes a Recipe, or one error that lists everything that is wrong with it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from tiphys.recipes.load import RecipeError, differences, digest, examine, from_dict, load_recipe, to_dict, to_yaml

GOOD = """
name: small
data:
  mixture: [{dataset: a, weight: 1, objective: gato}]
  validation: 1e-2
objectives: {gato: {context: 256, fields: {"observation.image": {encoding: grid}}}}
deepspeed: {train_batch_size: 4, optimizer: {type: AdamW, params: {lr: 1e-5}}}
run: {dir: runs/small}
"""


def write(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


def test_a_number_in_exponent_form_is_a_number(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.data.validation == 0.01
    assert recipe.deepspeed["optimizer"]["params"]["lr"] == 1e-5


def test_overrides_set_keys_in_lists_sections_and_deepspeeds_section(tmp_path):
    recipe = load_recipe(
        write(tmp_path, GOOD),
        ["data.mixture[0].dataset=s3://x/y", "deepspeed.bf16.enabled=true", "train.steps=7", "run.dir=elsewhere"],
    )
    assert recipe.data.mixture[0].dataset == "s3://x/y"
    assert recipe.deepspeed["bf16"] == {"enabled": True}
    assert (recipe.train.steps, recipe.run.dir) == (7, "elsewhere")


def test_all_errors_are_reported_at_once_each_with_its_line(tmp_path):
    wrong = GOOD.replace("weight: 1", "wieght: 1, prefer: retrun").replace("encoding: grid", "encoding: grdi")
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, wrong), ["train.steps=many", "modle.layers=3"])
    text = "\n".join(caught.value.errors)
    assert len(caught.value.errors) == 5
    for words in (
        "recipe.yaml:4: data.mixture[0].wieght: unknown key. Did you mean 'weight'?",
        "data.mixture[0].prefer: 'retrun' is not allowed",
        "Did you mean 'return'?",
        "Did you mean 'grid'?",
        "train.steps: must be a whole number, not 'many'",
        "modle: unknown key. Did you mean 'model'?",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", "name: this key appears twice"),
        ("name: [", "not YAML"),
        ("- a\n", "a recipe must be a mapping"),
        ("name: a\n", "run.dir is missing"),
        ("name: a\nrun: {dir: x}\ndata: {mixture: [{weight: 1}]}\n", "data.mixture[0].dataset is missing"),
        ("name: a\nrun: {dir: x}\nmodel: 3\n", "model: must be a section with keys, not 3"),
        ("name: a\nrun: {dir: x}\ndata: {mixture: {dataset: a}}\n", "data.mixture: must be a list"),
        (
            "name: a\nrun: {dir: x}\nobjectives: {bc: {options: [1]}}\n",
            "objectives.bc.options: must be a section with keys",
        ),
        ("name: a\nrun: {dir: x}\nevaluate: {tasks: a}\n", "evaluate.tasks: must be a list, not 'a'"),
        ("name: a\nrun: {dir: x}\ndeepspeed: [1]\n", "deepspeed: must be a section with keys"),
    ],
)
def test_a_broken_file_is_one_clear_error(tmp_path, text, words):
    with pytest.raises(RecipeError, match=r".") as caught:
        load_recipe(write(tmp_path, text))
    assert words in str(caught.value)
    assert "recipe.yaml" in str(caught.value)


def test_an_unknown_name_suggests_an_installed_recipe():
    with pytest.raises(RecipeError, match="Did you mean 'quickstart'"):
        load_recipe("quickstrat")


def test_a_recipe_survives_its_plain_form_and_differences_name_the_key(tmp_path):
    one = load_recipe(write(tmp_path, GOOD))
    assert from_dict(to_dict(one)) == one
    other = load_recipe(write(tmp_path, GOOD), ["model.layers=3"])
    assert differences(one, other) == ["model.layers: 8 -> 3"]
    assert digest(one) != digest(other)


@pytest.mark.parametrize(
    ("text", "word"), [("no", "no"), ("yes", "yes"), ("off", "no"), ("'no'", "no"), ("auto", "auto")]
)
def test_yes_and_no_need_no_quotes(tmp_path, text, word):
    file = write(tmp_path, GOOD.replace("context: 256", f"context: 256, discretise: {text}"))
    assert load_recipe(file).objectives["gato"].discretise == word
    assert (
        load_recipe(write(tmp_path, GOOD), [f"objectives.gato.discretise={text}"]).objectives["gato"].discretise == word
    )


def test_a_word_that_is_not_yes_or_no_is_not_guessed(tmp_path):
    for text, shown in (("no", "False"), ("'no'", "no")):
        with pytest.raises(
            RecipeError, match=rf"data\.weight_unit: '{shown}' is not allowed; allowed: windows, tokens"
        ):
            load_recipe(write(tmp_path, GOOD.replace("validation:", f"weight_unit: {text}\n  validation:")))


def test_a_missing_key_has_the_line_of_its_section(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2: run\.dir is missing"):
        load_recipe(write(tmp_path, "name: a\nrun: {}\n"))


@pytest.mark.parametrize("word", ["on", "1e5", "2024", "true", "0x1f", ".nan", "~"])
def test_a_text_that_yaml_reads_as_something_else_needs_quotes(tmp_path, word):
    reason = "a value is missing" if word == "~" else f'must be a text, .*; write it in quotes: "{word}"'
    with pytest.raises(RecipeError, match=rf"recipe\.yaml:2: name: {reason}"):
        load_recipe(write(tmp_path, GOOD.replace("name: small", f"name: {word}")))
    assert load_recipe(write(tmp_path, GOOD.replace("name: small", f'name: "{word}"'))).name == word


def test_a_text_of_the_command_line_needs_no_quotes(tmp_path):
    overrides = ["name=1e5", "run.dir=2024-01-01", "data.mixture[0].dataset=on", "data.cache.dir=", "train.steps=1_000"]
    recipe = load_recipe(write(tmp_path, GOOD), [*overrides, "objectives.gato.fields[observation.image].resize=8"])
    assert (recipe.name, recipe.run.dir, recipe.data.cache.dir, recipe.train.steps) == ("1e5", "2024-01-01", "", 1000)
    assert recipe.data.mixture[0].dataset == "on"
    assert recipe.objectives["gato"].fields["observation.image"].resize == 8


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("train.steps", "write key=value"),
        ("=3", "write key=value"),
        ("a..b=3", "write key=value"),
        ("data.mixture[3].weight=1", "data.mixture has 1 entries, numbered from 0; there is no '3'"),
        ("name.x=1", "name is 'small', not a section"),
        ("deepspeed.x=[&a 1, *a]", "&a is an anchor"),
        ("train.steps=[1", "not YAML"),
    ],
)
def test_an_override_that_cannot_be_done_is_an_error(tmp_path, item, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, GOOD), [item])
    assert words in str(caught.value)


def test_a_tilde_in_every_key_that_holds_a_path_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, GOOD)
    keys = ("run.dir", "data.mixture[0].dataset", "data.cache.dir", "model.text_tokenizer", "publish.to")
    values = to_dict(load_recipe("~/recipe.yaml", [f"{key}=~/x" for key in keys]))
    assert str(values).count(f"{tmp_path}/x") == len(keys)
    assert "~" not in str(values)
    with pytest.raises(RecipeError, match=r"run\.dir: ~nobody-here/x: ~nobody-here has no home folder"):
        load_recipe("~/recipe.yaml", ["run.dir=~nobody-here/x"])


TEXTS = st.sampled_from(
    ["1e5", "010", "2024-01-01", "Nan", "on", "no", "null", "~a", "1_000", "1:30", ".inf", "true", "x: y", "#", ""]
)


@settings(max_examples=8, deadline=None)
@given(TEXTS, st.lists(TEXTS, max_size=3), st.dictionaries(TEXTS, TEXTS, max_size=3))
def test_texts_survive_being_written_as_yaml_and_read(tmp_path_factory, name, tasks, section):
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    values = {"name": name, "evaluate": {"tasks": tasks}, "deepspeed": section, "run": {"dir": "d"}}
    recipe = from_dict(values | {"data": {"mixture": [{"dataset": "c"}]}})
    file.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("2", 2.0), ("0.5", 0.5)])
def test_a_loss_weight_is_a_number_or_auto(tmp_path, text, value):
    file = write(tmp_path, GOOD)
    found = load_recipe(file, [f"data.mixture[0].loss_weight={text}"]).data.mixture[0].loss_weight
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("blue", "'blue' is not allowed; allowed: a number"),
        ("-1", "out of range"),
        ("true", "must be a number or auto"),
    ],
)
def test_a_loss_weight_that_is_neither_is_refused(tmp_path, text, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(write(tmp_path, GOOD), [f"data.mixture[0].loss_weight={text}"])


def test_the_schema_is_built_once_for_each_key_and_not_for_each_value(tmp_path, monkeypatch):
    """OmegaConf copies a schema for each value that it checks, so a recipe of 20,000 values must not take minutes."""
    built = []
    real = OmegaConf.structured
    monkeypatch.setattr(OmegaConf, "structured", lambda section, **options: built.append(section) or real(section))

    def schemas(entries):
        mixture = "".join(f"    - {{dataset: /d{i}, weight: 2.5, tasks: [a]}}\n" for i in range(entries))
        built.clear()
        examine(write(tmp_path, f"name: many\nseed: 1\ndata:\n  mixture:\n{mixture}"))
        return len(built)

    schemas(1)  # from now on the schema of each of these keys is known
    assert schemas(300) == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.layers=-1", "model.layers: -1 is out of range"),
        ("mdel.layers=3", "mdel: unknown key"),
        ("data.mixture=[{dataset: a, weight: -2}]", "data.mixture[0].weight: -2"),
        ("objectives.gato.fields.observation.state.bins=-3", "objectives.gato.fields.observation.state.bins: -3"),
    ],
)
def test_an_error_of_the_command_line_names_the_override(tmp_path, override, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, GOOD), [override])
    assert error.value.errors[0].startswith(f"override {override!r}: {message}")


def test_an_error_of_the_file_names_the_line_beside_an_override(tmp_path):
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, GOOD.replace("validation", "validatoin")), ["data.weight_unit=tokens"])
    assert error.value.errors[0].startswith(f"{tmp_path}/recipe.yaml:5: data.validatoin: unknown key")
