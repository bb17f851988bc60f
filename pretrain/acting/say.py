"""Texts that a model continues: tokens are drawn one after the other, and each is read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tiphys.dataio.episode import DataError, Window
from tiphys.dataio.philox import SAY, uniform32, words
from tiphys.pretrain.acting.beam import drawn
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.acting.recall import Recall
from tiphys.pretrain.tokens.batch import TEXT, TokenBatch
from tiphys.pretrain.tokens.timestep import ACTION_LOCAL, BOTH, TimestepLayout

if TYPE_CHECKING:
    from tiphys.pretrain.model.transformer import DecisionModel


def can_say(layout: TimestepLayout) -> bool:
    """Whether a layout teaches what stands in its texts: documents, and captions of pictures."""
    return layout.text_last and layout.predict_text and layout.mask != BOTH


def texts_layout(processor: Processor, task: str, objective: str, seen: bool) -> TimestepLayout:
    """The layout of the texts that `Policy.say` means. `seen`: an observation is given.

    Raises
    ------
    KeyError, DataError
        As in `Policy.say`.
    """
    known = processor.layouts
    if (objective and objective not in known) or (task and task not in processor.tasks):
        raise KeyError(
            f"the policy was not trained on task {task!r} with objective {objective!r}; it has tasks "
            f"{', '.join(processor.tasks)} and objectives {', '.join(known)}"
        )
    layouts = [
        layout
        for name, by_task in known.items()
        for layout in by_task.values()
        if can_say(layout) and objective in ("", name) and task in ("", layout.task)
    ]
    fitting = [layout for layout in layouts if layout.document != seen]
    if not layouts:
        of = f"task {task!r}" if task else "no task"
        raise DataError(f"{of} of this policy taught texts; documents and captions do, with paradigm gato")
    if not fitting:
        need = "takes no observation" if seen else "needs the observation that the text is about"
        raise DataError(f"task {layouts[0].task!r} {need}")
    return fitting[0]


class Writer:
    """Continues several texts together.

    What is drawn for a text depends on the seed, its number and the tokens before it, whatever other texts are continued with
    it. If a document is longer than the model's window, its older half is dropped and the other half is read again, as hops
    of acting do it. A caption ends where the window does.

    Parameters
    ----------
    model : DecisionModel
        The model.
    processor : Processor
        The processor that belongs to it.
    layout : TimestepLayout
        The layout of the task, for which `can_say` holds.
    prompts : sequence of str
        How each text begins.
    fields : sequence of mapping
        The observations that each text is about; empty for documents.

    Raises
    ------
    DataError
        If a document's prompt is empty, a caption's prompt is too long, or an observation lacks a field or has a value without
        encoding.
    """

    def __init__(
        self,
        model: DecisionModel,
        processor: Processor,
        layout: TimestepLayout,
        prompts: Sequence[str],
        fields: Sequence[Mapping[str, Any]],
    ) -> None:
        self.processor, self.layout, self.model = processor, layout, model
        self.room = min(layout.context or processor.length, processor.length)
        self.ids = [ids.tolist() for ids in processor.text.encode(prompts)]
        self.given = [len(ids) for ids in self.ids]
        self.recall = Recall(model, len(prompts), processor.length)
        if layout.document:
            for prompt, ids in zip(prompts, self.ids, strict=True):
                if not ids:
                    raise DataError(
                        f"the prompt {prompt!r} has no token; give at least one word, which the text continues"
                    )
            self.unread = [ids[-self.room + 1 :] if len(ids) >= self.room else ids for ids in self.ids]
            self.first: np.ndarray | None = None
        else:
            self.batch = processor.encode(layout, [[self._window(p, f)] for p, f in zip(prompts, fields, strict=True)])
            self.first = (self.batch.segment > 0).sum(axis=1) - 1  # without the end of the text
            if max(self.given) >= layout.text_limit:
                raise DataError(
                    f"task {layout.task!r}: a prompt has {max(self.given)} tokens, but its texts have at most {layout.text_limit}"
                )
            self.unread = [[] for _ in prompts]
        self.local = np.zeros(len(prompts), int) if self.first is None else self.first - self.given

    @torch.inference_mode()
    def write(self, tokens: int, temperature: float, top_p: float, seed: int) -> list[str]:
        """What follows each prompt: at most `tokens` tokens, up to the end of the text."""
        low, high = self.processor.vocabulary.range("text")
        high = min(high, low + self.processor.text.size)
        end = self.processor.vocabulary.end_of_text
        alive = np.arange(len(self.ids))
        for number in range(tokens):
            if not len(alive):
                break
            logits = self.model.logits(self._read(alive)).cpu().double()
            logits = torch.cat([logits[:, low:high], logits[:, end : end + 1]], 1)
            uniform = uniform32(words(seed, number, alive, purpose=SAY)[0])
            chosen = choose(logits, temperature, top_p, uniform)
            going = chosen < high - low
            for row, one in zip(alive[going].tolist(), (chosen[going] + low).tolist(), strict=True):
                self.ids[row].append(one)
                self.unread[row] = [one]
            alive = alive[going]
            if not self.layout.document:
                alive = alive[[len(self.ids[row]) < self.layout.text_limit for row in alive.tolist()]]
        return [self._continuation(ids, given) for ids, given in zip(self.ids, self.given, strict=True)]

    def _read(self, rows: np.ndarray) -> torch.Tensor:
        """The hidden states [R, D] of the last token of each row."""
        if self.first is not None and not self.recall.cache.lengths.any():
            return self.recall.read(self.batch.part(rows, 0, self.first[rows]), rows)
        cache = self.recall.cache
        for row in rows.tolist():
            if cache.lengths[row] + len(self.unread[row]) > self.room:
                cache.lengths[row] = 0
                self.unread[row] = self.ids[row][-max(1, self.room // 2) :]
        new = [self.unread[row] for row in rows.tolist()]
        sizes = np.array([len(ids) for ids in new])
        there = np.arange(int(sizes.max())) < sizes[:, None]
        batch = TokenBatch.empty(0, there.shape[1], len(rows))
        batch.row[:] = np.arange(len(rows))
        batch.tokens[there] = np.concatenate(new)
        batch.modality[there] = TEXT
        batch.segment[there] = 1
        position = cache.lengths[rows][:, None] + np.arange(there.shape[1])
        batch.position[there] = position[there]
        # Local positions of a caption begin behind those of its picture; they count the tokens of the text
        local = self.layout.width + position - self.local[rows][:, None]
        batch.local[there] = np.clip(local, 0, ACTION_LOCAL - 1)[there]
        batch.task[:] = self.layout.number
        batch.causal[:] = True
        return self.recall.read(batch, rows)

    def _continuation(self, ids: list[int], given: int) -> str:
        text = self.processor.text
        whole, before = text.decode(ids), text.decode(ids[:given])
        return whole[len(before) :] if whole.startswith(before) else text.decode(ids[given:])

    def _window(self, prompt: str, fields: Mapping[str, Any]) -> Window:
        first, *others = self.layout.preamble
        known: dict[str, Any] = {first: prompt, **dict.fromkeys(others, "")}
        for element in self.layout.elements:
            if element.field not in fields:
                raise DataError(f"task {self.layout.task!r}: its texts are about {element.field!r}, which is not given")
            value = np.asarray(fields[element.field])
            known[element.field] = value if element.constant else value[None]
        return Window(
            entry=0,
            task=0,
            episode="text",
            start=0,
            steps=1,
            episode_steps=0,
            fields=known,
            step=np.zeros(1, np.int64),
            returns_to_go=np.zeros(1, np.float32),
            valid=np.zeros(1, bool),
        )


def choose(logits: torch.Tensor, temperature: float, top_p: float, uniform: np.ndarray) -> np.ndarray:
    """Columns [n] drawn from softmax(logits / temperature), among the most probable ones that together hold the share `top_p`.

    Temperature 0 takes the most probable one (Holtzman et al. 2020 for `top_p`).
    """
    if not temperature:
        return logits.argmax(-1).numpy()
    logits = logits / temperature
    if top_p < 1:
        chance, order = logits.softmax(-1).sort(-1, descending=True)
        dropped = chance.cumsum(-1) - chance >= top_p
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)
    return drawn(logits, uniform)
