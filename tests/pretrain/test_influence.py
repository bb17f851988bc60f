"""What may influence what, derived from a paradigm's row: each value of a window is changed, one after the other.

A changed value must move the targets that are made of it and no others; the model's answers from its own place on, if it is
shown, and never before; and nothing outside its own segment.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.pretrain.token_fixtures import ARM, CAMERA, GRID, make, window
from tiphys.dataio.episode import DataError
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.tokens import paradigms
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.paradigms import ACTION, OBSERVATION, RETURN, REWARD, Paradigm, Part
from tiphys.pretrain.tokens.sequence import placements
from tiphys.recipes.schema import FieldTokens, Model

# Every part is predicted, the return without being shown, as in Janner et al. 2021.
EVERYTHING = Paradigm(
    "everything",
    "a test",
    (
        Part(OBSERVATION, "uniform", weight=1.0),
        Part(ACTION, "uniform", weight=5.0),
        Part(REWARD, "uniform", weight=1.0),
        Part(RETURN, "uniform", weight=0.5, shown=False),
    ),
)
HIDDEN = Paradigm(
    "hidden", "a test", (Part(RETURN, "linear", shown=False), Part(OBSERVATION), Part(ACTION, weight=1.0))
)
CASES = {
    "bc": ("bc", [GRID, ARM, CAMERA], {}),
    "bc regressed": ("bc", [ARM], {"discretise": "no"}),
    "dt": ("dt", [GRID, ARM, CAMERA], {}),
    "gato": ("gato", [ARM, CAMERA], {"fields": {"*.front": FieldTokens(resize=16)}}),
    "everything": ("everything", [ARM], {}),
    "hidden": ("hidden", [ARM], {}),
}


@pytest.fixture
def rows_of_tests(monkeypatch):
    for row in (EVERYTHING, HIDDEN):
        monkeypatch.setitem(paradigms.PARADIGMS, row.name, row)


def other(value, field, rng):
    """A value of the field that is surely encoded differently."""
    if field is None:  # a return
        return value + 2.0
    if field.modality == "text":
        return "zq"
    if field.modality == "discrete":
        return (value + 1) % field.values
    if field.modality == "image":
        return 255 - value
    low, high = (np.array(field.low), np.array(field.high)) if field.low else (-3.0, 3.0)
    return (
        (low + high - value + (high - low) / 7 * np.sign(value - (low + high) / 2)).astype(value.dtype).clip(low, high)
    )


def changed(windows, w, element, step, task, rng):
    """The windows, with one element of one window changed at one step."""
    out, one = list(windows), windows[w]
    if element.role == "return":
        returns = one.returns_to_go.copy()
        returns[step] = other(returns[step], None, rng)
        out[w] = replace(one, returns_to_go=returns)
        return out
    field = next(f for f in task.fields if f.name == element.field)
    values = np.array(one.fields[element.field], copy=True)
    if element.constant:
        values = other(values, field, rng)
    else:
        values[step] = other(values[step], field, rng)
    out[w] = replace(one, fields={**one.fields, element.field: values})
    return out


def answers(model, objectives, windows):
    """(batch, hidden states by cell, targets by cell) of one row."""
    batch = TokenBatch.from_arrays(objectives.make_batch(0, np.arange(1), [windows], seed=0, training=False))
    inputs = to_tensors(batch)
    with torch.no_grad():
        packed = model(inputs).hidden
    hidden = torch.zeros(batch.length, packed.shape[-1])
    hidden[inputs["index"]] = packed  # the model sorts windows by length
    targets = {(p, "id"): int(batch.target[0, p]) for p in np.flatnonzero(batch.target[0] >= 0)}
    for name, part in batch.regression.items():
        targets |= {(int(i), name): tuple(v) for i, v in zip(part.index, part.value, strict=True)}
    return batch, hidden, targets


@pytest.mark.parametrize("case", CASES)
def test_every_value_influences_what_the_row_says_and_nothing_else(case, rows_of_tests):
    name, tasks, options = CASES[case]
    objectives, rng = make(tasks, name, context=420, **options), np.random.default_rng(3)
    config = DecisionConfig.from_recipe(Model(layers=2, hidden=32, heads=2, text_vocabulary=600), objectives.vocabulary)
    model = DecisionModel(config, seed=1).eval()
    windows = [window(objectives, t.name, 2, rng, start=4 + i) for i, t in enumerate(tasks)]
    windows += [window(objectives, tasks[0].name, 2, rng, start=9)]
    _, base, base_targets = answers(model, objectives, windows)
    placed = placements(windows, objectives.layouts, objectives.vocabulary, objectives.text)
    ends = np.cumsum([sum(p.size for p in placed if p.window == w) for w in range(len(windows))])
    moved_targets = set()
    for one in placed:
        if one.element is None or one.element.role in ("separator", "text"):
            continue
        task = objectives.tasks[windows[one.window].task]
        mine = changed(windows, one.window, one.element, one.step, task, rng)
        _, hidden, targets = answers(model, objectives, mine)
        here = range(one.first, one.first + one.size)
        if one.element.constant:  # it is shown at every step
            here = range(
                min(p.first for p in placed if p.window == one.window and p.element == one.element),
                int(ends[one.window]),
            )
        # Other places of the same expert are rounded differently, which is no influence
        differs = ((hidden - base).abs().amax(-1) > 1e-5).numpy()
        until = int(ends[one.window])
        assert not differs[: here.start].any(), (one.element.role, "an earlier answer saw it")
        assert not differs[until:].any(), (one.element.role, "another window saw it")
        assert differs[here.start :][: until - here.start].any() == one.element.shown, one.element
        assert targets.keys() == base_targets.keys()
        moved = {key for key, value in targets.items() if value != base_targets[key]}
        assert {cell for cell, _ in moved} <= {cell - 1 for cell in here}, one.element.role
        assert bool(moved) == (one.element.predicted and (one.first > 0 or one.size > 1)), one.element
        moved_targets |= moved
    texts = {cell for cell, _ in base_targets} - {cell for cell, _ in moved_targets}
    assert all(p.element is None or p.element.role == "text" or p.element.size > 1
               for p in placed for cell in texts if p.first <= cell + 1 < p.first + p.size)  # fmt: skip


def test_weights_of_the_parts_reach_the_targets(rows_of_tests):
    objectives, rng = make([ARM], "everything", context=200, loss_weight=2.0), np.random.default_rng(0)
    windows = [window(objectives, "arm", 3, rng)]
    batch = TokenBatch.from_arrays(objectives.make_batch(0, np.arange(1), [windows], seed=0))
    weights = {"observation": 2.0, "action": 10.0, "reward": 2.0, "return": 1.0}
    for one in placements(windows, objectives.layouts, objectives.vocabulary, objectives.text):
        for cell in range(max(one.first, 1), one.first + one.size):
            assert batch.weight[0, cell - 1] == weights[one.element.role]
            hidden = batch.tokens[0, cell] == objectives.vocabulary.mask
            assert hidden == (one.element.role == "return")
    assert "vector:return:1" not in batch.embedded


def test_a_hidden_part_that_is_not_predicted_leaves_no_value(rows_of_tests):
    objectives, rng = make([ARM], "hidden", context=200), np.random.default_rng(0)
    batch = TokenBatch.from_arrays(
        objectives.make_batch(0, np.arange(1), [[window(objectives, "arm", 3, rng)]], seed=0)
    )
    assert "vector:return:1" not in batch.embedded
    assert (batch.tokens[0] == objectives.vocabulary.mask).sum() == 3


def test_what_cannot_be_predicted_is_refused(rows_of_tests):
    with pytest.raises(DataError, match=r"predicts the observation 'observation.front'.*uniform"):
        make([CAMERA], "everything", context=400)
    with pytest.raises(DataError, match=r"'grid'.*no rewards"):
        make([GRID], "everything", context=400, fields={"*.image": FieldTokens(encoding="gato")})


@pytest.mark.parametrize(
    "wrong", [{"kind": "actions"}, {"kind": ACTION, "code": "liner"}, {"kind": ACTION, "weight": -1.0}]
)
def test_a_row_with_a_mistake_fails_where_it_is_declared(wrong):
    with pytest.raises(ValueError, match="part of kind"):
        Part(**wrong)
