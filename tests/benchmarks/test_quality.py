"""The benchmark of quality: its arithmetic, its record of stages, its recipes, and its agents."""

import json

import numpy as np
import pytest
import torch

from benchmarks.quality import moe, paradigms, small, weak
from benchmarks.quality.__main__ import main
from benchmarks.quality.figures import Played, interval, iqm, matrix, normalised, span, two, worst_task
from benchmarks.quality.stages import Stages
from benchmarks.quality.work import spent
from tests.pretrain.model.test_moe import make_batch, make_layout, make_moe
from tiphys.dataio import environments
from tiphys.recipes.load import from_dict


def played(rate, episodes=50):
    return Played(rate, 0.0, episodes, random=0.0, expert=1.0, success=True)


# Arithmetic


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 24, 72, 75])
def test_the_interquartile_mean_is_that_of_rliable(count):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(count).normal(size=count)
    assert iqm(values) == pytest.approx(stats.trim_mean(values, proportiontocut=0.25, axis=None))
    assert iqm(values.reshape(1, -1)) == iqm(values[::-1])


def test_a_score_is_normalised_between_random_actions_and_the_expert():
    assert normalised(20, 20, 500) == 0
    assert normalised(500, 20, 500) == 1
    assert normalised(-600, -1200, -200) == pytest.approx(0.6)
    with pytest.raises(ValueError, match="both score 3"):
        normalised(3, 3, 3)


def test_what_was_played_is_read_from_an_evaluation():
    scores = {"normalise": "success", "success_rate": 0.9, "mean_return": 7.0, "std_return": 2.0, "episodes": 40}
    scores |= {"random": 0.1, "expert": 0.9}
    assert Played.of(scores).score == pytest.approx(1.0)
    returns = Played.of({**scores, "normalise": "return"}, random=5.0, expert=9.0)
    assert (returns.score, returns.std) == (0.5, 2.0)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    for true in (0.5, 0.9, 0.98):
        rates = rng.binomial(50, true, 200) / 50
        covered = [low <= true <= high for low, high in (interval([[played(r)]], draws=400) for r in rates)]
        assert np.mean(covered) >= 0.9


def test_an_interval_of_perfect_scores_is_not_a_point_and_shrinks_with_episodes():
    few, many = (interval([[played(1.0, n)]]) for n in (10, 1000))
    assert few[0] < many[0] < 1.0


def test_an_interval_over_seeds_includes_what_differs_between_them():
    alike, apart = [played(0.5, 500)] * 3, [played(r, 500) for r in (0.1, 0.5, 0.9)]
    (a, b), (c, d) = interval([alike]), interval([apart])
    assert b - a < 0.1
    assert d - c > 0.3


def test_the_worst_task_is_the_lowest_mean_over_seeds():
    tasks = [[played(0.9), played(0.1)], [played(0.4), played(0.4)]]
    assert worst_task(matrix(tasks)) == pytest.approx(0.4)
    assert [two(x) for x in (0.966, 1.0, 0.0, -0.05, -0.001)] == [".97", "1.00", ".00", "−.05", ".00"]
    assert span((-0.1, 1.0)) == "−.10 to 1.00"


# The record of stages


def test_a_finished_stage_is_not_done_again_but_one_with_other_settings_is(tmp_path):
    did = []

    def run(task, settings):
        with Stages(tmp_path) as stages:
            return stages.run("played", {"task": task}, settings, lambda: did.append(task) or {"n": len(did)})["result"]

    assert [run("a", 1), run("a", 1), run("a", 2), run("b", 1), run("a", 1)] == [{"n": n} for n in (1, 1, 2, 3, 1)]
    assert did == ["a", "a", "b"]


def test_a_line_that_a_crash_cut_off_is_done_again_and_a_failed_stage_leaves_no_line(tmp_path):
    def fail():
        raise RuntimeError("no")

    file = tmp_path / "stages.jsonl"
    with Stages(tmp_path) as stages:
        stages.run("played", {"task": "ä"}, 1, lambda: {"n": 1})
        with pytest.raises(RuntimeError):
            stages.run("played", {"task": "c"}, 1, fail)
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: len(whole) // 2])
    with Stages(tmp_path) as stages:
        assert stages.run("played", {"task": "ä"}, 1, fail)["result"] == {"n": 1}
        stages.run("played", {"task": "b"}, 1, lambda: {"n": 2})
    assert [json.loads(line)["result"]["n"] for line in file.read_text().splitlines()] == [1, 2]


def test_a_folder_belongs_to_one_process(tmp_path):
    with Stages(tmp_path), pytest.raises(BlockingIOError, match="another process"):
        Stages(tmp_path)


