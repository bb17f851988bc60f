"""A row of a batch, decoded for people."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from tiphys.pretrain.tokens.batch import MODALITIES, TokenBatch
from tiphys.pretrain.tokens.codecs import Patches
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.timestep import Timestep
from tiphys.pretrain.tokens.vocabulary import Vocabulary


def describe_row(batch: TokenBatch, row: int, vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """One dict a position: where it stands, what it shows, what is predicted there.

    Keys: position, segment, task, timestep, local, modality, shows; and where there is a target: predicts, weight, over.
    Texts, discrete values and bins are decoded; of an embedded value its embedder, shape and extremes are given.
    """
    text = TextTokenizer(vocabulary.text_tokenizer) if vocabulary.text_tokenizer else None
    embedded = {
        int(cell): f"{name} {_summary(part.value[i])}"
        for name, part in batch.embedded.items()
        for i, cell in enumerate(part.index)
        if cell // batch.length == row
    }
    regressed = {
        int(cell): (f"{name} {_summary(part.value[i])}", float(part.weight[i]))
        for name, part in batch.regression.items()
        for i, cell in enumerate(part.index)
        if cell // batch.length == row
    }
    ranges = ("vocabulary", *(name for name, _, _ in vocabulary.ranges))
    out = []
    for p in np.flatnonzero(batch.segment[row]).tolist():
        cell = row * batch.length + p
        task = int(batch.task[row, p])
        entry: dict[str, Any] = {
            "position": p,
            "segment": int(batch.segment[row, p]),
            "task": vocabulary.tasks[task] if task < len(vocabulary.tasks) else task,
            "timestep": int(batch.timestep[row, p]),
            "local": int(batch.local[row, p]),
            "modality": MODALITIES[batch.modality[row, p]],
            "shows": embedded.get(cell) or show(int(batch.tokens[row, p]), vocabulary, text),
        }
        if batch.target[row, p] >= 0:
            entry["predicts"] = show(int(batch.target[row, p]), vocabulary, text)
            entry["weight"] = float(batch.weight[row, p])
            entry["over"] = ranges[batch.softmax[row, p]]
        elif cell in regressed:
            entry["predicts"], entry["weight"] = regressed[cell]
        out.append(entry)
    return out


def pictures(batch: TokenBatch, row: int, timesteps: Iterable[Timestep]) -> list[tuple[int, int, str, np.ndarray]]:
    """(segment, timestep, field, uint8 [height, width, channels]) of each picture of a row, put together from its patches.

    timesteps  those of the run's tasks (`Objectives.schemes`); where lines of the mixture show one task's pictures
               differently, only the first line's can be put together
    """
    scheme: dict[int, Timestep] = {}
    for timestep in timesteps:
        scheme.setdefault(timestep.number, timestep)
    out = []
    for name, part in batch.embedded.items():
        if not len(part.place):
            continue
        mine = np.flatnonzero(part.index // batch.length == row)
        at = part.index[mine] % batch.length
        keys = np.stack(
            [batch.segment[row, at], batch.position[row, at] - batch.local[row, at], batch.timestep[row, at]]
        )
        for number in _runs(keys):
            segment, _, step = (int(v) for v in keys[:, number[0]])
            left = part.value[mine[number]]
            for element in scheme[int(batch.task[row, at[number[0]]])].elements:
                codec = element.codec
                if isinstance(codec, Patches) and codec.embedder == name and step % element.stride == 0 and len(left):
                    out.append((segment, step, element.field, codec.decode(left[None, : codec.tokens])[0]))
                    left = left[codec.tokens :]
    return sorted(out, key=lambda picture: picture[:3])


def _runs(keys: np.ndarray) -> list[np.ndarray]:
    """Numbers of consecutive equal columns of [k, n]."""
    if not keys.shape[1]:
        return []
    edges = np.flatnonzero((np.diff(keys) != 0).any(axis=0)) + 1
    return np.split(np.arange(keys.shape[1]), edges)


def show(token: int, vocabulary: Vocabulary, text: TextTokenizer | None) -> str:
    """An id in words: `text 'red'`, `continuous bin 512 (+0.001)`, `discrete 3`, `separator`."""
    name = vocabulary.name_of(token)
    low, high = vocabulary.range(name)
    value = token - low
    if name == "text":
        return f"text {text.decode([token])!r}" if text else f"text {value}"
    if name == "continuous":
        return f"continuous bin {value} ({(value + 0.5) * 2 / (high - low) - 1:+.3f})"
    if name == "discrete":
        return f"discrete {value}"
    special = {getattr(vocabulary, n): n.replace("_", " ") for n in ("separator", "embedded", "mask", "end_of_text")}
    return special.get(token, f"{name} {value}")


def _summary(value: np.ndarray) -> str:
    size = "×".join(map(str, value.shape)) or "1"
    if value.size <= 8:
        return f"{size}: {' '.join(f'{v:g}' for v in np.round(value.ravel(), 3).tolist())}"
    return f"{size}: {value.min():.3g} … {value.max():.3g}"
