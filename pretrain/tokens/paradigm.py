"""What a row of the table of paradigms says: its parts, its prompt, how its policy acts and what data it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tiphys.dataio.episode import DataError
from tiphys.pretrain.tokens.derived import source_of
from tiphys.pretrain.tokens.hiding import HIDING
from tiphys.pretrain.tokens.timestep import BOTH, CAUSAL, LOSSES, MASKS, PREFIX
from tiphys.pretrain.tokens.views import AGENTS, FUTURE, ONE, VIEWS, WINDOW_TEXT

TEXT, OBSERVATION, SEPARATOR, RETURN, REWARD, ACTION = "text", "observation", "separator", "return", "reward", "action"
END, SUMMARY, AGENT = "end", "summary", "agent"
GRIDS = ("grid", "rows", "cells")  # a small grid of discrete values as one token, or one for each row or cell
CODES = {  # kind -> the codes that its parts may have
    TEXT: ("auto",),
    AGENT: ("auto",),
    OBSERVATION: ("auto", "gato", "vector", *GRIDS, "uniform", "quantile"),
    SEPARATOR: ("auto",),
    RETURN: ("auto", "linear", "uniform", "quantile", "integer", "sign", "histogram"),
    REWARD: ("auto", "uniform", "quantile", "integer", "sign"),
    ACTION: ("auto", "linear", "uniform", "quantile"),
    END: ("auto",),
    SUMMARY: ("auto",),
}
_CODE_OPTIONS = {"integer": ("low", "high")}
ACTING = {
    "next": "predicting the action, token by token",
    "ask": "predicting the action for a target return, which each reward lowers",
    "fill": "hiding the future, and filling in the action; a query says what else is shown: bc, rc or goal",
    "compare": "it does not act; Policy.match says how well texts fit what was seen",
    "label": "it does not act; `tiphys label` gives actions to data without them",
    "match": "predicting the action for a histogram: that of a reference episode, less what was done",
    "imitate": "predicting the action after the observations of a demonstration, the last one first",
    "sample": "drawing a return, high ones more often, and predicting the action for it",
    "beam": "drawing many plans, and taking the first action of the best",
}
ACTING_OPTIONS: dict[str, tuple[str, float, float]] = {  # name -> meaning, smallest and largest value
    "kappa": ("sample: how much more often high returns are drawn; 0: as the model says", -1e4, 1e4),
    "horizon": ("beam: most steps of a plan", 1, 1 << 12),
    "width": ("beam: plans that are kept", 1, 1 << 16),
    "expand": ("beam: actions that are drawn for each plan at each step", 1, 1 << 10),
    "cdf": ("beam: share of the least probable actions that are never drawn", 0, 0.999),
}
QUERY = "query"  # option of `fill`: what it is asked, unless `Policy.reset` says otherwise
TAKES_GOAL = frozenset({"fill"})  # rules of acting that are told an observation to reach
REQUIREMENTS = {
    "reward": "rewards",
    "text": "texts that differ within a task",
    "agents": "actions of several agents at each step",
    "hidden task": "several tasks that only the prompt tells apart",
}


@dataclass(frozen=True)
class Part:
    """One kind of element, in a timestep, or once before the first or after the last.

    Attributes
    ----------
    kind : str
        A key of `CODES`. `observation`, `action` and `text` stand for all fields of that role. `agent`: its number.
        `end` (of an episode) and `summary` are tokens of their own, which stand after the last step.
    code : str
        How its values are encoded, unless the recipe says otherwise for a field: one of the `CODES` of its kind. `auto`: by the
        scheme; `linear`: as one vector, and a predicted one is regressed; `uniform`, `quantile`: as ids of bins; `integer`,
        `sign`: as ids of integers, of -1, 0 and 1; `histogram`: as one vector of shares.
    weight : float
        Loss weight of its targets, relative to the weight of the mixture entry. 0: it is not predicted.
    shown : bool
        False: the token `mask` stands in its place in the input. Its targets stay.
    source : str
        Where the values of a return come from: a rule of `derived.SOURCES`. Empty: `to_go` for a return; the data's fields for
        all other kinds.
    options : mapping
        Options of its code (`integer`: low, high) and of its source (`histogram`: bins, low, high).
    """

    kind: str
    code: str = "auto"
    weight: float = 0.0
    shown: bool = True
    source: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.code not in CODES.get(self.kind, ()):
            raise ValueError(f"a part of kind {self.kind!r} with code {self.code!r}: unknown")
        if (self.code == "histogram") != self.source.startswith("histogram"):
            raise ValueError(f"a part of kind {self.kind!r}: code and source 'histogram' belong together")
        if self.source and self.kind != RETURN:
            raise ValueError(f"a part of kind {self.kind!r} has no source, but {self.source!r} is given")
        known = dict.fromkeys(_CODE_OPTIONS.get(self.code, ()))
        if self.rule:
            try:
                known |= dict(source_of(self.rule)[0].options)
            except DataError as error:
                raise ValueError(f"a part of kind {self.kind!r}: {error}") from None
        if set(self.options) - set(known):
            raise ValueError(
                f"a part of kind {self.kind!r} has options {sorted(self.options)}, but knows {sorted(known)}"
            )
        if not self.weight >= 0 or (self.weight and self.kind in (SEPARATOR, AGENT)):
            raise ValueError(f"a part of kind {self.kind!r} cannot have the weight {self.weight}")

    @property
    def rule(self) -> str:
        """The source that its values come from; empty: the fields of the data."""
        return self.source or ("to_go" if self.kind == RETURN else "")

    def __str__(self) -> str:
        weight = "" if not self.weight else "*" if self.weight == 1 else f"*{self.weight:g}"
        return f"{self.kind}{weight}" if self.shown else f"[{self.kind}{weight}]"


@dataclass(frozen=True)
class Prompt:
    """A demonstration of the same task, from another episode, that stands before a window. It has no targets.

    Attributes
    ----------
    share : float
        Share of rows that begin with a prompt, or, with `every_window`, of windows that have one.
    steps : int
        Most steps of a prompt; 0: as many as fit half of the row.
    every_window : bool
        Each window of a row has a prompt of its own, not only the first.
    ends : float
        Share of the prompts that are the end of their episode. The others lie anywhere in it.
    reverse : bool
        The last step stands first.
    parts : tuple of str
        The kinds of parts that a prompt shows; empty: all of a timestep.
    """

    share: float = 0.0
    steps: int = 0
    every_window: bool = False
    ends: float = 0.5
    reverse: bool = False
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (0 <= self.share <= 1 and 0 <= self.ends <= 1) or set(self.parts) - set(CODES):
            raise ValueError(f"a prompt cannot have share {self.share}, ends {self.ends}, parts {self.parts}")

    def __str__(self) -> str:
        return f"{self.share:g} of the {'windows' if self.every_window else 'rows'}" if self.share else "none"


@dataclass(frozen=True)
class Paradigm:
    """One row of the table.

    Attributes
    ----------
    name, source : str
        Its name, and where it is described.
    differs : str
        What is done differently from the source.
    timestep : tuple of Part
        The parts of a timestep, in order. `text`: texts that change from step to step.
    head : tuple of Part
        What stands once, before the first timestep of a window: texts that stay the same for a whole episode.
    tail : tuple of Part
        What stands once, after the last timestep: `end`, only where the episode ends, and `summary`.
    scheme : str
        How fields become tokens, unless the recipe says otherwise: gato | compact.
    softmax : str
        What a predicted id is normalised over: vocabulary | range.
    mask : str
        Who sees whom: a key of `timestep.MASKS`.
    hiding : tuple of (str, float)
        Schemes of `hiding.HIDING` with their shares. Each window draws one, which says which parts are hidden and learnt.
    views : str
        How a window becomes sequences: a key of `views.VIEWS`.
    window : int
        Most steps of a window, unless the recipe says otherwise; 0: as many as fit the context.
    future : int
        Most rows after a window's last step whose observations are shown.
    prompt : Prompt
        The demonstration before a window.
    loss : str
        What the targets count: a key of `timestep.LOSSES`.
    swap : float
        Share of the windows that show the text of another window of their row. A `summary` tells which, and nothing else is
        learned from them.
    acting : (str, mapping)
        How its policy acts: a name in `ACTING`, and the options of that rule.
    requires : tuple of str
        What the data must have: names in `REQUIREMENTS`.
    """

    name: str
    source: str
    timestep: tuple[Part, ...]
    head: tuple[Part, ...] = (Part(TEXT),)
    tail: tuple[Part, ...] = ()
    scheme: str = "compact"
    softmax: str = "range"
    mask: str = CAUSAL
    hiding: tuple[tuple[str, float], ...] = ()
    views: str = ONE
    window: int = 0
    future: int = 0
    prompt: Prompt = Prompt()
    loss: str = "targets"
    swap: float = 0.0
    acting: tuple[str, Mapping[str, Any]] = ("next", {})
    requires: tuple[str, ...] = ()
    differs: str = ""

    def __post_init__(self) -> None:
        for why in self._mistakes():
            raise ValueError(f"paradigm {self.name!r}: {why}")

    def _mistakes(self) -> Iterator[str]:
        for what, given, known in (
            ("acting", [self.acting[0]], ACTING),
            ("mask", [self.mask], MASKS),
            ("requirement", self.requires, REQUIREMENTS),
            ("view", [self.views], VIEWS),
            ("loss", [self.loss], LOSSES),
            ("hiding scheme", [name for name, _ in self.hiding], HIDING),
        ):
            for name in given:
                if name not in known:
                    yield f"the {what} {name!r} is unknown; known are {', '.join(known)}"
        if unknown := sorted(set(self.acting[1]) - {*ACTING_OPTIONS, QUERY}):
            yield f"acting has the options {unknown}, but known are {', '.join([*ACTING_OPTIONS, QUERY])}"
        if any(part.kind != TEXT or not part.shown for part in self.head):
            yield "only texts that are shown can stand before the first timestep"
        if any(part.kind not in (END, SUMMARY) or not part.shown for part in self.tail):
            yield "only `end` and `summary` can stand after the last timestep, and they are shown"
        if any(part.kind in (END, SUMMARY) for part in self.timestep):
            yield "`end` and `summary` stand after the last timestep, not in it"
        if any(not share >= 0 for _, share in self.hiding) or (self.hiding and not sum(s for _, s in self.hiding) > 0):
            yield "the shares of its hiding schemes are not positive"
        predicted = [part for part in (*self.timestep, *self.head, *self.tail) if part.weight]
        if self.mask == BOTH and any(part.shown and not (self.hiding and part in self.timestep) for part in predicted):
            yield "all positions see each other, so a part that is predicted must be hidden"
        if self.mask == PREFIX and any(part.weight for part in self.head):
            yield "the texts before the first timestep see each other, so they cannot be predicted"
        if (self.loss == "pairs") != (self.views == WINDOW_TEXT):
            yield f"the loss `pairs` and the view `{WINDOW_TEXT}` belong together"
        if self.loss == "pairs" and (predicted or [part.kind for part in self.tail] != [SUMMARY]):
            yield "pairs are read at a `summary`, which ends each sequence, and nothing else is predicted"
        if not 0 <= self.swap < 1 or any(part.weight for part in self.tail if part.kind == SUMMARY) != (self.swap > 0):
            yield "a `summary` is predicted if texts are swapped, and only then; the share is at least 0 and less than 1"
        if self.swap and (self.mask == BOTH or any(p.shown for p in self.timestep if p.kind == ACTION)):
            yield "texts are swapped: actions that are shown tell which fit, so they must be hidden, and the mask causal"
        if any(part.kind == AGENT for part in self.timestep) and self.views != AGENTS:
            yield f"the number of an agent is known in the view `{AGENTS}` only"
        if (self.views == FUTURE) != (self.acting[0] == "imitate") or (self.views == FUTURE and self.mask != PREFIX):
            yield f"the view `{FUTURE}` needs the mask `{PREFIX}` and acts by `imitate`, and nothing else does"
        if self.views != ONE and self.prompt.share:
            yield f"windows of the view `{self.views}` cannot have prompts"
        if self.future < 0:
            yield "future is the number of rows after a window, at least 0"

    @property
    def shows_returns(self) -> bool:
        """Whether its policy can be asked for a return."""
        return any(part.kind == RETURN for part in self.timestep)

    @property
    def predicts_text(self) -> bool:
        """Whether it learns from texts alone."""
        return any(part.weight > 0 for part in self.head)


def hiding_of(paradigm: Paradigm, options: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """The schemes that an objective hides by: those of its option `hiding`, else of the paradigm."""
    given = options.get("hiding")
    return paradigm.hiding if given is None else tuple((str(k), float(v)) for k, v in given.items())
