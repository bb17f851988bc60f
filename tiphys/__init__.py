"""Tiphys: pre-training for large decision models.

`import tiphys` is quick and imports no torch: each name below is imported when it is first used.

>>> import tiphys
>>> index = tiphys.EpisodeIndex.open("s3://bucket/dataset")
>>> policy = tiphys.Policy.load("runs/quickstart/policy")
"""

# No `from __future__` and no `typing`: with `python -m tiphys` they could come from the current folder (`dataio/python_path.py`).
from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from tiphys.dataio.collect import collect
    from tiphys.dataio.convert import convert
    from tiphys.dataio.episode import DataError, Episode, FieldSpec, Needs, TaskSpec, Window
    from tiphys.dataio.export import export
    from tiphys.dataio.index import EpisodeIndex
    from tiphys.dataio.loader import CacheBudget, LoadedBatch, TrajectoryLoader
    from tiphys.dataio.placement import Home, Placement
    from tiphys.dataio.plan.log import PlanLog
    from tiphys.dataio.sampling import EntryLengths, PlanEntry, SamplingPlan
    from tiphys.dataio.shards import ShardWriter
    from tiphys.dataio.storage import Store
    from tiphys.pretrain.acting.policy import Policy
    from tiphys.pretrain.checkpoint import Checkpoint
    from tiphys.pretrain.evaluate import evaluate
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.model.inputs import to_tensors
    from tiphys.pretrain.model.transformer import DecisionModel
    from tiphys.pretrain.objectives import Objectives
    from tiphys.pretrain.publish import publish
    from tiphys.pretrain.tokens.batch import TokenBatch
    from tiphys.recipes.load import RecipeError, load_recipe
    from tiphys.recipes.schema import Recipe

    __version__: str

_MODULES = {
    "dataio.collect": ("collect",),
    "dataio.convert": ("convert",),
    "dataio.episode": ("DataError", "Episode", "FieldSpec", "Needs", "TaskSpec", "Window"),
    "dataio.export": ("export",),
    "dataio.index": ("EpisodeIndex",),
    "dataio.loader": ("CacheBudget", "LoadedBatch", "TrajectoryLoader"),
    "dataio.placement": ("Home", "Placement"),
    "dataio.plan.log": ("PlanLog",),
    "dataio.sampling": ("EntryLengths", "PlanEntry", "SamplingPlan"),
    "dataio.shards": ("ShardWriter",),
    "dataio.storage": ("Store",),
    "pretrain.acting.policy": ("Policy",),
    "pretrain.checkpoint": ("Checkpoint",),
    "pretrain.evaluate": ("evaluate",),
    "pretrain.model.config": ("DecisionConfig",),
    "pretrain.model.inputs": ("to_tensors",),
    "pretrain.model.transformer": ("DecisionModel",),
    "pretrain.objectives": ("Objectives",),
    "pretrain.publish": ("publish",),
    "pretrain.tokens.batch": ("TokenBatch",),
    "recipes.load": ("RecipeError", "load_recipe"),
    "recipes.schema": ("Recipe",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = list(_HOME)


def __getattr__(name: str) -> "Any":
    if name == "__version__":
        from importlib.metadata import version

        return version("tiphys")
    if name not in _HOME:
        raise AttributeError(f"module 'tiphys' has no attribute {name!r}; it offers {', '.join(sorted(_HOME))}")
    value = getattr(import_module(f"tiphys.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME, "__version__"]
