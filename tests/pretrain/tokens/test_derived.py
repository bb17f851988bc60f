"""Sources against loops over the rewards of an episode."""

import numpy as np
import pytest

from tests.pretrain.token_fixtures import ARM, GRID, make
from tiphys.dataio.episode import BadValue, DataError, Window
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.derived import SOURCES, derived, source_of
from tiphys.pretrain.tokens.paradigm import ACTION, OBSERVATION, RETURN, Paradigm, Part
from tiphys.pretrain.tokens.paradigms import PARADIGMS
from tiphys.pretrain.tokens.timestep import TO_THE_END

OPTIONS = {"bins": 4, "low": [-1.0], "high": [1.0]}


def episode(start, steps, total=20, seed=0):
    """A window of an episode, with all rows to its end. The last row holds only an observation."""
    rewards = np.random.default_rng(seed).uniform(-1, 1, total + 1).astype(np.float32)
    rewards[total] = 99.0  # not a reward
    to_go = np.append(np.cumsum(rewards[:total][::-1], dtype=np.float64)[::-1], 0).astype(np.float32)
    step = np.arange(start, total + 1)
    return rewards, Window(
        entry=0,
        task=0,
        episode="e",
        start=start,
        steps=steps,
        episode_steps=total,
        fields={"reward": rewards[start:], "observation": np.zeros((len(step), 5), np.float32)},
        step=step,
        returns_to_go=to_go[start:],
        valid=step < total,
    )


@pytest.mark.parametrize(("start", "steps"), [(0, 20), (3, 5), (19, 1), (7, 13)])
def test_sources_equal_loops(start, steps):
    rewards, window = episode(start, steps)
    for k in range(steps):
        left = rewards[start + k : 20].astype(float)
        assert derived(window, steps, "to_go", {})[k] == pytest.approx(left.sum(), abs=1e-5)
        assert derived(window, steps, "after", {})[k] == pytest.approx(left[1:].sum(), abs=1e-5)
        value = sum(r * 0.9**i for i, r in enumerate(left[1:]))
        assert derived(window, steps, "discounted:.9", {})[k] == pytest.approx(value, abs=1e-5)
        counts = np.histogram(left, 4, (-1, 1))[0]
        np.testing.assert_allclose(derived(window, steps, "histogram:reward", OPTIONS)[k], counts / len(left))


def test_values_that_are_given_come_before_the_rule():
    _, window = episode(0, 3)
    window.given = {"discounted:.9": np.arange(5.0)}
    assert derived(window, 3, "discounted:.9", {}).tolist() == [0, 1, 2]


@pytest.mark.parametrize("rule", ["rtg", "after:1", "discounted", "discounted:1.5", "discounted:x", "histogram:"])
def test_an_unknown_rule_fails_where_it_is_declared(rule):
    with pytest.raises(DataError, match="source"):
        source_of(rule)
    code = "histogram" if rule.startswith("histogram") else "auto"
    with pytest.raises(ValueError, match="source"):
        Part(RETURN, code, source=rule)


def test_every_source_is_a_pure_function_of_the_rows_of_the_window():
    assert SOURCES.keys() == {"to_go", "after", "discounted", "histogram", "agent"}
    _, window = episode(4, 6)
    for rule in ("to_go", "after", "discounted:.9", "histogram:reward"):
        first = derived(window, 6, rule, OPTIONS).copy()
        assert np.array_equal(first, derived(window, 6, rule, OPTIONS))


def of(*parts):
    return Paradigm("it", "a test", (*parts, Part(OBSERVATION), Part(ACTION, weight=1.0)))


def test_the_loader_is_asked_for_what_a_source_reads(monkeypatch):
    wanted = {
        "to_go": ((), 0),
        "after": (("reward",), 0),
        "discounted:.9": (("reward",), TO_THE_END),
        "histogram:reward": (("reward",), TO_THE_END),
    }
    for rule, (fields, after) in wanted.items():
        code = "histogram" if rule.startswith("histogram") else "auto"
        monkeypatch.setitem(PARADIGMS, "it", of(Part(RETURN, code, source=rule)))
        needs = make([ARM], "it", context=100).needs(0)
        assert needs.fields == (*fields, "observation", "action")
        assert needs.after == after


def test_codes_of_returns(monkeypatch):
    for code, options, kind in (
        ("linear", {}, "affine"),
        ("uniform", {}, "bins"),
        ("integer", {}, "integers"),
        ("integer", {"low": -20, "high": 100}, "integers"),
        ("sign", {}, "sign"),
    ):
        monkeypatch.setitem(PARADIGMS, "it", of(Part(RETURN, code, weight=1.0, options=options)))
        objectives = make([ARM], "it", context=100)
        codec = objectives.layouts[0][0].elements[0].codec
        assert codec.kind == kind
        if options:
            assert (codec.low, codec.high) == (-20, 100)
    with pytest.raises(ValueError, match="knows"):
        Part(RETURN, "linear", options={"low": 3})
    with pytest.raises(ValueError, match="belong together"):
        Part(RETURN, "histogram")


def test_a_histogram_of_a_discrete_field_has_a_bin_for_each_value(monkeypatch):
    monkeypatch.setitem(PARADIGMS, "it", of(Part(RETURN, "histogram", source="histogram:action")))
    objectives = make([GRID], "it", context=100)
    element = objectives.layouts[0][0].elements[0]
    assert element.options == {"bins": 7, "low": [0.0], "high": [7.0]}
    assert objectives.vocabulary.embedders["vector:histogram:action:7"].shape == (7,)


def test_a_reward_that_is_not_finite_is_refused_at_its_step(monkeypatch):
    monkeypatch.setitem(PARADIGMS, "it", of(Part(RETURN, source="discounted:.9")))
    objectives = make([ARM], "it", context=100)
    _, window = episode(3, 2)
    window.fields = {**window.fields, "action": np.ones((len(window.step), 2), np.float32)}
    TokenBatch.from_arrays(objectives.make_batch(0, np.arange(1), [[window]], seed=0))
    window.fields["reward"] = np.where(window.step == 12, np.inf, window.fields["reward"])
    with pytest.raises(BadValue, match=r"'discounted:.9', episode 'e', step 3: it is inf"):
        objectives.make_batch(0, np.arange(1), [[window]], seed=0, on_bad_value="quarantine")
