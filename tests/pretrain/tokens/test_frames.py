"""Relative actions and chunks: statistics of what is predicted, masks past the end, decoding from the observed state."""

import json
from typing import Any

import numpy as np
import pytest

from benchmarks.ideas.toys import write
from tests.pretrain.token_fixtures import ARM, GRID, make
from tiphys.dataio import frame_statistics as module
from tiphys.dataio import sampled_statistics
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec, Window
from tiphys.dataio.frame_statistics import frame_statistics
from tiphys.dataio.index import EpisodeIndex
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.objectives import Objectives
from tiphys.pretrain.tokens.batch import ACTION, TokenBatch
from tiphys.pretrain.tokens.describe import view_windows
from tiphys.pretrain.tokens.frames import range_of
from tiphys.pretrain.tokens.id_codecs import Bins
from tiphys.recipes.schema import Recipe, Run
from tiphys.recipes.sections.data import Data, Entry
from tiphys.recipes.sections.model import Model
from tiphys.recipes.sections.objective import FieldTokens, Objective, Relative

ROBOT = TaskSpec(
    "robot",
    (
        FieldSpec("observation.state", "observation", "continuous", "float32", (4,)),
        FieldSpec("action", "action", "continuous", "float32", (3,)),
    ),
)
COLUMNS = [2, None, 0]  # of the state; the second entry, a gripper, stays absolute
RELATIVE = Relative(to="observation.state", columns=COLUMNS)
LENGTHS = (11, 7, 3, 16)


def episodes() -> list[Episode]:
    """States far from 0, actions near them, and a gripper that opens once."""
    rng, made = np.random.default_rng(0), []
    for number, steps in enumerate(LENGTHS):
        state = (50 + rng.normal(0, 5, (1, 4)) + rng.normal(0, 1, (steps, 4)).cumsum(axis=0)).astype(np.float32)
        action = np.stack([state[:, 2] + rng.normal(0, 0.1, steps), np.zeros(steps), state[:, 0] - 1], 1).astype("f4")
        made.append(Episode(f"e{number}", "robot", {"observation.state": state, "action": action}, steps))
    made[3].fields["action"][5, 1] = 1
    return made


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> EpisodeIndex:
    return EpisodeIndex.open(write(tmp_path_factory.mktemp("robot") / "data", [ROBOT], episodes()))


def objectives(index: EpisodeIndex, **options: Any) -> Objectives:
    options = {"horizon": 5, "chunk": 2, "head": "l2", "fields": {"action": FieldTokens(relative=RELATIVE)}, **options}
    recipe = Recipe(
        name="test",
        data=Data(mixture=[Entry(dataset="unused", objective="it")]),
        objectives={"it": Objective(paradigm="bc", context=40, **options)},
        model=Model(text_vocabulary=600),
        run=Run(dir="unused"),
    )
    return Objectives(recipe, [index])


def window(episode: Episode, start: int, steps: int, after: int = 4) -> Window:
    rows = slice(start, min(start + steps + after, episode.steps))
    count = rows.stop - start
    return Window(
        entry=0,
        task=0,
        episode=episode.id,
        start=start,
        steps=steps,
        episode_steps=episode.steps,
        fields={name: np.asarray(v)[rows] for name, v in episode.fields.items()},
        step=np.arange(start, rows.stop),
        returns_to_go=np.zeros(count, np.float32),
        valid=np.ones(count, bool),
    )


def derived(episode: Episode, t: int, k: int) -> np.ndarray:
    """The relative action, entry by entry."""
    state, action = (np.asarray(episode.fields[n], np.float64) for n in ("observation.state", "action"))
    return np.array([action[t + k, i] - (0 if c is None else state[t, c]) for i, c in enumerate(COLUMNS)])


def test_statistics_are_those_of_the_derived_values(index: EpisodeIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, horizon = (2, -1, 0), 5
    found = frame_statistics(index, 0, "action", "observation.state", columns, horizon)
    oracle = np.stack(
        [derived(e, t, k) for e in episodes() for t in range(e.steps) for k in range(min(horizon, e.steps - t))]
    )
    assert found.count == len(oracle)
    for mine, theirs in ((found.mean, oracle.mean(0)), (found.std, oracle.std(0))):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9)
    np.testing.assert_allclose(found.min, oracle.min(0), rtol=1e-6)
    exact = np.quantile(oracle, (0.01, 0.99), axis=0)
    np.testing.assert_allclose(found.at((0.01, 0.99)), exact, rtol=0.02, atol=0.02)

    monkeypatch.setattr(module, "_values", None)  # a second time, they are read
    again = frame_statistics(index, 0, "action", "observation.state", columns, horizon)
    assert again.to_dict() == found.to_dict()
    np.testing.assert_array_equal(again.at((0.003, 0.4)), found.at((0.003, 0.4)))


