"""Filling: a policy that fills in hidden parts acts by hiding the action and the future (Carroll et al. 2022, sec. 4).

A query says what else of the window is shown: `bc` nothing, `rc` the return that is asked for, `goal` the last observation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError, Window
from tiphys.pretrain.acting.history import History
from tiphys.pretrain.acting.slots import Acting
from tiphys.pretrain.tokens.batch import ACTION
from tiphys.pretrain.tokens.hiding import QUERIES
from tiphys.pretrain.tokens.timestep import TimestepLayout

if TYPE_CHECKING:
    from tiphys.pretrain.acting.processor import Processor


class Filling(History):
    """The last steps of a batch of environments, followed by hidden ones up to the longest window.

    A full window drops its older half, so that there is always a future to fill in. Nothing is remembered between steps, because
    all positions see each other.

    Parameters
    ----------
    query : str
        What is shown beside the past: a key of `hiding.QUERIES`. With `goal`, `goal` must say what is to be seen at the end of
        the window.
    """

    def __init__(
        self,
        processor: Processor,
        layout: TimestepLayout,
        environments: int,
        target_return: float | Sequence[float],
        prompt: Window | None,
        goal: Mapping[str, Any] | None,
        query: str,
        available: Mapping[str, str] | None = None,
    ):
        super().__init__(
            processor, layout, environments, target_return, prompt, hop=True, goal=goal, available=available
        )
        self.query = query
        self.needs_rewards = self.needs_rewards and query == "rc"

    def observe(
        self,
        observations: Sequence[Mapping[str, Any]],
        rewards: Sequence[float] | None = None,
        environments: Sequence[int] | None = None,
        *,
        new: bool = False,
    ) -> Acting:
        """As `History.observe`. The answer to slot i is read at column open + i itself; `new` makes no difference."""
        chosen = self._add_step(observations, rewards, environments)
        rows, numbers = [], []
        for i in chosen:
            windows = self._lay(i, False)[0]
            rows.append([*windows[:-1], self._filled(windows[-1])])
            numbers.append(windows[-1].step[windows[-1].steps - 1])
        batch = self.processor.encode(self.layout, rows)
        now = (batch.modality == ACTION) & (batch.timestep == np.array(numbers)[:, None])
        here = now & (batch.segment == batch.segment.max(axis=1, keepdims=True))
        nothing = np.zeros(len(rows), np.int64)
        acting = Acting(batch, here.argmax(axis=1), self.slots, nothing, nothing, ((),) * len(rows))
        return acting._restricted(self._allowed(observations))

    def _filled(self, window: Window) -> Window:
        """The window with hidden steps behind the current one."""
        layout, now = self.layout, window.steps - 1
        texts = [str(window.fields[name]) for name in layout.preamble]
        head = sum(len(ids) for ids in self.processor.text.encode(texts, layout.text_limit))
        prompt = 0 if self.prompt is None else self._prompt_tokens
        steps = max(window.steps, layout.steps(head, self.processor.length - prompt))
        once = {e.field for e in layout.elements if e.constant} | set(layout.preamble)

        def longer(rows: np.ndarray) -> np.ndarray:
            return np.concatenate([rows, np.repeat(rows[-1:], steps - len(rows), axis=0)])

        fields = {name: v if name in once else longer(v) for name, v in window.fields.items()}
        number = np.arange(steps)
        seen = number <= now
        if self.query == "goal":
            assert self.goal is not None
            for e in layout.elements:
                if e.role == "observation" and not e.constant:
                    if e.field not in self.goal:
                        raise DataError(f"the goal has no field {e.field!r}; it has {', '.join(sorted(self.goal))}")
                    fields[e.field][-1] = self.goal[e.field]
            if steps > window.steps:
                seen[-1] = True
        return Window(
            entry=0,
            task=0,
            episode=window.episode,
            start=window.start,
            steps=steps,
            episode_steps=window.start + steps,
            fields=fields,
            step=window.start + number,
            returns_to_go=longer(window.returns_to_go),
            valid=np.ones(steps, bool),
            hidden={
                "observation": ~seen,
                "action": number >= now,
                "reward": number >= now,
                "return": (number > 0) | (self.query != "rc"),
            },
        )

    def acted(
        self,
        actions: Mapping[str, np.ndarray],
        environments: Sequence[int] | None = None,
        seen: Acting | None = None,
        read: int = 0,
    ) -> None:
        """As `History.acted`; nothing is remembered."""
        super().acted(actions, environments)


def query_of(stated: str, asked: str, goal: Any, hiding: Sequence[tuple[str, float]], where: str) -> str:
    """The query that a policy acts by.

    Parameters
    ----------
    stated, asked : str
        The recipe's, and that of the caller, which comes before it; empty: not said.
    goal : observation or None
        Without a query of the caller, a goal means `goal`.
    hiding : sequence of (str, float)
        The schemes that were learned.
    where : str
        Task and objective, for messages.

    Raises
    ------
    DataError
        If there is no such query, the policy was not trained for it, or a goal is missing or of no use.
    """
    query = asked or ("goal" if goal is not None else stated)
    if query not in QUERIES:
        raise DataError(f"{where}: no query is called {query!r}; there are {', '.join(QUERIES)}")
    learnt = {name for name, share in hiding if share > 0}
    if not learnt & {query, "random"}:
        raise DataError(
            f"{where}: the policy was not trained for the query {query!r}, but for {', '.join(sorted(learnt))}"
        )
    if (query == "goal") != (goal is not None):
        raise DataError(f"{where}: the query {query!r} {'needs a goal' if goal is None else 'takes no goal'}")
    return query
