"""Oracle of the tokens of a row: slow, one token at a time, and independent of `tiphys.pretrain.tokens.sequence`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from tests.pretrain.hiding_oracle import hidden_and_learnt
from tiphys.pretrain.objectives import Objectives
from tiphys.pretrain.tokens.batch import MODALITIES
from tiphys.pretrain.tokens.derived import derived
from tiphys.pretrain.tokens.images import intervals
from tiphys.pretrain.tokens.picture_codecs import Patches

CODE = {name: i for i, name in enumerate(MODALITIES)}
DENSE = ("tokens", "modality", "segment", "position", "local", "timestep", "task", "causal", "softmax", "weight")


def lay(
    objectives: Objectives, rows: list[list[Any]], numbers: Any = None, step: int = 0, seed: int = 11
) -> dict[str, Any]:
    """Dense arrays by name, embedded {name: [(cell, value, middle place)]}, regression {head: [(cell, value, weight)]}.

    `numbers`: of the rows in the global batch. `step`: of the draws of what is hidden.
    """
    length, vocabulary = objectives.length, objectives.vocabulary
    out: dict[str, Any] = {name: np.zeros((len(rows), length)) for name in DENSE}
    out["target"] = np.full((len(rows), length), -1)
    embedded: dict[str, list[Any]] = {}
    regression: dict[str, list[Any]] = {}
    for r, windows in enumerate(rows):
        p, segment, position, continued = 0, 0, 0, False
        for slot, window, layout in _shown(objectives, windows):
            if not continued:
                segment, position = segment + 1, 0
            continued = window.prompt
            keys = (seed, step, r if numbers is None else int(numbers[r]), slot)
            tokens = _tokens(objectives, layout, window, keys)
            factors = Counter(_counted(tokens, layout, window, first=position == 0))
            steps = len({token["timestep"] for token in tokens if token["where"] == "body"})
            for token in tokens:
                out["tokens"][r, p] = vocabulary.mask if token["hidden"] else token.get("id", vocabulary.embedded)
                out["modality"][r, p] = CODE[token["modality"]]
                out["segment"][r, p] = segment
                out["position"][r, p] = position
                out["local"][r, p] = token["local"]
                out["timestep"][r, p] = token["timestep"]
                out["task"][r, p] = layout.number
                in_prefix = layout.mask == "prefix" and (window.prompt or token["where"] == "head")
                out["causal"][r, p] = layout.mask != "both" and not in_prefix
                if "embedder" in token and not token["hidden"]:
                    part = (r * length + p, token["value"], token.get("place"))
                    embedded.setdefault(token["embedder"], []).append(part)
                shift = 0 if layout.mask == "both" else 1
                if token["learnt"] and position >= shift and not window.prompt:
                    weight = layout.weight * token["weight"]
                    if layout.loss == "factors":
                        weight *= steps / len(factors) / factors[token["role"]]
                    if token.get("head"):
                        part = (r * length + p - shift, token["value"], weight)
                        regression.setdefault(token["head"], []).append(part)
                    else:
                        out["target"][r, p - shift] = token["id"]
                        out["weight"][r, p - shift] = weight
                        if layout.softmax == "range" and not token.get("against all"):
                            out["softmax"][r, p - shift] = vocabulary.softmax(vocabulary.name_of(token["id"]))
                p, position = p + 1, position + 1
    return {**out, "embedded": embedded, "regression": regression}


def _shown(objectives: Objectives, windows: list[Any]) -> Iterator[tuple[int, Any, Any]]:
    """Each window of a row with its number and layout; before it, if the layout says so, its own observations like a prompt."""
    for slot, window in enumerate(windows):
        layout = objectives.layouts[window.entry][window.task]
        if layout.views == "future":
            layout = replace(layout, prompt_parts=("observation",), prompt_reverse=True)
            yield slot, replace(window, prompt=True), layout
        yield slot, window, layout


def _counted(tokens: list[dict[str, Any]], layout: Any, window: Any, first: bool) -> list[str]:
    """The kind of part of each target of a window whose layout counts them by kind. `first`: nothing stands before it."""
    if window.prompt or layout.loss != "factors":
        return []
    unread = first and layout.mask != "both"  # nothing before it predicts the first token
    return [token["role"] for n, token in enumerate(tokens) if token["learnt"] and not (unread and n == 0)]


def _tokens(objectives: Objectives, layout: Any, window: Any, keys: tuple[int, int, int, int]) -> list[dict[str, Any]]:
    acted = window.steps
    if layout.has_actions and not window.valid[acted - 1]:
        acted -= 1
    steps = acted if window.prompt else min(acted + layout.future, len(window.step))
    texts: list[int] = []
    if not window.prompt:
        for name in layout.preamble:
            ids = objectives.text.encode([window.fields[name]])[0].tolist()
            texts += ids if layout.document else ids[: layout.text_limit]
    if layout.text_last:
        texts.append(objectives.vocabulary.end_of_text)
    if layout.document:
        texts = texts[window.start : window.start + window.steps + 1]
    first = layout.width if layout.text_last else 0
    once = [
        {
            "id": i,
            "role": "text",
            "modality": "text",
            "local": min(first + n, 510),
            "timestep": int(window.step[0]),
            "learnt": layout.predict_text,
            "hidden": False,
            "weight": 1.0,
            "where": "tail" if layout.text_last else "head",
        }
        for n, i in enumerate(texts)
    ]
    order = list(range(steps))
    if window.prompt and layout.prompt_reverse:
        order.reverse()
    hidden, learnt = {}, {}
    if layout.hiding and not window.prompt:
        hidden, learnt = hidden_and_learnt(layout, steps, acted, keys)
    body = []
    for s, step in enumerate(order):
        for token in _timestep(objectives, layout, window, step, s, partial=step >= acted):
            key = (s, token["role"])
            if key in hidden:
                token["hidden"] |= hidden[key]
                token["learnt"] &= learnt[key]
            if layout.mask == "both":
                token["learnt"] &= token["hidden"]
            body.append({**token, "where": "body"})
    tail = []
    for element in layout.tail if not window.prompt else ():
        ends = window.start + window.steps >= window.episode_steps
        if element.field:
            ends = ends and bool(window.fields[element.field][window.steps - 1])
        if element.role == "summary" or ends:
            tail.append(
                {
                    "id": objectives.vocabulary.special(element.role),
                    "role": element.role,
                    "modality": "separator",
                    "local": min(layout.width + len(tail), 510),
                    "timestep": int(window.step[acted - 1]),
                    "learnt": element.predicted,
                    "hidden": False,
                    "weight": element.weight,
                    "where": "tail",
                    "against all": True,
                }
            )
    return [*([] if layout.text_last else once), *body, *(once if layout.text_last else []), *tail]


def _timestep(
    objectives: Objectives, layout: Any, window: Any, s: int, place: int, partial: bool
) -> list[dict[str, Any]]:
    """The tokens of row s of a window, which is its timestep number `place`."""
    out: list[dict[str, Any]] = []
    number, local = int(window.step[s]), 0
    ends = any(e.role == "end" and e.predicted for e in layout.tail)
    for e in layout.elements:
        absent = e.role != "action" and (
            place % layout.chunk != 0 or (number - window.start % layout.chunk) % e.stride != 0
        )
        absent |= partial and e.role != "observation"
        absent |= window.prompt and bool(layout.prompt_parts) and e.role not in layout.prompt_parts
        base = {
            "role": e.role,
            "timestep": number,
            "learnt": e.predicted,
            "head": e.head,
            "hidden": not e.shown,
            "weight": e.weight,
        }
        if e.role == "text":
            ids = objectives.text.encode([str(window.fields[e.field][s])])[0].tolist()[: e.size]
            for i in [] if absent else ids:
                out.append({**base, "id": i, "modality": "text", "local": local})
                local += 1
            continue
        if e.role == "separator":
            tokens: list[dict[str, Any]] = [{"id": objectives.vocabulary.separator, "modality": "separator"}]
        elif absent:
            local += e.size
            continue
        else:
            if e.rule:
                value = derived(window, s + 1, e.rule, e.options)[s]
            else:
                value = window.fields[e.field] if e.constant else window.fields[e.field][s]
            encoded = e.codec.encode(np.asarray(value)[None])[0]
            own = e.role in ("action", "return", "reward")
            modality = e.role if own else MODALITIES[e.codec.modality]
            tokens = []
            for k, v in enumerate(encoded):
                token: dict[str, Any] = {"modality": modality}
                token |= {"embedder": e.codec.embedder, "value": v} if e.codec.embedder else {"id": int(v)}
                if isinstance(e.codec, Patches):
                    top, bottom, left, right = intervals(*e.codec.size[:2])[k]
                    token["place"] = ((top + bottom) // 2, (left + right) // 2)
                tokens.append(token)
        for k, token in enumerate(tokens):
            if not absent:
                shared = e.role == "action" and layout.mask != "both"
                whole = ends and e is layout.elements[0] and k == 0
                out.append({**base, **token, "local": 511 if shared else min(local, 510), "against all": whole})
            local += 1
    return out
