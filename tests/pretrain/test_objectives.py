"""Windows -> tokens: a Gato timestep by hand, the fast layout against the slow one, targets, lengths, and error messages."""

import functools
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from tests.pretrain import layout_oracle
from tests.pretrain.token_fixtures import ARM, CAMERA, CAPTION, GRID, ROWS, FakeIndex, make, window
from tiphys.dataio.episode import BadValue, DataError, FieldSpec, TaskSpec, Window
from tiphys.dataio.plan.cost import Costs
from tiphys.dataio.sampling import PlanEntry, SamplingPlan
from tiphys.pretrain.objectives import Objectives, table
from tiphys.pretrain.tokens.batch import MODALITIES, TokenBatch
from tiphys.pretrain.tokens.hiding import HIDING
from tiphys.pretrain.tokens.paradigms import PARADIGMS
from tiphys.recipes.schema import Recipe, Run
from tiphys.recipes.sections.data import Data, Entry
from tiphys.recipes.sections.model import Model
from tiphys.recipes.sections.objective import FieldTokens, Objective

SETUPS = {
    "gato": ("gato", {"context": 1200}),
    "gato by range, resized": (
        "gato",
        {"context": 400, "softmax": "range", "fields": {"*.front": FieldTokens(resize=16)}},
    ),
    "bc": ("bc", {"context": 200, "loss_weight": 0.5}),
    "bc regressed": ("bc", {"context": 200, "discretise": "no", "loss_weight": 0.25}),
    "bc strided": (
        "bc",
        {
            "context": 300,
            "fields": {"observation.front": FieldTokens(stride=2)},
            "options": {"text_tokens": 1},
        },
    ),
    "bc chunked": ("bc", {"context": 300, "fields": {"action*": FieldTokens(chunk=3)}}),
    "bc quantiles": ("bc", {"context": 200, "fields": {"action": FieldTokens(encoding="quantile", bins=32)}}),
    "dt": ("dt", {"context": 200}),
    "bdt": ("bdt", {"context": 400}),
}


def batch_of(objectives, rows, step=5, numbers=None, training=False):
    numbers = np.arange(len(rows)) if numbers is None else np.asarray(numbers)
    arrays = objectives.make_batch(step, numbers, rows, seed=11, training=training)
    return TokenBatch.from_arrays(arrays)


def some_rows(objectives, rng, rows=5, beyond=False):
    """Rows of random windows of all tasks, as many as fit. Some rows begin with a prompt, and the last is empty.

    beyond  the windows have rows behind them
    """
    out = []
    for r in range(rows):
        row, left = [], objectives.length
        while True:
            task = objectives.tasks[rng.integers(len(objectives.tasks))].name
            steps = 1 if task == "caption" else int(rng.integers(1, 5))
            layout = next(t for t in objectives.layouts[0].values() if t.task == task)
            cost = layout.width * steps + 45
            prompt = not row and r % 2 == 0 and layout.has_actions
            if left < cost * (1 + prompt):
                break
            after = int(rng.integers(0, 4)) if beyond else 0
            last = bool(rng.random() < 0.3) and steps > 1 and not after
            start = int(rng.integers(0, 9))
            if prompt:
                row.append(window(objectives, task, steps, rng, prompt=True))
            row.append(
                window(
                    objectives,
                    task,
                    steps,
                    rng,
                    start=start,
                    last_without_action=last,
                    after=after,
                    ends=bool(rng.random() < 0.5),
                )
            )
            left -= cost * (1 + prompt)
        out.append(row)
    return [*out, []]


def same(batch, expected):
    for name in (
        "tokens",
        "modality",
        "segment",
        "position",
        "local",
        "timestep",
        "task",
        "causal",
        "target",
        "softmax",
    ):
        assert np.array_equal(getattr(batch, name), expected[name]), name
    assert np.allclose(batch.weight, expected["weight"])
    for kind in ("embedded", "regression"):
        found, wanted = getattr(batch, kind), expected[kind]
        assert {n for n, p in found.items() if len(p.index)} == wanted.keys()
        for name, parts in wanted.items():
            assert found[name].index.tolist() == [cell for cell, _, _ in parts]
            assert np.array_equal(found[name].value, np.stack([value for _, value, _ in parts]))
            third = [x for _, _, x in parts]
            if kind == "regression":
                assert np.allclose(found[name].weight, third)
            elif name.startswith("patch"):
                assert found[name].place.tolist() == [list(place) for place in third]


