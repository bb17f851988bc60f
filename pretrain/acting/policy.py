"""Policy: native observations in, native actions out, for a batch of environments. Published policies carry this file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tiphys.dataio.episode import FieldSpec, Window
from tiphys.dataio.observation import native, observation_fields
from tiphys.dataio.philox import SAMPLE, uniform32, words
from tiphys.pretrain.acting.history import Acting
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.model.attention import KeyValueCache
from tiphys.pretrain.model.inputs import to_tensors, unpack
from tiphys.pretrain.tokens.batch import Embedded, TokenBatch

if TYPE_CHECKING:
    from tiphys.pretrain.model.transformer import DecisionModel

PROCESSOR = "processor.json"
_DENSE = (
    "tokens",
    "modality",
    "segment",
    "position",
    "local",
    "timestep",
    "task",
    "causal",
    "target",
    "softmax",
    "weight",
)


class Policy:
    """A decision model that acts.

        policy = Policy.load(folder)
        policy.reset("CartPole-v1")
        action = policy.act(observation)

    sample  draw each element of an action from the model's distribution instead of taking the most probable one
    seed    of those draws. Environment i's draws at its t-th step depend on (seed, stream of i, t) alone, whatever else is in
            the batch; `stream` of `restart` names them, by default the environment's number
    """

    def __init__(self, model: DecisionModel, processor: Processor, *, sample: bool = False, seed: int = 0) -> None:
        self.model, self.processor = model.eval(), processor
        self.sample, self.seed = sample, seed
        self.task = ""

    @classmethod
    def load(cls, folder: str | Path, device: str = "", *, sample: bool = False, seed: int = 0) -> Policy:
        """The policy of a folder (or of a hub, `org/name`), acting by this installation's code.

        device  "": a GPU where there is one; "auto": spread over all devices by `accelerate`; else a torch device
        """
        from transformers.utils import logging

        from tiphys.pretrain.model.transformer import DecisionModel

        logging.disable_progress_bar()  # an evaluation loads a policy in each of its processes
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = DecisionModel.from_pretrained(str(folder), device_map=device if device == "auto" else None)
        return cls.of(model if device == "auto" else model.to(device), sample=sample, seed=seed)

    @classmethod
    def of(cls, model: DecisionModel, *, sample: bool = False, seed: int = 0) -> Policy:
        """The policy of a model that was loaded from a folder or a hub: its processor lies beside its weights."""
        from transformers.utils import cached_file

        revision = getattr(model.config, "_commit_hash", None)
        file = cached_file(str(model.name_or_path), PROCESSOR, revision=revision)
        assert file is not None  # it raises where there is none
        return cls(model, Processor.from_dict(json.loads(Path(file).read_text())), sample=sample, seed=seed)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks that this policy can act in."""
        known = {task for timesteps in self.processor.timesteps.values() for task, t in timesteps.items() if t.acts}
        return tuple(name for name in self.processor.tasks if name in known)

    def reset(
        self,
        task: str,
        environments: int = 1,
        *,
        objective: str = "",
        target_return: float | None = None,
        prompt: Window | None = None,
    ) -> None:
        """Begin new episodes of a task in a number of environments. Raises KeyError for a task that was not learned.

        objective      which of the policy's objectives acts; "": the first that learned this task
        target_return  what to ask for, where the objective is conditioned on returns; None: as the recipe says
        prompt         a demonstration of the task that stands before each history
        """
        self.history = self.processor.history(
            task, environments, objective=objective, target_return=target_return, prompt=prompt
        )
        self.task = task
        self._actions = {f.name: f for f in self.processor.tasks[task].with_role("action")}
        self._streams = list(range(environments))
        self._steps = [0] * environments

    def restart(self, environment: int, *, stream: int | None = None, target_return: float | None = None) -> None:
        """Begin a new episode in one of the environments."""
        self.history.reset(environment, target_return)
        self._steps[environment] = 0
        if stream is not None:
            self._streams[environment] = stream

    def act(
        self,
        observations: Any,
        rewards: float | Sequence[float] | None = None,
        environments: Sequence[int] | None = None,
    ) -> Any:
        """The action for an observation, or a list of actions for a list of observations.

        rewards       what the actions before earned; they lower the return that is still asked for, and matter only to
                      objectives that are conditioned on it
        environments  numbers of the environments that these observations are of; None: all
        """
        if not self.task:
            raise ValueError("a policy needs to know its task: call reset(task) before act")
        if not isinstance(observations, list):
            one = None if rewards is None else [float(rewards)]  # type: ignore[arg-type]
            return self.act([observations], one, environments)[0]
        chosen = list(range(len(self._streams))) if environments is None else list(environments)
        if len(observations) != len(chosen):
            raise ValueError(f"{len(observations)} observations for {len(chosen)} environments")
        acting = self.history.observe([observation_fields(o) for o in observations], rewards, chosen)  # type: ignore[arg-type]
        fields = self.history.decode(self._answer(acting, chosen))
        self.history.acted(fields, chosen)
        for i in chosen:
            self._steps[i] += 1
        return [self._native(fields, row) for row in range(len(chosen))]

    def _native(self, fields: dict[str, np.ndarray], row: int) -> Any:
        return native({name: _value(values[row], self._actions[name]) for name, values in fields.items()})

    @torch.inference_mode()
    def _answer(self, acting: Acting, chosen: list[int]) -> list[np.ndarray]:
        """Answers to all slots: the rows' histories once, then one token a row for every further slot."""
        answers: list[list[Any]] = [[None] * len(chosen) for _ in acting.slots]
        device = self.model.device
        for rows in _groups(acting):
            cache = KeyValueCache() if len(acting.slots) > 1 else None
            start = 0
            for number in range(len(acting.slots)):
                read = acting.open[rows] + number - 1  # the column whose hidden state answers this slot
                stop = int(read.max()) + 1
                inputs = to_tensors(part(acting.batch, rows, start, stop), device)
                hidden = unpack(self.model(inputs, cache=cache).hidden, inputs, len(rows), stop - start)
                last = hidden[np.arange(len(rows)), read - start]
                found = self._choose(acting, number, last, [chosen[r] for r in rows])
                for r, value in zip(rows, found, strict=True):
                    answers[number][r] = value
                if number + 1 < len(acting.slots):
                    _write(acting, number, rows, found)
                start = stop
        return [np.stack(a) for a in answers]

    def _choose(self, acting: Acting, number: int, hidden: torch.Tensor, environments: list[int]) -> np.ndarray:
        """The answers [n] (ids) or [n, d] (vectors) of one slot, from the hidden states [n, D] before it."""
        slot = acting.slots[number]
        if slot.head:
            return self.model.regress(hidden, slot.head).float().cpu().numpy()
        logits = self.model.logits(hidden)[:, slot.low : slot.high].cpu()
        if not self.sample:
            return logits.argmax(-1).numpy() + slot.low
        steps = np.array([self._steps[i] for i in environments])
        streams = np.array([self._streams[i] for i in environments])
        draw = torch.from_numpy(uniform32(words(self.seed, steps, streams, number, purpose=SAMPLE)[0]))
        below = logits.double().softmax(-1).cumsum(-1)
        return (below < draw[:, None]).sum(-1).clamp(max=slot.high - slot.low - 1).numpy() + slot.low


