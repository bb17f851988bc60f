"""Which models of `transformers` have the arithmetic of ours, and the sizes that a recipe needs to begin with one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiphys.dataio.episode import DataError
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.rope import Rope


@dataclass(frozen=True)
class Family:
    """What distinguishes a family from Llama.

    qk_norm   queries and keys are normalised
    qkv_bias  queries, keys and values have a bias
    experts   layers are mixtures of experts, unless the config names them
    """

    qk_norm: bool = False
    qkv_bias: bool = False
    experts: bool = False


FAMILIES = {
    "llama": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
    "qwen3_moe": Family(qk_norm=True, experts=True),
}
# Keys of config.json that our layers can follow with one value only
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "quantization_config": None,
}
# Names of our `Rope` -> names of `transformers`
_ROPE = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "low_frequency": "low_freq_factor",
    "high_frequency": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
}


def family_config(folder: Path) -> DecisionConfig:
    """The config of ours that computes what the model in a folder computes, with its token ids as texts and nothing else.

    Raises
    ------
    DataError
        If config.json is not valid, of another family, or has a value that our layers cannot follow: it names key and value.
    """
    file = folder / "config.json"
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(given, dict):
            raise TypeError("not an object with keys")
        kind = given.get("model_type")
        if kind not in FAMILIES:
            raise DataError(
                f"{folder}: neither a policy of Tiphys nor a model of a family that is known; its config.json has model_type "
                f"{kind!r}; known: {', '.join(FAMILIES)}"
            )
        return _converted(_whole(given), FAMILIES[kind], file)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # the library checks values with errors of many classes
        raise DataError(f"{file} is not valid: {error}") from None


def _whole(given: dict[str, Any]) -> dict[str, Any]:
    """All values of a config: those of the file, and the library's defaults for its family."""
    from transformers import CONFIG_MAPPING

    return dict(CONFIG_MAPPING[given["model_type"]].from_dict(given).to_dict())


def _converted(there: dict[str, Any], family: Family, file: Path) -> DecisionConfig:
    for key, value in _ONLY.items():
        if there.get(key, value) != value:
            raise DataError(f"{file}: {key} is {str(there[key])[:60]!r}; only {value!r} can be followed")
    if sliding := {t for t in there.get("layer_types") or () if t != "full_attention"}:
        raise DataError(f"{file}: layer_types has {sorted(sliding)[0]!r}; only 'full_attention' can be followed")
    rope = _rope(there["rope_parameters"], file)
    experts = _experts(there, file) if family.experts else {}
    return DecisionConfig(
        vocab_size=there["vocab_size"],
        ranges=[("text", 0, there["vocab_size"])],
        hidden_size=there["hidden_size"],
        num_hidden_layers=there["num_hidden_layers"],
        num_attention_heads=there["num_attention_heads"],
        num_key_value_heads=there.get("num_key_value_heads") or 0,
        head_size=there.get("head_dim") or 0,
        intermediate_size=there["intermediate_size"],
        norm_epsilon=there["rms_norm_eps"],
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
        theta=rope.theta,
        rope=rope.values(),
        tie_word_embeddings=bool(there["tie_word_embeddings"]),
        router_modality=False,
        **experts,
    )


def _rope(there: Mapping[str, Any], file: Path) -> Rope:
    """Raises DataError if the positions are turned in a way that ours are not."""
    known = {"rope_theta", "rope_type", "type", *_ROPE.values()}
    harmless = {"partial_rotary_factor": 1.0, "truncate": True}
    for key, value in there.items():
        if key not in known and value is not None and harmless.get(key) != value:
            raise DataError(f"{file}: rope_parameters has {key}: {value!r}, which cannot be followed")
    theta, kind = float(there["rope_theta"]), there.get("rope_type", "default")
    needed = Rope(type=kind).values() if kind in ("linear", "llama3", "yarn") else {}
    numbers = {ours: there[name] for ours, name in _ROPE.items() if ours in needed and there.get(name) is not None}
    return Rope.of(theta, {"type": kind, **numbers})


def _experts(there: Mapping[str, Any], file: Path) -> dict[str, Any]:
    dense, layers = sorted(there["mlp_only_layers"] or ()), there["num_hidden_layers"]
    if dense != list(range(len(dense))):
        raise DataError(f"{file}: mlp_only_layers is {dense}; only the first layers can be dense")
    used, normalised = there["num_experts_per_tok"], there["norm_topk_prob"]
    if normalised != (used > 1):  # ours: gates add up to 1, and a single one is its probability
        raise DataError(
            f"{file}: norm_topk_prob is {normalised} with num_experts_per_tok {used}; only {not normalised} can be followed"
        )
    count = there.get("num_local_experts") or there["num_experts"]
    if not count or len(dense) >= layers:
        return {}
    return {
        "num_experts": count,
        "num_experts_per_tok": used,
        "moe_every": there["decoder_sparse_step"],
        "moe_intermediate_size": there["moe_intermediate_size"],
        "first_dense": len(dense),
    }


def section(config: DecisionConfig, init: str, tokenizer: str = "") -> dict[str, Any]:
    """The `model:` section of a recipe that begins with a model of this config."""
    out: dict[str, Any] = {
        "init": init,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_size": config.head_size,
        "qk_norm": config.qk_norm,
        "qkv_bias": config.qkv_bias,
        "ffn": config.intermediate_size,
        "norm_epsilon": config.norm_epsilon,
        "rope": {"theta": config.theta, **config.rope},
        "tie": config.tie_word_embeddings,
        "text_vocabulary": config.vocab_size,
    }
    if tokenizer:
        out["text_tokenizer"] = tokenizer
    if config.num_experts:
        out["moe"] = {
            "experts": config.num_experts,
            "experts_per_token": config.num_experts_per_tok,
            "every": config.moe_every,
            "first_dense": config.first_dense,
            "hidden": config.moe_intermediate_size,
        }
    return out


def misfits(there: DecisionConfig, here: DecisionConfig) -> Iterator[tuple[str, str]]:
    """(key of the recipe, reason) where a recipe would change what the model computes, beside the sizes of its layers."""
    if here.num_hidden_layers != there.num_hidden_layers:
        yield "model.layers", f"is {here.num_hidden_layers} here and {there.num_hidden_layers} there"
    if here.tie_word_embeddings and not there.tie_word_embeddings:
        yield "model.tie", "is True here and False there"
    if there.num_experts and here.num_experts_per_tok != there.num_experts_per_tok:
        yield "model.moe.experts_per_token", f"is {here.num_experts_per_tok} here and {there.num_experts_per_tok} there"
