"""A recipe file becomes a Recipe, or one error that lists everything that is wrong with it."""

import pytest

from tiphys.recipes.load import RecipeError, differences, digest, from_dict, load_recipe, to_dict

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
        "train.steps: Value 'many'",
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
    with pytest.raises(RecipeError, match=r"data\.weight_unit: 'False' is not allowed; allowed: windows, tokens"):
        load_recipe(write(tmp_path, GOOD), ["data.weight_unit=no"])


def test_a_value_from_another_key_is_checked_too(tmp_path):
    text = GOOD + "train: {steps: '${validate.rows}'}\nvalidate: {rows: 5}\n"
    assert load_recipe(write(tmp_path, text)).train.steps == 5
    text = GOOD + "train: {steps: '${validate.every}'}\nvalidate: {every: 0}\n"
    with pytest.raises(RecipeError, match=r"train\.steps: 0 is out of range; allowed: at least 1"):
        load_recipe(write(tmp_path, text))


def test_a_missing_key_has_the_line_of_its_section(tmp_path):
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2: run\.dir is missing"):
        load_recipe(write(tmp_path, "name: a\nrun: {}\n"))
