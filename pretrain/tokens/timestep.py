"""TimestepLayout: how the timesteps of one task become positions of a sequence.

It can be written as JSON, so that a policy acts with the layout that it was trained with.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from tiphys.dataio.episode import DataError
from tiphys.dataio.stored import number, stored
from tiphys.pretrain.tokens.batch import ACTION, RETURN, REWARD, SEPARATOR, TEXT
from tiphys.pretrain.tokens.codec import Codec
from tiphys.pretrain.tokens.codecs import check_codec, codec_from_dict
from tiphys.pretrain.tokens.derived import ALL, fields_of, source_of
from tiphys.pretrain.tokens.frames import ABSOLUTE, Frame
from tiphys.pretrain.tokens.hiding import HIDING
from tiphys.pretrain.tokens.vector_codecs import Chunk
from tiphys.pretrain.tokens.views import FUTURE, ONE, VIEWS, imitating
from tiphys.pretrain.tokens.vocabulary import Vocabulary

LOCAL_POSITIONS = 512
CLIP = "tiphys.clip"  # field that says what a clip was cut from
TO_THE_END = 1 << 30  # rows; more than an episode has
ACTION_LOCAL = LOCAL_POSITIONS - 1  # all action tokens share it (Reed et al. 2022, app. C.3)
CAUSAL, BOTH, PREFIX = "causal", "both", "prefix"
MASKS = {
    CAUSAL: "each position sees itself and those before it",
    BOTH: "all positions see each other",
    PREFIX: "a prompt and the texts before the first step see each other, the rest is causal",
}
LOSSES = {
    "targets": "each target counts by its weight",
    "factors": "each window counts as much as it has steps, and each kind of part in it has the same share",
    "pairs": "each window is told from the other windows of its row by its text, and each text by its window",
}
_JSON_KEYS = {  # name here -> key in processor.json, version 1; all other names are the same in both
    "text_limit": "text",
    "predict_text": "said",
    "text_last": "ends",
}
TAIL = ("end", "summary")
_ROLES = {
    "text": TEXT,
    "separator": SEPARATOR,
    "end": SEPARATOR,
    "summary": SEPARATOR,
    "action": ACTION,
    "return": RETURN,
    "reward": REWARD,
}
_VERSION_2: dict[str, Any] = {"mask": CAUSAL, "tail": [], "hiding": (), "future": 0, "loss": "targets"}
_VERSION_2 |= {"prompt_steps": 0, "prompt_parts": (), "prompt_reverse": False, "views": ONE, "swap": 0.0}
_VERSION_2 |= {"agents": 0, "agent_fields": (), "clipped": False}
_OPTIONAL: dict[str, Any] = {
    "weight": 1.0,
    "shown": True,
    "source": "",
    "options": {},
    "available": "",
    "to": "",
    "columns": (),
    "augment": {},
}  # keys of an element that processor.json may lack


@dataclass(frozen=True)
class Element:
    """One element of a timestep.

    role       agent (its number) | text (one that changes from step to step) | observation | separator | return | reward | action
    field      the field that it shows; empty for a separator and a return
    codec      its encoding; None for text and the separator
    size       positions that it takes; for text: at most
    predicted  its ids are targets; with `head`: its vector is the target
    weight     loss weight of its targets, times that of the layout
    shown      False: the token `mask` stands in its place in the input; its targets stay
    head       regression head; empty: its ids are predicted
    stride     it is shown at the steps whose number in the episode is a multiple of this
    constant   the field has one array for the whole episode, which is shown at every step
    source     the rule that its values come from (`derived.SOURCES`); empty: its field
    options    options of that rule
    available  for an action: the field that tells, for each of its values, whether it can be taken; empty: all can
    to         for an action: the field of the observed step that it is counted from; empty: it is absolute
    columns    with `to`: what of it is subtracted from each entry of the action (`frames.Frame`)
    augment    for an image: how it is changed at random in training (`augment.augmented`)
    """

    role: str
    field: str = ""
    codec: Codec | None = None
    size: int = 1
    predicted: bool = False
    head: str = ""
    stride: int = 1
    constant: bool = False
    weight: float = 1.0
    shown: bool = True
    source: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    available: str = ""
    to: str = ""
    columns: tuple[int, ...] = ()
    augment: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def frame(self) -> Frame | None:
        """What the action is counted from; None if it is absolute."""
        return Frame(self.to, tuple(self.columns)) if self.to else None

    @property
    def horizon(self) -> int:
        """Actions of a chunk that is predicted at each observed step; 0: the element is the action of one step."""
        return self.codec.horizon if isinstance(self.codec, Chunk) else 0

    @property
    def rule(self) -> str:
        """The source that its values come from; empty: its field. Policies of processor version 1 name none for a return."""
        return self.source or ("to_go" if self.role == "return" else "")

    @property
    def modality(self) -> int:
        if self.role in _ROLES:
            return _ROLES[self.role]
        assert self.codec is not None
        return self.codec.modality

    def to_dict(self) -> dict[str, Any]:
        """JSON. Keys of `_OPTIONAL` are left out if they have their defaults."""
        values = {k: v for k, v in self.__dict__.items() if k not in _OPTIONAL or v != _OPTIONAL[k]}
        return {**values, "codec": self.codec.to_dict() if self.codec else None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "element") -> Element:
        """The inverse of `to_dict`. Raises DataError if it is not valid."""
        stated = values.get("codec") if isinstance(values, Mapping) else None
        return stored(cls, values, where, codec=codec_from_dict(stated, f"{where}, codec") if stated else None)

    def check(self, vocabulary: Vocabulary, length: int, where: str) -> None:
        """Raises DataError if the element cannot be laid out, or its codec does not work or fit the vocabulary."""
        if self.role not in ("text", "observation", "separator", "return", "reward", "action", "agent"):
            raise DataError(f"{where}: role {self.role!r} is unknown")
        number(self.size, f"{where}, size", 0 if self.role == "text" else 1, length)
        number(self.stride, f"{where}, stride", 1, 1 << 24)
        number(self.weight, f"{where}, weight", 0, 1e6)
        if self.rule:
            source_of(self.rule)
        if self.codec is None:
            if self.role not in ("text", "separator"):
                raise DataError(f"{where}: it has no codec")
            return
        check_codec(self.codec, self.size, vocabulary, where)
        if self.head and self.head not in (vocabulary.chunks if self.horizon else vocabulary.regressions):
            raise DataError(f"{where}: the vocabulary has no regression head {self.head!r}")
        if self.to and (
            self.role != "action"
            or len(self.columns) != math.prod(self.codec.shape)
            or any(not ABSOLUTE <= column < 1 << 24 for column in self.columns)
        ):
            raise DataError(f"{where}: its columns {self.columns} of {self.to!r} are not those of an action")


@dataclass(frozen=True)
class TimestepLayout:
    """How a timestep of a task becomes positions, and what stands once in a window.

    number        the task's number in the run's list
    elements      in order; texts that change from step to step come first
    preamble      text fields that have one text for the whole episode. They stand once in a window, before its first timestep.
                  They have local positions of their own, so that an observation's local positions are the same in every timestep
    text_limit    most ids of one text of the preamble; of a document: most tokens of a window. 0: no limit
    predict_text  the preamble is predicted
    text_last     the preamble stands after the observations, and an end-of-text token follows it: captions and documents
                  (no actions). A document, which has no observations, is as long as its texts: windows show a part of it
    chunk         steps 0, chunk, 2·chunk … of a window show every element, the steps between them only the actions
    softmax       vocabulary | range: what a predicted id is normalised over
    weight        loss weight of each target, times that of its element
    context       most positions of a window
    window        most steps of a window; 0: as many as the context holds
    mask          who sees whom: a key of MASKS
    tail          what stands once, after the last timestep, each one position: elements with the role `end`, which stands only
                  where the episode ends, or `summary`. An `end` that is predicted, and the first id of each timestep, are
                  normalised over the whole vocabulary, so that they stand against each other
    hiding        schemes of `hiding.HIDING`, with their shares; each window draws one
    future        most rows after a window's last step whose observations are shown
    loss          a key of LOSSES
    prompt_steps  most steps of the prompt that stands before each window; 0: only rows have prompts
    prompt_parts  the kinds of parts that a prompt shows; empty: all
    prompt_reverse  the last step of a prompt stands first
    views         how a window becomes sequences: a key of `views.VIEWS`. Everything else here is said of the whole window
    swap          share of the windows that show the texts of another window of their row; the summary tells which, and nothing
                  else is learned from them
    clipped       the episodes are clips of others: see `clips`
    """

    task: str
    number: int
    elements: tuple[Element, ...]
    preamble: tuple[str, ...] = ()
    text_limit: int = 0
    predict_text: bool = False
    text_last: bool = False
    chunk: int = 1
    softmax: str = "vocabulary"
    weight: float = 1.0
    context: int = 0
    window: int = 0
    mask: str = CAUSAL
    tail: tuple[Element, ...] = ()
    hiding: tuple[tuple[str, float], ...] = ()
    future: int = 0
    loss: str = "targets"
    prompt_steps: int = 0
    prompt_parts: tuple[str, ...] = ()
    prompt_reverse: bool = False
    views: str = ONE
    swap: float = 0.0
    clipped: bool = False
    agents: int = 0
    agent_fields: tuple[str, ...] = ()

    @cached_property
    def sequences(self) -> tuple[TimestepLayout, ...]:
        """The layout of each sequence that a window becomes."""
        return VIEWS[self.views].layouts(self)

    @property
    def copies(self) -> int:
        """How many sequences of a window have timesteps."""
        return VIEWS[self.views].copies(self)

    @cached_property
    def document(self) -> bool:
        """Whether windows show consecutive tokens of the texts, and nothing else.

        Texts of n tokens are n units of the plan. Unit i is the prediction of the token after token i, or of the end. So the
        window [start, start + units) shows the tokens [start, start + units], each token is predicted equally often, and tiles
        that do not overlap miss none.
        """
        return self.text_last and not self.elements

    @property
    def shift(self) -> int:
        """How many positions before a predicted one its target stands."""
        return 0 if self.mask == BOTH else 1

    @cached_property
    def predicts_end(self) -> bool:
        """Whether the end of an episode is predicted."""
        return any(e.role == "end" and e.predicted for e in self.tail)

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """The kinds of parts that can be hidden, in order, without repetition."""
        return tuple(dict.fromkeys(e.role for e in self.elements if e.role not in ("text", "separator")))

    @cached_property
    def extra(self) -> int:
        """Most positions of a window beside its head and its own timesteps."""
        observed = sum(e.size for e in self.elements if e.role == "observation")
        once = len(self.tail) * len(self.sequences) + self.text_last
        return once + self.copies * self.future * observed + self.prompt_room(self.prompt_steps)

    def prompt_room(self, steps: int) -> int:
        """Most positions of a prompt of so many steps."""
        return sum(size * -(-steps // period) for size, period in self.cadence)

    def acting(self) -> TimestepLayout:
        """The layout of a history: nothing is drawn to be hidden, and nothing stands after the last step. Each agent has one.

        If windows show their future, a history has it as its prompt.
        """
        # What is available has no targets to act on, and chunks have none
        elements = tuple(replace(e, available="", predicted=e.predicted and not e.horizon) for e in self.elements)
        shown = imitating(self) if self.views == FUTURE else self
        return replace(shown, elements=elements, tail=(), hiding=(), swap=0.0, clipped=False, views=ONE)

    @cached_property
    def columns(self) -> tuple[int, ...]:
        """First column of each element, in a timestep that shows all elements."""
        return tuple(np.cumsum([0] + [e.size for e in self.elements[:-1]]).tolist()) if self.elements else ()

    @cached_property
    def width(self) -> int:
        """Positions of a timestep that shows all elements."""
        return sum(e.size for e in self.elements)

    @cached_property
    def text_columns(self) -> int:
        """Columns of the texts that change from step to step. They come first and vary in length."""
        return sum(e.size for e in self.elements if e.role == "text")

    @cached_property
    def step_texts(self) -> tuple[Element, ...]:
        """The texts that change from step to step, if the steps that show them do not depend on the window."""
        return tuple(e for e in self.elements if e.role == "text") if self.chunk == 1 else ()

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """The fields of the data that its tokens are made from, without repetition."""
        known = dict.fromkeys(self.preamble)
        for e in self.elements:
            known |= dict.fromkeys([e.field] if e.field else fields_of(e.rule) if e.rule else [])
        known |= dict.fromkeys(e.field for e in self.tail if e.field)
        known |= dict.fromkeys(e.available for e in self.elements if e.available)
        known |= dict.fromkeys(e.to for e in self.elements if e.to)
        known |= dict.fromkeys([CLIP] if self.clipped else [])
        return tuple(known)

    def stride(self, field: str) -> int:
        """Its tokens are made from the rows of a field whose number in the episode is a multiple of this."""
        users = [e for e in self.elements if e.field == field]
        every = [e for e in users if e.role != "observation" or e.rule or e.constant]
        others = {*self.preamble, *(e.field for e in self.tail)}
        for e in self.elements:
            others |= {e.available, e.to} | set(fields_of(e.rule) if e.rule and not e.field else ())
        # chunks shift the steps that are counted, and steps after a window are shown whatever their number
        if every or not users or field in others or self.chunk > 1 or self.future:
            return 1
        return math.gcd(*(e.stride for e in users))

    @cached_property
    def after(self) -> int:
        """Rows after a window's last step that its tokens are made from; TO_THE_END: all of them."""
        reach = [source_of(e.rule)[0].future for e in self.elements if e.rule]
        reach += [e.horizon - 1 for e in self.elements if e.horizon]
        return TO_THE_END if ALL in reach else max(self.future, *reach, 0)

    @cached_property
    def has_actions(self) -> bool:
        return any(e.role == "action" for e in self.elements)

    @cached_property
    def varies(self) -> bool:
        """Some timesteps may lack some columns."""
        return self.chunk > 1 or self.text_columns > 0 or any(e.stride > 1 for e in self.elements)

    def per_column(self, of: Any, dtype: Any) -> np.ndarray:
        """[width]: `of(element)` for each column of each element."""
        values = [of(e) for e in self.elements for _ in range(e.size)]
        return np.array(values, dtype)

    @cached_property
    def modality(self) -> np.ndarray:
        return self.per_column(lambda e: e.modality, np.uint8)

    @cached_property
    def local(self) -> np.ndarray:
        """int32 [width]: local positions 0, 1, … within the timestep.

        All actions have ACTION_LOCAL if they are predicted one after the other. With the mask `both` several can be hidden at
        once, so each has its own.
        """
        if self.mask == BOTH:
            return np.minimum(np.arange(self.width), ACTION_LOCAL - 1).astype(np.int32)
        action = self.per_column(lambda e: e.role == "action", bool)
        return np.where(action, ACTION_LOCAL, np.minimum(np.arange(self.width), ACTION_LOCAL - 1)).astype(np.int32)

    @cached_property
    def cadence(self) -> tuple[tuple[int, int], ...]:
        """(positions, period): how many positions are shown at every period-th step, counted from the first whole chunk.

        Actions are shown at every step, unless they are chunks. Other elements
        are shown at the steps that begin a chunk and that `stride` divides.
        """
        found: dict[int, int] = {}
        for e in self.elements:
            period = 1 if e.role == "action" and not e.horizon else math.lcm(self.chunk, e.stride)
            found[period] = found.get(period, 0) + e.size * (self.copies + (e.role in VIEWS[self.views].again))
        return tuple((size, period) for period, size in sorted(found.items()))

    def fit(self, room: int) -> int:
        """Most steps that fit `room` positions, wherever they start."""
        steps = max(room, 0) if not self.cadence else max(room, 0) * self.cadence[-1][1] // max(self.cadence[-1][0], 1)
        while steps > 0 and (over := sum(size * -(-steps // period) for size, period in self.cadence) - room) > 0:
            steps -= max(1, over // max(self.width, 1))
        return steps

    def steps(self, preamble: int, room: int) -> int:
        """Most steps of a window that fit `room` positions, of which its texts take `preamble`. Whole chunks if possible."""
        fit = max(1, self.fit(min(self.context, room) - preamble))
        fit = min(fit, self.window) if self.window else fit
        return fit // self.chunk * self.chunk or fit

    def to_dict(self) -> dict[str, Any]:
        """JSON, with the keys of processor.json. Those of version 2 are left out if they have their defaults."""
        flat = {_JSON_KEYS.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}
        flat |= {key: [e.to_dict() for e in getattr(self, key)] for key in ("elements", "tail")}
        return {k: v for k, v in flat.items() if k not in _VERSION_2 or v != _VERSION_2[k]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "layout") -> TimestepLayout:
        """The inverse of `to_dict`. Raises DataError if it is not valid."""
        names = {key: name for name, key in _JSON_KEYS.items()}
        if not isinstance(values, Mapping) or not isinstance(values.get("elements"), list):
            raise DataError(f"{where}: it has no list of elements")
        flat = {names.get(key, key): value for key, value in values.items()}
        made = {
            key: tuple(Element.from_dict(e, f"{where}, {key} {i}") for i, e in enumerate(values.get(key, ())))
            for key in ("elements", "tail")
        }
        out = stored(cls, flat, where, **made)
        hiding = tuple((str(name), float(share)) for name, share in out.hiding)
        return replace(
            out,
            preamble=tuple(out.preamble),
            hiding=hiding,
            prompt_parts=tuple(out.prompt_parts),
            agent_fields=tuple(out.agent_fields),
        )

    def check(self, vocabulary: Vocabulary, length: int, where: str) -> None:
        """Raises DataError if the layout does not fit the vocabulary and rows of `length` positions."""
        for name, low in (("text_limit", 0), ("chunk", 1), ("context", 0), ("window", 0), ("number", 0)):
            number(getattr(self, name), f"{where}, {name}", low, 1 << 24)
        if self.softmax not in ("vocabulary", "range"):
            raise DataError(f"{where}: softmax {self.softmax!r} is neither 'vocabulary' nor 'range'")
        for i, element in enumerate(self.elements):
            element.check(vocabulary, length, f"{where}, element {i}")
        for name, known in (("mask", MASKS), ("loss", LOSSES), ("views", VIEWS)):
            if getattr(self, name) not in known:
                raise DataError(f"{where}: {name} {getattr(self, name)!r} is none of {', '.join(known)}")
        for element in self.tail:
            if element.role not in TAIL or element.size != 1 or element.codec is not None:
                raise DataError(f"{where}: {element.role!r} cannot stand after the last step")
        for scheme, share in self.hiding:
            if scheme not in HIDING:
                raise DataError(f"{where}: the hiding scheme {scheme!r} is unknown")
            number(share, f"{where}, share of {scheme}", 0, 1e6)
        number(self.swap, f"{where}, swap", 0, 1)
        number(self.agents, f"{where}, agents", 0, 1 << 16)
        number(self.future, f"{where}, future", 0, 1 << 24)
        number(self.prompt_steps, f"{where}, prompt_steps", 0, 1 << 24)
        number(self.width, f"{where}: positions of a timestep", 0, length)
