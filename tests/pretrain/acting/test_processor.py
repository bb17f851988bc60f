"""Acting: a history that grows step by step has the tokens of a training window, and answers become native actions."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.pretrain.token_fixtures import ARM, CAMERA, CAPTION, GRID, FakeIndex, make, window
from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.recipes.sections.objective import FieldTokens

SETUPS = {
    "gato": ("gato", "camera", {"context": 300}),
    "bc grid": ("bc", "grid", {"context": 120}),
    "bc rows": ("bc", "grid", {"context": 200, "fields": {"*.image": FieldTokens("rows")}}),
    "bc arm": ("bc", "arm", {"context": 60}),
    "bc regressed": ("bc", "camera", {"context": 300, "discretise": "no"}),
    "bc strided": ("bc", "camera", {"context": 400, "fields": {"*.front": FieldTokens(stride=2)}}),
    "bc chunked": ("bc", "arm", {"context": 60, "fields": {"action": FieldTokens(chunk=3)}}),
    "dt": ("dt", "arm", {"context": 60}),
}


def processor_of(objectives):
    return Processor.from_dict(json.loads(json.dumps(objectives.processor())))


def play(processor, task, w, **options):
    """Replays a window through a history. The answers are the window's actions. Yields (steps so far, Acting)."""
    asks = any(e.role == "return" for e in processor.layouts["it"][task].elements)
    history = processor.history(task, 1, target_return=float(w.returns_to_go[0]) if asks else None, **options)
    constant = {e.field for e in history.layout.elements if e.constant} | set(history.layout.preamble)
    rewards = np.append(0.0, w.returns_to_go[:-1] - w.returns_to_go[1:])
    for t in range(w.steps):
        observation = {
            n: v if n in constant else v[t] for n, v in w.fields.items() if not n.startswith(("action", "reward"))
        }
        acting = history.observe([observation], [rewards[t]])
        slot = 0
        for element in history.actions:
            encoded = element.codec.encode(w.fields[element.field][t : t + 1])
            for k in range(element.size):
                acting.answer(slot, encoded[:, k])
                slot += 1
        yield t + 1, acting
        history.acted({e.field: w.fields[e.field][t : t + 1] for e in history.actions})


@pytest.mark.parametrize("setup", SETUPS)
def test_a_history_equals_the_training_window(setup):
    paradigm, task, options = SETUPS[setup]
    objectives = make([GRID, ARM, CAMERA], paradigm, **options)
    processor = processor_of(objectives)
    w = window(objectives, task, 4, np.random.default_rng(3), start=0)
    arrays = objectives.make_batch(0, np.array([0]), [[w]], seed=0, training=False)
    whole = TokenBatch.from_arrays(arrays)
    for rows, acting in play(processor, task, w):
        b = acting.batch
        n = b.real_tokens
        assert n == acting.open[0] + len(acting.slots)
        assert b.targets == 0
        for name in ("tokens", "modality", "segment", "position", "local", "timestep", "task", "causal"):
            assert np.array_equal(getattr(b, name)[0, :n], getattr(whole, name)[0, :n]), (rows, name)
        for name, part in whole.embedded.items():
            here = part.index < n
            assert np.array_equal(b.embedded[name].index, part.index[here])
            assert np.allclose(b.embedded[name].value, part.value[here], atol=1e-6)
            assert np.array_equal(b.embedded[name].place, part.place[here] if len(part.place) else part.place)
    assert n == whole.real_tokens


@pytest.mark.parametrize("setup", SETUPS)
def test_slots_stand_where_training_has_its_targets(setup):
    paradigm, task, options = SETUPS[setup]
    objectives = make([GRID, ARM, CAMERA], paradigm, **options)
    w = window(objectives, task, 2, np.random.default_rng(3), start=0)
    arrays = objectives.make_batch(0, np.array([0]), [[w]], seed=0, training=False)
    whole = TokenBatch.from_arrays(arrays)
    for _, acting in play(processor_of(objectives), task, w):
        for i, slot in enumerate(acting.slots):
            column = int(acting.open[0]) + i - 1
            if slot.head:
                assert column in whole.regression[slot.head].index
            else:
                assert slot.low <= whole.target[0, column] < slot.high
                if whole.softmax[0, column]:
                    _, low, high = objectives.vocabulary.ranges[whole.softmax[0, column] - 1]
                    assert low <= slot.low
                    assert slot.high <= high


