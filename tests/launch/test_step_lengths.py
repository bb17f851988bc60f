"""Texts that change from step to step: once their tokens are counted, the plan's figures are those of the delivered rows."""

import io

import numpy as np
import pytest
import yaml

from tiphys.dataio import step_counts
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.loader import TrajectoryLoader
from tiphys.dataio.placement import Home
from tiphys.dataio.shards import ShardWriter
from tiphys.launch.cli import main
from tiphys.launch.plan import loader_arguments, make_plan, open_datasets, text_lines
from tiphys.pretrain.objectives import Objectives
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.recipes.load import load_recipe

STEPS = 60


def task(name, *texts):
    fields = [FieldSpec(f"observation.{t}", "text", "text", "str") for t in texts]
    fields += [FieldSpec("observation.state", "observation", "continuous", "float32", (4,), (-1.0,) * 4, (1.0,) * 4)]
    return TaskSpec(name, (*fields, FieldSpec("action", "action", "discrete", "int64", values=5)))


def write(folder, spec, episodes, rng):
    with ShardWriter(str(folder), [spec]) as writer:
        for i in range(episodes):
            steps = int(rng.integers(2, 30))
            texts = {
                f.name: np.array(["ab " * int(rng.integers(0, 12)) for _ in range(steps)], np.dtypes.StringDType())
                for f in spec.fields if f.modality == "text"
            }  # fmt: skip
            state, action = rng.uniform(-1, 1, (steps, 4)).astype(np.float32), rng.integers(0, 5, steps)
            fields = texts | {"observation.state": state, "action": action}
            writer.write(Episode(f"{spec.name}-{i}", spec.name, fields, steps))


@pytest.fixture
def recipe(tmp_path):
    """Two datasets with equal weights: one with two texts at every step, one without texts."""
    rng = np.random.default_rng(0)
    write(tmp_path / "talk", task("talk", "heard", "seen"), 150, rng)
    write(tmp_path / "quiet", task("quiet"), 150, rng)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "name": "words",
                "data": {
                    "mixture": [{"dataset": str(tmp_path / name), "objective": "gato"} for name in ("talk", "quiet")],
                    "validation": 0.0,
                    "weight_unit": "tokens",
                },
                "objectives": {
                    "gato": {
                        "context": 256,
                        "window": 6,
                        "prompt": 0.2,
                        "fields": {"*.seen": {"stride": 2}},
                    }
                },
                "model": {"layers": 1, "hidden": 32, "heads": 2, "text_vocabulary": 300},
                "train": {"steps": 10},
                "deepspeed": {"train_batch_size": 32, "optimizer": {"type": "AdamW", "params": {"lr": 0.001}}},
                "run": {"dir": str(tmp_path / "run")},
            }
        )
    )
    return file


def planned_and_delivered(recipe):
    """(description of the plan, planned windows by step, real tokens by step and row)."""
    recipe = load_recipe(recipe)
    indexes = open_datasets(recipe)
    objectives = Objectives(recipe, indexes)
    plan = make_plan(recipe, indexes, objectives)
    real, tasks = [], []
    with TrajectoryLoader(plan, Home(0, 1), **loader_arguments(recipe, objectives), stop=STEPS) as loader:
        for loaded in loader:
            batch = TokenBatch.from_arrays(loaded.arrays)
            used = np.asarray(batch.segment) > 0
            real.append(used.sum(1))
            tasks.append([int((used & (np.asarray(batch.task) == t)).sum()) for t in range(2)])
            loaded.release()
    return objectives, plan, np.array(real), np.array(tasks)