def test_operations_are_counted_over_the_steps_between_lines(tmp_path):
    lines = [
        {"kind": "plan", "step": 0},
        {"step": 10, "flops": 2.0, "tokens": 5},
        {"step": 20, "flops": 3.0, "tokens": 5},
        {"step": 20, "flops": 3.0, "tokens": 5},  # a resumed run did it again
        {"step": 25, "flops": 1.0, "tokens": 5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert spent(tmp_path / "metrics.jsonl") == {"steps": 25, "flops": 55.0, "tokens": 125.0}


# Recipes


def test_the_small_set_has_24_tasks_and_none_that_is_held_out():
    tasks = small.tasks_of("small", [], {})
    assert len(tasks) == len(set(tasks)) == 24
    assert not set(tasks) & set(small.HELD_OUT)
    assert set(small.HELD_OUT.values()) <= set(tasks)
    assert set(tasks) | set(small.HELD_OUT) <= set(environments.names())


def test_the_full_set_adds_metaworld_and_the_tasks_of_agents(tmp_path):
    file = tmp_path / "agents.json"
    file.write_text(json.dumps({"HalfCheetah-v4": "tqc/agent.zip", "ALE/Pong-v5": "mine:Agent"}))
    agents = small.agents_of(str(file))
    assert agents == {"HalfCheetah-v4": str(tmp_path / "tqc/agent.zip"), "ALE/Pong-v5": "mine:Agent"}
    tasks = small.tasks_of("full", [], agents)
    assert len(tasks) == 24 + 40 - 2 + 2
    assert not set(tasks) & set(small.HELD_OUT)
    assert small.tasks_of("full", ["ALE/*"], agents) == ["ALE/Pong-v5"]


def test_the_recipe_of_all_tasks_is_valid_and_weighs_families_as_it_says():
    tasks = small.tasks_of("small", [], {})
    made = small.recipe({t: f"data/{t}" for t in tasks}, [t for t in tasks if t.startswith("metaworld")])
    recipe = from_dict({"name": "x", **made, "run": {"dir": "x"}})
    shares = {f: sum(e.weight for e in recipe.data.mixture if f in e.dataset) for f in ("BabyAI", "metaworld")}
    assert shares == pytest.approx({"BabyAI": 0.4, "metaworld": 0.4})
    assert sum(e.weight for e in recipe.data.mixture) == pytest.approx(1.0)
    first = {e.dataset: e.objective for e in reversed(recipe.data.mixture)}
    assert "prompted" not in first.values()  # the first objective of a task plays it


def test_recipes_of_paradigms_and_experts_are_valid():
    for row in paradigms.ROWS.values():
        made = paradigms.recipe(row, dict.fromkeys(paradigms.EPISODES, "data"))
        from_dict({"name": "x", **made, "run": {"dir": "x"}})
        assert {key for asked in row.asked for key in paradigms.asking(asked, "CartPole-v1", "data")} <= {"CartPole-v1"}
    for model in moe.MODELS.values():
        made = moe.recipe(dict.fromkeys(moe.TASKS, "data"), model)
        from_dict({"name": "x", **made, "run": {"dir": "x"}})


# Agents and experts


def test_an_agent_of_mixed_quality_depends_on_the_seed_alone():
    env = environments.make("Pendulum-v1")
    actors = weak.Mixed("Pendulum-v1", env), weak.Mixed("Pendulum-v1", env)

    def strong(actor, seed):
        observation, _ = env.reset(seed=seed)
        actor.reset()
        return abs(float(actor.act(observation)[0])) != 0.5

    found = [strong(actors[0], seed) for seed in range(200)]
    assert found[::-1] == [strong(actors[1], seed) for seed in range(199, -1, -1)]
    assert np.mean(found) == pytest.approx(weak.EXPERT["Pendulum-v1"], abs=0.08)


def test_other_experts_are_used_only_inside():
    layer = make_moe(num_experts_per_tok=2).eval()
    batch = make_batch(rows=2)
    layout = make_layout(batch)
    x = torch.randn(batch.real_tokens, 32, generator=torch.Generator().manual_seed(1))
    before = layer(x, layout)
    with moe.assigned([layer], lambda number, chosen: chosen):
        assert torch.equal(layer(x, layout), before)
    with moe.assigned([layer], lambda number, chosen: (chosen + 1) % layer.num_experts):
        assert not torch.allclose(layer(x, layout), before)
    assert torch.equal(layer(x, layout), before)


@pytest.mark.long
def test_a_small_run_is_not_repeated(tmp_path, capsys):
    line = [
        "small",
        "--to",
        str(tmp_path),
        "--seeds",
        "0",
        "--tasks",
        "CartPole-v1",
        "--episodes",
        "2",
        "--scale",
        "0.2",
    ]
    line += ["--minutes", "0.02", "--processes", "1"]
    assert main(line) == 0
    stages = (tmp_path / "stages.jsonl").read_text()
    assert [json.loads(s)["stage"] for s in stages.splitlines()] == ["collected", "paced", "trained", "evaluated"]
    first = capsys.readouterr().out
    assert main(line) == 0
    assert (tmp_path / "stages.jsonl").read_text() == stages
    again = capsys.readouterr().out
    assert "| CartPole |" not in again
    assert again.splitlines()[-1] == first.splitlines()[-1]