def test_a_large_dataset_is_sampled_and_the_sample_is_printed(
    index: EpisodeIndex, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sampled_statistics, "MOST_VALUES", 30)
    found = frame_statistics(index, 0, "action", "observation.state", (0, 0, 0), 2)
    assert 0 < found.count < 2 * sum(LENGTHS)
    assert f"of {sum(LENGTHS)} steps, a random sample of" in capsys.readouterr().out


def test_the_range_of_a_gripper_is_that_of_its_extremes() -> None:
    class Found:
        min, max = np.array([-3.0, 0.0]), np.array([3.0, 1.0])
        mean, std = np.array([0.5, 0.0]), np.array([2.0, 0.0])

        def at(self, levels: Any) -> np.ndarray:
            return np.array([[-2.0, 0.0], [2.0, 0.0]])  # it is open .5 % of the time

    assert [x.tolist() for x in range_of(Found(), "quantile")] == [[-2, 0], [2, 1]]
    assert [x.tolist() for x in range_of(Found(), "bounds")] == [[-3, 0], [3, 1]]
    assert [x.tolist() for x in range_of(Found(), "standard")] == [[-1.5, -1], [2.5, 1]]


@pytest.mark.parametrize("normalise", ["quantile", "bounds", "standard"])
def test_chunks_are_counted_from_the_observed_state(index: EpisodeIndex, normalise: str) -> None:
    made = objectives(index, fields={"action": FieldTokens(relative=RELATIVE, normalise=normalise)})
    assert made.needs(0).after == 4
    episode, start = episodes()[0], 3
    batch = TokenBatch.from_arrays(made.make_batch(0, np.array([0]), [[window(episode, start, 7)]], seed=0))
    found, codec = next(iter(batch.chunks.values())), made.layouts[0][0].elements[1].codec
    assert codec is not None
    assert batch.targets == len(found.index) == 4  # steps 3, 5, 7 and 9 are observed
    assert found.count.tolist() == [5, 5, 4, 2]  # the episode ends after 11
    inputs = batch.embedded[codec.embedder].value
    for row, t in enumerate((3, 5, 7, 9)):
        decoded = codec.decode(found.value[row][None, None])[0]
        for k in range(int(found.count[row])):
            np.testing.assert_allclose(decoded[k], derived(episode, t, k), atol=1e-5)  # of values near 50
        assert not found.value[row].reshape(5, 3)[int(found.count[row]) :].any()
        np.testing.assert_array_equal(inputs[row], found.value[row][: 2 * 3])  # what is executed is what is seen


def replay(made: Objectives, episode: Episode) -> list[np.ndarray]:
    """The actions of a policy whose model always answers what was done, from the observed state of each chunk."""
    processor = Processor.from_dict(json.loads(json.dumps(made.processor())))
    history, out = processor.history("robot"), []
    for t in range(episode.steps):
        seen = {"observation.state": episode.fields["observation.state"][t]}
        if history.plans(0):
            out.append(history.follow([seen])["action"][0])
            continue
        history.observe([seen])
        whole = TokenBatch.from_arrays(
            made.make_batch(0, np.array([0]), [[window(episode, t, min(2, episode.steps - t))]], seed=0)
        )
        if whole.chunks:
            answers = [next(iter(whole.chunks.values())).value[:1]]
        else:
            ids = whole.tokens[0, whole.modality[0] == ACTION]
            answers = [ids[i : i + 1] for i in range(3)]
        fields = history.decode(answers)
        history.acted(fields)
        out.append(fields["action"][0])
    return out


def test_what_is_decoded_is_what_was_done(index: EpisodeIndex) -> None:
    made, episode = objectives(index), episodes()[1]
    found = np.stack(replay(made, episode))
    np.testing.assert_allclose(found, episode.fields["action"], rtol=1e-6, atol=1e-6)


def test_ids_of_relative_actions_round_trip(index: EpisodeIndex) -> None:
    """Bins clamp, so their range is that of the data, and what is decoded is at most half a bin off."""
    made, episode = objectives(index, head="auto", horizon=0, chunk=0), episodes()[2]
    codec = made.layouts[0][0].elements[1].codec
    assert isinstance(codec, Bins)
    width = (np.array(codec.high) - codec.low) / codec.bins
    assert (np.abs(np.stack(replay(made, episode)) - episode.fields["action"]) <= width / 2 + 1e-5).all()


