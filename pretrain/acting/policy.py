"""Policy: native observations in, native actions out, for a batch of environments. A published policy contains this file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tiphys.dataio.episode import DataError, FieldSpec, Window
from tiphys.dataio.observation import fit_shapes, given_fields, native
from tiphys.dataio.philox import ACTING_NOISE, SAMPLE, normals, uniform32, words
from tiphys.dataio.stored import number as within
from tiphys.pretrain.acting.beam import drawn
from tiphys.pretrain.acting.load import draws_by_default, load_model, load_processor
from tiphys.pretrain.acting.match import fits, matching_layout
from tiphys.pretrain.acting.processor import Processor
from tiphys.pretrain.acting.recall import Recall
from tiphys.pretrain.acting.rules import RULES, resolved
from tiphys.pretrain.acting.say import Writer, texts_layout
from tiphys.pretrain.acting.slots import Acting
from tiphys.pretrain.tokens.timestep import CAUSAL

if TYPE_CHECKING:
    from tiphys.pretrain.model.transformer import DecisionModel


class Policy:
    """A decision model that acts in environments.

    Parameters
    ----------
    model : DecisionModel
        The model. It is put into evaluation mode.
    processor : Processor
        How observations become tokens, and answers become actions.
    sample : bool, optional
        Draw each element of an action from the model's distribution, instead of taking the most probable one. None: as
        `evaluate.sample` of the recipe that the policy was trained by.
    seed : int
        Seed of those draws. The draws of an environment at its t-th step depend only on the seed, on the environment's stream
        (`restart`; by default its number) and on t, whatever other environments are in the batch.
    hop : bool
        What is done when an episode is longer than the policy's window. True: the older half of the window is dropped, and the
        window grows again, so that most steps compute their new tokens only. False: the window always shows as many steps as
        fit, and every step computes the whole window. Shorter episodes are the same in both.

    Examples
    --------
    >>> policy = Policy.load(folder)
    >>> policy.reset("CartPole-v1")
    >>> action = policy.act(observation)
    """

    def __init__(
        self, model: DecisionModel, processor: Processor, *, sample: bool | None = None, seed: int = 0, hop: bool = True
    ) -> None:
        self.model, self.processor = model.eval(), processor
        self.sample = draws_by_default(model) if sample is None else sample
        self.seed, self.hop = seed, hop
        self.task = ""
        self.following: Any = None

    @classmethod
    def load(
        cls, folder: str | Path, device: str = "", *, sample: bool | None = None, seed: int = 0, hop: bool = True
    ) -> Policy:
        """Load a policy. It acts with the code of this installation, not with the code in its folder.

        On a CPU it computes in float32, whatever the type of its weights; elsewhere in the type of its weights.

        Parameters
        ----------
        folder : str or Path
            The folder of a policy, its URL in a store (``s3://bucket/path``), or ``org/name`` on the hub.
        device : str
            A torch device. "": a GPU if there is one, else the CPU; "auto": ``accelerate`` spreads the model over all devices.
        sample, seed, hop
            As in the class.

        Raises
        ------
        OSError
            If there is no policy.
        DataError
            If the policy was made by a newer version of Tiphys, its files are damaged, or there is no such device.
        """
        return cls.of(load_model(folder, device), sample=sample, seed=seed, hop=hop)

    @classmethod
    def follow(
        cls, url: str, device: str = "", *, every: float = 10.0, when: str = "act", best: bool = False, **options: Any
    ) -> Policy:
        """Load a policy that takes over each newer version of its weights that is published at the same place.

        A thread polls, decodes and verifies; `act` and `reset` only exchange the weights. ``policy.following`` knows the `step`
        and `digest` of the present ones, and its `close()` ends the thread.

        Parameters
        ----------
        url : str
            Where a run publishes: a folder, ``s3://bucket/path`` or ``hf://owner/name``.
        device : str
            A torch device, as in `load`.
        every : float
            Seconds between two polls, about.
        when : str
            ``act``: new weights are taken before any action; ``episode``: only in `reset` and `restart`.
        best : bool
            Follow the policy with the highest score instead of the newest one. Not on a hub.
        **options
            `sample`, `seed` and `hop`, as in the class.

        Raises
        ------
        FileNotFoundError
            If nothing is published there.
        DataError
            If `every` or `when` is not allowed, or as in `load`.
        """
        from importlib import import_module

        following = import_module("tiphys.pretrain.follow.following").Following(url, every=every, when=when, best=best)
        policy = cls.load(following.folder, device, **options)
        policy.following = following
        following.start(policy)
        return policy

    @classmethod
    def of(cls, model: DecisionModel, *, sample: bool | None = None, seed: int = 0, hop: bool = True) -> Policy:
        """The policy of a loaded model. Its processor.json is read from where the weights were loaded.

        Parameters
        ----------
        model : DecisionModel
            A model from ``from_pretrained``.
        sample, seed, hop
            As in the class.

        Raises
        ------
        OSError
            If there is no processor.json beside the weights.
        DataError
            If processor.json is not valid, does not fit the model, or was made by a newer version of Tiphys.
        """
        return cls(model, load_processor(model), sample=sample, seed=seed, hop=hop)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that this policy can act in."""
        layouts = self.processor.layouts.values()
        known = {task for by_task in layouts for task, layout in by_task.items() if layout.has_actions}
        return tuple(name for name in self.processor.tasks if name in known)

    def reset(
        self,
        task: str,
        environments: int = 1,
        *,
        objective: str = "",
        target_return: float | str | Sequence[float | str] | None = None,
        prompt: Window | None = None,
        goal: Any = None,
        query: str = "",
        instruction: str | Sequence[str] | None = None,
        future: Window | Sequence[Window] | None = None,
        remainder: bool = True,
        acting: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin new episodes of a task, in a number of environments.

        Parameters
        ----------
        task : str
            Name of the task, one of ``tasks``.
        environments : int
            Number of environments that `act` serves at once.
        objective : str
            The objective to act with; "": the first that the task was trained with.
        target_return : float, str, or a sequence of these, optional
            Return of an episode to ask for, if the objective is conditioned on returns: rewards (``450``), a multiple of the best
            return in the data (``"1.2x"``) or a quantile of its returns (``"q0.9"``). A sequence has one for each environment.
            None: as the recipe says.
        prompt : Window, optional
            A demonstration of the task. Its last steps stand before each history.
        goal : observation, optional
            An observation to reach, as the environment gives it, if the objective acts towards a goal.
        query : str
            What an objective that fills in hidden parts is asked: ``bc``, ``rc`` or ``goal``; "": as the recipe says, or ``goal``
            if there is one.
        instruction : str or sequence of str, optional
            What is to be done, in words: one text for all environments, or one for each. None: the observations say it.
        future : Window, or a sequence of them, optional
            A whole episode whose histogram is to be matched (gdt), or whose observations are to be imitated (bdt); a sequence has
            one for each environment.
        remainder : bool
            What of it is demanded at a step: what the environment has left of it (True), or what that episode had left then.
        acting : mapping, optional
            Options of the rule that the objective acts by, instead of its own: `horizon`, `width`, `expand` and `cdf` of a beam
            search, `kappa` of returns that are drawn.

        Raises
        ------
        KeyError
            If the policy was not trained on the task, or not with this objective.
        DataError
            If the task has no actions, was learned without any text and gets an instruction, or if the objective takes no target
            return or no goal and gets one; if an option of `acting` is unknown or out of range, or a plan is longer than the
            window.
        """
        if self.following is not None:
            self.following.take(self)
        known = self.processor.tasks.get(task)
        fields = {f.name: f for f in known.fields} if known is not None else {}
        name = objective or self.processor.objective(task)
        rule, stored = self.processor.rule(name) if name in self.processor.objectives else ("next", {})
        options = resolved(rule, stored, acting or {})
        reserve = int(options.get("horizon", 1)) - 1
        layouts = self.processor.layouts.get(name, {})
        self._agents = max(1, layouts[task].agents) if task in layouts else 1
        if isinstance(target_return, Sequence) and not isinstance(target_return, str):
            target_return = [one for one in target_return for _ in range(self._agents)]
        self.history = self.processor.history(
            task,
            environments * self._agents,
            objective=objective,
            reserve=reserve,
            target_return=target_return,
            prompt=prompt,
            hop=self.hop,
            goal=None if goal is None else given_fields(goal, fields)[0],
            query=query,
            future=future,
            remainder=remainder,
        )
        most = self.history.layout.steps(0, self.processor.length)
        if reserve >= most > 0 and reserve:
            if acting and "horizon" in acting:
                raise DataError(
                    f"task {task!r}: a plan of {reserve + 1} steps is longer than the policy's window of {most}"
                )
            options["horizon"] = self.history.reserve + 1
        self.task, self._objective, self._fields = task, name, fields
        self._rule, self._options = rule, options
        self.recall = Recall(self.model, environments * self._agents, self.processor.length)
        self._actions = {f.name: f for f in self.processor.tasks[task].with_role("action")}
        self._streams = list(range(environments * self._agents))
        self._steps = [0] * environments * self._agents
        self._instructions: list[str | None] = [None] * environments
        self._instruct(instruction, list(range(environments)))

    def restart(
        self,
        environment: int,
        *,
        stream: int | None = None,
        target_return: float | str | None = None,
        instruction: str | None = None,
    ) -> None:
        """Begin a new episode in one of the environments.

        Parameters
        ----------
        environment : int
            Number of the environment.
        stream : int, optional
            Stream of the environment's random draws from now on. None: as before.
        target_return : float or str, optional
            Return to ask for in this episode. None: as in `reset`.
        instruction : str, optional
            What is to be done, in words. None: as before.
        """
        if self.following is not None:
            self.following.take(self)
        asked = None if target_return is None else self.processor.asked(self.task, self._objective, target_return)
        self._instruct(instruction, [environment])
        for agent, row in enumerate(self._rows([environment])):
            self.history.reset(row, asked)
            self._steps[row] = 0
            if stream is not None:
                self._streams[row] = stream * self._agents + agent

    def forget(self) -> None:
        """Forget what the model has computed of the histories so far. The next action reads them again, by other weights."""
        if self.task:
            self.history.forget()
            self.recall = Recall(self.model, len(self._steps), self.processor.length)

    def act(
        self,
        observations: Any,
        rewards: float | Sequence[float] | None = None,
        environments: Sequence[int] | None = None,
        *,
        text: str | Sequence[str] | None = None,
    ) -> Any:
        """The action for an observation, or the actions for a list of observations.

        Parameters
        ----------
        observations : observation or list of observations
            As the environments give them: an array, a number, a text, or a dict of these. Or samples of a dataset with the names
            of its fields, such as the frame of a LeRobot dataset (see `observation.given_fields`).
        rewards : float or sequence of float, optional
            Rewards of the last actions. They lower the return that is still asked for, and matter only if the objective is
            conditioned on returns.
        environments : sequence of int, optional
            The number of the environment of each observation. None: all, in order.
        text : str or sequence of str, optional
            What is to be done from now on, in words: one text for all, or one for each observation. None: as `reset` or the
            observation says.

        Returns
        -------
        action or list of actions
            As the environments take them: an int, an array of the space's dtype and within its bounds, or a dict of these.

        Raises
        ------
        ValueError
            If `reset` was not called, or if there is not one observation for each environment.
        DataError
            If an observation lacks a field, or has a value without encoding. All environments are then as before the call.
        """
        if not self.task:
            raise ValueError("the policy does not know its task: call reset(task) before act")
        if not isinstance(observations, list):
            one = None if rewards is None else [float(rewards)]  # type: ignore[arg-type]
            return self.act([observations], one, environments, text=text)[0]
        if self.following is not None and self.following.when == "act":
            self.following.take(self)
        chosen = list(range(len(self._instructions))) if environments is None else list(environments)
        if len(observations) != len(chosen):
            raise ValueError(
                f"a list of {_number(len(observations), 'observation')} for {_number(len(chosen), 'environment')}: give one "
                "for each. The values of one observation are an array or a dict, not a list"
            )
        self._instruct(text, chosen)
        given = [self._given(observation, i) for observation, i in zip(observations, chosen, strict=True)]
        rows, agents = self._rows(chosen), self._agents
        each = None if rewards is None else np.repeat(np.asarray(rewards, np.float64), agents).tolist()
        try:
            seen = [o for team in given for o in self._members(team)]
            planned = np.array([self.history.plans(row) for row in rows], bool)
            parts = [
                act([seen[n] for n in some], None if each is None else [each[n] for n in some], [rows[n] for n in some])
                for act, some in (
                    (self._decide, np.flatnonzero(~planned)),
                    (self.history.follow, np.flatnonzero(planned)),
                )
                if len(some)
            ]
            order = np.argsort(np.argsort(planned, kind="stable"), kind="stable")
            fields = {name: np.concatenate([part[name] for part in parts if name in part])[order] for name in parts[-1]}
        except Exception:
            self.history.retract(rows)  # so that the environments can go on with an observation that is valid
            raise
        for row in rows:
            self._steps[row] += 1
        if self.history.layout.agents:
            fields = {name: values.reshape(len(chosen), agents, *values.shape[1:]) for name, values in fields.items()}
        return [self._native(fields, row) for row in range(len(chosen))]

    def beyond(self, environment: int = 0) -> list[Any]:
        """The actions that an environment's last prediction has after those that are executed.

        They are what the policy would do next, and it predicts them anew from the next observation. A policy whose `horizon` is
        its `chunk` has none.

        Returns
        -------
        list of actions
            As `act` gives them, in their order.
        """
        each = [self.history.beyond(row) for row in self._rows([environment])]
        out = []
        for members in zip(*each, strict=True):
            fields = {name: np.stack([one[name] for one in members]) for name in members[0]}
            fields = {name: value[None] for name, value in fields.items()} if self.history.layout.agents else fields
            out.append(self._native(fields, 0))
        return out

    def limit(self, declared: Sequence[FieldSpec]) -> None:
        """Answer only values that an environment takes, in all environments of `reset`.

        Parameters
        ----------
        declared : sequence of FieldSpec
            The fields of the environment. The range of its discrete action fields counts.

        Raises
        ------
        DataError
            If an entry of an action field has no value that both the policy and the environment know.
        """
        self.history.limit(declared)

    def _decide(
        self, observations: list[dict[str, Any]], rewards: list[float] | None, rows: list[int]
    ) -> dict[str, np.ndarray]:
        """The actions that the model chooses for these rows of the history, fields [R, *shape]."""
        new = self.hop and self.history.layout.mask == CAUSAL
        acting = self.history.observe(observations, rewards, rows, new=new)
        answers, read = self._answer(acting, rows)
        fields = self.history.decode(answers, rows)
        self.history.acted(fields, rows, acting, read)
        return fields

    def _rows(self, environments: Sequence[int]) -> list[int]:
        """The rows of the history that belong to these environments: one for each of their agents."""
        return [i * self._agents + agent for i in environments for agent in range(self._agents)]

    def _members(self, team: dict[str, Any]) -> list[dict[str, Any]]:
        """What each agent of an environment observes. Raises DataError if a field does not have the values of all agents."""
        layout = self.history.layout
        if not layout.agents:
            return [team]
        for name in layout.agent_fields:
            if name in team and np.shape(team[name])[:1] != (layout.agents,):
                raise DataError(
                    f"the observation's field {name!r} has shape {np.shape(team[name])}, but its first axis must be over the "
                    f"{layout.agents} agents"
                )
        mine = layout.agent_fields
        return [{n: v[i] if n in mine else v for n, v in team.items()} for i in range(layout.agents)]

    def match(
        self, task: str, clips: Sequence[Sequence[Any]], texts: Sequence[str], *, objective: str = ""
    ) -> np.ndarray:
        """How well each text fits each clip, if the policy has learned that.

        Parameters
        ----------
        task : str
            Name of the task.
        clips : sequence of sequence of observations
            Consecutive observations, as for `act`; at most as many as a window of training had.
        texts : sequence of str
            The texts.
        objective : str
            The objective that taught it; "": the first of the task that did.

        Returns
        -------
        ndarray, float64 [clips, texts]
            The cosine of their vectors (objectives such as `reward`), or the probability that the text belongs to the clip
            (objectives such as `mia`).

        Raises
        ------
        KeyError
            If the policy was not trained on the task, or not with this objective.
        DataError
            If no objective of the task taught which texts fit, or an observation lacks a field.
        """
        layout = matching_layout(self.processor, task, objective)
        fields = {f.name: f for f in self.processor.tasks[task].fields}
        given = [[given_fields(observation, fields)[0] for observation in clip] for clip in clips]
        return fits(self.model, self.processor, layout, given, texts)

    def say(
        self,
        prompt: str | Sequence[str],
        observation: Any = None,
        *,
        task: str = "",
        objective: str = "",
        tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Any:
        """Continue a text, or several together, if the policy has learned texts (documents or captions).

        Parameters
        ----------
        prompt : str or sequence of str
            How each text begins. Captions may begin with "".
        observation : observation or list of observations, optional
            The picture (or what else) that a caption is about, as for `act`; one for each prompt.
        task : str
            The task whose texts are meant; "": the first that was learned from documents, or with an observation from captions.
        objective : str
            The objective that taught it; "": the first that did.
        tokens : int
            Most tokens of an answer. It ends earlier where the text does.
        temperature : float
            The logits are divided by it before a token is drawn; 0: the most probable token is taken.
        top_p : float
            Only the most probable tokens are drawn, which together have at least this probability.

        Returns
        -------
        str or list of str
            What follows each prompt. It depends on the policy's seed, the text's number and the prompt.

        Raises
        ------
        KeyError
            If the policy was not trained on the task, or not with this objective.
        DataError
            If no task (or not this one) taught texts, the prompt of a document is empty, `tokens`, `temperature` or `top_p` is
            out of range, or an observation lacks a field.
        """
        within(tokens, "say, tokens", 1, 1 << 24)
        within(temperature, "say, temperature", 0, 1e6)
        within(top_p, "say, top_p", 1e-9, 1)
        many = not isinstance(prompt, str)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            return []
        layout = texts_layout(self.processor, task, objective, observation is not None)
        fields = {f.name: f for f in self.processor.tasks[layout.task].fields}
        seen = observation if many and observation is not None else [observation] * len(prompts)
        if len(seen) != len(prompts):
            raise ValueError(f"{len(seen)} observations for {len(prompts)} prompts; give one for each")
        about = [{} if layout.document else given_fields(one, fields)[0] for one in seen]
        writer = Writer(self.model, self.processor, layout, prompts, about)
        said = writer.write(tokens, temperature, top_p, self.seed)
        return said if many else said[0]

    def _given(self, observation: Any, environment: int) -> dict[str, Any]:
        """The fields of an observation, with the instruction if the observation does not have it by its name."""
        fields, words = given_fields(observation, self._fields)
        elements = self.history.layout.elements
        names = {e.field for e in elements if e.role == "observation"} | {e.to for e in elements}
        resized = [e.field for e in elements if getattr(e.codec, "resize", 0)]
        fields = fit_shapes(fields, {name: spec for name, spec in self._fields.items() if name in names}, resized)
        words = self._instructions[environment] if words is None else words
        missing = [name for name in self.history.texts if name not in fields]
        if words is not None and len(missing) > 1:
            raise DataError(
                f"task {self.task!r} needs the texts {', '.join(missing)}, so it is not clear which one the instruction is; "
                "give them in the observation, by these names"
            )
        return fields if words is None else fields | dict.fromkeys(missing, words)

    def _instruct(self, words: str | Sequence[str] | None, environments: Sequence[int]) -> None:
        if words is None:
            return
        if not self.history.texts:
            raise DataError(f"task {self.task!r} was learned without any text, so it takes no instruction")
        each = [words] * len(environments) if isinstance(words, str) else list(words)
        if len(each) != len(environments):
            raise ValueError(
                f"{len(each)} instructions for {len(environments)} environments; give one for each, or one for all"
            )
        for environment, one in zip(environments, each, strict=True):
            self._instructions[environment] = one

    def _native(self, fields: dict[str, np.ndarray], row: int) -> Any:
        return native(
            {name: _value(fields[name][row], field) for name, field in self._actions.items() if name in fields}
        )

    @torch.inference_mode()
    def _answer(self, acting: Acting, chosen: list[int]) -> tuple[list[np.ndarray], int]:
        """The answers to all slots, and how many of them the model has read."""
        return RULES[self._rule](self, acting, chosen, self._options)

    def uniform(self, environments: Sequence[int], slot: int, attempt: int | np.ndarray = 0) -> np.ndarray:
        """Random numbers in (0, 1) for a slot of the next action of environments [R]: [R], or [R, n] for n attempts.

        They depend on the seed, the environment's stream and its step, the slot and the attempt.
        """
        steps, streams = (np.array([of[i] for i in environments]) for of in (self._steps, self._streams))
        if np.ndim(attempt):
            steps, streams = steps[:, None], streams[:, None]
        return uniform32(words(self.seed, steps, streams, slot, attempt, purpose=SAMPLE)[0])

    def _noise(self, environments: Sequence[int], slot: int, head: str) -> torch.Tensor:
        """What chunks of environments [R] are drawn from, float32 [R, numbers of a chunk].

        It depends on the seed, the environment's stream and its step. Without `sample`, an episode has the same noise at all of
        its steps; noise of 0 would be the mean of what may follow, which nobody did.
        """
        spec = self.model.config.chunks[head]
        steps, streams = (np.array([of[i] for i in environments]) for of in (self._steps, self._streams))
        steps = steps if self.sample else np.zeros_like(steps)
        numbers = spec["steps"] * spec["entries"]
        return torch.from_numpy(normals(self.seed, steps, streams, slot, numbers, purpose=ACTING_NOISE))

    def _choose(
        self,
        acting: Acting,
        number: int,
        hidden: torch.Tensor,
        environments: list[int],
        tilt: np.ndarray | None = None,
    ) -> np.ndarray:
        """The answers to one slot, ids [n] or vectors [n, d], from the hidden states [n, D] before it.

        `tilt` is added to the logits; then the answer is always drawn.
        """
        slot = acting.slots[number]
        if slot.head in self.model.config.chunks:
            noise = self._noise(environments, number, slot.head).to(hidden.device)
            return self.model.draw_chunk(hidden, slot.head, noise).float().cpu().numpy()
        if slot.head:
            return self.model.regress(hidden, slot.head).float().cpu().numpy()
        logits = self.model.logits(hidden)[:, slot.low : slot.high].cpu()
        if number in acting.allowed:
            logits = logits.masked_fill(~torch.from_numpy(acting.allowed[number]), -torch.inf)
        if tilt is not None:
            logits = logits.double() + torch.from_numpy(tilt)
        elif not self.sample:
            return logits.argmax(-1).numpy() + slot.low
        return drawn(logits, self.uniform(environments, number)) + slot.low


def _value(value: np.ndarray, field: FieldSpec) -> Any:
    """One action field as an environment takes it: an int, or an array of the space's dtype within its bounds."""
    if field.modality == "discrete":
        return int(value) if field.shape == () else np.asarray(value, field.dtype)
    value = np.asarray(value, field.dtype)
    if field.low is not None and field.high is not None:
        low, high = (field.entries(b).astype(field.dtype) for b in (field.low, field.high))
        value = np.clip(value, low, high)
    return value


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"  # published code, so without tiphys.dataio.messages
