"""The table of paradigms: Decision Transformer, Gato and behaviour cloning differ in data, not in code.

A row of the table says which parts a timestep has and in what order, which of them are predicted, how they are encoded, the
prompt, what data it needs, and how its policy acts. `observation` means all observation fields: first images, then discrete and
continuous fields together; both groups are sorted by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from tiphys.pretrain.tokens.hiding import HIDING, QUERIES
from tiphys.pretrain.tokens.paradigm import (
    ACTING,
    ACTING_OPTIONS,
    ACTION,
    AGENT,
    END,
    OBSERVATION,
    QUERY,
    REQUIREMENTS,
    RETURN,
    REWARD,
    SEPARATOR,
    SUMMARY,
    TEXT,
    Paradigm,
    Part,
    Prompt,
    hiding_of,
)
from tiphys.pretrain.tokens.timestep import BOTH, LOSSES, MASKS, PREFIX
from tiphys.pretrain.tokens.views import AGENTS, FUTURE, VIEWS, WINDOW_TEXT

__all__ = [  # a table of one's own needs these
    "ACTION",
    "END",
    "OBSERVATION",
    "PARADIGMS",
    "RETURN",
    "REWARD",
    "Paradigm",
    "Part",
    "hiding_errors",
    "paradigm_errors",
    "table",
]

NOTHING = "nothing"
SCHEMES = {
    "compact": "a field is one token if it can be",
    "gato": "each number is a token",
}
SOFTMAXES = {
    "range": "an id is predicted among those of its kind",
    "vocabulary": "an id is predicted among all",
}

# What a trajectory transformer predicts, and how it plans (Janner et al. 2021)
_TRAJECTORY = (
    Part(TEXT),
    Part(OBSERVATION, "quantile", weight=1.0),
    Part(ACTION, "quantile", weight=5.0),
    Part(REWARD, "quantile", weight=1.0),
    Part(RETURN, "quantile", weight=1.0, shown=False, source="discounted:.99"),
)
_BEAM = ("beam", {"horizon": 15, "width": 32, "expand": 2, "cdf": 0.6})

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
            acting=("ask", {}),
            requires=(REWARD,),
            differs="returns are divided by the task's largest absolute return; the target is a multiple of the best return in "
            "the data; positions count tokens of the window and steps of the episode",
        ),
        Paradigm(
            "tt",
            "Janner et al. 2021, sec. 3",
            _TRAJECTORY,
            tail=(Part(END, weight=1.0),),
            acting=_BEAM,
            requires=(REWARD,),
            differs="the end of an episode is a token of its own, after which a plan earns nothing, instead of a penalty; the "
            "value is `mask` in the input; 32 plans instead of 128",
        ),
        Paradigm(
            "boot",
            "Wang et al. 2022 (Bootstrapped transformer for offline reinforcement learning), sec. 4",
            _TRAJECTORY,
            tail=(Part(END, weight=1.0),),
            acting=_BEAM,
            requires=(REWARD,),
            differs="as tt; transitions are drawn in rounds (`tiphys bootstrap`) and become a dataset, instead of being drawn in "
            "every training step; rewards and values stay those of the data, and the confidence does not count them",
        ),
        Paradigm(
            "mgdt",
            "Lee et al. 2022, sec. 3",
            (
                Part(TEXT),
                Part(OBSERVATION),
                Part(RETURN, "uniform", weight=1.0, source="to_go"),
                Part(ACTION, "uniform", weight=1.0),
                Part(REWARD, "sign", weight=1.0),
            ),
            acting=("sample", {"kappa": 10.0}),
            requires=(REWARD,),
            differs="returns are bins over the range of the data instead of integers from -20 to 100; kappa counts in that "
            "range; patches are causal; past returns stay as they were drawn",
        ),
        Paradigm(
            "gato",
            "Reed et al. 2022, sec. 2 and app. B, C",
            (Part(TEXT, weight=1.0), Part(OBSERVATION), Part(SEPARATOR), Part(ACTION, weight=1.0)),
            head=(Part(TEXT, weight=1.0),),
            scheme="gato",
            softmax="vocabulary",
            prompt=Prompt(0.25),
            differs="discrete values have ids of their own; a prompt stands before the first window of a row only",
        ),
        Paradigm(
            "unimask",
            "Carroll et al. 2022, sec. 4",
            (
                Part(TEXT),
                Part(RETURN, "integer", weight=1.0),
                Part(OBSERVATION, weight=1.0),
                Part(ACTION, weight=1.0),
            ),
            scheme="gato",
            mask=BOTH,
            hiding=(
                ("random", 0.5),
                ("bc", 0.1),
                ("rc", 0.1),
                ("goal", 0.1),
                ("waypoint", 0.1),
                ("past", 0.05),
                ("future", 0.05),
            ),
            loss="factors",
            acting=("fill", {QUERY: "bc"}),
            requires=(REWARD,),
            differs="what is hidden is a token of its own, not zeros; ids are predicted over their range; the kinds of parts "
            "have equal shares in the loss of a window, not of a batch; hidden numbers are predicted independently of each other",
        ),
        Paradigm(
            "idm",
            "Baker et al. 2022, sec. 4.1",
            (Part(TEXT), Part(OBSERVATION), Part(ACTION, weight=1.0, shown=False)),
            mask=BOTH,
            future=1,
            acting=("label", {}),
            differs="observations are encoded one by one, without convolutions over time; a window also shows the observation "
            "after its last action",
        ),
        Paradigm(
            "pdt",
            "Cang et al. 2022 (Semi-supervised offline RL with pre-trained decision transformers)",
            (
                Part(TEXT),
                Part(RETURN, "linear", source="to_go", shown=False),
                Part(OBSERVATION),
                Part(ACTION, "linear", weight=1.0),
            ),
            differs="the token `mask` stands for a return that is not known, because zero is a return; fine-tuning is `dt` with "
            "`model.init`",
        ),
        Paradigm(
            "prompt-dt",
            "Xu et al. 2022 (Prompting decision transformer), algorithm 1",
            (Part(RETURN, "linear", source="to_go"), Part(OBSERVATION), Part(ACTION, "linear", weight=1.0)),
            head=(),
            prompt=Prompt(1.0, steps=5, every_window=True, ends=1.0),
            acting=("ask", {}),
            requires=(REWARD, "hidden task"),
            differs="as dt; a prompt is the last steps of another episode of the task, and has no targets",
        ),
        Paradigm(
            "gdt",
            "Furuta et al. 2022 (Generalized decision transformer), sec. 4: its categorical form",
            (
                Part(TEXT),
                Part(RETURN, "histogram", source="histogram:reward"),
                Part(OBSERVATION),
                Part(ACTION, "linear", weight=1.0),
            ),
            acting=("match", {}),
            differs="shares are given as they are; acting subtracts what was done, or follows the reference's own remainder",
        ),
        Paradigm(
            "bdt",
            "Furuta et al. 2022 (Generalized decision transformer), sec. 5: its bidirectional form",
            (Part(TEXT), Part(OBSERVATION), Part(ACTION, "linear", weight=1.0)),
            mask=PREFIX,
            views=FUTURE,
            acting=("imitate", {}),
            differs="the window's own observations, the last one first, are read as a prefix by the same Transformer, instead of "
            "by a second one; nothing narrows them down, so training sees the next observation and is an inverse dynamics",
        ),
        Paradigm(
            "text-dt",
            "Putterman et al. 2022 (Pretraining for language-conditioned imitation with transformers)",
            (Part(OBSERVATION), Part(ACTION, "linear", weight=1.0)),
            requires=(TEXT,),
            differs="the text is not learned; no text model is begun with; returns are shown by `dt`, which takes texts too",
        ),
        Paradigm(
            "madt",
            "Meng et al. 2021 (Offline pre-trained multi-agent decision transformer), sec. 3",
            (Part(RETURN, "linear", source="to_go"), Part(AGENT), Part(OBSERVATION), Part(ACTION, weight=1.0)),
            views=AGENTS,
            acting=("ask", {}),
            requires=(REWARD, "agents"),
            differs="returns are shown as in dt, and are those of the team; windows have several steps (released code: one) and "
            "do not cross episodes; online fine-tuning is not part of it",
        ),
        Paradigm(
            "mia",
            "Multimodal interactive agent: Abramson et al. 2021, sec. 3.3 (language matching)",
            (Part(TEXT), Part(OBSERVATION), Part(ACTION, weight=1.0, shown=False)),
            tail=(Part(SUMMARY, weight=1.0),),
            swap=0.5,
            requires=(TEXT,),
            differs="past actions are hidden from everyone, because an action tells which text fits; half of the windows show "
            "the text of another window of their row, so a row needs several windows of a task; the match is read at one token, "
            "at the window's end",
        ),
        Paradigm(
            "reward",
            "MineCLIP: Fan et al. 2022 (MineDojo), sec. 4.1 and app. C",
            (Part(OBSERVATION),),
            tail=(Part(SUMMARY),),
            mask=BOTH,
            views=WINDOW_TEXT,
            window=16,
            loss="pairs",
            acting=("compare", {}),
            requires=(TEXT,),
            differs="one Transformer, trained from scratch, reads frames and texts; negatives come from the same row, and "
            "windows with equal texts are no negatives of each other",
        ),
    )
}


def hiding_errors(name: str, paradigm: Paradigm, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key path, reason) of what is wrong with the options `hiding` and `query` of an objective `name`."""
    where, given, query = f"objectives.{name}.options", options.get("hiding"), options.get("query")
    if given is not None:
        if not paradigm.hiding:
            yield f"{where}.hiding", f"paradigm {paradigm.name!r} hides nothing"
            return
        valid = isinstance(given, Mapping) and all(
            isinstance(share, int | float) and not isinstance(share, bool) and 0 <= share < float("inf")
            for share in given.values()
        )
        if not valid or not sum(given.values()) > 0:
            yield f"{where}.hiding", "give the schemes with their shares, such as {random: 0.5, bc: 0.5}"
            return
        for scheme in given:
            if scheme not in HIDING:
                yield f"{where}.hiding", f"no scheme is called {scheme!r}; there are {', '.join(HIDING)}"
    if query is not None:
        learnt = {scheme for scheme, share in hiding_of(paradigm, options) if share > 0}
        if paradigm.acting[0] != "fill":
            yield f"{where}.query", f"paradigm {paradigm.name!r} does not act by filling in hidden parts"
        elif query not in QUERIES:
            yield f"{where}.query", f"no query is called {query!r}; there are {', '.join(QUERIES)}"
        elif not learnt & {query, "random"}:
            yield (
                f"{where}.query",
                f"{query!r} would not be trained: the objective hides by {', '.join(sorted(learnt))}",
            )