@pytest.mark.parametrize("setup", SETUPS)
def test_fast_layout_equals_the_slow_one(setup):
    paradigm, options = SETUPS[setup]
    tasks = [GRID, ARM, CAMERA, CAPTION] if paradigm == "gato" else [GRID, ARM, CAMERA]
    objectives = make(tasks, paradigm, **options)
    rng = np.random.default_rng(1)
    for _ in range(4):
        rows = some_rows(objectives, rng)
        same(batch_of(objectives, rows), layout_oracle.lay(objectives, rows))


VIEWED = ("reward", "mia", "madt")  # several sequences in a window, or texts of others: see test_views and test_swap
PLAIN = [name for name in PARADIGMS if name not in (*VIEWED, *(paradigm for paradigm, _ in SETUPS.values()))]


@pytest.mark.parametrize("name", [*ROWS, *PLAIN])
def test_the_fast_layout_of_every_kind_of_row_equals_the_slow_one(name, monkeypatch):
    if name in ROWS:
        monkeypatch.setitem(PARADIGMS, name, ROWS[name])
    alone = any(p.kind == "reward" or p.source for p in PARADIGMS[name].timestep)
    tasks = [ARM] if alone else [ARM, GRID]
    tasks = tasks if name not in (*HIDING, *PLAIN) else [ARM]
    options = {"fields": {"observation.image": FieldTokens(encoding="skip")}} if len(tasks) > 1 else {}
    objectives = make(tasks, name, context=300, options={"without_rewards": True}, **options)
    rng = np.random.default_rng(1)
    for _ in range(3):
        rows = some_rows(objectives, rng, beyond=True)
        numbers = rng.integers(0, 99, len(rows))
        for training in (False, True):
            batch = batch_of(objectives, rows, numbers=numbers, training=training)
            same(batch, layout_oracle.lay(objectives, rows, numbers, step=5 if training else 0))


def test_a_gato_timestep_by_hand():
    """Reed et al. 2022: text, image patches, then discrete and continuous fields by name, separator, actions."""
    task = TaskSpec(
        "by hand",
        (
            FieldSpec("b", "observation", "continuous", "float32", (2,)),
            FieldSpec("a", "observation", "discrete", "int64", values=5),
            FieldSpec("z", "observation", "image", "uint8", (16, 32, 3)),
            FieldSpec("words", "text", "text", "str"),
            FieldSpec("action", "action", "continuous", "float32", (2,), low=(-2.0,), high=(2.0,)),
        ),
    )
    o = make([task], "gato", text=300, context=64)
    image = np.random.default_rng(0).integers(0, 256, (1, 16, 32, 3)).astype(np.uint8)
    fields = {
        "b": np.array([[1.0, -300.0]], np.float32),
        "a": np.array([4]),
        "z": image,
        "words": np.array(["ab"], np.dtypes.StringDType()),
        "action": np.array([[2.0, -0.5]], np.float32),
    }
    w = Window(
        entry=0,
        task=0,
        episode="e",
        start=0,
        steps=1,
        episode_steps=1,
        fields=fields,
        step=np.array([7]),
        returns_to_go=np.zeros(1, np.float32),
        valid=np.ones(1, bool),
    )
    b = batch_of(o, [[w]])
    text, continuous, discrete, special = (low for _, low, _ in o.vocabulary.ranges)
    assert (text, continuous, discrete, special) == (0, 300, 1324, 2348)
    words = o.text.encode(["ab"])[0].tolist()
    mu = int((np.log(101) / np.log(256 * 100 + 1) + 1) / 2 * 1024)
    expected = [
        *words,
        o.vocabulary.embedded,
        o.vocabulary.embedded,
        discrete + 4,
        continuous + mu,
        continuous + 0,
        o.vocabulary.separator,
        continuous + 1023,
        continuous + 384,  # (-0.5/2 + 1)/2 · 1024
    ]
    n = len(expected)
    assert b.tokens[0, :n].tolist() == expected
    assert b.real_tokens == n
    assert b.local[0, :n].tolist() == [*range(n - 2), 511, 511]
    kinds = ["text"] * len(words) + ["image"] * 2 + ["discrete"] + ["continuous"] * 2 + ["separator"] + ["action"] * 2
    assert [MODALITIES[m] for m in b.modality[0, :n]] == kinds
    target = [-1] * n
    target[: len(words) - 1] = words[1:]  # no position before it predicts the first token of a segment
    target[n - 3], target[n - 2] = expected[n - 2], expected[n - 1]
    assert b.target[0, :n].tolist() == target
    assert (b.softmax == 0).all()
    patch = b.embedded["patch:3"]
    assert np.allclose(patch.value[0], (image[0, :, :16].astype(float) / 127.5 - 1) / 4, atol=1e-6)
    assert patch.place.tolist() == [[63, 31], [63, 95]]


