"""`tiphys check` refuses data that lack what a paradigm requires, with the key and what to do."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.ideas.toys import write
from benchmarks.ideas.worlds import Cued, Goal, Told, behave
from tests.launch.one_step import write as recipe_file
from tiphys.launch.check import check
from tiphys.recipes.load import RecipeError


def recipe(tmp_path, dataset, paradigm, **model):
    return recipe_file(
        tmp_path,
        {
            "name": "small",
            "data": {"mixture": [{"dataset": dataset, "objective": paradigm}], "validation": 0.0},
            "objectives": {paradigm: {"context": 32, "window": 2}},
            "model": {"layers": 1, "hidden": 32, "heads": 2, "text_vocabulary": 300, **model},
            "deepspeed": {"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            "run": {"dir": str(tmp_path / "run")},
        },
    )


def goals(folder, number, episodes=3):
    worlds = [Goal(goal) for goal in range(number)]
    played = [(world, behave(world, episodes, 0, world.expert)) for world in worlds]
    return write(folder, [w.task for w in worlds], [e for w, p in played for e in p.episodes(w.task, w.task.name)])


def test_a_prompt_needs_several_tasks_to_tell_apart(tmp_path):
    with pytest.raises(RecipeError, match=r"objectives.prompt-dt: .*there is only goal-0; train it on several tasks"):
        check(recipe(tmp_path, goals(tmp_path / "one", 1), "prompt-dt"))
    two = goals(tmp_path / "two", 2)
    check(recipe(tmp_path, two, "prompt-dt"))
    moe = {"experts": 2, "every": 1, "experts_per_token": 1, "task": True}
    with pytest.raises(RecipeError, match=r"model.moe.task: the router sees the task"):
        check(recipe(tmp_path, two, "prompt-dt", moe=moe))


def test_a_prompt_needs_another_episode(tmp_path):
    with pytest.raises(RecipeError, match=r"shows another episode of the same task, but task 'goal-1' of .* has 1;"):
        check(recipe(tmp_path, goals(tmp_path / "data", 2, episodes=1), "prompt-dt"))


def test_an_instruction_must_differ_within_a_task(tmp_path):
    with pytest.raises(RecipeError, match=r"mixture\[0\].objective: .*task 'goal-0' of .* has no text that differs"):
        check(recipe(tmp_path, goals(tmp_path / "silent", 1), "text-dt"))
    for name, told in (("same", np.zeros(4, int)), ("other", np.arange(4))):
        world = Told(told)
        data = behave(world, 4, 0, world.expert).episodes(world.task, "told", {"mission": world.missions})
        file = recipe(tmp_path, write(tmp_path / name, [world.task], data), "text-dt")
        if name == "other":
            check(file)
            continue
        with pytest.raises(RecipeError, match=r"task 'told' of .* has no text that differs"):
            check(file)


def test_hidden_returns_need_no_rewards(tmp_path):
    world = Cued(rewarded=False)
    data = write(tmp_path / "data", [world.task], behave(world, 3, 0, world.competent).episodes(world.task, "bare"))
    check(recipe(tmp_path, data, "pdt"))
    with pytest.raises(RecipeError, match="has no field 'reward'"):
        check(recipe(tmp_path, data, "dt"))
