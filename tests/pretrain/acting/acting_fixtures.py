"""A policy with random weights in a folder, for real environments. Nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tests.pretrain.token_fixtures as fixtures
from tiphys.dataio import environments
from tiphys.dataio.episode import TaskSpec
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.objectives import Objectives
from tiphys.recipes.sections.model import Experts, Model

CART, GRID, SWING = "CartPole-v1", "BabyAI-GoToRedBallGrey-v0", "Pendulum-v1"
SCORES = {CART: (20.0, 500.0), GRID: (0.1, 1.0), SWING: (-1200.0, -150.0)}


def objectives(tasks: Sequence[str] = (CART, GRID, SWING), paradigm: str = "bc", **options: Any) -> Objectives:
    specs: list[TaskSpec] = [replace(environments.spec(t), random=SCORES[t][0], expert=SCORES[t][1]) for t in tasks]
    return fixtures.make(specs, paradigm, context=60, scheme="compact", **options)


def model(of: Objectives, seed: int = 0) -> DecisionModel:
    sizes = Model(layers=2, hidden=32, heads=4, kv_heads=2, moe=Experts(experts=4, experts_per_token=2))
    return DecisionModel(DecisionConfig.from_recipe(sizes, of.vocabulary), seed=seed)


def folder(path: Path, of: Objectives | None = None, seed: int = 0) -> Path:
    """The parts of a published policy that `Policy.load` reads."""
    of = of or objectives()
    model(of, seed).save_pretrained(path)
    (path / "processor.json").write_text(json.dumps(of.processor()))
    return path
