"""Environments equal the ones that they wrap, depend on the seed alone, are found by name, and fit their specs."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from tiphys.dataio import environments
from tiphys.dataio.collect import play
from tiphys.dataio.environments import ExpertLost, Family, MissingExtra, Stateless, UnknownEnvironment
from tiphys.dataio.environments.family import space_fields
from tiphys.dataio.episode import DataError
from tiphys.dataio.observation import native, observation_fields

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("minigrid")
pytestmark = pytest.mark.envs


def same(a, b) -> bool:
    left, right = observation_fields(a), observation_fields(b)
    return left.keys() == right.keys() and all(np.array_equal(left[k], right[k]) for k in left)


def by_expert(task, env, noise=0.0):
    """An `act` function for `play`: the family's expert, disturbed by `noise`."""
    family, expert, rng = environments.family(task), environments.expert(task, env), np.random.default_rng(0)

    def act(observation, taken, reward=0.0):
        if taken is None:
            expert.reset()
        action = expert.act(observation, taken)
        return action, family.disturb(action, env.action_space, noise, rng) if noise else action

    return act


@pytest.mark.parametrize("level", ["BabyAI-GoToRedBallGrey-v0", "BabyAI-UnlockPickup-v0", "MiniGrid-Empty-5x5-v0"])
def test_grid_observations_equal_minigrids_own(level):
    env, plain = environments.make(level), gymnasium.make(level).unwrapped
    rng = np.random.default_rng(1)
    for seed in range(3):
        assert same(env.reset(seed=seed)[0], plain.reset(seed=seed)[0])
        for _ in range(40):
            action = int(rng.integers(7))
            mine, theirs = env.step(action), plain.step(action)
            assert same(mine[0], theirs[0])
            assert mine[1:4] == theirs[1:4]
            if mine[2] or mine[3]:
                break


@pytest.mark.parametrize("level", ["BabyAI-GoToLocal-v0", "BabyAI-UnlockLocal-v0"])
def test_our_bot_acts_like_babyais_own_bot(level):
    from minigrid.utils.baby_ai_bot import BabyAIBot

    env, plain = environments.make(level), gymnasium.make(level).unwrapped
    expert, rng = environments.expert(level, env), np.random.default_rng(0)
    for seed in range(4):
        observation, _ = env.reset(seed=seed)
        plain.reset(seed=seed)
        expert.reset()
        bot, taken = BabyAIBot(plain), None
        for _ in range(60):
            action = expert.act(observation, taken)
            assert action == int(bot.replan(taken))
            taken = int(rng.integers(3)) if rng.random() < 0.3 else action
            observation, _, terminated, truncated, _ = env.step(taken)
            plain.step(taken)
            if terminated or truncated:
                break


TASKS = ["BabyAI-GoToRedBallGrey-v0", "MiniGrid-MemoryS7-v0", "metaworld/reach-v3", "metaworld/push-v3", "CartPole-v1"]
# window-close-v3 is in the list because it needs both of Meta-World's resets
TASKS += ["metaworld/window-close-v3", "Pendulum-v1", "MountainCarContinuous-v0", "LunarLander-v3"]


@pytest.mark.parametrize("task", TASKS)
def test_an_episode_depends_on_its_seed_alone_and_fits_the_spec(task):
    if task.startswith("metaworld"):
        pytest.importorskip("metaworld")
    spec, used, fresh = environments.spec(task), environments.make(task), environments.make(task)
    play(used, task, 7, by_expert(task, used, 0.3))
    first, second = (play(env, task, 3, by_expert(task, env, 0.2)) for env in (used, fresh))
    assert len(first.actions) == len(second.actions) > 3
    assert all(same(a, b) for a, b in zip(first.observations, second.observations, strict=True))
    assert first.rewards == second.rewards
    assert (first.success is not None) == (spec.normalise == "success")
    for action in first.actions:
        assert used.action_space.contains(np.asarray(action, used.action_space.dtype))
    for name, value in observation_fields(first.observations[0]).items():
        declared = spec.field(name)
        if declared.modality == "text":
            assert isinstance(value, str)
            continue
        assert value.shape == declared.shape
        if declared.modality == "discrete":
            assert value.max() < declared.values