@pytest.mark.parametrize("setup", SETUPS)
def test_answers_decode_to_native_actions(setup):
    paradigm, task, options = SETUPS[setup]
    objectives = make([GRID, ARM, CAMERA], paradigm, **options)
    history = processor_of(objectives).history(task, 5)
    rng = np.random.default_rng(0)
    wanted = window(objectives, task, 5, rng).fields
    answers = [column for e in history.actions for column in np.moveaxis(e.codec.encode(wanted[e.field]), 1, 0)]
    found = history.decode(answers)
    spec = next(t for t in objectives.tasks if t.name == task)
    for e in history.actions:
        field = spec.field(e.field)
        assert found[e.field].shape == (5, *field.shape)
        assert found[e.field].dtype == field.dtype
        if field.modality == "discrete":
            assert (found[e.field] == wanted[e.field]).all()
        else:
            width = np.array(field.high) - np.array(field.low)
            assert (np.abs(found[e.field] - wanted[e.field]) <= width / 1024).all()


def test_environments_are_independent():
    """An environment does not change if others have other lengths, are reset, or leave out a step."""
    objectives = make([GRID], "bc", context=120)
    processor = processor_of(objectives)
    rng = np.random.default_rng(0)
    windows = [window(objectives, "grid", 6, rng, start=0) for _ in range(2)]
    alone = [[a.batch for _, a in play(processor, "grid", w)] for w in windows]

    def seen(i, t):
        return {n: v if n.endswith("mission") else v[t] for n, v in windows[i].fields.items() if n != "action"}

    def action(i, t):
        return windows[i].fields["action"][t : t + 1]

    history = processor.history("grid", 3)
    for t in range(4):
        taking = [0] if t == 0 else [0, 2]  # environment 2 starts a step later
        times = [t] if t == 0 else [t, t - 1]
        acting = history.observe([seen(i // 2, s) for i, s in zip(taking, times, strict=True)], environments=taking)
        acting.answer(
            0, np.array([acting.slots[0].low + action(i // 2, s)[0] for i, s in zip(taking, times, strict=True)])
        )
        for row, (i, s) in enumerate(zip(taking, times, strict=True)):
            expected = alone[i // 2][s]
            n = expected.real_tokens
            assert np.array_equal(acting.batch.tokens[row, :n], expected.tokens[0, :n])
            assert (acting.batch.segment[row, n:] == 0).all()
        chosen = np.concatenate([action(i // 2, s) for i, s in zip(taking, times, strict=True)])
        history.acted({"action": chosen}, environments=taking)
    history.reset(0)
    acting = history.observe([seen(0, 0)], environments=[0])
    assert acting.batch.real_tokens == alone[0][0].real_tokens


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_long_history_keeps_the_last_steps_that_fit(chunk):
    objectives = make([ARM], "bc", context=34, fields={"action": FieldTokens(chunk=chunk)})
    processor = processor_of(objectives)
    w = window(objectives, "arm", 40, np.random.default_rng(0), start=0)
    for rows, acting in play(processor, "arm", w):
        assert acting.batch.real_tokens <= 34
        first = acting.batch.timestep[0, 0]
        assert first % chunk == 0
        if rows > 20:
            assert first >= rows - 14
            shown = rows - first
            assert acting.batch.real_tokens == 2 * shown + -(-shown // chunk)
    limited = processor_of(make([ARM], "bc", context=100, window=2))
    assert max(a.batch.real_tokens for _, a in play(limited, "arm", w)) == 6


def test_the_target_return_falls_by_each_reward():
    objectives = make([ARM], "dt", context=60, target_return="2x")
    processor = processor_of(objectives)
    index = FakeIndex([ARM])
    history = processor.history("arm")
    assert history.target_return == pytest.approx([2 * float(index.total_return.max())])
    history = processor.history("arm", target_return=10.0)
    observation = {"observation": np.zeros(5, np.float32)}
    history.observe([observation])
    history.acted({"action": np.zeros((1, 2))})
    history.observe([observation], rewards=[3.0])
    history.acted({"action": np.zeros((1, 2))})
    acting = history.observe([observation], rewards=[-1.0])
    scale = float(np.abs(index.total_return).max())
    assert np.allclose(acting.batch.embedded["vector:return:1"].value[:, 0], np.array([10, 7, 8]) / scale)


@pytest.mark.parametrize(
    ("asked", "level"), [("q0", 0.0), ("q0.5", 0.5), ("q0.33", 0.33), ("q1", 1.0), ("best", 1.0), ("1x", 1.0)]
)
def test_a_target_return_is_a_quantile_of_the_datas_returns_or_a_multiple_of_the_best(asked, level):
    returns = np.asarray(FakeIndex([ARM]).total_return, np.float64)
    expected = [pytest.approx(float(np.quantile(returns, level)), rel=1e-6)]
    assert processor_of(make([ARM], "dt", context=60, target_return=asked)).history("arm").target_return == expected
    other = processor_of(make([ARM], "dt", context=60, target_return="7"))
    assert other.history("arm").target_return == [7.0]
    assert other.history("arm", target_return=asked).target_return == expected
    assert other.history("arm", 3, target_return=[1, asked, "3.5"]).target_return == [1.0, *expected, 3.5]


def test_target_returns_that_make_no_sense_are_refused():
    processor = processor_of(make([ARM], "dt", context=60))
    best = processor.best_return["arm"]
    for asked, reason in {
        "high": "is not a target return; write",
        "nan": "not finite",
        float("inf"): "not finite",
        "q1.5": "must lie between q0",
        f"{30 * best}": "beyond what the policy can be told",
    }.items():
        with pytest.raises(DataError, match=f"task 'arm', objective 'it': .*{reason}"):
            processor.history("arm", target_return=asked)
    with pytest.raises(DataError, match="2 target returns for 3 environments"):
        processor.history("arm", 3, target_return=[1.0, 2.0])
    with pytest.raises(DataError, match="does not act towards a goal"):
        processor.history("arm", goal={"observation": np.zeros(5)})
    cloned = processor_of(make([ARM], "bc", context=60))
    with pytest.raises(DataError, match="objective 'it': it shows the model no returns"):
        cloned.history("arm", target_return=3.0)
    worse = Processor.from_dict({**processor.to_dict(), "best_return": {"arm": -150.0}})
    assert worse.history("arm").target_return == [-150.0]
    with pytest.raises(
        DataError, match=r"best return in the data is -150, so 1.2x of it, -180, .* quantile, such as q0.9"
    ):
        worse.history("arm", target_return="1.2x")


def test_a_policy_that_does_not_know_its_datas_returns_refuses_a_quantile():
    """As one of an earlier version."""
    values = processor_of(make([ARM], "dt", context=60)).to_dict()
    del values["return_quantiles"]
    processor = Processor.from_dict(values)
    assert processor.history("arm").target_return == [values["best_return"]["arm"]]
    with pytest.raises(DataError, match=r"target return q0.5: the policy does not know the quantiles"):
        processor.history("arm", target_return="q0.5")


def test_an_objective_that_acts_towards_a_goal_takes_one():
    values = processor_of(make([ARM], "bc", context=60)).to_dict()
    values["objectives"]["it"]["takes_goal"] = True
    goal = {"observation": np.zeros(5, np.float32)}
    assert Processor.from_dict(values).history("arm", goal=goal).goal is goal


def test_each_environment_is_asked_again_for_its_own_return():
    processor = processor_of(make([ARM], "dt", context=60))
    history = processor.history("arm", 2, target_return=[10.0, 4.0])
    observation = {"observation": np.zeros(5, np.float32)}
    for rewards in (None, [1.0, 1.0]):
        history.observe([observation] * 2, rewards)
        history.acted({"action": np.zeros((2, 2))})
    history.reset(1)
    assert [e.returns[-1:] or [e.asked] for e in history._episodes] == [[9.0], [4.0]]
    history.reset(1, 6.0)
    history.reset(1)
    assert history._episodes[1].asked == 4.0


def test_a_demonstration_stands_before_the_history_in_the_same_segment():
    objectives = make([ARM], "gato", context=200)
    processor = processor_of(objectives)
    rng = np.random.default_rng(0)
    w, demonstration = (
        window(objectives, "arm", 3, rng, start=0),
        window(objectives, "arm", 5, rng, start=9, prompt=True),
    )
    rows = [[demonstration, w]]
    whole = TokenBatch.from_arrays(objectives.make_batch(0, np.array([0]), rows, seed=0, training=False))
    for _, acting in play(processor, "arm", w, prompt=demonstration):
        n = acting.batch.real_tokens
        assert np.array_equal(acting.batch.tokens[0, :n], whole.tokens[0, :n])
        assert (acting.batch.segment[0, :n] == 1).all()
    assert n == whole.real_tokens
    long = window(objectives, "arm", 90, rng, prompt=True)
    *_, (_, acting) = play(processor, "arm", w, prompt=long)
    assert acting.batch.real_tokens <= 200
    assert acting.batch.timestep[0, 0] > long.start  # the last steps of the prompt, not the first


def test_the_error_names_what_cannot_act():
    processor = processor_of(make([ARM, CAPTION], "gato", context=300))
    with pytest.raises(KeyError, match="has no task 'leg'; its tasks are arm, caption"):
        processor.history("leg")
    with pytest.raises(DataError, match="'caption' has no actions"):
        processor.history("caption")
    history = processor.history("arm")
    with pytest.raises(DataError, match="no field 'observation'; it has picture"):
        history.observe([{"picture": 0}])
    with pytest.raises(DataError, match="version 7"):
        Processor.from_dict({"version": 7})


def test_processor_json_round_trip():
    values = make([GRID, ARM, CAMERA], "gato", context=300).processor()
    again = json.loads(json.dumps(Processor.from_dict(json.loads(json.dumps(values))).to_dict()))
    assert again == json.loads(json.dumps(values))


def test_a_processor_json_of_version_1_still_loads():
    """data/processor.json was written when the names in the code were other ones. Its keys must never change."""
    text = (Path(__file__).parent / "data" / "processor.json").read_text(encoding="utf-8")
    values = json.loads(text)
    processor = Processor.from_dict(values)
    assert json.loads(json.dumps(processor.to_dict())) == {**values, "version": 2}
    camera, caption = processor.layouts["it"]["camera"], processor.layouts["it"]["caption"]
    assert (camera.text_limit, camera.predict_text, camera.text_last) == (0, True, False)
    assert (camera.chunk, camera.window, camera.weight, camera.has_actions, camera.text_columns) == (2, 4, 0.5, True, 9)
    assert (caption.text_limit, caption.predict_text, caption.text_last) == (9, True, True)
    assert (caption.preamble, caption.has_actions) == (("caption",), False)
    digests = {"camera": "02b063a852f33842b9488579dca1ed46", "caption": "7a2fbc469b46a95b7dbeb6401e0806b5"}
    for task, steps in (("camera", 3), ("caption", 1)):
        w = window(
            SimpleNamespace(tasks=list(processor.tasks.values())), task, steps, np.random.default_rng(0), start=0
        )
        batch, digest = processor.encode(processor.layouts["it"][task], [[replace(w, task=0)]]), hashlib.sha256()
        for name in ("tokens", "modality", "segment", "position", "local", "timestep", "task"):
            digest.update(getattr(batch, name).tobytes())
        assert digest.hexdigest().startswith(digests[task])


def test_acting_needs_no_dataset_code():
    """A published policy contains only these files."""
    code = (
        "import sys, tiphys.pretrain.acting.processor\n"
        "mine = {m for m in sys.modules if m.split('.')[0] == 'tiphys'}\n"
        "print(*sorted(mine))\n"
        "assert not {'torch', 'pyarrow', 'obstore', 'omegaconf', 'PIL'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    files = {
        "agents",
        "augment",
        "clips",
        "views",
        "swap",
        "batch",
        "derived",
        "draft",
        "flow",
        "frames",
        "group",
        "hiding",
        "instruction",
        "images",
        "sequence",
        "text",
        "timestep",
        "codec",
        "codecs",
        "id_codecs",
        "picture_codecs",
        "vector_codecs",
        "vocabulary",
    }
    packages = {"tiphys", "tiphys.dataio", "tiphys.pretrain", "tiphys.pretrain.tokens", "tiphys.pretrain.acting"}
    mine = {
        "tiphys.recipes",
        "tiphys.recipes.target_return",
        "tiphys.dataio.episode",
        "tiphys.dataio.philox",
        "tiphys.dataio.stored",
        "tiphys.pretrain.acting.processor",
        "tiphys.pretrain.acting.history",
        "tiphys.pretrain.acting.slots",
        "tiphys.pretrain.acting.demand",
        "tiphys.pretrain.acting.fill",
    }
    assert set(found) == packages | mine | {f"tiphys.pretrain.tokens.{f}" for f in files}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("tasks",), 5),
        (("tasks", 0, "fields", 0, "shape"), [2**62]),
        (("vocabulary", "size"), 10**30),
        (("vocabulary", "separator"), -1),
        (("vocabulary", "text_tokenizer"), "{}"),
        (("vocabulary", "embedders", "patch:3", "shape"), [16, 16]),
        (("objectives", "it"), []),
        (("objectives", "it", "prompt_steps"), "2"),
        (("objectives", "it", "timesteps", "camera", "elements", 1, "size"), 2**40),
        (("objectives", "it", "timesteps", "camera", "elements", 1, "codec", "shape"), [2**31, 2**31, 3]),
        (("objectives", "it", "timesteps", "camera", "elements", 3, "codec", "first"), -7),
        (("objectives", "it", "timesteps", "camera", "chunk"), 0),
        (("best_return", "camera"), "high"),
        (("objectives", "it", "target_return"), "a lot"),
        (("return_quantiles",), {"camera": ["high"]}),
        (("length",), 0),
        (("more",), 1),
    ],
)
def test_an_invalid_processor_is_refused_with_the_place(path: Any, value: Any) -> None:
    values = json.loads((Path(__file__).parent / "data" / "processor.json").read_text())
    Processor.from_dict(values)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(DataError, match=r"processor\.json|vocabulary|tokenizer|codec"):
        Processor.from_dict(values)


def two_wheels(**ranges):
    action = FieldSpec("action", "action", "discrete", "int64", (2,), values=5, **ranges)
    return TaskSpec("wheels", (FieldSpec("observation", "observation", "continuous", "float32", (3,)), action))


def test_each_entry_answers_only_its_own_values():
    objectives = make([two_wheels(low=(0.0, -1.0), high=(1.0, 3.0))], "bc", context=60)
    processor = processor_of(objectives)
    history = processor.history("wheels")
    assert [slot.high - slot.low for slot in history.slots] == [2, 5]
    for answers in ([s.low for s in history.slots], [s.high - 1 for s in history.slots]):
        (action,) = history.decode([np.array([a]) for a in answers])["action"]
        assert action.tolist() in ([0, -1], [1, 3])


def test_a_policy_whose_ranges_are_too_wide_answers_what_its_environment_takes():
    """A policy that was published before ranges were kept by entry."""
    processor = processor_of(make([two_wheels()], "bc", context=60))
    history = processor.history("wheels")
    assert [slot.high - slot.low for slot in history.slots] == [5, 5]
    first = history.slots[0].low
    history.limit(two_wheels(low=(0.0, 1.0), high=(1.0, 9.0)).fields)
    assert [(slot.low - first, slot.high - first) for slot in history.slots] == [(0, 2), (1, 5)]
    with pytest.raises(DataError, match=r"'action', entry 1: the policy answers 0 to 4.*takes 7 to 9"):
        history.limit(two_wheels(low=(0.0, 7.0), high=(1.0, 9.0)).fields)
    history.limit([])
    assert [slot.high - slot.low for slot in history.slots] == [5, 5]
