"""The text before a value: against a slow oracle, in parts of a batch, and what a model makes of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.pretrain.model.model_fakes import make_batch, make_config
from tiphys.pretrain.model.inputs import to_tensors, unpack
from tiphys.pretrain.model.transformer import DecisionModel
from tiphys.pretrain.tokens.batch import TEXT, TokenBatch

GRID = "grid:observation.image:7x7x3"


def oracle(batch: TokenBatch, row: int, column: int) -> list[int]:
    """The tokens of the last text before a position of its window: go back to its end, and on to its beginning."""
    window, found = batch.segment[row, column], []
    for c in range(column - 1, -1, -1):
        if batch.segment[row, c] != window or (found and batch.modality[row, c] != TEXT):
            break
        if batch.modality[row, c] == TEXT:
            found.insert(0, int(batch.tokens[row, c]))
    return found


def texts_of(batch: TokenBatch) -> list[list[int]]:
    """The tokens of the text of each grid, as the model gets them."""
    inputs = to_tensors(batch)
    ids = torch.cat([inputs["tokens"], inputs["texts/earlier"]])[inputs["texts/place"]]
    return [ids[inputs["texts/number"] == n].tolist() if n else [] for n in inputs[f"embedded/{GRID}/text"].tolist()]


@pytest.mark.parametrize("seed", range(5))
def test_each_value_gets_the_last_text_before_it_in_its_window(seed: int) -> None:
    batch = make_batch(32, 50, seed=seed)
    wanted = [oracle(batch, *divmod(int(at), batch.length)) for at in batch.embedded[GRID].index]
    assert texts_of(batch) == wanted
    sizes = to_tensors(batch)["texts/size"]
    assert sizes[0] == 1
    assert (sizes[1:] > 0).all()
    assert any(wanted)


def test_a_part_has_the_texts_before_it() -> None:
    batch = make_batch(4, 50, seed=1, windows=(50, 51), bidirectional=False)
    rows, start = np.array([0, 2, 3]), np.array([20, 31, 3])
    parts = [batch.part(rows, start, 50), *(batch.part(rows[i : i + 1], int(start[i]), 50) for i in range(3))]
    for part in (parts[0], parts[0].select(slice(0, 3)), TokenBatch.concatenate(parts[:1])):
        inside = [divmod(int(at), 50) for at in batch.embedded[GRID].index]
        wanted = [
            oracle(batch, row, column)
            for n, first in zip(rows, start, strict=True)
            for row, column in inside
            if row == n and column >= first
        ]
        assert texts_of(part) == wanted
    assert texts_of(parts[0].select(slice(1, 2))) == texts_of(parts[2])
    later = np.array([23, 40, 11])
    again = parts[0].part(np.arange(3), later - start.min(), parts[0].length)  # a part of a part
    assert texts_of(again) == texts_of(batch.part(rows, later, 50))
    one, other = (batch.part(rows[i : i + 1], 25, 50) for i in range(2))
    assert texts_of(TokenBatch.concatenate([one.fill(2), other])) == texts_of(one) + texts_of(other)


@torch.no_grad()
def test_a_grid_is_another_vector_under_another_instruction() -> None:
    """And without FiLM it is not: what comes before the first layer does not depend on words."""
    for film in (True, False):
        spec = {"kind": "grid", "shape": [7, 7, 3], "values": 11} | ({"film": True} if film else {})
        config = make_config(embedders={GRID: spec}, timesteps=0)
        model = DecisionModel(config, seed=2).eval()
        batch = make_batch(4, 40, seed=3)
        batch = replace(batch, embedded={GRID: batch.embedded[GRID]})
        words = (batch.modality == TEXT) & (batch.tokens > 3)
        other = replace(batch, tokens=np.where(words, (batch.tokens + 7) % 90, batch.tokens).astype(np.int32))
        first, second = (embedded(model, b) for b in (batch, other))
        row, column = np.divmod(batch.embedded[GRID].index, batch.length)
        changed = (first - second)[row, column].abs().amax(-1) > 1e-6
        told = [
            any(words[r, max(c - 40, 0) : c]) and bool(oracle(batch, r, c)) for r, c in zip(row, column, strict=True)
        ]
        assert changed.any() == film
        if film:
            assert not changed[~torch.tensor(told)].any()  # no text, so nothing changes
            assert changed[torch.tensor(told)].float().mean() > 0.9


def embedded(model: DecisionModel, batch: TokenBatch) -> torch.Tensor:
    inputs = to_tensors(batch)
    return unpack(model.embedding(model.token(inputs["tokens"]), inputs), inputs, batch.rows, batch.length)