@pytest.mark.parametrize(
    ("task", "least"),
    [
        ("BabyAI-GoToRedBallGrey-v0", 1.0),
        ("MiniGrid-MemoryS7-v0", 1.0),
        ("metaworld/reach-v3", 1.0),
        ("metaworld/drawer-close-v3", 1.0),
        ("CartPole-v1", 500),
        ("Pendulum-v1", -260),
        ("MountainCar-v0", -130),
        ("MountainCarContinuous-v0", 85),
        ("LunarLander-v3", 150),
    ],
)
def test_experts_reach_good_scores(task, least):
    if task.startswith("metaworld"):
        pytest.importorskip("metaworld")
    env, spec = environments.make(task), environments.spec(task)
    played = [play(env, task, 500 + seed, by_expert(task, env)).outcome for seed in range(6)]
    assert np.mean([o.success if spec.normalise == "success" else o.total_return for o in played]) >= least


def test_the_memory_oracle_sees_the_clue_before_it_goes():
    """Otherwise its demonstrations could not be learned from the observations."""
    task = "MiniGrid-MemoryS13-v0"
    env: Any = environments.make(task)
    core = env.unwrapped
    for seed in range(12):
        trajectory = play(env, task, seed, by_expert(task, env))
        assert trajectory.success
        env.reset(seed=seed)
        seen = False
        for action in trajectory.actions:
            seen = seen or core.agent_sees(1, core.height // 2 - 1)
            env.step(action)
        assert seen


def test_specs_have_the_documented_fields_and_horizons():
    grid = environments.spec("BabyAI-GoToRedBallGrey-v0")
    image, mission = grid.field("observation.image"), grid.field("observation.mission")
    assert (image.modality, image.values, image.shape) == ("discrete", 11, (7, 7, 3))
    assert (mission.role, mission.per) == ("text", "episode")
    assert grid.max_steps == 64
    pytest.importorskip("metaworld")
    arm = environments.spec("metaworld/reach-v3")
    assert arm.field("observation").shape == (39,)
    assert (arm.field("action").low, arm.field("action").high, arm.field("action").shape) == ((-1.0,), (1.0,), (4,))
    assert arm.max_steps == 150
    assert [n for n in environments.names() if n.startswith("metaworld/")] == environments.family("metaworld/x").names()
    assert len(environments.family("metaworld/x").names()) == 50


def test_metaworld_shows_its_goal_which_depends_on_the_seed():
    pytest.importorskip("metaworld")
    env = environments.make("metaworld/reach-v3", horizon=3)
    goals = [env.reset(seed=seed)[0][-3:] for seed in (1, 2, 1)]
    assert np.array_equal(goals[0], goals[2])
    assert not np.array_equal(goals[0], goals[1])
    assert np.all(np.abs(goals[0]) > 0)
    flags = [env.step(np.zeros(4))[3] for _ in range(3)]
    assert flags == [False, False, True]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("BabyAI-GoToRedBalGrey-v0", "BabyAI-GoToRedBallGrey-v0"),
        ("metaworld/reech-v3", "metaworld/reach-v3"),
        ("cartpole", "CartPole-v1"),
        ("ALE/Pogn-v5", "ALE/Pong-v5"),
    ],
)
def test_unknown_names_are_answered_with_similar_ones(wrong, right):
    if right.startswith("ALE"):
        pytest.importorskip("ale_py")
    with pytest.raises(UnknownEnvironment, match=f"{wrong}.*{right}"):
        environments.make(wrong)


