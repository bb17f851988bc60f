"""Section `objectives`: what is learned, and how fields become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tiphys.recipes.keys import key
from tiphys.recipes.sections.limits import POSITIONS


@dataclass(frozen=True)
class Relative:
    """Actions that are counted from the state of the observed step."""

    to: str = key(
        "", "Actions: count them from this field of the observed step; empty: they stay absolute", text="field"
    )
    columns: list[Any] = key(
        list,
        "The column of `to` that each entry of the action is counted from, one for each entry; null: it stays absolute",
    )


@dataclass(frozen=True)
class Augment:
    """How pictures are changed at random in training, all of a window and camera alike; never in validation or acting."""

    crop: float = key(
        1.0, "Share of each side that is cut out at a random place and enlarged again; 1: all", low=0.1, high=1
    )
    rotate: float = key(
        0.0, "Most degrees by which pictures are rotated, to either side", unit="degrees", low=0, high=180
    )
    brightness: float = key(0.0, "Largest change of the factor of the brightness", low=0, high=1)
    contrast: float = key(0.0, "Largest change of the factor of the contrast", low=0, high=1)
    saturation: float = key(0.0, "Largest change of the factor of the saturation", low=0, high=1)


@dataclass(frozen=True)
class Flow:
    """The head that draws chunks of actions by flow matching, with `head: flow`."""

    width: int = key(256, "Width of the head", low=8, high=2**14)
    depth: int = key(3, "Blocks of the head", unit="blocks", low=1, high=64)
    draws: int = key(
        4, "Noises and times that each chunk is learned at; more make the gradient less noisy", low=1, high=64
    )
    steps: int = key(10, "Euler steps in which a policy draws a chunk", unit="steps", low=1, high=1000)


@dataclass(frozen=True)
class FieldTokens:
    """How one field of a timestep becomes tokens. It takes precedence over the scheme of the objective."""

    encoding: str = key(
        "auto",
        "How the field becomes tokens; auto: as the scheme says",
        choices=("auto", "gato", "vector", "grid", "rows", "cells", "uniform", "quantile", "integer", "sign", "skip"),
    )
    bins: int = key(1024, "With `encoding: uniform` or `quantile`, bins of each dimension", low=2, high=2**16)
    resize: int = key(0, "Images: height and width after resizing; 0: as stored", unit="pixels", low=0, high=8192)
    crop: int = key(
        0, "Images: height and width of a centre crop before resizing; 0: none", unit="pixels", low=0, high=8192
    )
    augment: Augment = key(Augment, "Images: how they are changed at random in training")
    stride: int = key(1, "Keep this field's observation in every n-th step only", unit="steps", low=1, high=POSITIONS)
    chunk: int = key(1, "Actions: predict this many steps at once", unit="steps", low=1, high=2**16)
    relative: Relative = key(Relative, "Actions: count them from the state of the observed step")
    normalise: str = key(
        "auto",
        "Actions: what becomes -1 to 1: the range of the data, its quantiles .01 to .99, or one standard deviation around the "
        "mean; auto: quantile for chunks and relative actions, else the bounds of the space",
        choices=("auto", "bounds", "quantile", "standard"),
    )


@dataclass(frozen=True)
class Objective:
    """A paradigm with its options."""

    paradigm: str = key(
        "", "Paradigm to learn by; empty: the one that the key under `objectives` names", text="name of a paradigm"
    )
    context: int = key(
        1024,
        "Most tokens of one window; rows are as long as the largest context of the recipe",
        unit="tokens",
        low=1,
        high=POSITIONS,
    )
    window: int = key(0, "Most steps of one window; 0: as many as fit the context", unit="steps", low=0, high=POSITIONS)
    scheme: str = key(
        "auto",
        "How fields become tokens; auto: gato for paradigm gato, else compact",
        choices=("auto", "gato", "compact"),
    )
    softmax: str = key(
        "auto",
        "What a prediction is normalised over: the whole vocabulary or the range of its target; auto: as the paradigm does",
        choices=("auto", "vocabulary", "range"),
    )
    prompt: float = key(
        -1.0,
        "Share of rows that begin with a prompt of the same task; -1: as the paradigm does",
        low=0,
        high=1,
        also=(-1,),
    )
    prompt_steps: int = key(
        0, "Most steps of a prompt; 0: as many as fit half of the row", unit="steps", low=0, high=POSITIONS
    )
    discretise: str = key(
        "auto",
        "Continuous actions become tokens (yes) or are regressed as vectors (no); auto: as the paradigm does",
        choices=("auto", "yes", "no"),
    )
    target_return: str = key(
        "best",
        "Return of an episode that the policy asks for, if the objective shows returns; `best` is 1x",
        target=True,
        resume=True,
    )
    horizon: int = key(
        0, "Actions that are predicted at each observed step; 0: as many as `chunk`", unit="steps", low=0, high=2**12
    )
    chunk: int = key(
        0,
        "Steps from one observed step to the next, whose actions a policy executes without looking; 0: as `fields` says",
        unit="steps",
        low=0,
        high=2**12,
    )
    head: str = key(
        "auto",
        "How continuous actions are predicted: ids (bins), the mean (l2) or the median (l1) of the whole chunk, or chunks that "
        "are drawn by flow matching; auto: as `discretise` says",
        choices=("auto", "bins", "l2", "l1", "flow"),
    )
    flow: Flow = key(Flow, "The head that draws chunks by flow matching")
    insulate: int = key(
        0,
        "With `head: flow`, `l2` or `l1`: the trunk is not trained by the head but by so many bins of each number of the same "
        "chunk, for example 256; 0: by the head",
        unit="bins",
        low=2,
        high=2**16,
        also=(0,),
    )
    fields: dict[str, FieldTokens] = key(dict, "How single fields become tokens, by field name or glob")
    options: dict[str, Any] = key(dict, "Further options of one paradigm, by name")
