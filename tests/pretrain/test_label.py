"""Labels: every step has the action that lies between its observation and the next, inferred in the middle of a window."""

from dataclasses import replace

import numpy as np
import pytest

from tests.pretrain import layout_oracle
from tests.pretrain.acting.acting_fixtures import folder, model
from tests.pretrain.token_fixtures import ARM, make, window
from tiphys.dataio.dataset import read_episode
from tiphys.dataio.episode import DataError, Episode, FieldSpec, TaskSpec
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.shards import ShardWriter
from tiphys.launch import cli
from tiphys.pretrain import label as module
from tiphys.pretrain.acting.infer import Filled, fill_in
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.acting.processor import Processor

SEEN = TaskSpec("arm", (FieldSpec("observation", "observation", "continuous", "float32", (5,)),))
WINDOW = 8


def policy_of(**options):
    objectives = make([ARM], "idm", context=60, window=WINDOW, **options)
    return Policy(model(objectives), Processor.from_dict(objectives.processor()))


def dataset(path, lengths, final=True):
    """Episodes that were only seen. Entry 0 of the observation counts in steps of different sizes."""
    rng = np.random.default_rng(0)
    with ShardWriter(str(path), [SEEN]) as writer:
        for number, steps in enumerate(lengths):
            moved = np.cumsum(rng.integers(0, 10, steps + final))
            rows = np.repeat(moved[:, None], 5, axis=1).astype(np.float32)
            writer.write(Episode(f"e{number}", "arm", {"observation": rows}, steps))
    return str(path)


def moves(model, processor, layout, windows, role="action"):
    """A perfect `fill_in`: entry 0 of the action is how far the observation moves, entry 1 the distance to the window's edge."""
    out = []
    for w in windows:
        at = w.fields["observation"][:, 0]
        n = w.steps
        assert len(at) == n + 1, "the observation after the last action is there"
        edge = np.minimum(np.arange(n), n - 1 - np.arange(n))
        values = np.stack([(at[1:] - at[:-1]), edge], axis=1).astype(np.float32)
        out.append({"action": Filled(np.arange(n), values, np.full(n, 0.5))})
    return out


@pytest.mark.parametrize("final", [True, False], ids=["with the last observation", "without"])
def test_every_step_has_the_action_between_two_observations(tmp_path, monkeypatch, final):
    monkeypatch.setattr(module, "fill_in", moves)
    lengths = [1, 2, 5, 8, 9, 12, 16, 30, 33]
    source = dataset(tmp_path / "seen", lengths, final)
    found = module.label(policy_of(), source, str(tmp_path / "labelled"))
    index = EpisodeIndex.open(str(tmp_path / "labelled"))
    kept = [n - (not final) for n in lengths]
    assert found.steps == sum(lengths)
    assert found.labelled == sum(kept)
    assert found.dropped == (not final)
    assert found.episodes == index.episodes
    assert f"{found.labelled / found.steps:.1%}" in str(found)
    assert "mean probability of a label: 0.500" in str(found)
    for i in range(index.episodes):
        episode = read_episode(index, i)
        steps = kept[int(episode.id[1:])]
        at, action = episode.fields["observation"][:, 0], episode.fields["action"]
        assert episode.steps == len(action) == steps == len(at) - 1
        assert np.array_equal(action[:, 0], np.diff(at))
        if steps > WINDOW:  # away from the episode's ends, a quarter of the window is on each side
            inner = slice(WINDOW // 4, steps - WINDOW // 4)
            assert (action[inner, 1] >= WINDOW // 4 - 1).all()


def test_values_are_read_at_the_cells_of_their_step():
    policy, rng = policy_of(), np.random.default_rng(0)
    objectives = make([ARM], "idm", context=60, window=WINDOW)
    windows = [window(objectives, "arm", 3, rng, after=1), window(objectives, "arm", 1, rng, after=1)]
    layout = policy.processor.layouts["it"]["arm"]
    found = fill_in(policy.model, policy.processor, layout, windows)
    for w, one in zip(windows, found, strict=True):
        single = fill_in(policy.model, policy.processor, layout, [w])[0]["action"]
        np.testing.assert_allclose(one["action"].values, single.values)
        laid = layout_oracle.lay(objectives, [[w]])
        assert (laid["tokens"][0][laid["target"][0] >= 0] == policy.processor.vocabulary.mask).all()
        assert one["action"].steps.tolist() == list(range(w.steps))
        assert (one["action"].confidence > 0).all()
    with pytest.raises(DataError, match="not learned to fill in a part of kind 'observation'"):
        fill_in(policy.model, policy.processor, layout, windows, "observation")


def test_the_command_writes_a_dataset_that_can_be_learned_from(tmp_path, capsys):
    source = dataset(tmp_path / "seen", [3, 11])
    made = folder(tmp_path / "policy", make([ARM], "idm", context=60, window=WINDOW))
    assert cli.main(["label", str(made), source, str(tmp_path / "out")]) == 0
    assert "14 of 14 steps in 2 episodes are labelled (100.0%)" in capsys.readouterr().out
    index = EpisodeIndex.open(str(tmp_path / "out"))
    (task,) = index.tasks
    assert {f.name: f.role for f in task.fields} == {"observation": "observation", "action": "action"}
    assert task.field("action").low == (-2.0, 0.0)
    action = read_episode(index, 1).fields["action"]
    assert action.shape == (11, 2)
    assert (action >= [-2, 0]).all()


def test_what_cannot_be_labelled_is_refused(tmp_path):
    policy = policy_of()
    with pytest.raises(DataError, match=r"task 'leg': the policy has not learned to label it; it labels arm.*idm"):
        module.labelling(policy, replace(SEEN, name="leg"))
    with pytest.raises(DataError, match="no field 'observation', which the policy sees"):
        module.labelling(
            policy, replace(SEEN, fields=(FieldSpec("picture", "observation", "image", "uint8", (8, 8, 3)),))
        )
    with pytest.raises(DataError, match=r"values of shape \(4,\), the policy sees continuous values of shape \(5,\)"):
        module.labelling(policy, replace(SEEN, fields=(replace(SEEN.fields[0], shape=(4,)),)))
    bc = make([ARM], "bc", context=60)
    with pytest.raises(DataError, match="it labels nothing"):
        module.labelling(Policy(model(bc), Processor.from_dict(bc.processor())), SEEN)