def test_a_history_equals_the_training_window(index: EpisodeIndex) -> None:
    """Also where the window has hopped: what was executed stands where it stood in training."""
    made, episode = objectives(index, window=8), episodes()[3]
    processor = Processor.from_dict(json.loads(json.dumps(made.processor())))
    history, number = processor.history("robot"), 0
    for t in range(8):
        seen = {"observation.state": episode.fields["observation.state"][t]}
        if history.plans(0):
            history.follow([seen])
            continue
        acting = history.observe([seen])
        whole = TokenBatch.from_arrays(made.make_batch(0, np.array([0]), [[window(episode, 0, t + 1)]], seed=0))
        number = whole.real_tokens - 1  # without the action itself
        for name in ("tokens", "position", "local", "segment", "timestep", "modality"):
            np.testing.assert_array_equal(getattr(acting.batch, name)[0, :number], getattr(whole, name)[0, :number])
        for name, part in whole.embedded.items():
            mine = part.index < number
            np.testing.assert_allclose(acting.batch.embedded[name].value[: mine.sum()], part.value[mine], atol=2e-6)
        chunk = next(iter(whole.chunks.values())).value[-1:]
        fields = history.decode([chunk])
        history.acted(fields)
    assert number == 7


def test_tokens_show_relative_and_absolute_values(index: EpisodeIndex) -> None:
    made, episode = objectives(index, head="flow"), episodes()[0]
    shown = window(episode, 3, 2)
    batch = TokenBatch.from_arrays(made.make_batch(0, np.array([0]), [[shown]], seed=0))
    views = view_windows(batch, 0, [shown], made.layouts, made.vocabulary, made.text)[0].elements
    action = next(v for v in views if v.field == "action")
    assert action.value.startswith("relative ")
    first = f"{float(np.float32(episode.fields['action'][3, 2])):.3g}"
    assert first in action.value.split("absolute ")[1].split()
    observed = next(v for v in views if v.field == "observation.state")
    assert observed.predicted.startswith("relative ")
    assert observed.weight == 1


REFUSED = {
    "columns[1] is 9, but 'observation' has the columns 0 to 4": {"columns": [0, 9]},
    "`columns` has 1 entries, but the action has 2": {"columns": [0]},
    "the task has no field 'nothing'": {"to": "nothing"},
    "'reward' is a field of role 'reward'": {"to": "reward"},
    "has `columns` but no `to`": {"to": ""},
    "a horizon of 2 is shorter than the chunk of 4": {"horizon": 2, "chunk": 4},
    "would see the actions of its `horizon`": {"horizon": 4, "head": "l2", "paradigm": "unimask"},
    "their `horizon` is the chunk, 2, not 4": {"horizon": 4, "chunk": 2, "head": "bins"},
    "contradicts `discretise: yes`": {"head": "flow", "discretise": "yes"},
    "`context` is at most 65536": {"head": "flow", "context": 1 << 17},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_is_refused(said: str) -> None:
    options = {"context": 60, **REFUSED[said]}
    relative = {"to": "observation", "columns": [0, 1]}
    relative |= {n: options.pop(n) for n in ("to", "columns") if n in options}
    paradigm = str(options.pop("paradigm", "bc"))
    given = Relative(**relative) if REFUSED[said].keys() & {"to", "columns"} else Relative()
    with pytest.raises(DataError) as refused:
        make([ARM], paradigm, fields={"action": FieldTokens(relative=given)}, **options)
    assert said in str(refused.value)


def test_an_image_is_no_state() -> None:
    camera = TaskSpec("camera", (FieldSpec("eye", "observation", "image", "uint8", (16, 16, 3)), *ARM.fields))
    tokens = FieldTokens(relative=Relative(to="eye", columns=[0, 1]))
    with pytest.raises(DataError, match="can only be relative to numbers that are observed"):
        make([camera], "bc", context=60, fields={"action": tokens})
    with pytest.raises(DataError, match="one continuous action field"):
        make([GRID], "bc", context=60, head="flow")


def test_normalised_bins_count_what_they_clamp() -> None:
    with pytest.raises(DataError, match=r"lie outside low/high and would be clipped; choose `normalise: bounds`"):
        make([ARM], "bc", context=60, fields={"action": FieldTokens(normalise="quantile")})
    made = make(
        [ARM],
        "bc",
        context=60,
        fields={"action": FieldTokens(normalise="quantile")},
        options={"allow_clipped": 0.05},
    )
    assert 0.01 < made.clipped()["arm/action"] < 0.05


def test_bins_may_have_the_horizon_of_their_chunk() -> None:
    made, plain = (make([ARM], "bc", context=60, chunk=2, **more) for more in ({"horizon": 2}, {}))
    assert made.processor() == plain.processor()
