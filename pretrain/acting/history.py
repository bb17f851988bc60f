"""History: what a batch of environments has observed and done, laid out as tokens for the next action."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec, Window
from tiphys.pretrain.acting.demand import Demand, shows_return, value_of
from tiphys.pretrain.acting.slots import Acting, Head, Slot, any_value, limited, name_of, slots_of
from tiphys.pretrain.tokens.agents import one_agent
from tiphys.pretrain.tokens.batch import ACTION
from tiphys.pretrain.tokens.codec import as_type
from tiphys.pretrain.tokens.derived import REWARD_FIELD
from tiphys.pretrain.tokens.frames import Frame
from tiphys.pretrain.tokens.id_codecs import Discrete
from tiphys.pretrain.tokens.instruction import Earlier, texts_before
from tiphys.pretrain.tokens.timestep import Element, TimestepLayout
from tiphys.pretrain.tokens.vector_codecs import Chunk

if TYPE_CHECKING:
    from tiphys.pretrain.acting.processor import Processor


@dataclass
class _Episode:
    """What one environment has observed and done since its reset: only the steps that a window can still show.

    asked   the return that is asked for, of the whole episode
    number  number of the first step that is kept, in the episode
    held    tokens of the window that the model has seen and still knows
    begins  position of each step's first token in the window, as it was laid out last
    told    the last text before that token
    fixed   texts and values that stand in every part of the window, as they were laid out last
    counted number of actions, from the episode's first on, that `demand` knows
    """

    asked: float
    demand: Demand | None = None
    number: int = 0
    observations: list[Mapping[str, Any]] = field(default_factory=list)
    actions: list[Mapping[str, np.ndarray]] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)  # return-to-go at each step
    rewards: list[float] = field(default_factory=list)  # of each action, as far as they are known
    demanded: list[np.ndarray] = field(default_factory=list)  # what `demand` was at each step
    planned: list[Mapping[str, np.ndarray]] = field(
        default_factory=list
    )  # actions of a chunk that are still to be executed
    beyond: list[Mapping[str, np.ndarray]] = field(default_factory=list)  # those that were predicted after them
    held: int = 0
    begins: list[int] = field(default_factory=list)
    told: list[Earlier] = field(default_factory=list)
    fixed: tuple[Any, ...] = ()
    counted: int = 0


class History:
    """The last steps of a batch of environments.

    At each step: `observe`, answer the slots of the result, `decode` the answers, act, and call `acted`. The environments are
    independent: each has its own number of steps, can be reset alone, and can be left out of a step.

    A window holds all steps of an episode until they do not fit any more. With `hop` the older half is dropped then, so the
    window's beginning stays where it is for many steps, and a model that remembers what it has seen needs the new tokens only.
    Without `hop` the window always shows as many steps as fit, and its beginning moves at every step.
    """

    def __init__(
        self,
        processor: Processor,
        layout: TimestepLayout,
        environments: int,
        target_return: float | Sequence[float],
        prompt: Window | None,
        hop: bool = False,
        goal: Mapping[str, Any] | None = None,
        demands: Sequence[Demand] = (),
        *,
        references: Sequence[Window] = (),
        learnt: TimestepLayout | None = None,
        answers_return: bool = False,
        reserve: int = 0,
        predicts_end: bool = False,
        available: Mapping[str, str] | None = None,
    ):
        """answers_return: the return of each step is answered too, before the action. reserve: steps that a full window keeps
        free, for a plan. predicts_end: the model says where an episode ends. references: the episode that each environment
        imitates. learnt: the layout of training, if its windows show more than a history does."""
        self.processor, self.layout, self.hop, self.goal = processor, layout, hop, goal
        self.available = dict(available or {})  # action field -> the field that tells which of its values can be taken
        # What each environment is asked for, unless `reset` says otherwise
        self.target_return: list[float] = np.broadcast_to(target_return, environments).tolist()
        self.prompt = prompt if prompt is not None and prompt.steps else None
        self._prompt_tokens = 0 if self.prompt is None else processor.encode(layout, [[self.prompt]]).real_tokens
        self._references, self._learnt = tuple(references), learnt or layout
        self.reserve, self.predicts_end = min(reserve, self._learnt.steps(0, processor.length) - 1), predicts_end
        self.actions = tuple(e for e in layout.elements if e.role == "action")
        self.answered = tuple(e for e in layout.elements if answers_return and e.role == "return") + self.actions
        self.slots = tuple(slot for e in self.answered for slot in slots_of(e))
        self._demands = tuple(demands)
        self._episodes = [_Episode(asked) for asked in self.target_return]
        for i in range(environments):
            self.reset(i)
        self.needs_rewards = any(shows_return(e) or (e.role == "reward" and e.shown) for e in layout.elements) or any(
            d.field == REWARD_FIELD for d in self._demands
        )
        self._warned = False
        # Names of the texts that an observation must give
        self.texts = (*layout.preamble, *(e.field for e in layout.elements if e.role == "text"))
        self._constants = tuple(e.field for e in layout.elements if e.constant)
        self._placeholders = {name_of(e): any_value(e) for e in layout.elements if e.role in ("action", "reward")}
        self._placeholders |= {name_of(e): any_value(e) for e in self.answered}

    def reset(self, environment: int, target_return: float | None = None) -> None:
        """Forget the episode of an environment.

        Its next one is asked for `target_return`, in rewards. None: for what was asked of this environment at first, whatever the
        last episode was asked for.
        """
        asked = self.target_return[environment] if target_return is None else target_return
        demand = self._demands[environment].again() if self._demands else None
        self._episodes[environment] = _Episode(asked, demand)

    def forget(self) -> None:
        """The model has seen nothing of these histories, so the next layouts are whole windows."""
        for episode in self._episodes:
            episode.held = 0

    def limit(self, declared: Sequence[FieldSpec]) -> None:
        """Answer only values that an environment takes.

        declared  the fields of the environment; the range of its discrete action fields counts

        Raises DataError if an entry of an action field has no value that both the policy and the environment know.
        """
        agents, mine_of = self.layout.agents, self.layout.agent_fields
        each = [one_agent(f, agents) if f.name in mine_of else f for f in declared]
        fields = {f.name: f for f in each if f.modality == "discrete"}
        slots: list[Slot] = []
        for element in self.answered:
            mine, field = slots_of(element), fields.get(element.field)
            if field is not None and isinstance(element.codec, Discrete):
                mine = limited(mine, element.codec, field)
            slots += mine
        self.slots = tuple(slots)

    def observe(
        self,
        observations: Sequence[Mapping[str, Any]],
        rewards: Sequence[float] | None = None,
        environments: Sequence[int] | None = None,
        *,
        new: bool = False,
    ) -> Acting:
        """Add a step of these environments (None: all), and lay out their histories for the next action.

        observations  for each environment, its fields by name (tiphys.dataio.observation.observation_fields)
        rewards       for each environment, the reward of its last action; it lowers the return that is still asked for
        new           lay out only what the model has not seen yet, if `acted` was given what it has seen. False: whole windows

        Raises DataError if a field is missing or a value has no encoding, or if an environment has not acted since its last
        observation.
        """
        chosen = self._add_step(observations, rewards, environments)
        laid = [self._lay(i, new) for i in chosen]
        batch = self.processor.encode(self.layout, [one[0] for one in laid])
        # New values may be embedded in view of a text that is not laid out again
        told = [self._told(i, one[2]) for i, one in zip(chosen, laid, strict=True)]
        batch = replace(batch, earlier=told if any(one.ids for one in told) else None)
        count = (batch.segment > 0).sum(axis=1)
        past = np.zeros(len(chosen), np.int64)
        base = np.array([one[1] for one in laid], np.int64)
        for row, (i, (_, at, first, heads, before)) in enumerate(zip(chosen, laid, strict=True)):
            episode = self._episodes[i]
            head = heads[-1].tokens if heads else before
            numbers = np.arange(episode.number + first, episode.number + len(episode.observations))
            body = np.searchsorted(batch.timestep[row, head : count[row]], numbers)
            episode.begins[first:] = (at + head + body).tolist()
            episode.told[first:] = texts_before(batch, np.full(len(body), row), head + body)
            past[row] = episode.held
        batch.position[batch.segment > 0] += np.repeat(base, count).astype(np.int32)
        is_action = batch.modality == ACTION
        after = batch.length - is_action[:, ::-1].argmax(axis=1)  # the column after the last action
        return Acting(
            batch, after - len(self.slots), self.slots, past - base, past, tuple(one[3] for one in laid)
        )._restricted(self._allowed(observations))

    def _told(self, environment: int, first: int) -> Earlier:
        """The last text before a step of a window that is laid out from that step on."""
        episode = self._episodes[environment]
        return episode.told[first] if episode.held else Earlier()

    def _allowed(self, observations: Sequence[Mapping[str, Any]]) -> dict[int, np.ndarray]:
        """Slot -> bool [R, ids of the slot]: which can be answered. Raises DataError if none can."""
        out = {}
        for number, slot in enumerate(self.slots):
            if name := self.available.get(slot.field):
                codec = next(e.codec for e in self.actions if e.field == slot.field)
                assert codec is not None
                first = slot.low - codec.choices()[0][0]
                can = np.stack([np.asarray(given(o, name)).astype(bool) for o in observations])
                out[number] = can[:, first : first + slot.high - slot.low]
                if not out[number].any(axis=1).all():
                    row = int(out[number].any(axis=1).argmin())
                    raise DataError(
                        f"observation {row}: field {name!r} says that no value of {slot.field!r} can be taken"
                    )
        return out

    def _add_step(
        self,
        observations: Sequence[Mapping[str, Any]],
        rewards: Sequence[float] | None,
        environments: Sequence[int] | None,
    ) -> list[int]:
        """Add a step of these environments (None: all). Returns their numbers."""
        chosen = list(range(len(self._episodes)) if environments is None else environments)
        if rewards is None and self.needs_rewards and any(self._episodes[i].returns for i in chosen):
            self._warn()
        earned = [0.0] * len(observations) if rewards is None else rewards
        for i, observation, reward in zip(chosen, observations, earned, strict=True):
            self._add(i, observation, float(reward))
        return chosen

    def _add(self, environment: int, observation: Mapping[str, Any], reward: float) -> None:
        episode = self._episodes[environment]
        if len(episode.actions) != len(episode.observations):
            raise DataError(
                f"environment {environment} has not acted since its last observation: call `acted` after each `observe`"
            )
        if episode.returns:
            episode.rewards.append(reward)
        if episode.demand is not None:
            done = episode.number + len(episode.actions)
            if done > episode.counted:
                episode.counted = done
                before, did = episode.observations[-1], episode.actions[-1]
                episode.demand.took(value_of(episode.demand.field, before, did, reward))
            episode.demanded.append(episode.demand.shares())
        if "return" in self._placeholders:
            episode.returns.append(float(self._placeholders["return"]))  # until it is answered
        else:
            episode.returns.append(episode.returns[-1] - reward if episode.returns else episode.asked)
        episode.observations.append(observation)

    def retract(self, environments: Sequence[int]) -> None:
        """Forget the observations of these environments that were not acted on, because one of them was refused."""
        for episode in (self._episodes[i] for i in environments):
            count = len(episode.actions)
            kept_by_step: tuple[list[Any], ...] = (
                episode.observations,
                episode.returns,
                episode.demanded,
                episode.begins,
                episode.told,
            )
            for steps in kept_by_step:
                del steps[count:]
            del episode.rewards[max(count - 1, 0) :]

    def _lay(self, environment: int, new: bool) -> tuple[list[Window], int, int, tuple[Head, ...], int]:
        """What is to be laid out of an environment's window.

        Windows, the position of their first token, the first step, heads, and the tokens before the steps that are no head.

        After a step whose tokens the model has seen, only the last tokens of the step before it and those of the new step are
        new; but a chunk can only be laid out from its beginning.
        """
        episode, layout = self._episodes[environment], self.layout
        last = episode.observations[-1]
        texts = [str(given(last, name, text=True)) for name in layout.preamble]
        ids = self.processor.text.encode(texts, layout.text_limit)
        preamble = sum(len(part) for part in ids)
        fixed = (*texts, *(given(last, name) for name in self._constants))
        same = len(fixed) == len(episode.fixed) and all(map(np.array_equal, fixed, episode.fixed))
        if self._forget(episode, preamble) or not new or not same:
            episode.held = 0
        episode.fixed = fixed
        if episode.held:
            first = max(len(episode.observations) - 2, 0) // layout.chunk * layout.chunk
            return [self._window(environment, episode, first, {})], episode.begins[first], first, (), 0
        window = self._window(environment, episode, 0, dict(zip(layout.preamble, texts, strict=True)))
        if self._references:
            shown = self._future(self._references[environment], episode.number, preamble)
            tokens = self.processor.encode(layout, [[shown]]).real_tokens
            return [shown, window], 0, 0, (), tokens + preamble
        before = self._prompt_tokens
        heads = [Head(before, None, 0)] if before else []
        if preamble:
            heads.append(Head(before + preamble, tuple(texts), episode.number))
        return [window] if self.prompt is None else [self.prompt, window], 0, 0, tuple(heads), 0

    def _future(self, reference: Window, first: int, preamble: int) -> Window:
        """The steps of an episode to imitate that a window from step `first` on would have; of a shorter one, the last step."""
        steps = int(np.asarray(reference.valid[: reference.steps], bool).sum())
        first = min(first, steps - 1)
        rows = slice(first, min(steps, first + self._learnt.steps(preamble, self.processor.length)))
        once = {*self._constants, *self.layout.preamble}
        return replace(
            reference,
            entry=0,
            task=0,
            start=reference.start + first,
            steps=rows.stop - first,
            fields={name: v if name in once else v[rows] for name, v in reference.fields.items()},
            step=reference.step[rows],
            returns_to_go=reference.returns_to_go[rows],
            valid=reference.valid[rows],
            prompt=True,
        )

    def _warn(self) -> None:
        """Say once that the model is not told what its actions earned."""
        if not self._warned:
            warnings.warn(
                f"task {self.layout.task!r}: this objective depends on rewards, but `act` was given no `rewards`, so all count "
                "as 0, and a return that is asked for never falls; give it the rewards of the last actions",
                stacklevel=5,
            )
        self._warned = True

    def plans(self, environment: int) -> bool:
        """Whether the next action of an environment is known already: it belongs to a chunk that is being executed."""
        return bool(self._episodes[environment].planned)

    def beyond(self, environment: int) -> Sequence[Mapping[str, np.ndarray]]:
        """The actions that the last prediction has after those that are executed, fields [*shape] of each."""
        return self._episodes[environment].beyond

    def follow(
        self,
        observations: Sequence[Mapping[str, Any]],
        rewards: Sequence[float] | None = None,
        environments: Sequence[int] | None = None,
    ) -> dict[str, np.ndarray]:
        """Add a step of environments that execute a chunk, and return its next actions, fields [R, *shape].

        The arguments are those of `observe`. `acted` must not be called for these environments.
        """
        chosen = self._add_step(observations, rewards, environments)
        actions = []
        for i in chosen:
            actions.append(self._episodes[i].planned.pop(0))
            self._episodes[i].actions.append(actions[-1])
        return {name: np.stack([one[name] for one in actions]) for name in actions[0]}

    def acted(
        self,
        actions: Mapping[str, np.ndarray],
        environments: Sequence[int] | None = None,
        seen: Acting | None = None,
        read: int = 0,
    ) -> None:
        """Add the actions that these environments (None: all) took: fields [R, *shape], as `decode` gives them.

        seen  the layout that `observe` gave, if the model has seen all of it up to the action
        read  the number of slots that it has seen too
        """
        chosen = range(len(self._episodes)) if environments is None else environments
        agree = np.zeros(len(chosen), np.int64) if seen is None else self._agreeing(actions, seen, read, list(chosen))
        for row, i in enumerate(chosen):
            episode = self._episodes[i]
            episode.actions.append({e.field: np.asarray(actions[e.field][row]) for e in self.actions})
            if "return" in self._placeholders:
                episode.returns[-1] = float(actions["return"][row])
            if seen is not None:
                episode.held = int(seen.past[row] + seen.open[row] - seen.start[row] + agree[row])
            else:
                episode.held = 0

    def _origin(self, frame: Frame, environments: Sequence[int]) -> np.ndarray:
        """float64 [R, entries]: what the current action of each environment is counted from, at its last observed step."""
        states = []
        for i in environments:
            seen = self._episodes[i].observations
            states.append(np.asarray(given(seen[(len(seen) - 1) // self.layout.chunk * self.layout.chunk], frame.to)))
        return frame.origin(np.stack(states))

    def _agreeing(
        self, actions: Mapping[str, np.ndarray], seen: Acting, read: int, chosen: Sequence[int]
    ) -> np.ndarray:
        """[R]: how many of the first `read` slots hold what the action's own encoding is.

        An action that was decoded may be encoded differently, for instance if it was clamped.
        """
        agree = np.zeros(len(seen.open), np.int64)
        still, number = np.ones(len(agree), bool), 0
        for element in self.answered:
            assert element.codec is not None
            if number >= read:
                break
            did = np.asarray(actions[name_of(element)])
            if element.frame is not None:
                did = did.astype(np.float64) - self._origin(element.frame, chosen).reshape(did.shape)
            encoded = element.codec.encode(did)
            for column in range(min(element.size, read - number)):
                if self.slots[number].shown:
                    mine = encoded[:, column].reshape(len(agree), -1)
                    still &= np.isclose(seen.written(number), mine, rtol=1e-6, atol=1e-6).all(axis=1)
                agree += still
                number += 1
        return agree

    def decode(self, answers: Sequence[np.ndarray], environments: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Answers to all slots (ids [R] or vectors [R, d]) -> action fields [R, *shape], in the units of the dataset.

        If returns are answered too, `return` [R] is among the fields. Of a chunk, the first action is returned; the others that
        are to be executed are kept for `follow`. `environments`: those of the answers (None: all).
        """
        chosen = list(range(len(self._episodes))) if environments is None else list(environments)
        out, at = {}, 0
        for element in self.answered:
            codec = element.codec
            assert codec is not None
            mine = [np.asarray(a) for a in answers[at : at + element.size]]
            out[name_of(element)] = self._native(element, np.stack(mine, axis=1), chosen)
            at += element.size
            if isinstance(codec, Chunk):
                chunk = out[element.field]
                out[element.field] = chunk[:, 0]
                for actions, i in zip(chunk, chosen, strict=True):
                    each: list[Mapping[str, np.ndarray]] = [{element.field: one} for one in actions]
                    self._episodes[i].planned, self._episodes[i].beyond = each[1 : codec.steps], each[codec.steps :]
        return out

    def _native(self, element: Element, answers: np.ndarray, chosen: Sequence[int]) -> np.ndarray:
        """Answers [R, size, …] to an element in the units of the dataset, [R, *shape], or [R, n, *shape] of a chunk."""
        codec = element.codec
        assert codec is not None
        if element.frame is None:
            return codec.decode(answers)
        exact: Any = replace(codec, dtype="float64")  # type: ignore[call-arg]
        found = exact.decode(answers)
        origin = self._origin(element.frame, chosen).reshape(
            len(found), *(1,) * (found.ndim - 1 - len(codec.shape)), *codec.shape
        )
        return as_type(found + origin, element.codec.dtype)  # type: ignore[union-attr]

    def return_values(self) -> np.ndarray:
        """float64 [ids]: the returns that the answers to the first slot stand for."""
        codec, slot = self.answered[0].codec, self.slots[0]
        assert codec is not None
        return np.asarray(codec.decode(np.arange(slot.low, slot.high)[:, None]), np.float64).reshape(-1)

    def _window(self, environment: int, episode: _Episode, first: int, texts: Mapping[str, str]) -> Window:
        """The kept steps from `first` on; the last of them has a placeholder as its action, and as its reward.

        texts  what stands before the first step, by the names of the preamble; none if it has been laid out
        """
        shown, layout = episode.observations[first:], self.layout
        count, number = len(shown), episode.number + first
        fields: dict[str, Any] = {}
        for element in layout.elements:
            name = element.field
            if element.role in ("observation", "text"):
                constant = element.constant
                rows = [given(o, name, element.role == "text") for o in (shown[-1:] if constant else shown)]
                fields[name] = rows[0] if constant else np.stack([np.asarray(r) for r in rows])
            elif element.role == "action":
                fields[name] = np.stack([*(a[name] for a in episode.actions[first:]), self._placeholders[name]])
            elif element.role == "reward":
                mine = np.reshape(episode.rewards[first:], (-1, *self._placeholders[name].shape))
                fields[name] = np.concatenate([mine, self._placeholders[name][None]]).astype(np.float32)
        for name in {e.to for e in layout.elements if e.to} - fields.keys():
            fields[name] = np.stack([np.asarray(given(o, name)) for o in shown])
        fields.update({**dict.fromkeys(layout.preamble, ""), **texts})
        agent = {"agent": np.full(count, environment % layout.agents)} if layout.agents else {}
        return Window(
            entry=0,
            task=0,
            episode=f"environment {environment}",
            start=number,
            steps=count,
            episode_steps=number + count,
            fields=fields,
            step=np.arange(number, number + count),
            returns_to_go=np.array(episode.returns[first:], np.float32),
            valid=np.ones(count, bool),
            given=agent
            if episode.demand is None
            else {**agent, episode.demand.element.rule: np.stack(episode.demanded[first:])},
        )

    def _forget(self, episode: _Episode, preamble: int) -> bool:
        """Drop the oldest steps if the window cannot show all. Whole chunks, so that no chunk loses its observation.

        preamble  tokens of the texts that stand before the first step

        Returns whether steps were dropped.
        """
        layout, count = self._learnt, len(episode.observations)
        prompt = 0 if self.prompt is None else self.prompt.steps * layout.width
        most = max(1, layout.steps(preamble, self.processor.length - prompt) - self.reserve)
        if count <= most:
            return False
        kept = max(1, most // 2) if self.hop else most
        drop = min(-(-(count - kept) // layout.chunk) * layout.chunk, count - 1)
        kept_by_step: tuple[list[Any], ...] = (episode.observations, episode.actions, episode.returns)
        for steps in (*kept_by_step, episode.rewards, episode.demanded, episode.begins, episode.told):
            del steps[:drop]
        episode.number += drop
        return True


def given(observation: Mapping[str, Any], name: str, text: bool = False) -> Any:
    try:
        return observation[name]
    except KeyError:
        there = ", ".join(sorted(observation))
        if text:
            raise DataError(
                f"no instruction was given: the observation has no text {name!r} (it has {there}); give it to "
                "`policy.reset(task, instruction=…)` or `policy.act(observation, text=…)`"
            ) from None
        raise DataError(f"the observation has no field {name!r}; it has {there}") from None
