"""What may influence what, derived from a paradigm's row: each value of a window is changed, one after the other.

A changed value must move the targets that are made of it and no others. If it is shown, it must move the model's answers where
the row's mask lets them see it, and nowhere else; if it is hidden, it must move none.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.pretrain.token_fixtures import ARM, CAMERA, GRID, ROWS, TEAM, make, window
from tiphys.dataio.episode import DataError
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.tokens import paradigms
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.derived import derived
from tiphys.pretrain.tokens.paradigm import ACTION, END, OBSERVATION, RETURN, TEXT, Paradigm, Part, Prompt
from tiphys.pretrain.tokens.sequence import placements
from tiphys.recipes.sections.model import Model
from tiphys.recipes.sections.objective import FieldTokens

PRODUCT = tuple(paradigms.PARADIGMS)
CASES = {
    "bc": ("bc", [GRID, ARM, CAMERA], {}),
    "bc regressed": ("bc", [ARM], {"discretise": "no"}),
    "dt": ("dt", [GRID, ARM, CAMERA], {}),
    "gato": ("gato", [ARM, CAMERA], {"fields": {"*.front": FieldTokens(resize=16)}}),
    "reward": ("reward", [GRID], {}),
    "mia": ("mia", [GRID], {}),
    "madt": ("madt", [TEAM], {"options": {"agents": 2}}),
    "turned": ("turned", [ARM, GRID], {"options": {"without_rewards": True}}),
    "prefix": ("prefix", [ARM, GRID], {"options": {"without_rewards": True}}),
    **{name: (name, [ARM], {}) for name in ROWS if name not in ("prefix", "turned")},
}
CASES |= {name: (name, [ARM], {}) for name in PRODUCT if name not in CASES}


@pytest.fixture
def rows_of_tests(monkeypatch):
    for name, row in ROWS.items():
        monkeypatch.setitem(paradigms.PARADIGMS, name, row)


def other(value, field, element):
    """A value that is surely encoded differently."""
    if element.codec.kind == "sign":
        return -value
    if element.codec.kind == "histogram":
        return 1 - value
    if field is None:  # a return
        return value - 2.0 * (value > 0) + 2.0 * (value <= 0)
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


def changed(windows, w, element, step, task, agent=None):
    """The windows, with one element of one window changed at one step; for one agent, if the field has a value of each."""
    out, one = list(windows), windows[w]
    if element.rule:
        values = np.array(derived(one, one.steps, element.rule, element.options), copy=True)
        values[step] = other(values[step], None, element)
        out[w] = replace(one, given={**one.given, element.rule: values})
        return out
    field = next(f for f in task.fields if f.name == element.field)
    values = np.array(one.fields[element.field], copy=True)
    if agent is not None:
        values[step, agent] = other(values[step], field, element)[agent]
    elif element.constant:
        values = other(values, field, element)
    else:
        values[step] = other(values[step], field, element)
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
    assert all(
        len(a.index) == len(np.intersect1d(a.index, np.flatnonzero(batch.target[0] >= 0)))
        for a in batch.allowed.values()
    )
    targets = {(p, "id"): int(batch.target[0, p]) for p in np.flatnonzero(batch.target[0] >= 0)}
    for name, part in batch.regression.items():
        targets |= {(int(i), name): tuple(v) for i, v in zip(part.index, part.value, strict=True)}
    return batch, hidden, targets


def row_of(objectives, tasks, row, rng):
    """Windows of one row, with prompts if the row has them, and rows after them."""
    windows = [window(objectives, t.name, 2, rng, start=4 + i, after=3) for i, t in enumerate(tasks)]
    windows += [window(objectives, tasks[0].name, 4, rng, start=9, ends=True, after=1)]
    if row.prompt.share == 1:
        prompts = [window(objectives, objectives.tasks[w.task].name, 2, rng, start=1, prompt=True) for w in windows]
        windows = [w for pair in zip(prompts, windows, strict=True) for w in pair]
    for w in windows:  # a changed reward must not change what rules compute from it: that is another element
        rules = [e for e in objectives.layouts[0][w.task].elements if e.rule and e.role != "agent"]
        w.given = {e.rule: derived(w, w.steps, e.rule, e.options) for e in rules}
    return windows


def seen_by(batch, cell, mask):
    """The cells whose answers may see a cell that is shown."""
    everyone = np.flatnonzero(batch.segment[0] == batch.segment[0, cell])
    ahead = np.flatnonzero(~batch.causal[0] & (batch.segment[0] == batch.segment[0, cell]))
    return set(everyone if mask == "both" or cell in ahead else everyone[everyone >= cell])


@pytest.mark.parametrize("case", CASES)
def test_every_value_influences_what_the_row_says_and_nothing_else(case, rows_of_tests):
    name, tasks, options = CASES[case]
    row = paradigms.PARADIGMS[name]
    objectives, rng = make(tasks, name, context=420, **options), np.random.default_rng(3)
    config = DecisionConfig.from_recipe(Model(layers=2, hidden=32, heads=2, text_vocabulary=600), objectives.vocabulary)
    model = DecisionModel(config, seed=1).eval()
    windows = row_of(objectives, tasks, row, rng)
    if name == "madt":  # every action is available, so that any can be the changed one
        windows = [replace(w, fields={**w.fields, "mask": np.ones_like(w.fields["mask"])}) for w in windows]
    batch, base, base_targets = answers(model, objectives, windows)
    shift = 0 if row.mask == "both" else 1
    placed = placements(windows, objectives.layouts, objectives.vocabulary, objectives.text)
    moved_targets = set()
    for one in placed:
        if one.element is None or one.element.role in ("separator", "text", "agent"):
            continue
        w = windows[one.window]
        task, step = objectives.tasks[w.task], one.step
        same = [p for p in placed if (p.window, p.element, p.step) == (one.window, one.element, one.step)]
        agent = None
        if one.element.field in objectives.layouts[0][w.task].agent_fields:
            agent, same = same.index(one), [one]
        elif one.element.constant:
            same = [p for p in placed if (p.window, p.element) == (one.window, one.element)]
        _, hidden, targets = answers(model, objectives, changed(windows, one.window, one.element, step, task, agent))
        cells = [c for p in same for c in range(p.first, p.first + p.size)]
        shown = [c for c in cells if batch.tokens[0, c] != objectives.vocabulary.mask]
        assert bool(shown) or not one.element.shown or row.hiding
        # Other places of the same expert are rounded differently, which is no influence
        differs = set(np.flatnonzero((hidden - base).abs().amax(-1) > 1e-5).tolist())
        may = set().union(*(seen_by(batch, c, row.mask) for c in shown))
        assert differs <= may, (one.element.role, "an answer saw it that must not")
        assert bool(differs) == bool(may), (one.element.role, "no answer saw it")
        if shift == 0 and shown and min(may) < min(shown):
            assert min(differs) < min(shown), "no earlier answer saw it"
        assert targets.keys() == base_targets.keys()
        moved = {key for key, value in targets.items() if value != base_targets[key]}
        mine = {key for key in base_targets if key[0] in {c - shift for c in cells}}
        assert moved <= mine, one.element.role
        learnt = one.element.predicted and not w.prompt and any(batch.position[0, c] >= shift for c in cells)
        assert bool(moved) == bool(mine if row.hiding or row.swap else learnt), one.element
        assert not mine or shift or not shown, "a target that is shown"
        moved_targets |= moved
    rest = {cell + shift for cell, _ in base_targets.keys() - moved_targets}
    roles = [
        p.element.role for p in placed if p.element and rest & set(range(p.first, p.first + p.size)) and p.size == 1
    ]
    assert set(roles) <= {"text"}


@pytest.mark.parametrize("name", ["turned", "prefix"])
def test_a_prefix_sees_itself_and_not_what_follows(name, rows_of_tests):
    objectives, rng = make([ARM], name, context=420), np.random.default_rng(3)
    windows = row_of(objectives, [ARM], ROWS[name], rng)
    batch = TokenBatch.from_arrays(objectives.make_batch(0, np.arange(1), [windows], seed=0))
    placed = placements(windows, objectives.layouts, objectives.vocabulary, objectives.text)
    for w, one in enumerate(windows):
        cells = [c for p in placed if p.window == w for c in range(p.first, p.first + p.size)]
        assert (batch.causal[0, cells] == (not one.prompt)).all()
        assert not one.prompt or (batch.target[0, cells[:-1]] < 0).all()
        if one.prompt and name == "turned":
            shown = [(p.element.role, int(one.step[p.step])) for p in placed if p.window == w]
            assert shown == [(role, step) for step in (2, 1) for role in ("return", "observation")]
            assert batch.timestep[0, cells].tolist() == [step for _, step in shown]


def test_the_end_of_an_episode_stands_against_the_next_step(rows_of_tests):
    objectives, rng = make([ARM], "everything", context=420), np.random.default_rng(3)
    end, summary = (objectives.vocabulary.special(name) for name in ("end", "summary"))
    layout = objectives.layouts[0][0]
    for ends in (False, True):
        w = window(objectives, "arm", 3, rng, ends=ends, after=0 if ends else 3)
        batch = TokenBatch.from_arrays(objectives.make_batch(0, np.arange(1), [[w]], seed=0))
        last = layout.width * 3
        assert batch.tokens[0, last : last + 3].tolist() == ([end, summary, 0] if ends else [summary, 0, 0])
        assert (batch.target[0, last - 1] == end) == ends
        firsts = [layout.width * k - 1 for k in (1, 2, *([3] if ends else []))]
        assert (batch.softmax[0, firsts] == 0).all()
        others = np.setdiff1d(np.flatnonzero(batch.target[0] >= 0), firsts)
        assert (batch.softmax[0, others] > 0).all()


def test_an_end_is_that_of_the_world_where_the_data_tell_it(rows_of_tests):
    from tiphys.dataio.episode import FieldSpec

    arm = replace(ARM, fields=(*ARM.fields, FieldSpec("done", "terminated", "discrete", "bool", values=2)))
    objectives, rng = make([arm], "everything", context=420), np.random.default_rng(3)
    assert "done" in objectives.needs(0).fields
    end = objectives.vocabulary.special("end")
    for done in (False, True):
        w = window(objectives, "arm", 3, rng, ends=True)
        w.fields["done"] = np.array([False, False, done])
        batch = TokenBatch.from_arrays(objectives.make_batch(0, np.arange(1), [[w]], seed=0))
        assert (batch.tokens == end).any() == done


def test_windows_and_the_kinds_of_parts_in_them_have_equal_shares(rows_of_tests):
    """Whatever a window draws to hide: one part, or nearly all of them."""
    objectives, rng = make([ARM], "mixture", context=420), np.random.default_rng(3)
    for number in range(6):
        windows = [window(objectives, "arm", 6, rng, after=1) for _ in range(4)]
        batch = TokenBatch.from_arrays(objectives.make_batch(0, np.array([number]), [windows], seed=0))
        for segment in range(1, 5):
            mine = np.flatnonzero(batch.segment[0] == segment)
            sums = {name: r.weight[np.isin(r.index, mine)].sum() for name, r in batch.regression.items()}
            sums["reward"] = batch.weight[0, mine].sum() / 3  # its part has the weight 3
            learnt = [share for share in sums.values() if share]
            assert max(learnt) == pytest.approx(min(learnt), rel=1e-5)
            assert sum(learnt) == pytest.approx(len(np.unique(batch.timestep[0, mine])), rel=1e-5)


def test_weights_of_the_parts_reach_the_targets(rows_of_tests):
    objectives, rng = make([ARM], "everything", context=200, loss_weight=2.0), np.random.default_rng(0)
    windows = [window(objectives, "arm", 3, rng)]
    batch = TokenBatch.from_arrays(objectives.make_batch(0, np.arange(1), [windows], seed=0))
    weights = {"observation": 2.0, "action": 10.0, "reward": 2.0, "return": 1.0}
    for one in placements(windows, objectives.layouts, objectives.vocabulary, objectives.text):
        if one.element is None:  # the episode's end
            continue
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
    ("wrong", "why"),
    [
        ({"mask": "sideways"}, "mask 'sideways'"),
        ({"hiding": (("blink", 1.0),)}, "hiding scheme 'blink'"),
        ({"hiding": (("random", 0.0),)}, "shares"),
        ({"acting": ("guess", {})}, "acting 'guess'"),
        ({"views": "agents of tomorrow"}, "view"),
        ({"loss": "most"}, "loss 'most'"),
        ({"tail": (Part(OBSERVATION),)}, "after the last"),
        ({"timestep": (Part(END), Part(ACTION))}, "after the last"),
        ({"mask": "both"}, "must be hidden"),
        ({"mask": "prefix", "head": (Part(TEXT, weight=1.0),)}, "cannot be predicted"),
        ({"head": (Part(RETURN),)}, "only texts"),
        ({"future": -2}, "future"),
    ],
)
def test_a_row_with_a_mistake_fails_at_its_declaration(wrong, why):
    with pytest.raises(ValueError, match=why):
        Paradigm("it", "a test", **{"timestep": (Part(ACTION, weight=1.0),), **wrong})
    with pytest.raises(ValueError, match="share"):
        Prompt(1.5)


@pytest.mark.parametrize(
    "wrong", [{"kind": "actions"}, {"kind": ACTION, "code": "liner"}, {"kind": ACTION, "weight": -1.0}]
)
def test_a_row_with_a_mistake_fails_where_it_is_declared(wrong):
    with pytest.raises(ValueError, match="part of kind"):
        Part(**wrong)
