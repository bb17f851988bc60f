"""The row `dt` beside HF's DecisionTransformerModel: the same inputs from the same data, and the same behaviour.

Equal outputs are impossible, because norms, positions and embedders differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import DecisionTransformerConfig, DecisionTransformerModel

from benchmarks.ideas.dt import learnt, slope
from benchmarks.ideas.toys import write
from benchmarks.ideas.worlds import Chain, Played, behave, competent, play
from tiphys.dataio.loader import TrajectoryLoader
from tiphys.dataio.placement import Home
from tiphys.launch.plan import loader_arguments, make_plan, open_datasets
from tiphys.pretrain.objectives import Objectives
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.recipes.load import from_dict

K, STEPS = 10, 150
ASKED = np.repeat(np.arange(11.0), 40)
Inputs = dict[str, torch.Tensor]


def windows(batch: TokenBatch, objectives: Objectives) -> Iterator[dict[str, np.ndarray]]:
    """What the tokens of each window say, in the form of HF's inputs."""
    layout = objectives.layouts[0][0]
    assert [e.role for e in layout.elements] == ["return", "observation", "action"]
    low, _ = objectives.vocabulary.range("discrete")
    returns = np.zeros((batch.rows * batch.length, 1), np.float32)
    for part in batch.embedded.values():
        returns[part.index] = part.value
    returns = returns.reshape(batch.rows, batch.length, 1)
    for row in range(batch.rows):
        for number in range(1, batch.segment[row].max() + 1):
            at = np.flatnonzero(batch.segment[row] == number).reshape(-1, 3)
            yield {
                "returns_to_go": returns[row, at[:, 0]],
                "states": batch.tokens[row, at[:, 1]] - low,
                "actions": batch.tokens[row, at[:, 2]] - low,
                "timesteps": batch.timestep[row, at[:, 0]],
            }


def naive(data: Played, episode: int, start: int, steps: int) -> dict[str, np.ndarray]:
    """The inputs that the reference implementation makes of the recorded episodes."""
    here = slice(start, start + steps)
    to_go = [data.rewards[episode, t:].sum() / data.returns.max() for t in range(start, start + steps)]
    return {
        "returns_to_go": np.array(to_go, np.float32)[:, None],
        "states": data.fields["observation"][episode, here],
        "actions": data.actions[episode, here],
        "timesteps": np.arange(start, start + steps),
    }


def padded(some: list[dict[str, np.ndarray]], values: int) -> tuple[Inputs, torch.Tensor]:
    """HF's inputs of several windows, padded at their beginning, and the actions; -100: padding."""
    n = len(some)
    out = {
        "states": torch.zeros(n, K, values),
        "actions": torch.zeros(n, K, 2),
        "rewards": torch.zeros(n, K, 1),
        "returns_to_go": torch.zeros(n, K, 1),
        "timesteps": torch.zeros(n, K, dtype=torch.long),
        "attention_mask": torch.zeros(n, K),
    }
    said = torch.full((n, K), -100)
    for i, one in enumerate(some):
        first = K - len(one["actions"])
        out["states"][i, first:] = F.one_hot(torch.from_numpy(one["states"].astype(np.int64)), values).float()
        actions = torch.from_numpy(one["actions"].astype(np.int64))
        out["actions"][i, first:] = F.one_hot(actions.clamp(min=0), 2).float() * (actions >= 0)[:, None]
        out["returns_to_go"][i, first:] = torch.from_numpy(one["returns_to_go"])
        out["timesteps"][i, first:] = torch.from_numpy(one["timesteps"].astype(np.int64))
        out["attention_mask"][i, first:] = 1
        said[i, first:] = actions
    return out, said


def reference(batches: list[list[dict[str, np.ndarray]]], values: int) -> DecisionTransformerModel:
    """HF's model, trained on the windows of these batches."""
    torch.manual_seed(0)
    config = DecisionTransformerConfig(
        state_dim=values, act_dim=2, hidden_size=32, max_ep_len=16, action_tanh=False, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = DecisionTransformerModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=len(batches) + 1, pct_start=0.1)
    for some in batches:
        inputs, said = padded(some, values)
        logits = model(**inputs).action_preds
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), said.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def reached(model: DecisionTransformerModel, world: Chain, scale: float) -> np.ndarray:
    """The returns that HF's model reaches if it is asked for `ASKED`."""
    random = np.random.default_rng(1)
    seen, n = [world.reset(len(ASKED), random)["observation"]], len(ASKED)
    to_go, actions, earned = [ASKED / scale], [np.full(n, -1)], np.zeros(n)
    for step in range(world.steps):
        some = [
            {
                "returns_to_go": np.array([[r[i]] for r in to_go], np.float32),
                "states": np.array([s[i] for s in seen]),
                "actions": np.array([a[i] for a in actions]),
                "timesteps": np.arange(step + 1),
            }
            for i in range(n)
        ]
        chance = model(**padded(some, world.steps + 1)[0]).action_preds[:, -1].softmax(-1)[:, 1].numpy()
        actions[-1] = (random.random(n) < chance).astype(np.int64)
        fields, rewards = world.step(actions[-1])
        earned += rewards
        seen.append(fields["observation"])
        to_go.append(to_go[-1] - rewards / scale)
        actions.append(np.full(n, -1))
    return earned


@pytest.mark.long
def test_dt_has_the_inputs_and_the_behaviour_of_the_reference(tmp_path: Path) -> None:
    world = Chain()
    data = behave(world, 1000, 0, competent())
    dataset = write(tmp_path / "hf", [world.task], data.episodes(world.task, "chain"))
    recipe = from_dict(
        {
            "name": "oracle",
            "data": {
                "mixture": [{"dataset": dataset, "objective": "dt"}],
                "validation": 0.0,
                "starts": "windows",
            },
            "objectives": {"dt": {"context": 64, "window": K}},
            "model": {"layers": 2, "hidden": 32, "heads": 2, "text_vocabulary": 300},
            "train": {"steps": STEPS},
            "deepspeed": {"train_batch_size": 16},
            "run": {"dir": "unused"},
        }
    )
    indexes = open_datasets(recipe)
    objectives = Objectives(recipe, indexes)
    plan = make_plan(recipe, indexes, objectives)
    batches = []
    with TrajectoryLoader(plan, Home(0, 1), **loader_arguments(recipe, objectives), stop=STEPS) as loader:
        for loaded in loader:
            batches.append(list(windows(TokenBatch.from_arrays(loaded.arrays), objectives)))
            loaded.release()
    for step in range(3):
        planned = plan.windows(step)
        ids = [int(name.rpartition("-")[2]) for name in indexes[0].ids.many(planned.episode)]
        expected = [naive(data, *one) for one in zip(ids, planned.start, planned.units, strict=True)]
        for one, other in zip(batches[step], expected, strict=True):
            for name, values in other.items():
                np.testing.assert_allclose(one[name], values, atol=1e-6, err_msg=name)

    ours = play(learnt(world, data, tmp_path / "ours", 0), world, len(ASKED), 0, asked=ASKED).returns
    theirs = reached(reference(batches, world.steps + 1), world, float(data.returns.max()))
    assert slope(ASKED, theirs) > 0.9
    assert abs(slope(ASKED, ours) - slope(ASKED, theirs)) <= 0.05
