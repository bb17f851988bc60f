"""Clips: a window of a clip has the tokens and targets of the same window of the whole episode."""

import numpy as np
import pytest

from tests.pretrain.token_fixtures import ARM, make, window
from tiphys.dataio.episode import DataError, TaskSpec
from tiphys.pretrain.tokens.clips import SPEC, Clip, as_clips, without_clip
from tiphys.pretrain.tokens.derived import derived

CLIPS = TaskSpec("arm", (*ARM.fields, SPEC))
RULE = "discounted:.99"


def cut(whole, first, stop):
    """The steps [first, stop) of a window of a whole episode, as an episode of their own."""
    from dataclasses import replace

    after = float(derived(whole, whole.steps, RULE, {})[stop - 1])
    clip = np.array(Clip(first, whole.episode_steps, after, 0.99))
    fields = {name: value[first:stop] for name, value in whole.fields.items()} | {SPEC.name: clip}
    return replace(
        whole,
        start=0,
        steps=stop - first,
        episode_steps=stop - first,
        fields=fields,
        step=np.arange(stop - first),
        returns_to_go=whole.returns_to_go[first:stop],
        valid=np.ones(stop - first, bool),
        entry=1,
    )


@pytest.mark.parametrize(("first", "stop"), [(0, 3), (2, 6), (5, 9)], ids=["begin", "middle", "end"])
def test_a_clip_is_learned_as_the_window_that_it_was(first, stop):
    from dataclasses import replace

    objectives, rng = make([ARM], "boot", context=200), np.random.default_rng(0)
    objectives.layouts = [objectives.layouts[0], {0: as_clips(objectives.layouts[0][0], CLIPS)}]
    whole = window(objectives, "arm", 9, rng, start=0, ends=True)
    part = replace(
        whole,
        start=first,
        steps=stop - first,
        fields={name: value[first:] for name, value in whole.fields.items()},
        step=whole.step[first:],
        returns_to_go=whole.returns_to_go[first:],
        valid=whole.valid[first:],
    )
    one, other = (objectives.make_batch(0, np.arange(1), [[w]], seed=0) for w in (part, cut(whole, first, stop)))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_the_field_of_clips_is_fetched_and_is_no_part_of_the_task():
    layout = make([ARM], "boot", context=200).layouts[0][0]
    assert SPEC.name in as_clips(layout, CLIPS).fields
    assert SPEC.name not in as_clips(layout, ARM).fields
    assert without_clip(CLIPS) == ARM
    assert not as_clips(layout, CLIPS).acting().clipped


def test_what_only_the_whole_episode_tells_is_refused():
    with pytest.raises(DataError, match=r"no return but a discounted one.*'to_go'"):
        as_clips(make([ARM], "dt", context=200).layouts[0][0], CLIPS)
    objectives, rng = make([ARM], "boot", context=200), np.random.default_rng(0)
    objectives.layouts = [objectives.layouts[0], {0: as_clips(objectives.layouts[0][0], CLIPS)}]
    clip = cut(window(objectives, "arm", 9, rng, start=0), 2, 5)
    clip.fields[SPEC.name][3] = 0.5
    with pytest.raises(DataError, match=r"discounted by 0.5, but this objective discounts by 0.99"):
        objectives.make_batch(0, np.arange(1), [[clip]], seed=0)
