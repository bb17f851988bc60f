"""History: what a batch of environments has observed and done, laid out as tokens for the next action."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec, Window
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.codecs import Discrete
from tiphys.pretrain.tokens.timestep import Element, TimestepLayout

if TYPE_CHECKING:
    from tiphys.pretrain.acting.processor import Processor


@dataclass(frozen=True)
class Slot:
    """One answer that the model gives: an id in [low, high), or, if `head` is set, the vector of that regression head.

    For a vector, low and high are 0. `field` is the action field that the answer belongs to.
    """

    field: str
    low: int
    high: int
    head: str = ""


@dataclass(frozen=True)
class Acting:
    """Histories whose next action is still to be chosen, one row for each environment.

    batch  TokenBatch [R, L] without targets: everything up to the action, then the positions of the action. `answer` fills in
           the ids or vectors of those; everything else about them (segment, position, local, …) is already there
    open   int64 [R]: column of the action's first position. The model gives the answer to slot i at column open + i − 1, and
           the answer stands in column open + i
    slots  the answers that make up the action, in order
    """

    batch: TokenBatch
    open: np.ndarray
    slots: tuple[Slot, ...]

    def answer(self, slot: int, value: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Write the answers to a slot into these rows (None: all), so that the next slot's answer can depend on them.

        value  int [n] ids, or float [n, d] vectors; an element for each row
        """
        rows = np.arange(len(self.open)) if rows is None else rows
        column = self.open[rows] + slot
        if not self.slots[slot].head:
            self.batch.tokens[rows, column] = value
            return
        part = self.batch.embedded[f"vector:{self.slots[slot].head}"]
        part.value[np.searchsorted(part.index, rows * self.batch.length + column)] = value


@dataclass
class _Episode:
    """What one environment has observed and done since its reset: only the steps that a window can still show."""

    asked: float  # the return that is asked for, of the whole episode
    number: int = 0  # number of the first step that is kept, in the episode
    observations: list[Mapping[str, Any]] = field(default_factory=list)
    actions: list[Mapping[str, np.ndarray]] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)  # return-to-go at each step