def paradigm_errors(name: str, paradigm: str = "") -> Iterator[tuple[str, str]]:
    """(key path, reason) if an objective `name` of a recipe names no paradigm; without `paradigm`, its own name is meant."""
    wanted = paradigm or name
    if wanted not in PARADIGMS:
        near = difflib.get_close_matches(str(wanted), PARADIGMS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Allowed: {', '.join(PARADIGMS)}."
        yield f"objectives.{name}", f"no paradigm is called {wanted!r}. {hint}"


def table() -> list[dict[str, str]]:
    """The rows as text, for people to read. A part with a star is predicted; one in brackets is hidden in the input.

    What a row does not have is `NOTHING`.
    """
    return [
        {
            "name": p.name,
            "source": p.source,
            "at the start": " ".join(map(str, p.head)) or NOTHING,
            "each step": " ".join(map(str, p.timestep)),
            "at the end": " ".join(map(str, p.tail)) or NOTHING,
            "codes": ", ".join(map(_code, filter(_code, p.timestep))) or NOTHING,
            "scheme": f"{p.scheme}: {SCHEMES[p.scheme]}",
            "softmax": f"{p.softmax}: {SOFTMAXES[p.softmax]}",
            "mask": f"{p.mask}: {MASKS[p.mask]}",
            "views": VIEWS[p.views].about,
            "loss": LOSSES[p.loss] + (f"; {p.swap:g} of the windows show another text" if p.swap else ""),
            "hides": _schemes(p) or NOTHING,
            "prompt": str(p.prompt) if p.prompt.share else NOTHING,
            "needs": ", ".join(REQUIREMENTS[name] for name in p.requires) or NOTHING,
            "acts by": ACTING[p.acting[0]],
            "options": "; ".join(_option(name, value) for name, value in p.acting[1].items()) or NOTHING,
            "differs": p.differs or NOTHING,
        }
        for p in PARADIGMS.values()
    ]


def _code(part: Part) -> str:
    """How a part is encoded, where the scheme does not say it."""
    source = f" ({part.rule})" if part.rule else ""
    return f"{part.kind}{source}: {part.code}" if part.code != "auto" else ""


def _schemes(row: Paradigm) -> str:
    shares = ", ".join(f"{name} {share:g}" for name, share in row.hiding)
    return f"parts of each window, by a scheme that is drawn: {shares}" if shares else ""


def _option(name: str, value: Any) -> str:
    """An option of acting, its default, and what it means."""
    about = (
        ACTING_OPTIONS[name][0].partition(": ")[2] if name in ACTING_OPTIONS else "what is asked, unless reset says it"
    )
    return f"{name} {value} ({about})"
