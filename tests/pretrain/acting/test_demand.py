"""A histogram that is demanded of an episode, less what has been done, reaches the model while acting."""

from dataclasses import replace

import numpy as np
import pytest

from tests.pretrain.token_fixtures import ARM, GRID, make, window
from tiphys.dataio.episode import DataError
from tiphys.pretrain.acting.demand import Demand, shows_histogram
from tiphys.pretrain.acting.processor import Processor


def history(field, actions, environments=1, **options):
    """(history, the element with histograms) of a reference that took these actions in the grid."""
    objectives = make([GRID], "gdt", context=200, options={"histogram": field})
    reference = window(objectives, "grid", len(actions), np.random.default_rng(0), start=0)
    reference = replace(reference, fields={**reference.fields, "action": np.array(actions)})
    processor = Processor.from_dict(objectives.processor())
    element = next(filter(shows_histogram, processor.layouts["it"]["grid"].elements))
    return processor.history("grid", environments, future=reference, **options), element, reference


def seen(reference):
    names = ("observation.image", "observation.direction", "observation.mission")
    return {n: v if isinstance(v := reference.fields[n], str) else v[0] for n in names}


def demanded(history, reference, action):
    """The histogram at this step, in which `action` is then taken."""
    acting = history.observe([seen(reference)], [0.0])
    (name,) = (n for n in acting.batch.embedded if n.startswith("vector:histogram"))
    history.acted({"action": np.array([action])})
    return acting.batch.embedded[name].value[-1]


def test_what_was_done_is_subtracted():
    made, _, reference = history("action", [0, 0, 1, 6])
    assert demanded(made, reference, 1) == pytest.approx([0.5, 0.25, 0, 0, 0, 0, 0.25])
    assert demanded(made, reference, 0) == pytest.approx([2 / 3, 0, 0, 0, 0, 0, 1 / 3])
    assert demanded(made, reference, 0) == pytest.approx([0.5, 0, 0, 0, 0, 0, 0.5])
    assert demanded(made, reference, 5) == pytest.approx([0, 0, 0, 0, 0, 0, 1])
    made.reset(0)
    assert demanded(made, reference, 1) == pytest.approx([0.5, 0.25, 0, 0, 0, 0, 0.25])


def test_the_reference_s_own_remainder_can_be_followed():
    made, _, reference = history("action", [0, 0, 1, 6], remainder=False)
    assert demanded(made, reference, 1) == pytest.approx([0.5, 0.25, 0, 0, 0, 0, 0.25])
    assert demanded(made, reference, 1) == pytest.approx([1 / 3, 1 / 3, 0, 0, 0, 0, 1 / 3])


def test_after_the_reference_s_end_nothing_is_preferred():
    _, element, reference = history("action", [0, 1])
    demand = Demand(element, reference)
    for _ in range(3):
        demand.took(0)
    demand.took(1)
    assert demand.shares() == pytest.approx(np.full(7, 1 / 7))


def test_acting_shows_what_training_showed():
    """An environment in which the reference's own steps are taken sees the histograms of the reference's window."""
    from tiphys.pretrain.tokens.derived import derived

    made, element, reference = history("observation.direction", [3, 0, 2, 2, 1])
    wanted = derived(reference, 5, element.rule, element.options)
    for step in range(5):
        one = {n: v if isinstance(v, str) else v[step] for n, v in reference.fields.items() if n != "action"}
        made.observe([one], [0.0])
        made.acted({"action": reference.fields["action"][step : step + 1]})
    assert np.stack(made._episodes[0].demanded) == pytest.approx(wanted, abs=1e-6)


def test_wrong_use_is_refused():
    made, _, reference = history("action", [0, 1])
    processor = made.processor
    with pytest.raises(DataError, match=r"give an episode to match: `policy.reset\(task, future=window\)`"):
        processor.history("grid")
    with pytest.raises(DataError, match="shows the model no returns, so it takes no target return"):
        processor.history("grid", future=reference, target_return=1.0)
    with pytest.raises(DataError, match="1 futures for 2 environments"):
        processor.history("grid", 2, future=[reference])
    other = Processor.from_dict(make([ARM], "bc", context=200).processor())
    with pytest.raises(DataError, match="it takes no `future`"):
        other.history("arm", future=reference)
    with pytest.raises(DataError, match="no field 'speed'"):
        make([GRID], "gdt", context=200, options={"histogram": "speed"})


def test_a_hidden_return_takes_no_target():
    processor = Processor.from_dict(make([ARM], "pdt", context=200).processor())
    assert not processor.history("arm").needs_rewards
    with pytest.raises(DataError, match="takes no target return"):
        processor.history("arm", target_return=1.0)
