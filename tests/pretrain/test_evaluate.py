"""Evaluation: the same on any number of processes, equal to the obvious loop, written whole or not at all."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gymnasium")
pytest.importorskip("minigrid")

import tests.pretrain.acting.acting_fixtures as acting
import tests.pretrain.token_fixtures as fixtures
from tiphys.dataio import environments
from tiphys.dataio.collect import LONGEST, EnvironmentFault, Outcome, Players
from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.dataio.shards import ShardWriter
from tiphys.launch.display import scores
from tiphys.pretrain import evaluate as evaluating
from tiphys.pretrain.acting.ask import Asking
from tiphys.pretrain.acting.play import play_group
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.acting.scores import bootstrap, by_objective, seen_share, summary, wilson
from tiphys.pretrain.acting.states import demonstrated_states, state_hash
from tiphys.pretrain.evaluate import evaluate
from tiphys.pretrain.played_groups import PlayedGroups

pytestmark = pytest.mark.envs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return acting.folder(tmp_path_factory.mktemp("policy"))


def test_the_result_does_not_depend_on_the_number_of_processes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluating, "GROUP", 2)
    tasks = [acting.CART, acting.GRID]
    one = evaluate(folder, tasks, episodes=5, processes=1, out=tmp_path / "one.json")
    two = evaluate(folder, tasks, episodes=5, processes=2, out=tmp_path / "two.json")
    assert one == two
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert json.loads((tmp_path / "one.json").read_text()) == one
    assert list(one["tasks"]) == tasks
    needed = {"episodes", "mean_return", "success_rate", "random", "expert", "expert_normalized"}
    for found in one["tasks"].values():
        assert needed <= set(found)
        assert found["episodes"] == 5


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A policy with two objectives."""
    of = fixtures.make_each([environments.spec(acting.CART)], ["bc", "dt"], context=60)
    return acting.folder(tmp_path_factory.mktemp("two"), of)


def test_results_are_given_by_task_objective_and_target_return(two, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluating, "GROUP", 2)
    asking = Asking(["dt", "bc"], {"*": "3"}, target_returns=["q0.1", "best"])
    found, again = (
        evaluate(two, episodes=3, processes=n, asking=asking, out=tmp_path / f"{n}.json")["tasks"][acting.CART]
        for n in (1, 2)
    )
    assert found == again
    assert (found["objective"], found["target_return"], list(found["objectives"])) == ("dt", 3.0, ["bc"])
    assert [(c["asked"], c["episodes"]) for c in found["curve"]] == [("q0.1", 3), ("best", 3)]
    low, high = (c["target_return"] for c in found["curve"])
    assert low < high
    assert "target_return" not in found["objectives"]["bc"]
    plain = evaluate(two, episodes=3, processes=1)["tasks"][acting.CART]
    assert plain == found["objectives"]["bc"]
    assert [(t, o) for t, o, _ in by_objective({"tasks": {acting.CART: found}})] == [
        (acting.CART, n) for n in ("dt", "bc")
    ]
    shown = scores({"tasks": {acting.CART: found}})
    assert shown.count(acting.CART) == 5  # four rows, and the line that says whose scores are not known
    assert "asked" in shown


