"""A window becomes sequences that do not see each other: its steps and its text, or those of each agent."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.pretrain.token_fixtures import GRID, TEAM, make, window
from tiphys.dataio.episode import BadValue, DataError, FieldSpec, TaskSpec
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.targets import TARGETS, candidates, only_allowed
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.tokens.agent_statistics import statistics_of_one_agent
from tiphys.pretrain.tokens.agents import agent_fields, of_one_agent
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.recipes.sections.model import Model

AGENTS = {"options": {"agents": 2}}


def batch_of(objectives, *rows):
    return TokenBatch.from_arrays(objectives.make_batch(0, np.arange(len(rows)), rows, seed=0))


def told(objectives, random, *texts):
    """Windows with these texts."""
    windows = [window(objectives, "grid", 3, random, start=3 + i) for i in range(len(texts))]
    for w, text in zip(windows, texts, strict=True):
        w.fields["observation.mission"] = text
    return windows


def test_pairs_of_a_row_end_where_their_sequences_end():
    objectives, random = make([GRID], "reward", context=200, window=4), np.random.default_rng(0)
    batch = batch_of(objectives, told(objectives, random, "a", "bb", "a"), told(objectives, random, "c", "bb"))
    pairs, segment = batch.pairs["match"], batch.segment.reshape(-1)
    assert (segment[pairs.index] % 2 == 1).all()
    assert (segment[pairs.index + pairs.ahead] == segment[pairs.index] + 1).all()
    assert (batch.tokens.reshape(-1)[pairs.index + pairs.ahead] == objectives.vocabulary.special("summary")).all()
    assert pairs.text.tolist() == [0, 1, 0, 0, 1]
    assert batch.targets == 5
    assert (batch.target < 0).all()
    parts = [batch.select(slice(0, 1)), batch.select(slice(1, 2))]
    again = TokenBatch.from_arrays(TokenBatch.concatenate(parts).to_arrays())
    for name in ("index", "ahead", "text", "weight"):
        assert (getattr(again.pairs["match"], name) == getattr(pairs, name)).all()


def test_equal_texts_and_other_rows_are_no_negatives():
    pairs = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 1]], dtype=torch.int32)  # place, row, text
    expected = [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
    assert candidates(pairs).int().tolist() == expected
    logits = torch.randn(4, 4, generator=torch.manual_seed(0))
    losses = TARGETS["pairs"].losses(logits, pairs, 0)
    by_hand = (
        F.cross_entropy(logits[:1, :2], torch.tensor([0])) + F.cross_entropy(logits[:2, :1].T, torch.tensor([0]))
    ) / 2
    assert losses[0].item() == pytest.approx(by_hand.item(), abs=1e-6)
    assert losses[3] == 0
    for row, column in ((0, 2), (2, 0), (0, 3), (3, 1)):
        other = logits.clone()
        other[row, column] += 100
        assert torch.equal(TARGETS["pairs"].losses(other, pairs, 0), losses)


@pytest.mark.parametrize(("name", "task", "options"), [("reward", GRID, {}), ("mia", GRID, {}), ("madt", TEAM, AGENTS)])
def test_windows_take_the_tokens_that_the_plan_counts(name, task, options):
    objectives, random = make([task], name, context=400, **options), np.random.default_rng(0)
    layout, lengths = objectives.layouts[0][0], objectives.lengths(0)
    for steps in (1, 3):
        one = window(objectives, task.name, steps, random)
        text = objectives.index(0).text("observation.mission")[1][int(objectives.index(0).codes[0])]
        one.fields |= {"observation.mission": text} if layout.preamble else {}
        planned = int(lengths.fixed[0]) + sum(n * -(-steps // every) for n, every in layout.cadence)
        assert batch_of(objectives, [one]).real_tokens == planned


def test_each_agent_has_a_sequence_of_its_own_and_the_return_is_that_of_the_team():
    objectives, random = make([TEAM], "madt", context=400, **AGENTS), np.random.default_rng(0)
    one = window(objectives, "team", 3, random)
    batch = batch_of(objectives, [one])
    width = objectives.layouts[0][0].width
    assert batch.segment[0, : 6 * width].tolist() == [1] * (3 * width) + [2] * (3 * width)
    returns = batch.embedded["vector:return:1"].value.reshape(2, 3)
    assert (returns[0] == returns[1]).all()
    own = batch.embedded["vector:observation.own:3"].value.reshape(2, 3, -1)
    assert not np.allclose(own[0], own[1])
    first = objectives.vocabulary.range("discrete")[0]
    assert batch.tokens[0, [1, 3 * width + 1]].tolist() == [first, first + 1]  # the agent's number
    actions = batch.target[batch.target >= 0].reshape(2, 3) - first
    assert (actions == one.fields["action"].T).all()


def test_what_is_not_available_has_no_probability():
    objectives, random = make([TEAM], "madt", context=400, **AGENTS), np.random.default_rng(0)
    one = window(objectives, "team", 3, random)
    batch = batch_of(objectives, [one])
    ((number, allowed),) = batch.allowed.items()
    low, high = objectives.vocabulary.ranges[int(number) - 1][1:]
    payload = torch.from_numpy(np.concatenate([batch.target.reshape(-1)[allowed.index, None], allowed.bits], axis=1))
    share = only_allowed(torch.randn(6, high - low), payload).softmax(-1).numpy()
    mask = one.fields["mask"].transpose(1, 0, 2).reshape(6, 5)
    assert ((share[:, :5] > 0) == mask).all()
    assert (share[:, 5:] == 0).all()
    one.fields["mask"][1, 0, one.fields["action"][1, 0]] = False
    with pytest.raises((BadValue, DataError), match=r"field 'action'.*step 4.*'mask' says cannot be taken"):
        batch_of(objectives, [one])


def test_a_team_acts_only_as_it_can():
    objectives = make([TEAM], "madt", context=100, **AGENTS)
    config = DecisionConfig.from_recipe(Model(layers=1, hidden=32, heads=2, text_vocabulary=600), objectives.vocabulary)
    random = np.random.default_rng(0)
    for sample in (False, True):
        policy = Policy(DecisionModel(config, seed=1), Processor.from_dict(objectives.processor()), sample=sample)
        policy.reset("team", 3)
        for step in range(6):
            can = random.random((3, 2, 5)) < 0.4
            can[..., step % 5] = True
            seen = [
                {"observation.own": random.random((2, 3)), "observation.seen": np.array([0, 3]),
                 "observation.state": random.random(4), "mask": mask} for mask in can
            ]  # fmt: skip
            actions = np.stack(policy.act(seen, [1.0] * 3))
            assert actions.shape == (3, 2)
            assert np.take_along_axis(can, actions[..., None], -1).all()
    seen[1]["mask"] = np.zeros((2, 5), bool)
    with pytest.raises(DataError, match="no value of 'action' can be taken"):
        policy.act(seen, [1.0] * 3)
    policy.restart(1)
    with pytest.raises(DataError, match=r"'observation.own' .* has the shape \[3, 3\], but .* \[2, 3\]"):
        policy.act([{**seen[0], "observation.own": np.zeros((3, 3))}], [1.0], [1])


def test_the_fields_of_one_agent():
    bounded = FieldSpec(
        "action", "action", "continuous", "float32", (2, 2), (-1.0, 0.0, -3.0, 0.5), (1.0, 2.0, 3.0, 1.0)
    )
    task = TaskSpec("team", (*(f for f in TEAM.fields if f.name != "action"), bounded))
    names = agent_fields(task, 2)
    assert names == ("action", "mask", "observation.own", "observation.seen")
    one = of_one_agent(task, names, 2).field("action")
    assert (one.shape, one.low, one.high) == ((2,), (-3.0, 0.0), (3.0, 2.0))
    statistics = make([TEAM], "madt", context=400, **AGENTS).index(0).statistics["team"]
    found = statistics_of_one_agent(statistics, names, 2)
    both = statistics["observation.own"]
    assert found["observation.own"].mean == pytest.approx(both.mean.mean(0))
    assert found["observation.own"].max == pytest.approx(both.max.max(0))
    assert (found["observation.own"].invalid, found["observation.own"].first_bad) == (both.invalid, both.first_bad)
    assert found["observation.state"] is statistics["observation.state"]


@pytest.mark.parametrize(
    ("name", "task", "options", "why"),
    [
        ("madt", TEAM, {}, r"agents: n"),
        ("madt", TEAM, {"options": {"agents": 3}}, r"'action' has shape \(2,\), but with 3 agents"),
        ("madt", TEAM, {"options": {"agents": 2, "available": "can"}}, r"no field 'can'"),
        ("madt", TEAM, {"options": {"agents": 2, "available": "observation.own"}}, r"shape must be \(5,\)"),
        ("madt", TEAM, {**AGENTS, "prompt": 0.5}, r"no prompts"),
        ("madt", replace(TEAM, fields=TEAM.fields[:-1]), AGENTS, r"no field 'reward'"),
        ("reward", TEAM, {}, r"no text"),
        ("mia", TEAM, {}, r"no text"),
    ],
)
def test_what_cannot_be_learned_is_refused(name, task, options, why):
    with pytest.raises(DataError, match=why):
        make([task], name, context=400, **options)
