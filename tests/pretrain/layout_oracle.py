"""Oracle of the tokens of a row: slow, one token at a time, and independent of `tiphys.pretrain.tokens.sequence`."""

from __future__ import annotations

from typing import Any

import numpy as np

from tiphys.pretrain.objectives import Objectives
from tiphys.pretrain.tokens.batch import MODALITIES
from tiphys.pretrain.tokens.codecs import Patches
from tiphys.pretrain.tokens.images import intervals

CODE = {name: i for i, name in enumerate(MODALITIES)}


def lay(objectives: Objectives, rows: list[list[Any]]) -> dict[str, Any]:
    """Dense arrays by name, embedded {name: [(cell, value, middle place)]}, regression {head: [(cell, value, weight)]}."""
    length, vocabulary = objectives.length, objectives.vocabulary
    names = ("tokens", "modality", "segment", "position", "local", "timestep", "task", "causal", "softmax", "weight")
    out: dict[str, Any] = {name: np.zeros((len(rows), length)) for name in names}
    out["target"] = np.full((len(rows), length), -1)
    embedded: dict[str, list[Any]] = {}
    regression: dict[str, list[Any]] = {}
    for r, windows in enumerate(rows):
        p, segment, position, continued = 0, 0, 0, False
        for window in windows:
            layout = objectives.layouts[window.entry][window.task]
            if not continued:
                segment, position = segment + 1, 0
            continued = window.prompt
            for token in _tokens(objectives, layout, window):
                out["tokens"][r, p] = token.get("id", vocabulary.embedded)
                out["modality"][r, p] = CODE[token["modality"]]
                out["segment"][r, p] = segment
                out["position"][r, p] = position
                out["local"][r, p] = token["local"]
                out["timestep"][r, p] = token["timestep"]
                out["task"][r, p] = layout.number
                out["causal"][r, p] = 1
                if "embedder" in token:
                    part = (r * length + p, token["value"], token.get("place"))
                    embedded.setdefault(token["embedder"], []).append(part)
                if token["predicted"] and position > 0 and not window.prompt:
                    if token.get("head"):
                        part = (r * length + p - 1, token["value"], layout.weight)
                        regression.setdefault(token["head"], []).append(part)
                    else:
                        out["target"][r, p - 1] = token["id"]
                        out["weight"][r, p - 1] = layout.weight
                        if layout.softmax == "range":
                            out["softmax"][r, p - 1] = vocabulary.softmax(vocabulary.name_of(token["id"]))
                p, position = p + 1, position + 1
    return {**out, "embedded": embedded, "regression": regression}


def _tokens(objectives: Objectives, layout: Any, window: Any) -> list[dict[str, Any]]:
    steps = window.steps
    if layout.has_actions and not window.valid[steps - 1]:
        steps -= 1
    texts: list[int] = []
    if not window.prompt:
        for name in layout.preamble:
            texts += objectives.text.encode([window.fields[name]])[0].tolist()[: layout.text_limit]
    if layout.text_last:
        texts.append(objectives.vocabulary.end_of_text)
    first = layout.width if layout.text_last else 0
    preamble = [
        {
            "id": i,
            "modality": "text",
            "local": min(first + n, 510),
            "timestep": int(window.step[0]),
            "predicted": layout.predict_text,
        }
        for n, i in enumerate(texts)
    ]
    body = [t for s in range(steps) for t in _timestep(objectives, layout, window, s)]
    return body + preamble if layout.text_last else preamble + body


def _timestep(objectives: Objectives, layout: Any, window: Any, s: int) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    number, local = int(window.step[s]), 0
    for e in layout.elements:
        absent = e.role != "action" and (
            s % layout.chunk != 0 or (number - window.start % layout.chunk) % e.stride != 0
        )
        base = {"timestep": number, "predicted": e.predicted, "head": e.head}
        if e.role == "text":
            ids = objectives.text.encode([str(window.fields[e.field][s])])[0].tolist()[: e.size]
            for i in [] if absent else ids:
                out.append({**base, "id": i, "modality": "text", "local": local})
                local += 1
            continue
        if e.role == "separator":
            tokens: list[dict[str, Any]] = [{"id": objectives.vocabulary.separator, "modality": "separator"}]
        else:
            if e.role == "return":
                value = window.returns_to_go[s]
            else:
                value = window.fields[e.field] if e.constant else window.fields[e.field][s]
            encoded = e.codec.encode(np.asarray(value)[None])[0]
            modality = {"action": "action", "return": "return"}.get(e.role) or MODALITIES[e.codec.modality]
            tokens = []
            for k, v in enumerate(encoded):
                token: dict[str, Any] = {"modality": modality}
                token |= {"embedder": e.codec.embedder, "value": v} if e.codec.embedder else {"id": int(v)}
                if isinstance(e.codec, Patches):
                    top, bottom, left, right = intervals(*e.codec.size[:2])[k]
                    token["place"] = ((top + bottom) // 2, (left + right) // 2)
                tokens.append(token)
        for token in tokens:
            if not absent:
                out.append({**base, **token, "local": 511 if e.role == "action" else min(local, 510)})
            local += 1
    return out
