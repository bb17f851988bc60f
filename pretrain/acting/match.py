"""How well texts fit what was seen, as a model learned it from pairs of windows and texts or from texts that were swapped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tiphys.dataio.episode import DataError, Window
from tiphys.pretrain.acting.history import given
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.acting.slots import any_value
from tiphys.pretrain.model.inputs import to_tensors, unpack
from tiphys.pretrain.tokens.timestep import TimestepLayout

if TYPE_CHECKING:
    from tiphys.pretrain.model.transformer import DecisionModel


def matches_texts(layout: TimestepLayout) -> bool:
    """Whether a layout teaches which texts fit."""
    return layout.loss == "pairs" or any(e.role == "summary" and e.predicted for e in layout.tail)


def matching_layout(processor: Processor, task: str, objective: str) -> TimestepLayout:
    """The layout that `Policy.match` means. Raises KeyError as it does."""
    layouts = {name: by_task[task] for name, by_task in processor.layouts.items() if task in by_task}
    if not layouts or (objective and objective not in layouts):
        known = f"objectives {', '.join(layouts)}" if layouts else f"tasks {', '.join(processor.tasks)}"
        raise KeyError(f"the policy was not trained on task {task!r} with objective {objective!r}; it has {known}")
    return layouts[objective or next((n for n, one in layouts.items() if matches_texts(one)), next(iter(layouts)))]


@torch.inference_mode()
def fits(
    model: DecisionModel,
    processor: Processor,
    layout: TimestepLayout,
    clips: Sequence[Sequence[Mapping[str, Any]]],
    texts: Sequence[str],
) -> np.ndarray:
    """float64 [clips, texts]: the cosine of their vectors, or the probability that a text belongs to a clip.

    Parameters
    ----------
    model : DecisionModel
        The model.
    processor : Processor
        The processor that belongs to it.
    layout : TimestepLayout
        The layout of the task.
    clips : sequence of sequence of mapping
        The fields of consecutive observations.
    texts : sequence of str
        The texts.

    Raises
    ------
    DataError
        If the layout does not teach which texts fit, or an observation lacks a field.
    """
    if not matches_texts(layout):
        raise DataError(f"task {layout.task!r}: the policy has not learned which texts fit what was seen")
    if layout.loss == "pairs":
        steps, words = (replace(one, loss="targets") for one in layout.sequences)
        seen = _last(model, processor, steps, [_window(layout, clip, "") for clip in clips])
        said = _last(model, processor, words, [_window(layout, clips[0], text) for text in texts])
        assert model.head.match is not None
        return model.head.match.cosines(seen, said).double().cpu().numpy()
    layout = replace(layout, swap=0.0, tail=tuple(e for e in layout.tail if e.role == "summary"))
    both = [_window(layout, clip, text) for clip in clips for text in texts]
    no, yes = processor.vocabulary.answers
    logits = model.logits(_last(model, processor, layout, both))[:, [no, yes]]
    return logits.double().softmax(-1)[:, 1].view(len(clips), len(texts)).cpu().numpy()


def _last(
    model: DecisionModel, processor: Processor, layout: TimestepLayout, windows: Sequence[Window]
) -> torch.Tensor:
    """[windows, D]: the hidden state at the last token of each window."""
    batch = processor.encode(layout, [[window] for window in windows])
    inputs = to_tensors(batch, model.device)
    hidden = unpack(model(inputs).hidden, inputs, batch.rows, batch.length)
    last = torch.from_numpy((batch.segment > 0).sum(axis=1) - 1).to(hidden.device)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _window(layout: TimestepLayout, clip: Sequence[Mapping[str, Any]], text: str) -> Window:
    """The observations with some text. Actions and returns, which no match depends on, are placeholders."""
    n = len(clip)
    fields: dict[str, Any] = dict.fromkeys(layout.preamble, text)
    for element in layout.elements:
        if element.role in ("observation", "text"):
            rows = [np.asarray(given(o, element.field, element.role == "text")) for o in clip]
            fields[element.field] = rows[-1] if element.constant else np.stack(rows)
        elif element.field:
            fields[element.field] = np.repeat(any_value(element)[None], n, axis=0)
    return Window(
        entry=0,
        task=0,
        episode="clip",
        start=0,
        steps=n,
        episode_steps=n + 1,
        fields=fields,
        step=np.arange(n),
        returns_to_go=np.zeros(n, np.float32),
        valid=np.ones(n, bool),
    )
