"""The model of a recipe: its sizes, its text tokenizer, and the parameters that are frozen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tiphys.launch.checks.values import Error
from tiphys.pretrain.distributed.layout_errors import MOST_ROWS
from tiphys.pretrain.model.size_errors import parameter_errors, size_errors
from tiphys.recipes.sections.model import Model

if TYPE_CHECKING:
    from tiphys.pretrain.objectives import Objectives
    from tiphys.recipes.schema import Recipe

MOST_POSITIONS = 2**34  # of a global batch
MODEL_SIZES = ("layers", "hidden", "heads", "kv_heads", "head_size", "ffn", "text_vocabulary", "timesteps")
INIT_KEYS = (
    *(f"model.{key}" for key in ("init", "init_map", "init_digest", "init_revision", "upcycle.fresh")),
    "model.moe.experts_per_token",
)
EXPERT_SIZES = ("experts", "experts_per_token", "every", "first_dense", "hidden")


def model_errors(model: dict[str, int], moe: dict[str, int] | None) -> Iterator[Error]:
    """What is wrong with the sizes, by MODEL_SIZES and EXPERT_SIZES. `moe`: None if the schema has refused them."""
    experts = moe or {**dict.fromkeys(EXPERT_SIZES, 0), "experts_per_token": 1, "every": 1}
    shared = {key: model[key] for key in ("layers", "hidden", "heads", "head_size")}
    shared |= {key: experts[key] for key in ("experts", "every", "first_dense")}
    found = list(size_errors(**shared, kv_heads=model["kv_heads"], experts_per_token=experts["experts_per_token"]))
    yield from found
    if not found:
        more = {key: model[key] for key in ("ffn", "text_vocabulary", "timesteps")}
        yield from parameter_errors(**shared, **more, expert_hidden=experts["hidden"])


def rope_errors(recipe: Recipe) -> Iterator[Error]:
    """Whether the rotary positions have one base, and frequencies that are in order."""
    model, rope = recipe.model, recipe.model.rope
    if rope.theta and model.rope_theta not in (Model.rope_theta, rope.theta):
        yield "model.rope.theta", f"{rope.theta:g}, but model.rope_theta is {model.rope_theta:g}; remove one of them"
    if rope.type == "llama3" and rope.low_frequency >= rope.high_frequency:
        yield (
            "model.rope.low_frequency",
            f"{rope.low_frequency:g} must be below high_frequency ({rope.high_frequency:g})",
        )
    if rope.type == "yarn" and (rope.theta or model.rope_theta) == 1:
        yield "model.rope.theta", "1 gives all pairs one frequency, which `yarn` cannot stretch"


def batch_size_errors(rows: Any, contexts: list[Any]) -> Iterator[Error]:
    """Whether a global batch has more positions than any machine computes."""
    longest = max((c for c in contexts if isinstance(c, int)), default=0)
    if isinstance(rows, int) and rows <= MOST_ROWS and rows * longest > MOST_POSITIONS:
        yield (
            "deepspeed.train_batch_size",
            f"{rows} rows of {longest} positions are {rows * longest:.1e}; allowed: at most 2^{int(math.log2(MOST_POSITIONS))}",
        )


def tokenizer_errors(path: Any, vocabulary: Any) -> Iterator[Error]:
    """Whether `model.text_tokenizer` is a tokenizer that fits the vocabulary."""
    from tiphys.pretrain.tokens.text_tokenizers import load

    if isinstance(path, str) and path and "${" not in path and isinstance(vocabulary, int):
        try:
            load(path, vocabulary)
        except ValueError as error:
            yield "model.text_tokenizer", str(error).removeprefix("model.text_tokenizer: ")


def average_errors(recipe: Recipe) -> Iterator[Error]:
    """Whether the policy is to have averages that are not made."""
    if recipe.publish.weights == "ema" and not recipe.train.ema.decay:
        yield "publish.weights", "there is no average of the weights; set `train.ema.decay`, for example to 0.999"


def init_errors(recipe: Recipe, objectives: Objectives) -> Iterator[Error]:
    """Whether `model.init` is a policy with layers of the same sizes, and its digest the one that the recipe was pinned to."""
    if not recipe.model.init:
        if recipe.model.upcycle.fresh:
            yield (
                "model.upcycle.fresh",
                "there is no `model.init` whose MLPs could be copied; set it, or remove this key",
            )
        return
    from tiphys.pretrain.checkpoint import Checkpoint
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.pretrained import open_pretrained, pinned

    if Checkpoint.newest_whole(recipe.run.dir) is not None:
        return  # a run that continues does not open it
    if wrong := [v for v in recipe.model.init_map.values() if not isinstance(v, str)]:
        yield "model.init_map", f"the name here must be a text, not {wrong[0]!r}; write it in quotes"
        return
    try:
        pinned(recipe, None)
        config = DecisionConfig.from_recipe(recipe.model, objectives.vocabulary)
        open_pretrained(recipe, (config, objectives.vocabulary))
    except (OSError, ValueError, RuntimeError) as error:
        where, _, reason = str(error).partition(": ")
        yield (where, reason) if where in INIT_KEYS else ("model.init", str(error))


def freeze_errors(recipe: Recipe, objectives: Objectives) -> Iterator[Error]:
    """Whether each pattern of `model.freeze` names a parameter, and one is left to train."""
    if not recipe.model.freeze:
        return
    import torch

    from tiphys.pretrain.engine import freeze
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.model.transformer import DecisionModel

    with torch.device("meta"):
        model = DecisionModel(DecisionConfig.from_recipe(recipe.model, objectives.vocabulary))
    try:
        freeze(model, recipe.model.freeze)
    except ValueError as error:
        yield "model.freeze", str(error).removeprefix("model.freeze: ")