def _groups(acting: Acting) -> Iterator[np.ndarray]:
    """Rows that are computed together: all for one slot; for several, those of one length, as a key-value cache wants."""
    if len(acting.slots) == 1:
        yield np.arange(len(acting.open))
        return
    for opening in np.unique(acting.open):
        yield np.flatnonzero(acting.open == opening)


def _write(acting: Acting, number: int, rows: np.ndarray, found: np.ndarray) -> None:
    """Some rows' answers to a slot into the batch."""
    slot, column = acting.slots[number], acting.open[rows] + number
    if slot.head:
        vectors = acting.batch.embedded[f"vector:{slot.head}"]
        vectors.value[np.searchsorted(vectors.index, rows * acting.batch.length + column)] = found
    else:
        acting.batch.tokens[rows, column] = found


def part(batch: TokenBatch, rows: np.ndarray, start: int, stop: int) -> TokenBatch:
    """Positions [start, stop) of some rows (ascending), without targets."""
    dense: dict[str, Any] = {n: np.ascontiguousarray(getattr(batch, n)[rows, start:stop]) for n in _DENSE}
    dense["target"] = np.full_like(dense["target"], -1)
    new = np.full(batch.rows, -1)
    new[rows] = np.arange(len(rows))
    embedded = {}
    for name, e in batch.embedded.items():
        row, column = np.divmod(e.index, batch.length)
        keep = (new[row] >= 0) & (column >= start) & (column < stop)
        index = new[row[keep]] * (stop - start) + column[keep] - start
        embedded[name] = Embedded(index, e.value[keep], e.place[keep] if len(e.place) else e.place)
    return replace(batch, row=batch.row[rows], **dense, embedded=embedded, regression={})


def _value(value: np.ndarray, field: FieldSpec) -> Any:
    """One action field as an environment takes it: an int, or an array of the space's type within its bounds."""
    if field.modality == "discrete":
        return int(value) if field.shape == () else np.asarray(value, field.dtype)
    value = np.asarray(value, field.dtype)
    if field.low is not None and field.high is not None:
        shape = field.shape
        low, high = (np.asarray(b, field.dtype).reshape(shape if len(b) > 1 else ()) for b in (field.low, field.high))
        value = np.clip(value, low, high)
    return value
