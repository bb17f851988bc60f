"""Sessions of a policy server: one history each. `act` answers many of them in one forward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import say
from tiphys.pretrain.serving.observed import Needed, Sent, fit
from tiphys.pretrain.serving.served import Histories, Served, Wish


@dataclass
class Session:
    """One client's history. Only the inference thread changes it.

    Attributes
    ----------
    wish : Wish
        What its next episodes are asked for.
    histories, row
        Where its history is; None before its first observation.
    words : str or None
        What it was told to do last.
    began : bool
        Whether an episode has begun.
    acted : bool
        Whether the episode has an action.
    """

    wish: Wish = field(default_factory=Wish)
    served: Served | None = None
    histories: Histories | None = None
    row: int = -1
    words: str | None = None
    began: bool = False
    acted: bool = False


@dataclass(frozen=True)
class Observed:
    """One request for actions."""

    session: Session
    sent: Sent
    reward: float | None = None
    executed: int | None = None


@dataclass(frozen=True)
class Acted:
    """The answer to one request.

    Attributes
    ----------
    fields : mapping of str to ndarray [H, *shape]
        The next H actions, by field.
    execute : int
        How many of them the server records as done.
    seconds : float
        Time of the forward passes, which several requests may share.
    """

    fields: dict[str, np.ndarray]
    execute: int
    seconds: float

    @property
    def table(self) -> np.ndarray:
        """float32 [H, A]: the fields beside each other, sorted by name."""
        parts = [self.fields[name].reshape(len(self.fields[name]), -1) for name in sorted(self.fields)]
        return np.concatenate(parts, axis=1).astype(np.float32)


class Sessions:
    """All sessions of a server. Only the inference thread may use it.

    Parameters
    ----------
    served : callable
        Gives the policy with which new episodes begin.
    """

    def __init__(self, served: Callable[[], Served]) -> None:
        self._served, self._streams = served, itertools.count()
        self._members: dict[int, int] = {}  # id of histories -> sessions in them
        self._warned = False

    def reset(self, session: Session, wish: Wish | None = None, words: str | None = None) -> None:
        """Let the next observation begin a new episode.

        wish    what it is asked for; None: as before
        words   what is to be done, if the observations do not say it
        """
        if session.served is not self._served():
            self.end(session)  # nothing keeps older weights in memory
        session.began, session.words = False, words
        session.wish = session.wish if wish is None else wish

    def end(self, session: Session) -> None:
        """Free a session's place."""
        histories, served = session.histories, session.served
        session.histories, session.served, session.began = None, None, False
        if histories is None or served is None:
            return
        histories.give(session.row)
        self._members[id(histories)] -= 1
        if not self._members[id(histories)]:
            del self._members[id(histories)]
            served.forget(histories)

    def act(self, requests: Sequence[Observed]) -> list[Acted | Exception]:
        """Answer requests of different sessions. A refused request leaves its session as it was."""
        answers: dict[int, Acted | Exception] = {}
        together: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for number, request in enumerate(requests):
            try:
                fields = self._prepared(request)
                together.setdefault(id(request.session.histories), []).append((number, fields))
            except Exception as error:
                answers[number] = error
        for group in together.values():
            answers |= self._acted(requests, group)
        return [answers[number] for number in range(len(requests))]

    def _prepared(self, request: Observed) -> dict[str, Any]:
        """The fields of a request. Begins an episode if it is time for one."""
        session, sent = request.session, request.sent
        if session.began and (sent.words not in (None, session.words) or self._other_task(session, sent)):
            self.reset(session)
        words = session.words if sent.words is None else sent.words
        sent = Sent(sent.values, words)
        if not session.began:
            served = self._served()
            needed = served.choose(session.wish, sent)
            fields = fit(needed, sent)
            self._begin(session, served, needed)
        else:
            assert session.histories is not None
            self._check_executed(session.histories, session, request.executed)
            fields = fit(session.histories.needed, sent)
        session.words = words
        return fields

    @staticmethod
    def _other_task(session: Session, sent: Sent) -> bool:
        assert session.served is not None
        assert session.histories is not None
        return session.served.named(sent) not in ("", session.histories.needed.task)

    def _begin(self, session: Session, served: Served, needed: Needed) -> None:
        histories = served.histories(session.wish, needed)
        if histories is not session.histories:
            self.end(session)
            session.served, session.histories, session.row = served, histories, histories.take()
            self._members[id(histories)] = self._members.get(id(histories), 0) + 1
        stream = next(self._streams) if session.wish.stream is None else session.wish.stream
        histories.begin(session.row, stream, session.wish.target_return)
        session.began, session.acted = True, False

    @staticmethod
    def _check_executed(histories: Histories, session: Session, executed: int | None) -> None:
        if session.acted and executed not in (None, histories.execute):
            raise DataError(
                f"`executed` is {executed}, but the policy can go on only after {histories.execute} of the "
                f"{histories.chunk} actions that it gave; carry out {histories.execute} of each answer, or reset"
            )

    def _acted(
        self, requests: Sequence[Observed], group: Sequence[tuple[int, dict[str, Any]]]
    ) -> dict[int, Acted | Exception]:
        """Answers by number, for requests that share histories. If they fail together, each is tried alone."""
        mine = [requests[number] for number, _ in group]
        histories = mine[0].session.histories
        assert histories is not None
        self._warn(histories, mine)
        began = perf_counter()
        rows = [one.session.row for one in mine]
        rewards = [0.0 if one.reward is None else one.reward for one in mine]
        try:
            found = histories.act(rows, [fields for _, fields in group], rewards)
        except Exception as error:
            if len(group) == 1:
                return {group[0][0]: error}
            return {number: answer for one in group for number, answer in self._acted(requests, [one]).items()}
        seconds = perf_counter() - began
        for one in mine:
            one.session.acted = True
        return {n: Acted(fields, histories.execute, seconds) for (n, _), fields in zip(group, found, strict=True)}

    def _warn(self, histories: Histories, requests: Sequence[Observed]) -> None:
        late = (one for one in requests if one.session.acted and one.reward is None)
        if histories.needs_rewards and not self._warned and next(late, None) is not None:
            self._warned = True
            say(
                f"task {histories.needed.task!r}: its objective depends on rewards, but a client sends no `reward`, so all "
                "count as 0, and a return that is asked for never falls",
                error=True,
            )
