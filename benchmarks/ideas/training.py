"""Training of an experiment: datasets, objectives, plan, loader, model and policy are the product's own.

Only DeepSpeed is left out: the optimizer is torch's AdamW in this process, as in the oracle of the layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.loader import TrajectoryLoader
from tiphys.dataio.placement import Home
from tiphys.launch.plan import Joining, balance_of, loader_arguments, make_plan, open_datasets
from tiphys.pretrain.acting.policy import Policy
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.model.flops import flops_per_batch
from tiphys.pretrain.model.inputs import to_tensors
from tiphys.pretrain.model.moe import mixtures, step_counts
from tiphys.pretrain.objectives import Objectives
from tiphys.pretrain.pretrained import begin
from tiphys.pretrain.publish import save_policy
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.recipes.load import from_dict
from tiphys.recipes.schema import Recipe

SMALL = {"layers": 2, "hidden": 32, "heads": 2, "text_vocabulary": 300, "init_std": 0.02}
# With weights of .02, attention of so narrow a model is nearly uniform in the beginning, and a model that must learn to compare
# two tokens stays there for longer than an experiment lasts.
WIDE = {"init_std": 0.0}  # 1 / √width, the default of recipes
JOINED = 0.3  # weight of a dataset that joins; the first entry has 1


def train(
    mixture: Sequence[Mapping[str, Any]],
    objective: Mapping[str, Any],
    *,
    steps: int,
    rows: int = 16,
    rate: float = 8e-3,
    seed: int = 0,
    model: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    sample: bool = True,
    joins: Mapping[int, Callable[[Policy], str]] | None = None,
) -> Policy:
    """Train a small model, and return its policy.

    Parameters
    ----------
    mixture : sequence of mapping
        The entries of `data.mixture`; each has the objective that follows.
    objective : mapping
        The recipe's section of the objective, with `paradigm`.
    steps, rows : int
        Training steps, and rows of each.
    rate : float
        Peak learning rate. It rises over the first tenth of the steps, and falls to 0 in the end.
    seed : int
        Of the weights, the plan, and the policy's draws.
    model : mapping, optional
        Keys of the recipe's `model` section, instead of those of `SMALL`.
    data : mapping, optional
        Further keys of the recipe's `data` section.
    sample : bool
        The policy draws its actions.
    joins : mapping, optional
        Step -> what makes a dataset from the policy of that step. It joins the mixture from the next step on, learned like the
        first entry, with `JOINED` as its weight.
    """
    recipe = from_dict(
        {
            "name": "idea",
            "data": {"mixture": [{"objective": "it", **entry} for entry in mixture], "validation": 0.0, **(data or {})},
            "objectives": {"it": dict(objective)},
            "model": {**SMALL, **(model or {})},
            "train": {"steps": steps, "seed": seed},
            "deepspeed": {"train_batch_size": rows},
            "run": {"dir": "unused"},
        }
    )
    return fit(recipe, rate, sample=sample, joins=joins).policy


@dataclass(frozen=True)
class Fitted:
    """A policy, and what its training took: steps, operations of forward and backward passes, tokens.

    loss  mean over the last tenth of the steps
    """

    policy: Policy
    steps: int
    flops: float
    tokens: int
    loss: float


def fit(
    recipe: Recipe, rate: float, *, sample: bool = False, joins: Mapping[int, Callable[[Policy], str]] | None = None
) -> Fitted:
    """Train the model of a recipe in this process.

    Parameters
    ----------
    recipe : Recipe
        Its sections `data`, `objectives`, `model` and `train` count, and the number of rows.
    rate : float
        Peak learning rate. It rises over the first tenth of the steps, and falls to 0 in the end.
    sample : bool
        The policy draws its actions.
    joins : mapping, optional
        As for `train`.
    """
    indexes = open_datasets(recipe)
    objectives = Objectives(recipe, indexes)
    joining = Joining(recipe, objectives)
    plan = make_plan(recipe, indexes, objectives, joining=joining)
    net = begin(recipe, objectives.vocabulary).train()
    steps, flops, tokens = recipe.train.steps, 0.0, 0
    losses: list[torch.Tensor] = []
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01, foreach=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    balance = balance_of(recipe, objectives)
    processor, arguments = Processor.from_dict(objectives.processor()), loader_arguments(recipe, objectives)
    with TrajectoryLoader(plan, Home(0, 1), **arguments, join=joining.loader, stop=steps) as loader:
        for step, loaded in enumerate(loader, start=1):
            batch = balance.weighted(TokenBatch.from_arrays(loaded.arrays))
            flops, tokens = flops + flops_per_batch(net.config, batch), tokens + batch.real_tokens
            optimizer.zero_grad()
            output = net(to_tensors(batch), batch.targets, batch.real_tokens)
            output.loss.backward()
            losses.append(output.loss.detach())
            balance.observe(step, output.loss_by_task.detach().numpy()[:, 0])
            loaded.release()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            for layer, counts in zip(mixtures(net), step_counts(net)[0], strict=True):
                layer.finish_step(counts)  # the balance loss of the next step needs them
            if step in (joins or {}):
                made = joins[step](Policy(net, processor, seed=recipe.train.seed))  # type: ignore[index]
                net.train()
                loader.append([joined(made, plan.entries[0].name, len(plan.entries), step)])
    policy = Policy(net, processor, sample=sample, seed=recipe.train.seed)
    return Fitted(policy, steps, flops, tokens, float(torch.stack(losses[-max(1, steps // 10) :]).mean()))


def joined(dataset: str, like: str, number: int, step: int) -> dict[str, Any]:
    """The event of the plan's log by which a dataset joins from a step on."""
    event = {"kind": "dataset", "step": step, "entry": f"{number}:{dataset}", "dataset": dataset, "like": like}
    return {**event, "digest": EpisodeIndex.open(dataset).fingerprint, "weight": JOINED}


def publish(policy: Policy, folder: Path) -> str:
    """Write a policy as a folder, for `model.init`. Returns the folder."""
    save_policy(folder, policy.model.state_dict(), policy.model.config, policy.processor.to_dict())
    return str(folder)
