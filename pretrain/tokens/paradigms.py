"""The table of paradigms: Decision Transformer, Gato and behaviour cloning differ in data, not in code.

A row of the table says which parts a timestep has and in what order, which of them are predicted, how they are encoded, the
prompt, what data it needs, and how its policy acts. `observation` means all observation fields: first images, then discrete and
continuous fields together; both groups are sorted by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tiphys.dataio.episode import DataError
from tiphys.pretrain.tokens.derived import source_of

TEXT, OBSERVATION, SEPARATOR, RETURN, REWARD, ACTION = (
    "text",
    "observation",
    "separator",
    "return",
    "reward",
    "action",
)
CODES = {  # kind -> the codes that its parts may have
    TEXT: ("auto",),
    OBSERVATION: ("auto", "gato", "vector", "grid", "uniform", "quantile"),
    SEPARATOR: ("auto",),
    RETURN: ("auto", "linear", "uniform", "quantile", "integer", "sign", "histogram"),
    REWARD: ("auto", "uniform", "quantile", "integer", "sign"),
    ACTION: ("auto", "linear", "uniform", "quantile"),
}
_CODE_OPTIONS = {"integer": ("low", "high")}
ACTING = {
    "next": "the action's tokens one after another",
    "ask": "a target return, lowered by each reward; then the action",
}
TAKES_GOAL = frozenset({"fill"})  # rules of acting that are told an observation to reach
REQUIREMENTS = {"reward": "rewards"}


@dataclass(frozen=True)
class Part:
    """One kind of element, in a timestep or once before the first.

    Attributes
    ----------
    kind : str
        A key of `CODES`. `observation`, `action` and `text` stand for all fields of that role.
    code : str
        How its values are encoded, unless the recipe says otherwise for a field: one of the `CODES` of its kind. `auto`: by the scheme;
        `linear`: as one vector, and a predicted one is regressed; `uniform`, `quantile`: as ids of bins; `integer`, `sign`: as
        ids of integers, of -1, 0 and 1; `histogram`: as one vector of shares.
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
        if not self.weight >= 0 or (self.weight and self.kind == SEPARATOR):
            raise ValueError(f"a part of kind {self.kind!r} cannot have the weight {self.weight}")

    @property
    def rule(self) -> str:
        """The source that its values come from; empty: the fields of the data."""
        return self.source or ("to_go" if self.kind == RETURN else "")

    def __str__(self) -> str:
        weight = "" if not self.weight else "*" if self.weight == 1 else f"*{self.weight:g}"
        return f"{self.kind}{weight}" if self.shown else f"[{self.kind}{weight}]"


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
    scheme : str
        How fields become tokens, unless the recipe says otherwise: gato | compact.
    softmax : str
        What a predicted id is normalised over: vocabulary | range.
    mask : str
        Who may attend to whom: causal.
    prompt : float
        Share of rows that begin with a prompt, a demonstration of the same task.
    acting : str
        How its policy acts: a name in `ACTING`.
    requires : tuple of str
        What the data must have: names in `REQUIREMENTS`.
    """

    name: str
    source: str
    timestep: tuple[Part, ...]
    head: tuple[Part, ...] = (Part(TEXT),)
    scheme: str = "compact"
    softmax: str = "range"
    mask: str = "causal"
    prompt: float = 0.0
    acting: str = "next"
    requires: tuple[str, ...] = ()
    differs: str = ""

    def __post_init__(self) -> None:
        if self.acting not in ACTING or self.mask != "causal" or set(self.requires) - set(REQUIREMENTS):
            raise ValueError(f"paradigm {self.name!r}: unknown acting, mask or requirement")
        if any(part.kind != TEXT or not part.shown for part in self.head):
            raise ValueError(f"paradigm {self.name!r}: only texts that are shown can stand before the first timestep")

    @property
    def predicts_text(self) -> bool:
        """Whether it learns from texts alone."""
        return any(part.weight > 0 for part in self.head)


PARADIGMS: dict[str, Paradigm] = {
    p.name: p
    for p in (
        Paradigm(
            "bc",
            "behaviour cloning; %BC: Chen et al. 2021, sec. 5.1",
            (Part(TEXT), Part(OBSERVATION), Part(ACTION, weight=1.0)),
        ),
        Paradigm(
            "dt",
            "Chen et al. 2021, algorithm 1",
            (Part(TEXT), Part(RETURN, "linear", source="to_go"), Part(OBSERVATION), Part(ACTION, "linear", weight=1.0)),
            acting="ask",
            requires=(REWARD,),
            differs="returns are divided by the task's largest absolute return; the target is a multiple of the best return in "
            "the data; positions count tokens of the window and steps of the episode",
        ),
        Paradigm(
            "gato",
            "Reed et al. 2022, sec. 2 and app. B, C",
            (Part(TEXT, weight=1.0), Part(OBSERVATION), Part(SEPARATOR), Part(ACTION, weight=1.0)),
            head=(Part(TEXT, weight=1.0),),
            scheme="gato",
            softmax="vocabulary",
            prompt=0.25,
            differs="discrete values have ids of their own; a prompt stands before the first window of a row only",
        ),
    )
}


def paradigm_errors(name: str, paradigm: str = "") -> Iterator[tuple[str, str]]:
    """(key path, reason) if an objective `name` of a recipe names no paradigm; without `paradigm`, its own name is meant."""
    wanted = paradigm or name
    if wanted not in PARADIGMS:
        near = difflib.get_close_matches(str(wanted), PARADIGMS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Allowed: {', '.join(PARADIGMS)}."
        yield f"objectives.{name}", f"no paradigm is called {wanted!r}. {hint}"


def table() -> list[dict[str, str]]:
    """The rows as text, for people to read. A part with a star is predicted; one in brackets is hidden in the input."""
    return [
        {
            "name": p.name,
            "once": " ".join(map(str, p.head)),
            "each step": " ".join(map(str, p.timestep)),
            "scheme": p.scheme,
            "softmax": p.softmax,
            "mask": p.mask,
            "prompt": f"{p.prompt:g} of the rows" if p.prompt else "none",
            "needs": ", ".join(REQUIREMENTS[name] for name in p.requires) or "nothing special",
            "acts by": ACTING[p.acting],
            "source": p.source,
            "differs": p.differs or "nothing that we know of",
        }
        for p in PARADIGMS.values()
    ]
