"""`tiphys check` names the values of the datasets that cannot be learned from, and tasks without the rewards that are needed."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch.nn import Linear

from tiphys.dataio.dataset import filter, inspect
from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.shards import ShardWriter
from tiphys.launch import cli
from tiphys.launch.check import check
from tiphys.launch.plan import make_plan
from tiphys.launch.run import announce
from tiphys.pretrain.objectives import Objectives
from tiphys.recipes.load import RecipeError, load_recipe

FIELDS = (
    FieldSpec("observation", "observation", "continuous", "float32", (3,)),
    FieldSpec("gear", "observation", "discrete", "int64", (), values=5),
    FieldSpec("action", "action", "continuous", "float32", (2,), (-1.0, -1.0), (1.0, 1.0)),
)
TASK = TaskSpec("drive", (*FIELDS, FieldSpec("reward", "reward", "continuous", "float32")))
SILENT = TaskSpec("silent", FIELDS)
RECIPE = """
name: small
data: {{mixture: [{{dataset: {data}, objective: dt}}], validation: 0.0}}
model: {{layers: 2, hidden: 32, heads: 2, text_vocabulary: 300}}
deepspeed:
  train_batch_size: 4
  optimizer: {{type: AdamW, params: {{lr: 1e-3}}}}
run: {{dir: {run}}}
"""


def dataset(url: str, bad: Mapping[str, Any] = {}, task: TaskSpec = TASK, length: int = 20) -> EpisodeIndex:
    """8 episodes. `bad`: field -> value of step 10 of episode e3."""
    rng = np.random.default_rng(0)
    with ShardWriter(url, [task]) as writer:
        for number in range(8):
            fields: dict[str, Any] = {
                "observation": rng.normal(size=(length, 3)).astype(np.float32),
                "gear": rng.integers(0, 5, length),
                "action": rng.uniform(-1, 1, (length, 2)).astype(np.float32),
                "reward": rng.uniform(0, 1, length).astype(np.float32),
            }
            for field, value in bad.items() if number == 3 else ():
                fields[field][10] = value
            writer.write(Episode(f"e{number}", task.name, {f.name: fields[f.name] for f in task.fields}, length))
    return EpisodeIndex.open(url)


def recipe(folder: Any, data: str) -> Any:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.format(data=data, run=folder / "run"))
    return file


def refused(file: Any, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        check(file, overrides)
    return caught.value.errors


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"reward": np.nan}, "field 'reward': 1 step with NaN or an infinity in 1 episode (first: e3)"),
        ({"observation": np.nan}, "field 'observation': 1 step with NaN or an infinity in 1 episode (first: e3)"),
        ({"gear": 9}, "field 'gear': 1 step beyond the declared range in 1 episode (first: e3)"),
    ],
)
def test_a_bad_value_is_refused_and_named_unless_it_is_quarantined(tmp_path, capsys, bad, words):
    data = str(tmp_path / "data")
    dataset(data, bad)
    file = recipe(tmp_path, data)
    (error,) = refused(file)
    assert f"data.mixture[0]: {data}: task 'drive', {words}, and objective 'dt' uses it" in error
    assert "data.on_bad_value=quarantine" in error
    assert cli.main(["check", str(file), "data.on_bad_value=quarantine"]) == 0
    assert f"{data}: task 'drive', {words}; training leaves such episodes out" in capsys.readouterr().out
    assert cli.main(["inspect", data]) == 0
    assert f"task 'drive', {words}" in capsys.readouterr().out


def test_a_value_that_no_token_is_made_from_is_not_refused(tmp_path):
    dataset(str(tmp_path / "data"), {"reward": np.nan})
    check(recipe(tmp_path, str(tmp_path / "data")), ["data.mixture[0].objective=bc"])


def test_a_filtered_dataset_without_the_bad_episode_is_not_refused(tmp_path):
    dataset(str(tmp_path / "all"), {"observation": np.nan, "reward": np.nan})
    filter(str(tmp_path / "all"), str(tmp_path / "good"), min_return=0.0)
    check(recipe(tmp_path, str(tmp_path / "good")))


def test_one_bad_reward_changes_no_other_return(tmp_path):
    good, bad = dataset(str(tmp_path / "good")), dataset(str(tmp_path / "bad"), {"reward": np.nan})
    file = recipe(tmp_path, bad.url)
    settings = check(file, ["data.on_bad_value=quarantine", "data.mixture[0].prefer=return"])
    found, returns = Objectives(settings, [bad]).processor()["best_return"]["drive"], np.asarray(good.total_return)
    assert found == returns[np.arange(8) != 3].max()
    assert cli.main(["check", str(file), "data.on_bad_value=quarantine", "data.mixture[0].prefer=top"]) == 0


@pytest.mark.parametrize("overrides", [[], ["data.mixture[0].objective=bc", "data.mixture[0].prefer=top"]])
def test_returns_of_a_task_without_rewards_are_refused(tmp_path, capsys, overrides):
    dataset(str(tmp_path / "data"), task=SILENT)
    file = recipe(tmp_path, str(tmp_path / "data"))
    (error,) = refused(file, *overrides)
    assert "silent" in error
    assert "reward" in error
    check(file, ["objectives.dt.options.without_rewards=true"])
    found = inspect(str(tmp_path / "data"))["tasks"]["silent"]
    assert found["returns"]["mean"] is None
    assert cli.main(["inspect", str(tmp_path / "data"), "--episode", "0"]) == 0
    assert "return –" in capsys.readouterr().out


def test_a_dataset_of_two_entries_is_named_once(tmp_path):
    dataset(str(tmp_path / "data"), {"observation": np.nan})
    data = f"{{dataset: {tmp_path / 'data'}, objective: dt}}, {{dataset: {tmp_path / 'data'}, objective: bc}}"
    file = recipe(tmp_path, "x")
    file.write_text(file.read_text().replace("{dataset: x, objective: dt}", data))
    assert len(refused(file)) == 1


def test_a_dataset_of_two_entries_is_counted_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tiphys.launch.run._memory_line", lambda *of: "")
    index = dataset(str(tmp_path / "data"))
    file = recipe(tmp_path, "x")
    entry = f"{{dataset: {index.url}, objective: bc}}"
    file.write_text(file.read_text().replace("{dataset: x, objective: dt}", f"{entry}, {entry}"))
    settings = load_recipe(file)
    objectives = Objectives(settings, [index, index])
    plan = make_plan(settings, [index, index], objectives)
    world = SimpleNamespace(world=1, pipeline=1, data=1, expert=1)
    engine = SimpleNamespace(module=Linear(1, 1), world=world, zero_stage=0, bf16=False, rows=4, accumulation=1)
    engine.micro_batch, engine.derived, engine.config = 4, {}, SimpleNamespace(vocab_size=7)
    announce(settings, objectives, plan, engine)
    assert "1 task, 8 episodes" in capsys.readouterr().out


def told(folder: Any, *texts: str) -> str:
    """A dataset of eight episodes, of which each has one of these texts."""
    task = TaskSpec("told", (*FIELDS, FieldSpec("mission", "text", "text", "str", per="episode")))
    random = np.random.default_rng(0)
    with ShardWriter(str(folder / "told"), [task]) as writer:
        for number in range(8):
            fields = {
                "observation": random.normal(size=(20, 3)).astype(np.float32),
                "gear": random.integers(0, 5, 20),
                "action": random.uniform(-1, 1, (20, 2)).astype(np.float32),
                "mission": texts[number % len(texts)],
            }
            writer.write(Episode(f"e{number}", task.name, fields, 20))
    return str(folder / "told")


@pytest.mark.parametrize(("name", "few", "enough", "least"), [("reward", 60, 300, 8), ("mia", 18, 90, 2)])
def test_rows_with_too_few_windows_to_tell_apart_are_refused(tmp_path, name, few, enough, least):
    file = recipe(tmp_path, told(tmp_path, "go left", "go right"))
    given = ["data.mixture[0].objective=it", f"objectives.it.paradigm={name}", "objectives.it.window=4"]
    with pytest.raises(RecipeError, match=rf"objectives.it.context.*needs at least {least}"):
        check(file, [*given, f"objectives.it.context={few}"])
    check(file, [*given, f"objectives.it.context={enough}"])
    with pytest.raises(RecipeError, match="no text that differs"):
        check(
            file,
            [*given, f"objectives.it.context={enough}", f"data.mixture[0].dataset={told(tmp_path / 'same', 'go')}"],
        )


def test_a_target_return_that_cannot_be_asked_for_is_refused_at_its_key(tmp_path):
    dataset(str(tmp_path / "data"))
    file = recipe(tmp_path, str(tmp_path / "data"))
    check(file, ["objectives.dt.target_return=q0.9"])
    check(file, ["objectives.dt.target_return=12"])
    (error,) = refused(file, "objectives.dt.target_return=1e6")
    assert "objectives.dt.target_return: task 'drive'" in error
    assert "beyond what the policy can be told" in error
    clone = ["data.mixture[0].objective=bc", "objectives.bc.target_return=12"]
    (error,) = refused(file, *clone)
    assert "objectives.bc.target_return: paradigm 'bc' shows the model no returns" in error


def test_a_multiple_of_a_negative_best_return_is_refused(tmp_path):
    """As in Pendulum: 1.2 times the best of −150 is worse than the best."""
    rng = np.random.default_rng(0)
    with ShardWriter(str(tmp_path / "data"), [TASK]) as writer:
        for number in range(8):
            fields = {
                "observation": rng.normal(size=(9, 3)).astype(np.float32),
                "gear": rng.integers(0, 5, 9),
                "action": rng.uniform(-1, 1, (9, 2)).astype(np.float32),
                "reward": -rng.uniform(1, 2, 9).astype(np.float32),
            }
            writer.write(Episode(f"e{number}", "drive", fields, 9))
        writer.close()
    file = recipe(tmp_path, str(tmp_path / "data"))
    for good in ("best", "q0.9", "-11"):
        check(file, [f"objectives.dt.target_return={good}"])
    (error,) = refused(file, "objectives.dt.target_return=1.2x")
    assert "the best return in the data is -" in error
    assert "a quantile, such as q0.9" in error


def test_every_entry_whose_data_have_no_rewards_is_named_with_its_key(tmp_path):
    dataset(str(tmp_path / "a"), task=SILENT)
    dataset(str(tmp_path / "b"), task=TaskSpec("mute", FIELDS))
    file = recipe(tmp_path, str(tmp_path / "a"))
    mixture = f"data.mixture=[{{dataset: {tmp_path}/a, objective: dt}}, {{dataset: {tmp_path}/b, objective: dt}}]"
    one, two = refused(file, mixture)
    assert "data.mixture[0].objective" in one
    assert "task 'silent' has no field 'reward'" in one
    assert "data.mixture[1].objective" in two
    assert "task 'mute' has no field 'reward'" in two
