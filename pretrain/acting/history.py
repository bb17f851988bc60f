"""History: what a batch of environments has seen and done, laid out for the next action."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError, Window
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.timestep import Element, Timestep

if TYPE_CHECKING:
    from tiphys.pretrain.acting.processor import Processor


@dataclass(frozen=True)
class Slot:
    """One answer of the policy: an id in [low, high), or, where `head` is named, the vector of that regression head.

    low and high are 0 for a vector. `field` is the action field that it belongs to.
    """

    field: str
    low: int
    high: int
    head: str = ""


@dataclass(frozen=True)
class Acting:
    """Rows of open histories, a row an environment.

    batch  TokenBatch [R, L]: everything up to the action, and after it the action's positions, whose ids are to be
           filled in. All else of them (segment, position, local, …) is already right.
    open   int64 [R]: column of the action's first position. The answer to slot i is read at column open + i − 1 and
           stands in column open + i
    slots  of the action, in order
    """

    batch: TokenBatch
    open: np.ndarray
    slots: tuple[Slot, ...]

    def answer(self, slot: int, value: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Writes the answers [n] (ids) or [n, d] (vectors) of a slot into these rows (None: all), for the next slot to read."""
        rows = np.arange(len(self.open)) if rows is None else rows
        column = self.open[rows] + slot
        if not self.slots[slot].head:
            self.batch.tokens[rows, column] = value
            return
        part = self.batch.embedded[f"vector:{self.slots[slot].head}"]
        part.value[np.searchsorted(part.index, rows * self.batch.length + column)] = value


@dataclass
class _Episode:
    """What one environment has seen and done since its reset: the rows that a window may still show."""

    asked: float  # the return of the whole episode
    number: int = 0  # of the first row kept
    observations: list[Mapping[str, Any]] = field(default_factory=list)
    actions: list[Mapping[str, np.ndarray]] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)  # to go, at each row


class History:
    """The last steps of a batch of environments: `observe`, answer the slots, `decode`, act, and again.

    Environments are independent: each has its own length, may be reset alone, and may be left out of a step.
    """

    def __init__(
        self, processor: Processor, timestep: Timestep, environments: int, target_return: float, prompt: Window | None
    ):
        self.processor, self.timestep, self.target_return, self.prompt = processor, timestep, target_return, prompt
        self.actions = tuple(e for e in timestep.elements if e.role == "action")
        self.slots = tuple(slot for e in self.actions for slot in _slots(e))
        self._episodes = [_Episode(target_return) for _ in range(environments)]
        self._nothing = {e.field: _any_action(e) for e in self.actions}

    def reset(self, environment: int, target_return: float | None = None) -> None:
        """Forgets an environment's episode; its next one is asked for `target_return`, or as much as the history was."""
        self._episodes[environment] = _Episode(self.target_return if target_return is None else target_return)

    def observe(
        self,
        observations: Sequence[Mapping[str, Any]],
        rewards: Sequence[float] | None = None,
        environments: Sequence[int] | None = None,
    ) -> Acting:
        """Takes in a step of these environments (None: all) and lays out their histories with the action open.

        observations  fields by name (tiphys.dataio.observation.observation_fields), one mapping an environment
        rewards       what the last action earned; they lower the return that is still asked for
        Raises DataError where a field is missing or has no encoding.
        """
        chosen = range(len(self._episodes)) if environments is None else environments
        earned = [0.0] * len(observations) if rewards is None else rewards
        rows = []
        for i, observation, reward in zip(chosen, observations, earned, strict=True):
            episode = self._episodes[i]
            if len(episode.actions) != len(episode.observations):
                raise DataError(
                    f"environment {i} observes again without having acted: call `acted` after each `observe`"
                )
            to_go = episode.returns[-1] - float(reward) if episode.returns else episode.asked
            episode.observations.append(observation)
            episode.returns.append(to_go)
            window = self._window(i, episode)
            rows.append([window] if self.prompt is None or not self.prompt.steps else [self.prompt, window])
        batch = self.processor.encode(self.timestep, rows)
        used = (batch.segment > 0).sum(axis=1)
        return Acting(batch, used.astype(np.int64) - len(self.slots), self.slots)

    def acted(self, actions: Mapping[str, np.ndarray], environments: Sequence[int] | None = None) -> None:
        """What was done: action fields [R, *shape], as `decode` gives them."""
        chosen = range(len(self._episodes)) if environments is None else environments
        for row, i in enumerate(chosen):
            episode = self._episodes[i]
            episode.actions.append({e.field: np.asarray(actions[e.field][row]) for e in self.actions})

    def decode(self, answers: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Answers of all slots (ids [R] or vectors [R, d]) -> action fields [R, *shape], in the environment's own terms."""
        out, at = {}, 0
        for element in self.actions:
            codec = element.codec
            assert codec is not None
            mine = [np.asarray(a) for a in answers[at : at + element.size]]
            out[element.field] = codec.decode(np.stack(mine, axis=1))
            at += element.size
        return out

    def _window(self, environment: int, episode: _Episode) -> Window:
        """The rows that the context holds, the last one with an action that is still to be chosen."""
        self._forget(episode)
        shown, timestep = episode.observations, self.timestep
        count = len(shown)
        fields: dict[str, Any] = {}
        for element in timestep.elements:
            if element.role in ("observation", "text"):
                name, constant = element.field, element.constant
                rows = [_given(o, name) for o in (shown[-1:] if constant else shown)]
                fields[name] = rows[0] if constant else np.stack([np.asarray(r) for r in rows])
        for name in timestep.preamble:
            fields[name] = str(_given(shown[-1], name))
        for name, nothing in self._nothing.items():
            fields[name] = np.stack([*(a[name] for a in episode.actions), nothing])
        return Window(
            entry=0,
            task=0,
            episode=f"environment {environment}",
            start=episode.number,
            steps=count,
            episode_steps=episode.number + count,
            fields=fields,
            step=np.arange(episode.number, episode.number + count),
            returns_to_go=np.array(episode.returns, np.float32),
            valid=np.ones(count, bool),
        )

    def _forget(self, episode: _Episode) -> None:
        """Drops what no window shows any more, in whole chunks, so that a chunk's observation is never parted from it."""
        timestep = self.timestep
        prompt = 0 if self.prompt is None else self.prompt.steps * timestep.width
        said = episode.observations[-1]
        texts = [str(_given(said, name)) for name in timestep.preamble]
        preamble = sum(len(ids) for ids in self.processor.text.encode(texts, timestep.text))
        room = self.processor.length - prompt
        most = timestep.steps(preamble, room)
        while len(episode.observations) > most:
            drop = timestep.chunk
            del episode.observations[:drop], episode.actions[:drop], episode.returns[:drop]
            episode.number += drop


def _given(observation: Mapping[str, Any], name: str) -> Any:
    try:
        return observation[name]
    except KeyError:
        raise DataError(f"the observation has no field {name!r}; it has {', '.join(sorted(observation))}") from None


def _slots(element: Element) -> list[Slot]:
    codec = element.codec
    assert codec is not None
    if element.head:
        return [Slot(element.field, 0, 0, element.head)]
    return [Slot(element.field, low, high) for low, high in codec.choices()]


def _any_action(element: Element) -> np.ndarray:
    """Some action, for the position whose action is open."""
    codec = element.codec
    assert codec is not None
    if element.head:
        return codec.decode(np.zeros((1, 1, *codec.embedder_spec().shape), np.float32))[0]
    return codec.decode(np.array([[low for low, _ in codec.choices()]]))[0]
