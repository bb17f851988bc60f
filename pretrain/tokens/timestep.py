"""Timestep: the plan by which one task's timesteps become positions of a sequence.

It is JSON, so that a policy acts by the plan that it learned from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tiphys.pretrain.tokens.batch import ACTION, RETURN, SEPARATOR, TEXT
from tiphys.pretrain.tokens.codecs import Codec, codec_from_dict

LOCAL_POSITIONS = 512
ACTION_LOCAL = LOCAL_POSITIONS - 1  # the one that all actions share (Reed et al. 2022, app. C.3)
_ROLES = {"text": TEXT, "separator": SEPARATOR, "action": ACTION, "return": RETURN}


@dataclass(frozen=True)
class Element:
    """One element of a timestep.

    role       text (one by step) | observation | separator | return | action
    field      the field it shows; empty for a separator and a return
    codec      how; None for text and the separator
    size       positions; for text the most that it takes
    predicted  its ids are targets; with `head`, its vector is
    head       regression head; empty: ids
    stride     shown at steps whose number in the episode it divides
    constant   the field is one array for the episode, shown at every step
    """

    role: str
    field: str = ""
    codec: Codec | None = None
    size: int = 1
    predicted: bool = False
    head: str = ""
    stride: int = 1
    constant: bool = False

    @property
    def modality(self) -> int:
        if self.role in _ROLES:
            return _ROLES[self.role]
        assert self.codec is not None
        return self.codec.modality

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "codec": self.codec.to_dict() if self.codec else None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Element:
        codec = codec_from_dict(values["codec"]) if values["codec"] else None
        return cls(**{**values, "codec": codec})


@dataclass(frozen=True)
class Timestep:
    """A task's timestep, and what stands once in a window.

    number    the task's number in the run's list
    elements  in order; texts by step come first
    preamble  fields whose text is one for the episode: once a window, before its first timestep, with local positions of
              their own, so that an observation's local positions are the same in every timestep
    text      most ids of one text
    said      the preamble is predicted
    ends      the preamble stands after the observations and is closed by end-of-text: captions and documents (no actions)
    chunk     steps that one observation answers for: rows 0, chunk, 2·chunk … of a window show observations, all show actions
    softmax   vocabulary | range
    weight    of each target
    context   most positions of a window
    window    most steps of a window; 0: as many as the context holds
    """

    task: str
    number: int
    elements: tuple[Element, ...]
    preamble: tuple[str, ...] = ()
    text: int = 0
    said: bool = False
    ends: bool = False
    chunk: int = 1
    softmax: str = "vocabulary"
    weight: float = 1.0
    context: int = 0
    window: int = 0

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """First column of each element in a timestep that shows all of them."""
        return tuple(np.cumsum([0] + [e.size for e in self.elements[:-1]]).tolist()) if self.elements else ()

    @cached_property
    def width(self) -> int:
        return sum(e.size for e in self.elements)

    @cached_property
    def spoken(self) -> int:
        """Columns of texts by step, which vary in length."""
        return sum(e.size for e in self.elements if e.role == "text")

    @cached_property
    def acts(self) -> bool:
        return any(e.role == "action" for e in self.elements)

    @cached_property
    def varies(self) -> bool:
        """Timesteps may lack columns."""
        return self.chunk > 1 or self.spoken > 0 or any(e.stride > 1 for e in self.elements)

    def per_column(self, of: Any, dtype: Any) -> np.ndarray:
        """[width]: `of(element)` for each of the element's columns."""
        values = [of(e) for e in self.elements for _ in range(e.size)]
        return np.array(values, dtype)

    @cached_property
    def modality(self) -> np.ndarray:
        return self.per_column(lambda e: e.modality, np.uint8)

    @cached_property
    def local(self) -> np.ndarray:
        """int32 [width]: 0, 1, … within the timestep; actions share the last."""
        action = self.per_column(lambda e: e.role == "action", bool)
        return np.where(action, ACTION_LOCAL, np.minimum(np.arange(self.width), ACTION_LOCAL - 1)).astype(np.int32)

    def cost(self, prompts: bool = False) -> tuple[int, int]:
        """(a, b): a window of n steps takes at most a·n + b positions beside its preamble.

        With prompts b is 0, because a prompt is planned by its steps alone.
        """
        if prompts or not (self.chunk > 1 or any(e.stride > 1 for e in self.elements)):
            return self.width, 0
        if self.chunk > 1:
            seen = sum(e.size for e in self.elements if e.role != "action")
            return self.width - seen + -(-seen // self.chunk), -(-seen * (self.chunk - 1) // self.chunk)
        each = sum(-(-e.size // e.stride) for e in self.elements)
        return each, sum(-(-e.size * (e.stride - 1) // e.stride) for e in self.elements)

    def steps(self, preamble: int, room: int) -> int:
        """Most steps of a window in `room` positions, `preamble` of them for its texts; whole chunks where it can be."""
        each, once = self.cost()
        fit = max(1, (min(self.context, room) - preamble - once) // max(each, 1))
        fit = min(fit, self.window) if self.window else fit
        return fit // self.chunk * self.chunk or fit

    def to_dict(self) -> dict[str, Any]:
        flat = {k: v for k, v in self.__dict__.items() if k in self.__dataclass_fields__ and k != "elements"}
        return flat | {"elements": [e.to_dict() for e in self.elements]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Timestep:
        elements = tuple(Element.from_dict(e) for e in values["elements"])
        return cls(**{**values, "elements": elements, "preamble": tuple(values["preamble"])})
