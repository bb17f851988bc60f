"""Hidden parts of windows, as a model fills them in: all at once, each from everything that is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tiphys.dataio.episode import DataError, Window
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.model.inputs import to_tensors, unpack
from tiphys.pretrain.tokens.sequence import placements
from tiphys.pretrain.tokens.timestep import BOTH, Element, TimestepLayout

if TYPE_CHECKING:
    from tiphys.pretrain.model.transformer import DecisionModel


@dataclass(frozen=True)
class Filled:
    """One field of a window.

    steps       int64 [n]: the steps that show the field, counted from the window's first
    values      [n, *shape]: what the model takes for most probable, in the units of the dataset
    confidence  float64 [n]: probability of the value; 1 where it is a regressed vector
    """

    steps: np.ndarray
    values: np.ndarray
    confidence: np.ndarray


@torch.inference_mode()
def fill_in(
    model: DecisionModel, processor: Processor, layout: TimestepLayout, windows: Sequence[Window], role: str = "action"
) -> list[dict[str, Filled]]:
    """What a model fills in for the parts of a kind, by field, for each window.

    Parameters
    ----------
    model : DecisionModel
        The model.
    processor : Processor
        The processor that belongs to it.
    layout : TimestepLayout
        The layout of the task, in which all positions see each other.
    windows : sequence of Window
        All with entry 0 and task 0. `Window.hidden` says what is hidden; parts that the layout never shows are hidden too.
    role : str
        The kind of part to fill in: `action`, `observation` or `reward`.

    Raises
    ------
    DataError
        If the layout does not predict such parts from both sides.
    """
    wanted = [e for e in layout.elements if e.role == role and e.predicted]
    if layout.mask != BOTH or not wanted:
        raise DataError(f"task {layout.task!r}: the policy has not learned to fill in a part of kind {role!r}")
    layout = layout.acting()
    batch = processor.encode(layout, [[w] for w in windows])
    inputs = to_tensors(batch, model.device)
    hidden = unpack(model(inputs).hidden, inputs, batch.rows, batch.length)
    out = []
    for row, window in enumerate(windows):
        placed = placements([window], [{0: layout}], processor.vocabulary, processor.text)
        found = {}
        for element in wanted:
            here = [p for p in placed if p.element == element and p.step is not None]
            cells = np.array([[*range(p.first, p.first + p.size)] for p in here], np.int64).reshape(-1, element.size)
            values, confidence = _decoded(model, element, hidden[row][torch.from_numpy(cells)])
            found[element.field] = Filled(np.array([p.step for p in here], np.int64), values, confidence)
        out.append(found)
    return out


def _decoded(model: DecisionModel, element: Element, hidden: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Values [n, *shape] and their probabilities [n], from the hidden states [n, size, D] at the element's positions."""
    codec = element.codec
    assert codec is not None
    if element.head:
        vectors = model.regress(hidden[:, 0], element.head).float().cpu().numpy()
        return codec.decode(vectors[:, None]), np.ones(len(vectors))
    ids, sure = [], np.ones(len(hidden))
    for column, (low, high) in enumerate(codec.choices()):
        share = model.logits(hidden[:, column])[:, low:high].double().softmax(-1).cpu()
        most, at = share.max(-1)
        ids.append(at.numpy() + low)
        sure *= most.numpy()
    return codec.decode(np.stack(ids, axis=1)), sure