@pytest.mark.parametrize(
    ("task", "module", "extra"),
    [
        ("BabyAI-GoToLocal-v0", "minigrid", "envs"),
        ("metaworld/reach-v3", "metaworld.env_dict", "envs"),
        ("ALE/Pong-v5", "ale_py", "atari"),
        ("CartPole-v1", "gymnasium", "envs"),
    ],
)
def test_a_missing_extra_names_the_command_that_installs_it(task, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # as if the package were not installed
    with pytest.raises(MissingExtra, match=rf"pip install 'tiphys\[{extra}\]'"):
        environments.make(task)


class Counting(Family):
    """A user's family: a number goes up or stays, and must reach 3."""

    normalise = "success"

    def names(self):
        return ["counting/three"]

    def make(self, task, **options):
        class Count(gymnasium.Env):  # type: ignore[name-defined]
            observation_space = gymnasium.spaces.Dict({"a": gymnasium.spaces.Dict({"b": gymnasium.spaces.Discrete(9)})})
            action_space = gymnasium.spaces.Discrete(2)

            def reset(self, *, seed=None, options=None):
                self.count, self.left = 0, 5
                return {"a": {"b": 0}}, {}

            def step(self, action):
                self.count, self.left = self.count + action, self.left - 1
                done = self.count == 3
                return {"a": {"b": self.count}}, float(done), done, self.left == 0, {"success": done}

        return Count()

    def expert(self, task, env):
        return Stateless(lambda observation: 1)


class Point:
    def __init__(self, value):
        self.name, self.value = "counting", "tests:Counting"
        self._loaded = value

    def load(self):
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


def test_users_can_add_families_by_an_entry_point(monkeypatch):
    monkeypatch.setattr(environments, "_users", lambda: [Point(Counting)])
    assert "counting/three" in environments.names()
    assert environments.spec("counting/three").field("observation.a.b").values == 9
    env = environments.make("counting/three")
    assert play(env, "counting/three", 0, by_expert("counting/three", env)).success
    with pytest.raises(UnknownEnvironment, match="counting/three"):
        environments.make("counting/thre")
    monkeypatch.setattr(environments, "_users", lambda: [Point(ImportError("no such module"))])
    with pytest.raises(DataError, match=r"counting.*no such module"):
        environments.make("counting/three")


def test_a_disturbed_bot_finishes_or_raises_expert_lost():
    task = "BabyAI-PickupLoc-v0"
    env, finished = environments.make(task), 0
    for seed in range(10):
        try:
            finished += bool(play(env, task, seed, by_expert(task, env, 0.5)).success)
        except ExpertLost:
            continue
    assert finished >= 7


def test_tasks_without_an_expert_say_how_to_give_one():
    env = environments.make("Acrobot-v1")
    with pytest.raises(DataError, match="--policy"):
        environments.expert("Acrobot-v1", env)


def test_spaces_become_fields():
    spaces = gymnasium.spaces
    fields = {
        f.name: f
        for f in space_fields(
            spaces.Dict(
                camera=spaces.Box(0, 255, (8, 8, 3), np.uint8),
                joints=spaces.Box(-np.inf, np.inf, (3,), np.float64),
                hand=spaces.Tuple((spaces.Discrete(4), spaces.MultiBinary(3))),
            ),
            spaces.Box(np.array([-1, -2], np.float32), np.array([1, 2], np.float32)),
        )
    }
    assert fields["observation.camera"].modality == "image"
    assert fields["observation.joints"].low is None
    assert fields["observation.joints"].dtype == "float32"
    assert (fields["observation.hand.0"].values, fields["observation.hand.1"].values) == (4, 2)
    assert fields["action"].low == (-1.0, -2.0)


def test_ranges_of_integer_spaces_are_kept_by_entry():
    spaces = gymnasium.spaces

    def ranged(space):
        field = space_fields(spaces.Discrete(2), space)[1]
        return field.modality, field.values, field.low, field.high

    assert ranged(spaces.MultiDiscrete([2, 5])) == ("discrete", 5, (0.0,), (1.0, 4.0))
    assert ranged(spaces.MultiDiscrete([2, 5], start=[1, -1])) == ("discrete", 5, (1.0, -1.0), (2.0, 3.0))
    assert ranged(spaces.MultiDiscrete([3, 3])) == ("discrete", 3, None, None)
    assert ranged(spaces.Discrete(3, start=-1)) == ("discrete", 3, (-1.0,), (1.0,))
    assert ranged(spaces.Box(np.array([-1, 2]), np.array([3, 9]), dtype=np.int64))[1:] == (8, (-1.0, 2.0), (3.0, 9.0))
    assert ranged(spaces.Box(0, 9, (3,), np.int8)) == ("discrete", 10, None, None)
    assert ranged(spaces.Box(-(2**63), 2**63 - 1, (2,), np.int64)) == ("discrete", 0, None, None)
    assert ranged(spaces.Box(0, 255, (20, 20, 3), np.uint8)) == ("discrete", 256, None, None)  # no picture is an action
    board = space_fields(spaces.Box(0, 2, (8, 8), np.uint8), spaces.Discrete(2))[0]
    assert (board.modality, board.values, board.low) == ("discrete", 3, None)


def test_every_other_space_works_or_is_refused_by_name():
    spaces = gymnasium.spaces

    class Own(spaces.Box):  # type: ignore[name-defined]
        pass

    scalar = space_fields(Own(-1, 1, (), np.float32), spaces.MultiBinary([2, 3]))
    assert (scalar[0].shape, scalar[0].low, scalar[1].shape, scalar[1].values) == ((), (-1.0,), (2, 3), 2)
    assert space_fields(spaces.Text(5), spaces.Discrete(2))[0].modality == "text"
    open_ended = space_fields(spaces.Box(0, np.inf, (2,)), spaces.Box(-np.inf, np.inf, (1,)))
    assert (open_ended[0].high, open_ended[1].low, open_ended[1].high) == (None, None, None)
    for space, kind in (
        (spaces.Sequence(spaces.Discrete(3)), "Sequence"),
        (spaces.OneOf([spaces.Discrete(2)]), "OneOf"),
    ):
        with pytest.raises(DataError, match=rf"observation\.part: a space of kind {kind}.*wrap the environment"):
            space_fields(spaces.Dict(part=space), spaces.Discrete(2))
    with pytest.raises(DataError, match="action: a space of kind Text"):
        space_fields(spaces.Discrete(2), spaces.Text(5))


def test_a_disturbed_action_stays_in_its_space():
    spaces, rng = gymnasium.spaces, np.random.default_rng(0)
    family = environments.family("Acrobot-v1")
    for space in (
        spaces.Discrete(3, start=-1),
        spaces.MultiDiscrete([2, 5], start=[1, -1]),
        spaces.MultiBinary([2, 3]),
        spaces.Box(np.array([0, 200]), np.array([3, 255]), dtype=np.uint8),
        spaces.Dict(a=spaces.Box(-1, 1, (2,)), b=spaces.Tuple((spaces.Discrete(2), spaces.MultiBinary(1)))),
    ):
        taken = [family.disturb(space.sample(), space, 0.9, rng) for _ in range(30)]
        assert all(space.contains(action) for action in taken)
        assert len({str(action) for action in taken}) > 1
    with pytest.raises(DataError, match="cannot be disturbed"):
        family.disturb(np.zeros(1), spaces.Box(-np.inf, np.inf, (1,)), 0.5, rng)


def test_nested_values_can_be_flattened_and_restored():
    value = {"arm": {"move": np.ones(2), "grip": 1}, "base": np.zeros(3)}
    flat = observation_fields(value, "action")
    assert set(flat) == {"action.arm.move", "action.arm.grip", "action.base"}
    back = native(flat)
    assert np.array_equal(back["arm"]["move"], np.ones(2))
    assert int(back["arm"]["grip"]) == 1
    assert native({"action": 4}) == 4
    assert observation_fields(("a", {"b": 1})) == {"observation.0": "a", "observation.1.b": 1}