def test_counted_texts_make_rows_full_and_shares_exact(recipe, capsys):
    objectives, plan, real, _ = planned_and_delivered(recipe)
    assert len(text_lines(objectives)) == 2
    before = real.mean() / objectives.length
    assert before < 0.8 < plan.describe()["fill"]  # planned with the most tokens, which few texts have

    assert main(["dataset", "lengths", str(recipe)]) == 0
    assert capsys.readouterr().out.count("tokens of the field") == 2
    assert main(["dataset", "lengths", str(recipe)]) == 0
    assert capsys.readouterr().out.startswith("no dataset of the recipe has a text field whose tokens are still")

    objectives, plan, real, by_task = planned_and_delivered(recipe)
    assert text_lines(objectives) == []
    planned = np.array([np.bincount(w.row, w.tokens, 32) for w in map(plan.windows, range(STEPS))])
    assert (planned == real).all()
    assert real.mean() / objectives.length > 0.85
    windows = np.array([np.bincount(w.row, w.tokens * ~w.prompt, 32) for w in map(plan.windows, range(STEPS))])
    assert windows.mean() / objectives.length == pytest.approx(plan.describe()["fill"], rel=0.01)
    assert by_task.sum(0) / by_task.sum() == pytest.approx([0.5, 0.5], rel=0.03)


def test_a_plan_with_other_counts_is_another_plan(recipe):
    _, plan, *_ = planned_and_delivered(recipe)
    state = plan.state_dict()
    main(["dataset", "lengths", str(recipe)])
    _, counted, *_ = planned_and_delivered(recipe)
    with pytest.raises(ValueError, match="plan"):
        counted.load_state_dict(state)


def test_every_step_of_a_counted_dataset_is_equally_likely(recipe):
    """Also those with long texts, which take more room than others: χ² over the number of tokens of a step's texts."""
    from tests.dataio.plan.test_step_rates import p_value, rates
    from tiphys.dataio.sampling import PlanEntry

    main(["dataset", "lengths", str(recipe)])
    loaded = load_recipe(recipe)
    objectives = Objectives(loaded, open_datasets(loaded))
    index = objectives.index(0)
    lengths = objectives.lengths(0)
    counts = rates(PlanEntry(index, lengths, 1.0, "talk", [0], None), budget=objectives.length)
    running, steps = lengths.savings.running, np.asarray(index.steps)
    saved = np.concatenate([np.diff(running[f : f + n + 1]) for f, n in zip(lengths.savings.first, steps, strict=True)])
    groups = np.searchsorted(np.quantile(saved, [0.2, 0.4, 0.6, 0.8]), saved)
    assert p_value(counts, groups, np.ones(len(saved))) > 1e-4


def test_counts_belong_to_one_dataset_field_and_tokenizer(tmp_path):
    rng = np.random.default_rng(1)
    write(tmp_path / "talk", task("talk", "heard"), 5, rng)
    index = EpisodeIndex.open(str(tmp_path / "talk"))
    path = step_counts.write(index, "observation.heard", "one", lambda texts: [len(t) for t in texts])
    found = step_counts.read(index, "observation.heard", "one")
    texts = [t for e in range(5) for t in read_episode(index, e).fields["observation.heard"]]
    assert found.tolist() == [len(t) for t in texts]
    assert step_counts.read(index, "observation.heard", "two") is None
    assert step_counts.read(index, "observation.other", "one") is None
    for wrong in (found[:-1], found.astype(np.int64)):
        file = io.BytesIO()
        np.save(file, wrong)
        (tmp_path / "talk" / path).write_bytes(file.getvalue())
        with pytest.raises(DataError, match=r"lengths/.*\.npy.*count again"):
            step_counts.read(index, "observation.heard", "one")
    (tmp_path / "talk" / path).write_bytes(b"something else")
    with pytest.raises(DataError, match="not an array of"):
        step_counts.read(index, "observation.heard", "one")


def test_savings_equal_a_slow_sum():
    class Index:
        steps = np.array([3, 0, 5])

    counts = np.array([1, 9, 4, 2, 2, 0, 7, 3], np.uint16)
    saved = step_counts.savings(Index, [(np.array([True, True, True]), counts, 5, 2)])
    by_step = [5 - min(int(c), 5) for c in counts]
    for episode, (begin, steps) in enumerate([(0, 3), (3, 0), (3, 5)]):
        for t in range(steps + 1):
            wanted = sum(by_step[begin + s] for s in range(t) if s % 2 == 0)
            assert saved.running[saved.first[episode] + t] == wanted