class History:
    """The last steps of a batch of environments.

    At each step: `observe`, answer the slots of the result, `decode` the answers, act, and call `acted`. The environments are
    independent: each has its own number of steps, can be reset alone, and can be left out of a step.
    """

    def __init__(
        self,
        processor: Processor,
        layout: TimestepLayout,
        environments: int,
        target_return: float | Sequence[float],
        prompt: Window | None,
        goal: Mapping[str, Any] | None = None,
    ):
        self.processor, self.layout, self.prompt, self.goal = processor, layout, prompt, goal
        # What each environment is asked for, unless `reset` says otherwise
        self.target_return: list[float] = np.broadcast_to(target_return, environments).tolist()
        self.actions = tuple(e for e in layout.elements if e.role == "action")
        self.slots = tuple(slot for e in self.actions for slot in _slots(e))
        self._episodes = [_Episode(asked) for asked in self.target_return]
        self.asks_for_returns = any(e.role == "return" for e in layout.elements)
        self._warned = False
        # Names of the texts that an observation must give
        self.texts = (*layout.preamble, *(e.field for e in layout.elements if e.role == "text"))
        self._placeholders = {e.field: _any_action(e) for e in self.actions}

    def reset(self, environment: int, target_return: float | None = None) -> None:
        """Forget the episode of an environment.

        Its next one is asked for `target_return`, in rewards. None: for what was asked of this environment at first, whatever the
        last episode was asked for.
        """
        asked = self.target_return[environment] if target_return is None else target_return
        self._episodes[environment] = _Episode(asked)

    def limit(self, declared: Sequence[FieldSpec]) -> None:
        """Answer only values that an environment takes.

        declared  the fields of the environment; the range of its discrete action fields counts

        Raises DataError if an entry of an action field has no value that both the policy and the environment know.
        """
        fields = {f.name: f for f in declared if f.modality == "discrete"}
        slots: list[Slot] = []
        for element in self.actions:
            mine, field = _slots(element), fields.get(element.field)
            if field is not None and isinstance(element.codec, Discrete):
                mine = _limited(mine, element.codec, field)
            slots += mine
        self.slots = tuple(slots)

    def observe(
        self,
        observations: Sequence[Mapping[str, Any]],
        rewards: Sequence[float] | None = None,
        environments: Sequence[int] | None = None,
    ) -> Acting:
        """Add a step of these environments (None: all), and lay out their histories for the next action.

        observations  for each environment, its fields by name (tiphys.dataio.observation.observation_fields)
        rewards       for each environment, the reward of its last action; it lowers the return that is still asked for

        Raises DataError if a field is missing or a value has no encoding, or if an environment has not acted since its last
        observation.
        """
        chosen = range(len(self._episodes)) if environments is None else environments
        if rewards is None and self.asks_for_returns and any(self._episodes[i].returns for i in chosen):
            self._warn()
        earned = [0.0] * len(observations) if rewards is None else rewards
        rows = []
        for i, observation, reward in zip(chosen, observations, earned, strict=True):
            episode = self._episodes[i]
            if len(episode.actions) != len(episode.observations):
                raise DataError(
                    f"environment {i} has not acted since its last observation: call `acted` after each `observe`"
                )
            to_go = episode.returns[-1] - float(reward) if episode.returns else episode.asked
            episode.observations.append(observation)
            episode.returns.append(to_go)
            window = self._window(i, episode)
            rows.append([window] if self.prompt is None or not self.prompt.steps else [self.prompt, window])
        batch = self.processor.encode(self.layout, rows)
        used = (batch.segment > 0).sum(axis=1)
        return Acting(batch, used.astype(np.int64) - len(self.slots), self.slots)

    def _warn(self) -> None:
        """Say once that the return that is asked for stays the same at every step."""
        if not self._warned:
            warnings.warn(
                f"task {self.layout.task!r}: this objective asks for a return, but `act` was given no `rewards`, so the return "
                "that is still asked for never falls; give it the rewards of the last actions",
                stacklevel=4,
            )
        self._warned = True

    def acted(self, actions: Mapping[str, np.ndarray], environments: Sequence[int] | None = None) -> None:
        """Add the actions that these environments (None: all) took: fields [R, *shape], as `decode` gives them."""
        chosen = range(len(self._episodes)) if environments is None else environments
        for row, i in enumerate(chosen):
            episode = self._episodes[i]
            episode.actions.append({e.field: np.asarray(actions[e.field][row]) for e in self.actions})

    def decode(self, answers: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Answers to all slots (ids [R] or vectors [R, d]) -> action fields [R, *shape], in the units of the dataset."""
        out, at = {}, 0
        for element in self.actions:
            codec = element.codec
            assert codec is not None
            mine = [np.asarray(a) for a in answers[at : at + element.size]]
            out[element.field] = codec.decode(np.stack(mine, axis=1))
            at += element.size
        return out

    def _window(self, environment: int, episode: _Episode) -> Window:
        """The last steps that fit into the context; the last of them has a placeholder as its action."""
        self._forget(episode)
        shown, layout = episode.observations, self.layout
        count = len(shown)
        fields: dict[str, Any] = {}
        for element in layout.elements:
            if element.role in ("observation", "text"):
                name, constant = element.field, element.constant
                rows = [_given(o, name, element.role == "text") for o in (shown[-1:] if constant else shown)]
                fields[name] = rows[0] if constant else np.stack([np.asarray(r) for r in rows])
        for name in layout.preamble:
            fields[name] = str(_given(shown[-1], name, text=True))
        for name, placeholder in self._placeholders.items():
            fields[name] = np.stack([*(a[name] for a in episode.actions), placeholder])
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
        """Drop the steps that no window can show any more. Only whole chunks, so that no chunk loses its observation."""
        layout = self.layout
        prompt = 0 if self.prompt is None else self.prompt.steps * layout.width
        last = episode.observations[-1]
        texts = [str(_given(last, name, text=True)) for name in layout.preamble]
        preamble = sum(len(ids) for ids in self.processor.text.encode(texts, layout.text_limit))
        room = self.processor.length - prompt
        most = layout.steps(preamble, room)
        while len(episode.observations) > most:
            drop = layout.chunk
            del episode.observations[:drop], episode.actions[:drop], episode.returns[:drop]
            episode.number += drop


def _given(observation: Mapping[str, Any], name: str, text: bool = False) -> Any:
    try:
        return observation[name]
    except KeyError:
        there = ", ".join(sorted(observation))
        if text:
            raise DataError(
                f"nobody says what is to be done: the observation has no text {name!r} (it has {there}); give it to "
                "`policy.reset(task, instruction=…)` or `policy.act(observation, text=…)`"
            ) from None
        raise DataError(f"the observation has no field {name!r}; it has {there}") from None


def _slots(element: Element) -> list[Slot]:
    codec = element.codec
    assert codec is not None
    if element.head:
        return [Slot(element.field, 0, 0, element.head)]
    return [Slot(element.field, low, high) for low, high in codec.choices()]


def _limited(slots: Sequence[Slot], codec: Discrete, field: FieldSpec) -> list[Slot]:
    if field.low is not None and field.high is not None:
        bounds = [np.broadcast_to(field.entries(b).reshape(-1), len(slots)) for b in (field.low, field.high)]
    elif field.values:
        bounds = [np.zeros(len(slots)), np.full(len(slots), field.values - 1)]
    else:
        return list(slots)
    least = np.broadcast_to(codec.low, len(slots))
    out = []
    for i, (slot, low, high) in enumerate(zip(slots, *bounds, strict=True)):
        first = slot.low - int(least[i])  # id of the value 0
        found = replace(slot, low=max(slot.low, first + int(low)), high=min(slot.high, first + int(high) + 1))
        if found.low >= found.high:
            raise DataError(
                f"field {slot.field!r}, entry {i}: the policy answers {least[i]} to {slot.high - first - 1}, but the environment "
                f"takes {int(low)} to {int(high)}"
            )
        out.append(found)
    return out


def _any_action(element: Element) -> np.ndarray:
    """Some valid action, as a placeholder for the one that is still to be chosen."""
    codec = element.codec
    assert codec is not None
    if element.head:
        return codec.decode(np.zeros((1, 1, *codec.embedder_spec().shape), np.float32))[0]
    return codec.decode(np.array([[low for low, _ in codec.choices()]]))[0]
