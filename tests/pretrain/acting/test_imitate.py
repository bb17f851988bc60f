"""A policy that imitates sees the observations of an episode before its own, as windows in training see their own."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from tests.pretrain.acting.acting_fixtures import model
from tests.pretrain.token_fixtures import ARM, make, window
from tiphys.dataio.episode import DataError
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.publish import save_policy
from tiphys.pretrain.tokens.batch import TokenBatch

DENSE = ("tokens", "modality", "segment", "position", "local", "timestep", "causal")


def objectives(**options):
    return make([ARM], "bdt", context=60, **options)


def reference(of, steps, seed=0):
    return window(of, "arm", steps, np.random.default_rng(seed), start=0, ends=True)


def part(whole, first, stop):
    """The steps [first, stop) of a window of a whole episode."""
    rows = slice(first, stop)
    return replace(
        whole,
        start=first,
        steps=stop - first,
        fields={name: value[rows] for name, value in whole.fields.items()},
        step=whole.step[rows],
        returns_to_go=whole.returns_to_go[rows],
        valid=whole.valid[rows],
    )


def act(history, whole, step, environment=0):
    """What is laid out at a step of the episode, in which its own action is then taken."""
    seen = history.observe([{"observation": whole.fields["observation"][step]}], None, [environment])
    history.acted({"action": whole.fields["action"][step : step + 1]}, [environment])
    return seen


def test_a_history_is_laid_out_like_a_window_of_training():
    of, whole = objectives(), reference(objectives(), 4)
    history = Processor.from_dict(of.processor()).history("arm", future=whole, hop=True)
    for step in range(4):
        seen = act(history, whole, step)
        trained = TokenBatch.from_arrays(of.make_batch(0, np.arange(1), [[whole]], seed=0))
        end = int(seen.open[0])  # up to the action
        for name in DENSE:
            np.testing.assert_array_equal(getattr(seen.batch, name)[0, :end], getattr(trained, name)[0, :end])
        mine, theirs = (b.embedded["vector:observation:5"] for b in (seen.batch, trained))
        np.testing.assert_array_equal(mine.value[: 4 + step], theirs.value[: 4 + step])
    assert not trained.causal[0, :4].any()
    assert trained.timestep[0, :4].tolist() == [3, 2, 1, 0]


def test_a_window_that_has_dropped_steps_shows_what_was_to_come_from_there_on():
    of = objectives(window=6)
    whole = reference(of, 9)
    history = Processor.from_dict(of.processor()).history("arm", future=whole, hop=True)
    for step in range(9):
        seen = act(history, whole, step)
        first = history._episodes[0].number
        shown = seen.batch.timestep[0, ~seen.batch.causal[0] & (seen.batch.segment[0] > 0)]
        assert shown.tolist() == list(range(min(first + 6, 9)))[first:][::-1]
    assert first > 0


def test_an_episode_that_is_longer_than_its_example_sees_the_example_s_end():
    of = objectives(window=4)
    short, own = reference(of, 2), reference(of, 9, seed=1)
    history = Processor.from_dict(of.processor()).history("arm", future=short, hop=True)
    for step in range(9):
        seen = act(history, own, step)
    assert seen.batch.timestep[0, ~seen.batch.causal[0] & (seen.batch.segment[0] > 0)].tolist() == [1]


@pytest.mark.parametrize("hop", [True, False])
def test_each_environment_imitates_its_own_episode_and_remembers_what_it_read(hop):
    """The actions are those of one environment alone, and of a policy that reads each window anew."""
    of = objectives(window=5)
    net, processor = model(of), Processor.from_dict(of.processor())
    episodes = [reference(of, n, seed=n) for n in (7, 3)]
    seen = np.random.default_rng(5).normal(size=(7, 2, 5)).astype(np.float32)

    def actions(chosen, forget=False):
        policy = Policy(net, processor, hop=hop)
        policy.reset("arm", len(chosen), future=[episodes[i] for i in chosen])
        out = []
        for t in range(7):
            if forget:
                policy.forget()
            out.append(policy.act([seen[t, i] for i in chosen]))
        return np.array(out)

    together = actions([0, 1])
    np.testing.assert_allclose(together[:, :1], actions([0]), atol=1e-5)
    np.testing.assert_allclose(together[:, 1:], actions([1]), atol=1e-5)
    np.testing.assert_allclose(together, actions([0, 1], forget=True), atol=1e-5)
    assert np.abs(together[:, 1] - actions([1, 1])[:, 0]).max() < 1e-5


def test_the_plan_counts_what_a_window_takes():
    of = objectives()
    layout = of.layouts[0][0]
    for steps in (1, 3, 8):
        batch = TokenBatch.from_arrays(of.make_batch(0, np.arange(1), [[reference(of, steps)]], seed=0))
        assert batch.real_tokens == sum(size * -(-steps // period) for size, period in layout.cadence)
    assert layout.steps(0, 60) == 60 // 3


def test_wrong_use_is_refused():
    of = objectives()
    processor = Processor.from_dict(of.processor())
    with pytest.raises(DataError, match=r"acts on what is to come; give an episode to match"):
        processor.history("arm")
    with pytest.raises(DataError, match="1 futures for 2 environments"):
        processor.history("arm", 2, future=[reference(of, 2)])
    with pytest.raises(DataError, match="has no step"):
        processor.history("arm", future=replace(reference(of, 2), steps=0))


STRANGER = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tiphys":
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Absent())
import json, importlib, numpy as np
from transformers import AutoModel
acted = []
for place in {places!r}:
    policy = AutoModel.from_pretrained(place, trust_remote_code=True).policy()
    Window = importlib.import_module(type(policy).__module__.rpartition(".")[0] + ".episode").Window
    rng, n = np.random.default_rng(0), 5
    fields = dict(observation=rng.normal(size=(n, 5)).astype("f4"), action=rng.uniform(-1, 1, (n, 2)).astype("f4"))
    shown = Window(0, 0, "e", 0, n, n, fields, np.arange(n), np.zeros(n, "f4"), np.ones(n, bool))
    policy.reset("arm", **(dict(future=shown) if "bdt" in place else dict(acting=dict(horizon=2, width=2))))
    acted.append([policy.act(row, 0.0).tolist() for row in fields["observation"]])
print("ACTED" + json.dumps(acted))
"""


def test_published_policies_of_the_new_rows_act_without_tiphys(tmp_path):
    """`bdt` is shown an episode, `boot` plans."""
    places = []
    for name, of in (("bdt", objectives()), ("boot", make([ARM], "boot", context=60))):
        net = model(of)
        config = DecisionConfig(**{k: v for k, v in net.config.to_dict().items() if k != "auto_map"})
        values = of.processor()
        place = tmp_path / name
        places.append(str(save_policy(place, net.state_dict(), config, values, recipe={}, step=1, recipe_digest="a")))
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    kept |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", STRANGER.format(places=places)]
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.split("ACTED")[1])
    rng, n = np.random.default_rng(0), 5
    seen, did = rng.normal(size=(n, 5)).astype(np.float32), rng.uniform(-1, 1, (n, 2)).astype(np.float32)
    shown = replace(reference(objectives(), n), fields={"observation": seen, "action": did}, episode_steps=n)
    for place, acted in zip(places, theirs, strict=True):
        policy = Policy.load(place, "cpu")
        policy.reset("arm", **({"future": shown} if "bdt" in place else {"acting": {"horizon": 2, "width": 2}}))
        np.testing.assert_allclose([policy.act(row, 0.0) for row in seen], acted, atol=1e-5)