def test_a_compact_timestep_is_few_tokens():
    o = make([GRID, ARM], "bc", context=64)
    assert [t.width for t in o.layouts[0].values()] == [3, 3]  # direction, grid, action; vector, two of an action
    rng = np.random.default_rng(0)
    w = window(o, "arm", 2, rng)
    b = batch_of(o, [[w]])
    ids = o.layouts[0][w.task].elements[-1].codec.encode(w.fields["action"])
    embedded = o.vocabulary.embedded
    assert b.tokens[0, :6].tolist() == [embedded, *ids[0], embedded, *ids[1]]
    assert b.target[0, :6].tolist() == [*ids[0], -1, *ids[1], -1]
    assert set(b.softmax[b.target >= 0]) == {o.vocabulary.softmax("continuous")}


def test_a_decision_transformer_has_return_observation_and_action_and_regresses_the_action():
    o = make([ARM], "dt", context=30)
    rng = np.random.default_rng(0)
    w = window(o, "arm", 3, rng)
    b = batch_of(o, [[w]])
    assert [MODALITIES[m] for m in b.modality[0, :9]] == ["return", "continuous", "action"] * 3
    head = b.regression["action:2"]
    assert head.index.tolist() == [1, 4, 7]  # at the observation, which stands before the action
    assert np.allclose(head.value, w.fields["action"] / [2, 5] - [0, 1], atol=1e-6)
    assert (head.value == b.embedded["vector:action:2"].value).all()
    largest = np.abs(FakeIndex([ARM]).total_return).max()
    assert np.allclose(b.embedded["vector:return:1"].value[:, 0], w.returns_to_go / largest, atol=1e-6)
    assert b.targets == 3