def test_a_policy_that_demonstrates_is_asked_for_a_return_and_told_its_rewards(two, tmp_path):
    """The episodes equal those of an evaluation with the same seeds."""
    from tiphys.dataio.collect import collect
    from tiphys.dataio.dataset import read_episode
    from tiphys.pretrain.acting.play import PolicyExpert

    asking = Asking(["dt"], {acting.CART: "4"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = collect(
            acting.CART, str(tmp_path / "d"), 3, seed=7, noise=0.0, processes=1, score_episodes=1,
            policy=PolicyExpert(str(two), asking),
        )  # fmt: skip
    policy = Policy.load(two, "cpu")
    envs = [environments.make(acting.CART) for _ in range(3)]
    (ask,) = asking.asks(policy.processor, [acting.CART])
    played = play_group(policy, policy.processor.tasks[acting.CART], envs, [7, 8, 9], ask=ask)
    for number, one in enumerate(played):
        assert read_episode(index, number).fields["action"].tolist() == one.actions
    with pytest.raises(DataError, match="has no task 'Pendulum-v1'; its tasks are CartPole-v1"):
        PolicyExpert(str(two))("Pendulum-v1", envs[0])


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("task", [acting.CART, acting.GRID])
def test_episodes_played_together_equal_episodes_played_alone(folder, task, sample):
    policy = Policy.load(folder, "cpu", sample=sample)
    spec = policy.processor.tasks[task]
    seeds = [1_000_000, 1_000_001, 1_000_002]
    together = play_group(policy, spec, [environments.make(task) for _ in seeds], seeds)
    env = environments.make(task)
    for seed, played in zip(seeds, together, strict=True):
        policy.reset(task)
        policy.restart(0, stream=seed)
        (observation, _), done, actions, total, reward = env.reset(seed=seed), False, [], 0.0, 0.0
        while not done:
            actions.append(policy.act(observation, reward))
            observation, reward, terminated, truncated, _ = env.step(actions[-1])
            total, done = total + reward, terminated or truncated
        assert actions == played.actions
        assert total == pytest.approx(played.outcome.total_return)


def test_an_evaluation_that_was_killed_goes_on_after_the_episodes_that_it_has_played(folder, tmp_path, monkeypatch):
    tasks = [acting.CART, acting.GRID]
    monkeypatch.setattr(evaluating, "GROUP", 1)
    how = {"episodes": 2, "processes": 1, "sample": True, "pictures": tmp_path / "pictures"}
    whole = evaluate(folder, tasks, **how)
    keep, kept = PlayedGroups.keep, []

    def dies(self, group, played):
        keep(self, group, played)
        kept.append(group.seeds)
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(PlayedGroups, "keep", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, tasks, **how, resume=tmp_path / "played")
    assert evaluate(folder, tasks, **how, resume=tmp_path / "played") == whole
    first = evaluating.EVALUATION_SEEDS
    assert kept == [(first,), (first + 1,)] * 2
    evaluate(folder, tasks, **how | {"sample": False}, resume=tmp_path / "played")  # other actions
    assert kept[4:] == [(first,), (first + 1,)] * 2
    for file in (tmp_path / "played").iterdir():
        file.write_bytes(file.read_bytes()[:50])  # damaged: played again
    assert evaluate(folder, tasks, **how, resume=tmp_path / "played") == whole


def test_scores_of_known_outcomes():
    spec = acting.objectives([acting.GRID]).tasks[0]
    found = summary(spec, [Outcome(0.9, True, 5)] * 3 + [Outcome(0.0, False, 64)])
    assert found["success_rate"] == 0.75
    assert found["mean_return"] == pytest.approx(0.675)
    assert found["expert_normalized"] == pytest.approx((0.75 - 0.1) / 0.9)
    assert found["mean_length"] == pytest.approx((15 + 64) / 4)
    low, high = found["expert_normalized_interval"]
    assert low < found["expert_normalized"] < high
    cart = acting.objectives([acting.CART]).tasks[0]
    found = summary(cart, [Outcome(500.0, None, 500), Outcome(260.0, None, 260)])
    assert found["success_rate"] is None
    assert found["expert_normalized"] == pytest.approx((380 - 20) / 480)
    with pytest.raises(DataError, match="success"):
        summary(spec, [Outcome(1.0, None, 1)])


def test_intervals_contain_the_true_value_in_95_percent_of_cases():
    rng = np.random.default_rng(0)
    held = {"wilson": 0, "bootstrap": 0}
    for _ in range(300):
        low, high = wilson(int(rng.binomial(40, 0.9)), 40)
        held["wilson"] += low <= 0.9 <= high
        low, high = bootstrap(rng.normal(3.0, 2.0, 40), draws=500)
        held["bootstrap"] += low <= 3.0 <= high
    for count in held.values():
        assert 0.90 <= count / 300 <= 0.99
    assert wilson(40, 40)[1] == pytest.approx(1.0)
    assert wilson(0, 40)[0] == pytest.approx(0.0)


def test_pictures_show_the_scored_episodes(folder, tmp_path):
    from PIL import Image

    found = evaluate(folder, [acting.GRID], episodes=2, processes=1, pictures=tmp_path / "pictures", videos=2)
    drawn = found["tasks"][acting.GRID]["pictures"]
    assert [d["seed"] for d in drawn] == [1_000_000, 1_000_001]
    with Image.open(tmp_path / "pictures" / drawn[0]["file"]) as strip:
        pixels = np.asarray(strip.convert("RGB"))
    assert pixels.shape[0] == 160
    first = environments.make(acting.GRID, render_mode="rgb_array")
    first.reset(seed=1_000_000)
    expected = np.asarray(Image.fromarray(np.asarray(first.render(), np.uint8)).resize((160, 160)))
    assert np.array_equal(pixels[:, :160], expected)


def test_the_share_of_seen_states_is_given_if_states_can_repeat(folder, tmp_path):
    from tiphys.dataio.collect import collect

    collect({acting.GRID: 3, acting.CART: 1}, str(tmp_path / "data"), processes=1, score_episodes=1)
    tasks = [acting.GRID, acting.CART]
    found = evaluate(folder, tasks, episodes=2, processes=1, demonstrations=[str(tmp_path / "data")])["tasks"]
    assert 0 <= found[acting.GRID]["seen_states"] <= 1
    assert found[acting.CART]["seen_states"] is None


def test_scores_are_kept_if_a_picture_cannot_be_drawn(folder, tmp_path, monkeypatch):
    made = environments.make

    def blind(task, **options):
        if options:
            raise RuntimeError("no display")
        return made(task)

    monkeypatch.setattr(environments, "make", blind)
    found = evaluate(folder, [acting.CART], episodes=1, processes=1, pictures=tmp_path)
    assert "no display" in found["tasks"][acting.CART]["pictures"][0]["error"]


def test_states_of_demonstrations_are_recognised(tmp_path):
    spec = environments.spec(acting.GRID)
    with Players(1) as players, ShardWriter(str(tmp_path / "data"), [spec]) as writer:
        episodes = list(players.demonstrations(spec, 6, 0, None))
        for episode in episodes[:4]:
            writer.write(episode)
    hashed = state_hash(spec)
    assert hashed is not None
    assert state_hash(environments.spec(acting.CART)) is None

    def states(episode):
        rows = episode.fields["observation.image"], episode.fields["observation.direction"]
        mission = episode.fields["observation.mission"]
        return [hashed({"image": i, "direction": int(d), "mission": mission}) for i, d in zip(*rows, strict=True)]

    known = demonstrated_states(spec, [str(tmp_path / "data")])
    inside, outside = ({s for e in part for s in states(e)} for part in (episodes[:4], episodes[4:]))
    assert set(known.tolist()) == inside
    thirds = [demonstrated_states(spec, [str(tmp_path / "data")], (i, 3)) for i in range(3)]
    assert set(np.concatenate(thirds).tolist()) == inside
    share = seen_share([np.array(states(e), np.uint64) for e in episodes], [known[:3], known[3:]])
    visited = [s for e in episodes for s in states(e)]
    assert share == pytest.approx(np.mean([s in inside for s in visited]))
    assert outside - inside  # otherwise this test would prove nothing
    assert share is not None
    assert 0 < share < 1


def test_errors_name_what_is_wrong_and_no_file_is_written(folder, tmp_path):
    out = tmp_path / "evaluation.json"
    with pytest.raises(DataError, match=r"metaworld/reach-v3.*CartPole-v1"):
        evaluate(folder, ["metaworld/reach-v3"], out=out)
    with pytest.raises(DataError, match="0 episodes"):
        evaluate(folder, episodes=0, out=out)
    assert not out.exists()


def test_the_error_of_an_environment_names_task_seed_and_step(folder):
    policy = Policy.load(folder, "cpu")

    class Broken:
        def reset(self, *, seed):
            return np.zeros(4, np.float32), {}

        def step(self, action):
            raise OSError("the simulator is gone")

    broken: Any = Broken()
    with pytest.raises(EnvironmentFault, match=r"CartPole-v1.*seed 5, step 0.*simulator is gone"):
        play_group(policy, policy.processor.tasks[acting.CART], [broken], [5])


def policy_of(path: Path, spec: TaskSpec) -> Path:
    """The folder of a policy for this task, with random weights."""
    return acting.folder(path, fixtures.make([spec], "bc", context=60, scheme="compact"))


@pytest.mark.parametrize(("max_steps", "most"), [(0, 500), (3, 3), (700, 500)])
def test_episodes_end_after_the_max_steps_of_the_task(tmp_path, max_steps, most):
    """The scores of this task refer to 3 steps: a policy that stays alive so long is as good as the expert."""
    spec = replace(environments.spec(acting.CART), random=0.0, expert=3.0, max_steps=max_steps)
    found = evaluate(policy_of(tmp_path, spec), episodes=2, processes=1)["tasks"][acting.CART]
    assert found["mean_length"] <= most
    if max_steps == 3:
        assert (found["mean_length"], found["expert_normalized"]) == (3, 1.0)
    else:
        assert found["mean_length"] > 3


def test_an_environment_is_made_with_a_longer_horizon_if_the_task_has_one():
    stage = evaluating._Stage(replace(environments.spec(acting.CART), max_steps=700))
    (env,) = stage.environments(1)
    assert env.spec.max_episode_steps == 700  # type: ignore[attr-defined]
    assert stage.limit == LONGEST
    unchanged = evaluating._Stage(environments.spec(acting.GRID))
    assert (
        unchanged.limit == LONGEST
    )  # a level's horizon depends on its mission, and the environment ends episodes itself


def test_discrete_actions_of_shape_1_act_in_cartpole(tmp_path):
    """Some formats store scalars as arrays of one number, without the number of values."""
    cart = environments.spec(acting.CART)
    action = FieldSpec("action", "action", "discrete", "int64", (1,))
    spec = replace(cart, fields=(*(f for f in cart.fields if f.name != "action"), action), max_steps=5)
    found = evaluate(policy_of(tmp_path, spec), episodes=3, processes=1, sample=True)
    assert found["tasks"][acting.CART]["episodes"] == 3


def test_an_environment_of_another_shape_is_named_in_one_sentence(tmp_path):
    cart = environments.spec(acting.CART)
    wide = replace(cart.field("observation"), shape=(6,), low=None, high=None)
    spec = replace(cart, fields=(wide, *(f for f in cart.fields if f.name != "observation")))
    with pytest.raises(DataError) as caught:
        evaluate(policy_of(tmp_path, spec), episodes=1, processes=1)
    assert str(caught.value) == (
        "task 'CartPole-v1', field 'observation': its data have shape (6,), but environment 'CartPole-v1' has shape (4,)"
    )


def test_a_module_that_the_policy_names_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text("import pathlib; pathlib.Path('imported').touch()")
    monkeypatch.chdir(tmp_path)
    folder = policy_of(
        tmp_path / "policy", replace(environments.spec(acting.CART), environment="evil_module:CartPole-v1")
    )
    for tasks in (None, [acting.CART]):
        with pytest.raises(DataError, match=r"'evil_module'.*comes from data.*--modules evil_module"):
            evaluate(folder, tasks, episodes=1, processes=1)
    assert not (tmp_path / "imported").exists()
    evaluate(folder, episodes=1, processes=1, modules=["evil_module"])
    assert (tmp_path / "imported").exists()


def test_importing_evaluate_imports_no_torch_and_no_environments():
    import subprocess

    code = "import sys, tiphys.pretrain.evaluate; assert not {'torch', 'transformers', 'gymnasium'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
