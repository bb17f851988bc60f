"""The table of paradigms: Decision Transformer, Gato and behaviour cloning differ in data, not in code.

A row of the table says which elements a timestep has and in what order, which of them are predicted, whether actions are ids or
regressed vectors, the attention mask, the conditioning, and how the policy acts. `OBSERVATION` means all observation fields:
first images, then discrete and continuous fields together; both groups are sorted by name. Texts that stay the same for a whole
episode stand once, before the first timestep of the window.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

TEXT, OBSERVATION, SEPARATOR, RETURN, ACTION = "text", "observation", "separator", "return", "action"


@dataclass(frozen=True)
class Paradigm:
    """One row of the table.

    timestep      elements in order
    targets       elements that are predicted: `action`, `text`
    discretised   True: actions are ids. False: continuous actions are regressed vectors
    scheme        gato | compact: how fields become tokens, unless the recipe says otherwise
    softmax       vocabulary | range: what a predicted id is normalised over
    mask          causal
    prompt        share of rows that begin with a prompt of the same task
    conditioning  what the policy is told besides observations
    acting        how it acts
    source        where it is described
    """

    name: str
    timestep: tuple[str, ...]
    targets: tuple[str, ...]
    discretised: bool
    scheme: str
    softmax: str
    mask: str
    prompt: float
    conditioning: str
    acting: str
    source: str


PARADIGMS: dict[str, Paradigm] = {
    p.name: p
    for p in (
        Paradigm(
            name="bc",
            timestep=(TEXT, OBSERVATION, ACTION),
            targets=(ACTION,),
            discretised=True,
            scheme="compact",
            softmax="range",
            mask="causal",
            prompt=0.0,
            conditioning="text, if the task has one; %BC by `prefer: top`",
            acting="the action's tokens one after another",
            source="behaviour cloning; %BC: Chen et al. 2021, sec. 5.1",
        ),
        Paradigm(
            name="dt",
            timestep=(TEXT, RETURN, OBSERVATION, ACTION),
            targets=(ACTION,),
            discretised=False,
            scheme="compact",
            softmax="range",
            mask="causal",
            prompt=0.0,
            conditioning="return-to-go, divided by the task's largest absolute return",
            acting="a target return (a multiple of the best in the data), lowered by each reward",
            source="Chen et al. 2021, algorithm 1",
        ),
        Paradigm(
            name="gato",
            timestep=(TEXT, OBSERVATION, SEPARATOR, ACTION),
            targets=(TEXT, ACTION),
            discretised=True,
            scheme="gato",
            softmax="vocabulary",
            mask="causal",
            prompt=0.25,
            conditioning="text; prompt: a demonstration of the same task, in half of the cases its end",
            acting="the action's tokens one after another, after a demonstration if one is given",
            source="Reed et al. 2022, sec. 2 and app. B, C",
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
    """The rows as text, for people to read."""
    return [
        {
            "name": p.name,
            "timestep": " ".join(p.timestep),
            "predicted": ", ".join(p.targets),
            "discretised": "yes" if p.discretised else "no",
            "scheme": p.scheme,
            "softmax": p.softmax,
            "mask": p.mask,
            "prompt": f"{p.prompt:g}",
            "conditioning": p.conditioning,
            "acts by": p.acting,
            "source": p.source,
        }
        for p in PARADIGMS.values()
    ]