@pytest.mark.parametrize(("encoding", "tokens", "columns"), [("grid", 1, 7), ("rows", 7, 7), ("cells", 49, 1)])
def test_a_grid_is_one_token_or_one_for_each_row_or_cell_with_its_place(encoding, tokens, columns):
    o = make([GRID], "bc", context=200, fields={"observation.image": FieldTokens(encoding)})
    w = window(o, "grid", 2, np.random.default_rng(0))
    (embedded,) = batch_of(o, [[w]]).embedded.values()
    assert len(embedded.index) == 2 * tokens
    seen = embedded.value.reshape(2, 7, 7, 3)
    assert (seen == w.fields["observation.image"]).all()
    if tokens > 1:
        place = np.stack(np.divmod(np.arange(tokens), 7 // columns), axis=1)
        assert (embedded.place == np.concatenate([place, place])).all()


@pytest.mark.parametrize("encoding", ["grid", "rows", "cells"])
def test_grids_are_refused_for_other_fields_and_for_actions(encoding):
    for field in ("observation", "action"):
        with pytest.raises(DataError, match=f"'{encoding}'"):
            make([ARM], "bc", context=200, fields={field: FieldTokens(encoding)})


def test_a_prompt_has_no_targets_and_shares_its_windows_segment():
    o = make([GRID], "gato", context=700)
    rng = np.random.default_rng(0)
    prompt, first, second = window(o, "grid", 1, rng, prompt=True), window(o, "grid", 1, rng), window(o, "grid", 1, rng)
    b = batch_of(o, [[prompt, first, second]])
    segments = b.segment[0]
    assert sorted(set(segments.tolist())) == [0, 1, 2]
    size = o.layouts[0][0].width
    assert (b.target[0, : size - 1] < 0).all()
    text = len(o.text.encode([first.fields["observation.mission"]])[0])
    assert (segments == 1).sum() == 2 * size + text
    assert b.position[0, : 2 * size + text].tolist() == list(range(2 * size + text))
    assert b.target[0, size - 1] == b.tokens[0, size]  # the prompt's last position predicts what follows it
    assert b.target[0, 2 * size + text - 1] == -1  # a segment's last position does not predict the next segment


def test_a_row_does_not_depend_on_the_rows_beside_it():
    o = make([GRID, ARM, CAMERA, CAPTION], "gato", context=1200)
    rows = some_rows(o, np.random.default_rng(4), 6)
    numbers = np.array([3, 8, 1, 200, 7, 0, 12])
    whole = batch_of(o, rows, numbers=numbers, training=True)
    parts = [batch_of(o, [row], numbers=[n], training=True) for row, n in zip(rows, numbers, strict=True)]
    joined = TokenBatch.concatenate(parts)
    for name, array in whole.to_arrays().items():
        assert np.array_equal(array, joined.to_arrays()[name]), name
    back = batch_of(o, rows[::-1], numbers=numbers[::-1], training=True)
    for i in range(len(rows)):
        one, other = whole.select(slice(i, i + 1)).to_arrays(), back.select(slice(-1 - i, len(rows) - i)).to_arrays()
        assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("setup", SETUPS)
def test_windows_take_the_positions_that_the_plan_is_told(setup):
    paradigm, options = SETUPS[setup]
    o = make([GRID, ARM, CAMERA], paradigm, **options)
    lengths, (codes, texts) = o.lengths(0), FakeIndex([GRID]).text("observation.mission")
    index = FakeIndex([GRID, ARM, CAMERA])
    rng = np.random.default_rng(2)
    for episode in range(9):
        number = int(index.task[episode])
        task, layout = o.tasks[number], o.layouts[0][number]
        costs, at = Costs([lengths.costs[number]], o.length), np.zeros(1, np.int64)
        fixed = int(lengths.fixed[episode])
        most = min(int(lengths.window[number]), int(costs.fit(at, lengths.context[number] - fixed)[0]))
        for units in {1, 2, 3, max(most, 1)}:
            w = window(o, task.name, units, rng, start=episode)
            if "observation.mission" in w.fields:
                w.fields["observation.mission"] = texts[codes[episode]]
            body = int(costs.cost(at, at + episode, at + units)[0])
            used = batch_of(o, [[w]]).real_tokens if fixed + body <= o.length else 0
            assert used <= fixed + body
            assert layout.text_columns or used in (fixed + body, 0)
            if lengths.prompt[number] and units <= lengths.prompt_units[number]:
                p = window(o, task.name, units, rng, start=episode, prompt=True)
                used = batch_of(o, [[p]]).real_tokens
                assert used <= body
                assert layout.text_columns or used == body


def test_chunks_and_strides_count_from_the_same_step():
    """A window that starts at an odd step shows a field with stride 2 as often as one that starts at an even step."""
    fields = {"observation.front": FieldTokens(stride=4), "action*": FieldTokens(chunk=2)}
    o = make([CAMERA], "bc", context=300, fields=fields)
    rng = np.random.default_rng(0)
    shown = [batch_of(o, [[window(o, "camera", 8, rng, start=start)]]).embedded for start in (4, 5, 8, 9)]
    counts = [len(embedded["patch:3"].index) for embedded in shown]
    assert len(set(counts)) == 1
    assert counts[0] > 0


def test_of_a_field_with_a_stride_only_the_rows_that_are_shown_are_needed():
    fields = {"observation.front": FieldTokens(stride=4)}
    o = make([CAMERA], "bc", context=300, fields=fields)
    assert o.needs(0).strides == (("observation.front", 4),)
    whole = window(o, "camera", 9, np.random.default_rng(0), start=3)
    front = whole.fields["observation.front"]
    black = np.where((whole.step % 4 == 0).reshape(-1, *[1] * (front.ndim - 1)), front, 0).astype(front.dtype)
    some = replace(whole, fields={**whole.fields, "observation.front": black})
    arrays = [batch_of(o, [[one]]).to_arrays() for one in (whole, some)]
    assert all(np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])
    chunked = make([CAMERA], "bc", context=300, fields={**fields, "action*": FieldTokens(chunk=2)})
    assert chunked.needs(0).strides == ()


def test_prompts_are_for_tasks_that_act():
    o = make([GRID, CAPTION], "gato", context=400, prompt=0.25)
    assert o.lengths(0).prompt.tolist() == [0.25, 0.0]


@pytest.mark.parametrize("setup", SETUPS)
def test_what_the_plan_packs_into_a_row_fits(setup):
    """The real plan fills rows by these lengths. Everything that it packs fits, prompts too."""
    paradigm, options = SETUPS[setup]
    tasks = [GRID, ARM, CAMERA, CAPTION] if paradigm == "gato" else [GRID, ARM, CAMERA]
    o = make(tasks, paradigm, **options)
    index = FakeIndex(tasks)
    entry = PlanEntry(index, o.lengths(0), 1.0, "it", range(len(tasks)), None)
    plan = SamplingPlan([entry], rows=16, budget=o.length, seed=0, buckets=1)
    rng = np.random.default_rng(0)
    full = []
    for step in range(3):
        planned = plan.windows(step)
        rows = [[] for _ in range(16)]
        for i in range(len(planned.row)):
            episode, task = int(planned.episode[i]), tasks[int(planned.task[i])].name
            w = window(o, task, int(planned.units[i]), rng, start=int(planned.start[i]), prompt=bool(planned.prompt[i]))
            for name in w.fields:
                if name in ("observation.mission", "caption"):
                    codes, texts = index.text(name)
                    w.fields[name] = texts[codes[episode]]
            rows[int(planned.row[i])].append(w)
        full.append((batch_of(o, rows, step=step).segment > 0).mean())
    if not any(o.layouts[0][t].varies for t in range(len(tasks))):
        assert np.mean(full) > 0.6  # the rest of a row is shorter than the first timestep of the next window


def test_pickled_objectives_make_the_same_batches_without_indexes():
    o = make([GRID, ARM], "bc", context=100)
    rows = some_rows(o, np.random.default_rng(0), 2)
    expected = o.make_batch(1, np.arange(3), rows, seed=2)
    data = pickle.dumps(functools.partial(o.make_batch, seed=2))
    assert b"token_fixtures" not in data
    found = pickle.loads(data)(1, np.arange(3), rows)
    assert all(np.array_equal(found[n], expected[n]) for n in expected)
    with pytest.raises(RuntimeError, match="unpickled and have no indexes"):
        pickle.loads(data).func.__self__.lengths(0)


def test_the_loader_side_imports_no_torch():
    code = (
        "import sys, tiphys.pretrain.objectives, tiphys.pretrain.acting.processor\n"
        "assert not {'torch', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_fields_that_are_shown_are_fetched():
    o = make([CAMERA, CAPTION], "gato", context=500, fields={"observation.joints": FieldTokens(encoding="skip")})
    assert set(o.needs(0).fields) == {
        "observation.front",
        "observation.gripper",
        "observation.goal",
        "observation.said",
        "action.arm",
        "action.hand",
        "image",
        "caption",
    }


def test_the_error_for_a_value_without_encoding_names_its_episode_and_step():
    o = make([ARM, GRID], "bc", context=100)
    rng = np.random.default_rng(0)
    good, bad = window(o, "arm", 3, rng), window(o, "arm", 4, rng, start=20)
    bad.fields["observation"][2, 1] = np.nan
    with pytest.raises(DataError, match=r"task 'arm', field 'observation', episode 'arm-20', step 22: NaN"):
        batch_of(o, [[good], [bad]])
    wrong = window(o, "grid", 2, rng, start=5)
    wrong.fields["action"][1] = 7
    with pytest.raises(DataError, match=r"field 'action', episode 'grid-5', step 6: 7 is not in 0 … 6"):
        batch_of(o, [[wrong]])
    del wrong.fields["action"]
    with pytest.raises(DataError, match="'grid-5' has no field 'action'"):
        batch_of(o, [[wrong]])


def test_a_bad_value_is_an_error_that_says_what_to_do_or_one_that_a_loader_knows():
    o = make([ARM], "dt", context=60)
    bad = window(o, "arm", 4, np.random.default_rng(0), start=20)
    bad.returns_to_go[:2] = np.inf  # a codec would clamp it
    with pytest.raises(
        DataError, match=r"episode 'arm-20', step 20: .*infinite; correct .* data.on_bad_value=quarantine"
    ) as e:
        batch_of(o, [[bad]])
    assert not isinstance(e.value, BadValue)
    with pytest.raises(BadValue, match=r"field 'return-to-go', episode 'arm-20', step 20"):
        o.make_batch(0, np.arange(1), [[bad]], seed=0, on_bad_value="quarantine")


def test_a_row_that_is_too_long_is_refused():
    o = make([ARM], "bc", context=16)
    with pytest.raises(DataError, match="row 9 of the batch has 18 tokens, but a row holds 16"):
        batch_of(o, [[window(o, "arm", 6, np.random.default_rng(0))]], numbers=[9])


def test_a_context_that_cannot_hold_a_timestep_is_refused():
    with pytest.raises(
        DataError, match=r"context of 100 cannot hold one timestep of 150 tokens .*observation.image 147"
    ):
        make([GRID], "gato", context=100)


def with_action(**changes):
    fields = {"name": "action", "role": "action", "modality": "continuous", "dtype": "float32", "shape": (1,)} | changes
    return TaskSpec("t", (FieldSpec("observation", "observation", "continuous", "float32", (2,)), FieldSpec(**fields)))


def test_clipped_actions_are_refused_unless_allowed():
    task = with_action(low=(-1.0,), high=(1.0,))
    index = FakeIndex([task])
    found = index.statistics["t"]["action"]
    index.statistics["t"]["action"] = replace(found, clipped=0.02, max=np.array([1.5]))

    def build(**options):
        recipe = Recipe(
            name="x",
            data=Data(mixture=[Entry(dataset="fake", objective="bc")]),
            objectives={"bc": Objective(options=options)},
            model=Model(text_vocabulary=300),
            run=Run(dir="unused"),
        )
        return Objectives(recipe, [index])

    with pytest.raises(DataError, match=r"task 't', field 'action': 2.00% .*allow_clipped: 0.0200"):
        build()
    assert build(allow_clipped=0.02).clipped() == {"t/action": 0.02}
    with pytest.raises(DataError, match="no option 'allow_clip'; the options are"):
        build(allow_clip=0.02)


def test_a_pattern_that_matches_no_field_is_refused():
    with pytest.raises(
        DataError,
        match=r"fields: no field matches 'observation.imag'; did you mean 'observation.image'\? The tasks have action, ",
    ):
        make([GRID], "bc", context=64, fields={"observation.imag": FieldTokens(encoding="skip")})


def test_actions_without_bounds_are_mapped_by_the_range_of_the_data():
    o = make([with_action()], "bc", context=64)
    codec = o.layouts[0][0].elements[-1].codec
    found = FakeIndex([with_action()]).statistics["t"]["action"]
    assert codec.low == (float(found.min[0]),)
    assert codec.high == (float(found.max[0]),)
    inside = make([with_action(low=(-0.5,), high=(0.5,))], "bc", context=64).layouts[0][0].elements[-1].codec
    assert (inside.low, inside.high) == ((-1.0,), (1.0,))  # values in [-1, 1] stay as they are


def test_two_tasks_of_one_name_with_different_fields_are_refused():
    other = TaskSpec("arm", (*ARM.fields[:1], FieldSpec("action", "action", "discrete", "int64", values=3)))
    recipe = Recipe(
        name="x",
        data=Data(mixture=[Entry(dataset="a", objective="bc"), Entry(dataset="b", objective="bc")]),
        model=Model(text_vocabulary=300),
        run=Run(dir="unused"),
    )
    with pytest.raises(DataError, match=r"task 'arm' has other fields in b than in a: action, reward"):
        Objectives(recipe, [FakeIndex([ARM], url="a"), FakeIndex([other], url="b")])


def test_two_mixture_entries_share_tasks_but_not_weight_and_objective():
    recipe = Recipe(
        name="x",
        data=Data(
            mixture=[
                Entry(dataset="a", objective="gato", tasks=["arm"]),
                Entry(dataset="b", objective="bc", loss_weight=0.25),
            ]
        ),
        model=Model(text_vocabulary=300),
        run=Run(dir="unused"),
    )
    o = Objectives(recipe, [FakeIndex([GRID, ARM], url="a"), FakeIndex([ARM, GRID], url="b")])
    assert [t.name for t in o.tasks] == ["arm", "grid"]
    assert o.task_numbers(0).tolist() == [-1, 0]
    assert o.task_numbers(1).tolist() == [0, 1]
    assert o.layouts[0][0].width > o.layouts[1][0].width
    assert o.layouts[1][0].weight == 0.25
    with pytest.raises(DataError, match=r"no task of a matches nothing\*; it has arm"):
        Objectives(
            Recipe(name="x", data=Data(mixture=[Entry(dataset="a", tasks=["nothing*"])]), run=Run(dir="unused")),
            [FakeIndex([ARM])],
        )


def test_the_text_tokenizer_is_the_same_in_every_process():
    code = (
        "from tiphys.pretrain.tokens.text_tokenizers import learn; import hashlib; "
        "print(hashlib.sha256(learn({f'go to the {c} {o} {i}' for c in ('red', 'grün') "
        "for o in ('ball', 'key') for i in range(300)}, 400).encode()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1


def test_any_text_round_trips():
    o = make([GRID], "bc", context=64, text=300)
    for text in ["", "go to the red ball", "日本語 🙂\n\t", "<mask> [SEP]", "öffne"]:
        ids = o.text.encode([text])[0]
        assert o.text.decode(ids) == text
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < 300)
    rich = make([GRID], "bc", context=64, text=2000)
    assert len(rich.text.encode(["go to the red ball"])[0]) == 5


def test_the_table_has_a_row_for_each_paradigm():
    assert [row["name"] for row in table()] == list(PARADIGMS)
    assert json.dumps(table())


def test_images_of_different_sizes_are_resized_to_one():
    task = TaskSpec("web", (FieldSpec("image", "observation", "image", "uint8", (0, 0, 3)), CAPTION.fields[1]))
    with pytest.raises(DataError, match=r"task 'web', field 'image': .* give `resize`"):
        make([task], "gato", context=64)
    o = make([task], "gato", context=64, fields={"image": FieldTokens(crop=40, resize=32)})
    rng = np.random.default_rng(0)
    rows = []
    for shape in ((50, 70, 3), (16, 20, 3)):
        image = rng.integers(0, 256, (1, *shape)).astype(np.uint8)
        fields = {"image": image, "caption": "go"}
        one = Window(
            entry=0,
            task=0,
            episode="w",
            start=0,
            steps=1,
            episode_steps=0,
            fields=fields,
            step=np.zeros(1, int),
            returns_to_go=np.zeros(1, np.float32),
            valid=np.zeros(1, bool),
        )
        rows.append([one])
    batch = batch_of(o, rows)
    assert batch.embedded["patch:3"].value.shape == (8, 16, 16, 3)
    ids = [*o.text.encode(["go"])[0], o.vocabulary.end_of_text]
    assert batch.tokens[0, 4 : 4 + len(ids)].tolist() == ids
    assert batch.target[0, 3 : 3 + len(ids)].tolist() == ids  # the last patch predicts the caption's first token


def test_the_range_of_text_is_as_large_as_the_tokenizer() -> None:
    for task, most in ((ARM, 256), (GRID, 400)):
        made = make([task], "bc", text=0, context=100)
        low, high = made.vocabulary.range("text")
        assert (low, high) == (0, made.text.size)
        assert 256 <= high <= most
        assert make([task], "bc", text=600, context=100).vocabulary.range("text") == (0, 600)
