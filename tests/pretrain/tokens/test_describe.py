"""A row decoded for people shows every position once, with the values of its windows and the targets of the batch."""

import numpy as np
import pytest

from tests.pretrain.token_fixtures import ARM, CAMERA, CAPTION, GRID, make, window
from tiphys.pretrain.tokens.batch import MODALITIES, TokenBatch
from tiphys.pretrain.tokens.describe import view_windows
from tiphys.pretrain.tokens.sequence import placements
from tiphys.recipes.sections.objective import FieldTokens

SETUPS = {
    "gato": ("gato", {"context": 700}),
    "bc": ("bc", {"context": 300}),
    "bc regressed": ("bc", {"context": 300, "discretise": "no"}),
    "bc strided": ("bc", {"context": 400, "fields": {"*.front": FieldTokens(stride=2)}}),
    "bc chunked": ("bc", {"context": 300, "fields": {"action*": FieldTokens(chunk=3)}}),
    "dt": ("dt", {"context": 300}),
}


def batch_of(objectives, rows):
    return TokenBatch.from_arrays(objectives.make_batch(0, np.arange(len(rows)), rows, seed=0))


def views(objectives, rows, row):
    o = objectives
    return view_windows(batch_of(o, rows), row, rows[row], o.layouts, o.vocabulary, o.text)


def some_windows(objectives, paradigm, rng):
    last = "caption" if paradigm == "gato" else "grid"
    return [
        window(objectives, "camera", 2, rng, prompt=True),
        window(objectives, "camera", 4, rng, last_without_action=True),
        window(objectives, "arm", 3, rng, start=7),
        window(objectives, last, 1, rng),
    ]


def objectives_of(setup):
    paradigm, options = SETUPS[setup]
    return paradigm, make([GRID, ARM, CAMERA, *([CAPTION] if paradigm == "gato" else [])], paradigm, **options)


@pytest.mark.parametrize("setup", SETUPS)
def test_placements_cover_every_position_once_and_agree_with_the_batch(setup):
    paradigm, o = objectives_of(setup)
    windows = some_windows(o, paradigm, np.random.default_rng(2))
    batch = batch_of(o, [windows])
    placed = placements(windows, o.layouts, o.vocabulary, o.text)
    assert [p for one in placed for p in range(one.first, one.first + one.size)] == list(range(batch.real_tokens))
    for one in placed:
        here = slice(one.first, one.first + one.size)
        w = windows[one.window]
        assert (batch.task[0, here] == w.task).all()
        assert (batch.timestep[0, here] == w.step[one.step or 0]).all()
        modality = "text" if one.element is None else MODALITIES[one.element.modality]
        assert {MODALITIES[m] for m in batch.modality[0, here]} == {modality}


@pytest.mark.parametrize("setup", SETUPS)
def test_every_target_is_shown_with_its_weight(setup):
    paradigm, o = objectives_of(setup)
    windows = some_windows(o, paradigm, np.random.default_rng(2))
    batch = batch_of(o, [windows])
    cells = {int(p): float(batch.weight[0, p]) for p in np.flatnonzero(batch.target[0] >= 0)}
    for part in batch.regression.values():
        cells |= dict(zip(part.index.tolist(), part.weight.tolist(), strict=True))
    assert cells
    for window_view in views(o, [windows], 0):
        for e in window_view.elements:
            here = [cells.pop(p) for p in range(e.first, e.last + 1) if p in cells]
            assert bool(here) == bool(e.predicted) == (e.weight is not None)
            assert set(here) <= {e.weight}
    assert not cells


def test_values_and_targets_are_those_of_the_window():
    o = make([GRID, ARM], "bc", context=100)
    rng = np.random.default_rng(0)
    w = window(o, "grid", 2, rng, start=5)
    (view,) = views(o, [[window(o, "arm", 1, rng)], [w]], 1)
    assert (view.task, view.episode, view.start, view.steps, view.prompt) == ("grid", "grid-5", 5, 2, False)
    text, *rest = view.elements
    assert (text.step, text.what, text.field, text.first) == (None, "text", "observation.mission", 0)
    assert text.value == repr(w.fields["observation.mission"])
    assert [e.step for e in rest] == [5, 5, 5, 6, 6, 6]
    assert [e.value for e in rest if e.field == "action"] == [str(a) for a in w.fields["action"]]
    assert [e.predicted for e in rest if e.predicted] == [str(a) for a in w.fields["action"]]
    image = next(e for e in rest if e.field == "observation.image")
    assert image.value == f"7×7×3: {w.fields['observation.image'][0].min()} … {w.fields['observation.image'][0].max()}"


def test_regressed_actions_and_returns_are_in_the_units_of_the_dataset():
    o = make([ARM], "dt", context=60)
    w = window(o, "arm", 2, np.random.default_rng(0))
    (view,) = views(o, [[w]], 0)
    assert [e.what for e in view.elements] == ["return", "continuous", "action"] * 2
    for step, action in enumerate(w.fields["action"]):
        shown, seen, acted = view.elements[3 * step : 3 * step + 3]
        assert float(shown.value) == pytest.approx(float(w.returns_to_go[step]), abs=0.01)
        assert seen.predicted == acted.value
        assert np.allclose([float(v) for v in acted.value.split()], action, rtol=0.01, atol=0.01)


def test_a_caption_ends_with_end_of_text():
    o = make([CAPTION], "gato", context=64)
    w = window(o, "caption", 1, np.random.default_rng(0))
    (view,) = views(o, [[w]], 0)
    image, caption = view.elements
    assert image.value == "1 patch of 16×16"
    assert caption.value == f"{w.fields['caption']!r} end-of-text"
    first = o.text.decode(o.text.encode([w.fields["caption"]])[0][:1])
    assert (image.predicted, image.weight) == (repr(first), 1.0)
    assert caption.predicted.endswith("end-of-text")


@pytest.mark.parametrize("stride", [1, 2])
def test_pictures_are_those_of_the_windows(stride):
    o = make([CAMERA, CAPTION], "gato", context=400, fields={"observation.front": FieldTokens(stride=stride)})
    rng = np.random.default_rng(0)
    windows = [window(o, "camera", 3, rng, start=4), window(o, "caption", 1, rng), window(o, "camera", 1, rng, start=6)]
    found = [
        (i, e.step, e.field, e.picture)
        for i, view in enumerate(views(o, [[], windows], 1))
        for e in view.elements
        if e.picture is not None
    ]
    names = ("observation.front", "image", "observation.front")
    wanted = [
        (i, int(w.step[s]), name, w.fields[name][s])
        for i, (w, name) in enumerate(zip(windows, names, strict=True))
        for s in range(w.steps)
        if name == "image" or w.step[s] % stride == 0
    ]
    assert [one[:3] for one in found] == [one[:3] for one in wanted]
    for (*_, one), (*_, other) in zip(found, wanted, strict=True):
        assert np.array_equal(one, other)
    assert views(o, [[], windows], 0) == []
