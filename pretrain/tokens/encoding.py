"""Chooses the codec of each field of a task, from the objective's scheme, the recipe's overrides and the data's statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.pretrain.tokens.agent_statistics import statistics_of_one_agent
from tiphys.pretrain.tokens.agents import agent_fields, of_one_agent
from tiphys.pretrain.tokens.codecs import (
    Affine,
    Bins,
    Chunk,
    Codec,
    Discrete,
    Grid,
    Histogram,
    Integers,
    Patches,
    Quantiles,
    Sign,
    Tiles,
    Vector,
)
from tiphys.pretrain.tokens.derived import REWARD_FIELD, source_of
from tiphys.pretrain.tokens.discrete_range import discrete_range
from tiphys.pretrain.tokens.frames import Frame, flat_entries, frame_of, range_of
from tiphys.pretrain.tokens.paradigms import (
    ACTING_OPTIONS,
    ACTION,
    AGENT,
    END,
    GRIDS,
    OBSERVATION,
    RETURN,
    REWARD,
    SEPARATOR,
    TEXT,
    Paradigm,
    Part,
    hiding_of,
)
from tiphys.pretrain.tokens.timestep import BOTH, Element, TimestepLayout
from tiphys.pretrain.tokens.views import AGENTS, ONE
from tiphys.pretrain.tokens.vocabulary import CONTINUOUS_BINS

if TYPE_CHECKING:
    from tiphys.dataio.statistics import FieldStatistics
    from tiphys.recipes.schema import FieldTokens, Objective

CLIPPED = 1e-3  # share of an action field's values that may be outside the range of its tokens
_MANY = 16  # in the compact scheme, a discrete vector with more entries becomes one token
_RETURN_LIMIT = 10.0
_RETURN_BINS = 100  # of a return whose bins are quantiles (Janner et al. 2021)
OPTIONS = {
    "without_rewards": "true: allow an objective that is conditioned on returns for tasks whose data have no rewards",
    "hiding": "schemes by which parts of a window are hidden, with their shares",
    "query": "what a policy that fills in hidden parts is asked: bc, rc or goal",
    "agents": "number of agents, whose values are the first axis of actions and observations; for a paradigm of several agents",
    "available": "field that tells which values of a discrete action can be taken; for several agents: that with the role mask",
    "swap": "for a paradigm that learns which texts fit: share of the windows that show the text of another window",
    "text_tokens": "most tokens of a text; of a document: of a window of it",
    "allow_clipped": "share of an action field's values that may be clamped",
    "histogram": "field of whose future values histograms are shown (gdt)",
    "action_quantile": "for an action field without bounds: its range goes from this quantile q to 1 − q; 0: from min to max",
} | {name: meaning for name, (meaning, _, _) in ACTING_OPTIONS.items()}
_IMAGES, _REST = 0, 1
_POSITIONS = 1 << 16  # that the noise of flow matching tells apart
_LEVELS = np.linspace(0, 1, 1001)
# (action field, its frame, horizon) -> statistics of the relative actions
Framed = Callable[[FieldSpec, Frame, int], "FieldStatistics"]
# discount -> statistics of the sums of the rewards after each step
Discounted = Callable[[float], "FieldStatistics"]


@dataclass(frozen=True)
class Ranges:
    """First ids and sizes of the vocabulary's ranges for continuous and discrete values."""

    continuous: int
    continuous_size: int
    discrete: int
    discrete_size: int


@dataclass(frozen=True)
class Encoding:
    """Everything that decides how the fields of one task become tokens under one objective."""

    task: TaskSpec
    objective: Objective
    paradigm: Paradigm
    statistics: Mapping[str, FieldStatistics]
    ranges: Ranges
    largest_return: float  # largest absolute return in the data
    superset: bool = False  # the statistics also count episodes that are not in the data
    framed: Framed | None = None
    discounted: Discounted | None = None
    agents: int = 0  # > 0: task and statistics are those of one of so many agents
    agent_fields: tuple[str, ...] = ()

    @property
    def scheme(self) -> str:
        return self.paradigm.scheme if self.objective.scheme == "auto" else self.objective.scheme

    @property
    def softmax(self) -> str:
        return self.paradigm.softmax if self.objective.softmax == "auto" else self.objective.softmax

    def linear(self, part: Part) -> bool:
        """Whether the continuous actions of a part are regressed vectors instead of ids."""
        choice = self.objective.discretise
        if self.objective.head != "auto":
            return self.objective.head != "bins"
        return part.code == "linear" if choice == "auto" else choice == "no"

    def option(self, name: str, default: Any) -> Any:
        return self.objective.options.get(name, default)

    def where(self, field: FieldSpec) -> str:
        return f"task {self.task.name!r}, field {field.name!r}"

    # the layout

    def layout(self, number: int, weight: float) -> TimestepLayout:
        """The layout of this task's timesteps. Raises DataError if a field has no encoding or the context is too short."""
        if self.paradigm.views == AGENTS and not self.agents:
            return self.of_agents().layout(number, weight)
        texts = [f for f in self.shown("observation", "text") if f.modality == "text"]
        said = any(part.kind == TEXT for part in self.paradigm.head)
        preamble = tuple(f.name for f in texts if f.per == "episode" and said)
        has_actions, pairs = bool(self.shown("action")), self.paradigm.loss == "pairs"
        if pairs or self.paradigm.swap:
            self.check_pairs(preamble)
        elif not has_actions and not (self.paradigm.predicts_text and preamble):
            raise DataError(
                f"task {self.task.name!r} has neither actions nor a text that paradigm {self.paradigm.name!r} predicts, so there "
                "is nothing to learn; leave the task out with `tasks` of the mixture entry, or use another paradigm"
            )
        if has_actions and REWARD in self.paradigm.requires:
            self.check_rewards()
        if has_actions:
            self.check_chunks()
        elements: list[Element] = []
        for part in self.paradigm.timestep:
            if part.kind == OBSERVATION:
                made = self.observations(part)
            elif part.kind == ACTION:
                made = self.actions(part)
            elif part.kind == TEXT:
                made = [self.step_text(f) for f in texts if f.per == "step"]
            elif part.kind == REWARD:
                made = self.rewards(part)
            elif part.kind == AGENT:
                number_of = Discrete("", (), self.ranges.discrete, (self.agents,), (0,), "int64")
                made = [Element("agent", codec=number_of, source="agent")]
            elif part.kind == RETURN:
                made = [self.returns(part)] if has_actions else []
            else:
                assert part.kind == SEPARATOR
                made = [Element("separator")] if has_actions else []
            elements += [self.learnt(element, part) for element in made]
        layout = TimestepLayout(
            task=self.task.name,
            number=number,
            elements=tuple(elements),
            preamble=preamble,
            predict_text=self.paradigm.predicts_text,
            text_last=not has_actions and not pairs,
            chunk=self.chunk(),
            softmax=self.softmax,
            weight=weight,
            context=self.objective.context,
            window=self.objective.window or self.paradigm.window if has_actions or pairs else 1,
            mask=self.paradigm.mask,
            tail=tuple(self.tail(part) for part in self.paradigm.tail) if has_actions or pairs else (),
            hiding=hiding_of(self.paradigm, self.objective.options) if has_actions else (),
            future=self.paradigm.future if has_actions else 0,
            loss=self.paradigm.loss,
            prompt_parts=self.paradigm.prompt.parts,
            prompt_reverse=self.paradigm.prompt.reverse,
            views=self.paradigm.views,
            swap=float(self.option("swap", self.paradigm.swap)) if has_actions else 0.0,
            agents=self.agents,
            agent_fields=self.agent_fields,
        )
        layout = self.with_prompts(layout)
        return self.with_text_limit(layout)

    def of_agents(self) -> Encoding:
        """The encoding of what one agent sees and does. Raises DataError if the actions are not those of several agents."""
        agents = int(self.option("agents", 0))
        names = agent_fields(self.task, agents)
        task, statistics = (
            of_one_agent(self.task, names, agents),
            statistics_of_one_agent(self.statistics, names, agents),
        )
        return replace(self, task=task, statistics=statistics, agents=agents, agent_fields=names)

    def available(self, field: FieldSpec, codec: Codec) -> str:
        """The field that tells which values of an action can be taken; empty if there is none. Raises DataError if it cannot."""
        given = self.option("available", "")
        if not given and self.paradigm.views != AGENTS:
            return ""
        masks = [f.name for f in self.task.fields if f.name == given or (not given and f.role == "mask")]
        if given and not masks:
            raise DataError(
                f"task {self.task.name!r} has no field {given!r}, which `options: {{available: …}}` of the objective names; it "
                f"has {', '.join(f.name for f in self.task.fields)}"
            )
        for name in masks:
            values = codec.values[0] if isinstance(codec, Discrete) and codec.tokens == 1 else 0
            if self.task.field(name).shape == (values,):
                return name
            if given:
                raise DataError(
                    f"{self.where(field)}: {name!r} has shape {self.task.field(name).shape} (of one agent), but it must tell of "
                    f"each value of one discrete action whether it can be taken, so its shape must be "
                    f"({values or 'number of values'},)"
                )
        return ""

    def check_pairs(self, preamble: Sequence[str]) -> None:
        """Raises DataError if the task has no texts, or no observations, that windows can be told from each other by."""
        lacks = "" if preamble else "text that stays the same for a whole episode"
        if not [f for f in self.shown("observation") if f.modality != "text"]:
            lacks = "observation that is not a text"
        if lacks:
            raise DataError(
                f"task {self.task.name!r} has no {lacks}, and paradigm {self.paradigm.name!r} learns which text fits which "
                "window; leave the task out with `tasks` of the mixture entry, or use another paradigm"
            )

    def with_prompts(self, layout: TimestepLayout) -> TimestepLayout:
        """The layout with room for a prompt before each window. Raises DataError if the prompts of a row cannot be reversed."""
        prompt = self.paradigm.prompt
        if self.paradigm.views != ONE and self.prompt_share:
            raise DataError(
                f"task {self.task.name!r}: paradigm {self.paradigm.name!r} has no prompts; set `prompt: 0`, or leave it out"
            )
        if prompt.reverse and layout.chunk > 1:
            raise DataError(f"task {self.task.name!r}: prompts are reversed, so its actions cannot have a `chunk`")
        if not prompt.every_window or not layout.has_actions or not self.prompt_share:
            return layout
        steps = self.objective.prompt_steps or prompt.steps or max(1, layout.fit(self.objective.context // 2))
        return replace(layout, prompt_steps=steps)

    @property
    def prompt_share(self) -> float:
        return self.paradigm.prompt.share if self.objective.prompt < 0 else self.objective.prompt

    def with_text_limit(self, layout: TimestepLayout) -> TimestepLayout:
        """Limits the texts so that one timestep fits beside them. Raises DataError if it does not fit even without texts."""
        room = self.objective.context - layout.width * layout.copies - (layout.extra - layout.text_last)
        if room < 0:
            parts = ", ".join(f"{e.field or e.role} {e.size}" for e in layout.elements)
            raise DataError(
                f"task {self.task.name!r}: a context of {self.objective.context} cannot hold one timestep of "
                f"{layout.width * layout.copies} tokens ({parts}); raise `context`, or resize, skip or encode a field "
                "as one token"
            )
        if layout.document:
            return replace(layout, text_limit=int(self.option("text_tokens", 0)))
        if not layout.preamble:
            return layout
        each = (room // layout.copies - layout.text_last) // len(layout.preamble)
        limit = min(each, int(self.option("text_tokens", each)))
        if limit < 1:
            raise DataError(
                f"task {self.task.name!r}: a context of {self.objective.context} holds one timestep, but not also the texts of "
                f"{', '.join(layout.preamble)}; raise `context`"
            )
        return replace(layout, text_limit=limit)

    def tail(self, part: Part) -> Element:
        """The element of a token after the last step. An `end` is that of the world, if the data tell it from a time limit."""
        ends = self.task.with_role("terminated")
        name = ends[0].name if part.kind == END and ends else ""
        return self.learnt(Element(part.kind, name), part)

    def tokens(self, field: FieldSpec) -> FieldTokens:
        """What the recipe says of a field: under its name, else under the first pattern that matches, else the defaults."""
        from tiphys.recipes.schema import FieldTokens

        given = self.objective.fields
        if field.name in given:
            return given[field.name]
        return next((t for pattern, t in given.items() if fnmatchcase(field.name, pattern)), FieldTokens())

    def shown(self, *roles: str) -> list[FieldSpec]:
        return [f for f in self.task.with_role(*roles) if self.tokens(f).encoding != "skip"]

    def check_chunks(self) -> None:
        """Raises DataError if the recipe's horizon, chunk and head cannot be."""
        where, given = f"task {self.task.name!r}", self.objective
        fields, chunk = self.shown("action"), self.chunk()
        head = given.head in ("l2", "l1", "flow")
        if given.head != "auto" and given.discretise != "auto" and (given.discretise == "yes") == head:
            raise DataError(
                f"{where}: `head: {given.head}` contradicts `discretise: {given.discretise}`; leave one out"
            )
        if given.insulate and not (head or given.horizon > chunk):
            raise DataError(
                f"{where}: `insulate: {given.insulate}` keeps a head that predicts chunks from training the trunk, but here ids "
                "of actions are all that is predicted; set `head: flow`, `l2` or `l1`, or leave `insulate` out"
            )
        if given.horizon and given.horizon < chunk:
            raise DataError(
                f"{where}: a horizon of {given.horizon} is shorter than the chunk of {chunk} steps that are executed; raise "
                "`horizon`, or lower `chunk`"
            )
        if not (head or given.horizon > chunk):
            return
        if self.paradigm.mask == BOTH:
            raise DataError(
                f"{where}: paradigm {self.paradigm.name!r} sees what comes later, so it would see the actions of its `horizon`; "
                "use a causal paradigm, such as bc"
            )
        if self.paradigm.views != ONE:
            raise DataError(
                f"{where}: paradigm {self.paradigm.name!r} cannot predict chunks; set `head: bins` and no `horizon`"
            )
        if given.head == "bins" or (not head and len(fields) and fields[0].modality != "continuous"):
            raise DataError(
                f"{where}: ids of actions are predicted one after another and are seen by the steps that follow, so their "
                f"`horizon` is the chunk, {chunk}, not {given.horizon}; set `head: l2`, `l1` or `flow`, or leave `horizon` out"
            )
        other = [f.name for f in fields if f.modality != "continuous"]
        if len(fields) > 1 or other:
            raise DataError(
                f"{where}: one head predicts a chunk of one continuous action field, but the task has "
                f"{', '.join(f.name for f in fields)}; give the others `encoding: skip`, or join them when you convert"
            )
        if given.head == "flow" and given.context > _POSITIONS:
            raise DataError(f"{where}: with `head: flow`, `context` is at most {_POSITIONS}, not {given.context}")

    def chunk(self) -> int:
        if self.objective.chunk:
            single = {self.tokens(f).chunk for f in self.shown("action")} - {1, self.objective.chunk}
            if single:
                raise DataError(
                    f"task {self.task.name!r}: the objective's `chunk` is {self.objective.chunk}, but that of a field is "
                    f"{min(single)}; leave one out"
                )
            return self.objective.chunk
        chunks = {max(1, self.tokens(f).chunk) for f in self.shown("action")}
        if len(chunks) > 1:
            raise DataError(
                f"task {self.task.name!r}: all action fields must have the same `chunk`, but they have {sorted(chunks)}"
            )
        return chunks.pop() if chunks else 1

    def step_text(self, field: FieldSpec) -> Element:
        """The element of a text that changes from step to step."""
        return Element(
            "text", field.name, size=int(self.option("text_tokens", 32)), stride=max(1, self.tokens(field).stride)
        )

    def learnt(self, element: Element, part: Part) -> Element:
        """The element with what the part says of its targets, and of whether it is shown."""
        if not part.weight:
            return element if part.shown else replace(element, shown=False)
        codec = element.codec
        head = codec.embedder.removeprefix("vector:") if isinstance(codec, Affine | Vector | Histogram | Chunk) else ""
        if codec is not None and codec.embedder and not head:
            raise DataError(
                f"task {self.task.name!r}: paradigm {self.paradigm.name!r} predicts the {element.role} {element.field!r}, "
                "which is encoded as one embedded vector; give it `encoding: uniform` or `encoding: quantile`, or skip it"
            )
        return replace(element, predicted=True, head=head, weight=part.weight, shown=part.shown)

    def rewards(self, part: Part) -> list[Element]:
        """The reward of each step."""
        fields = self.shown("reward")
        if not fields:
            raise DataError(
                f"task {self.task.name!r}: it has no rewards, which paradigm {self.paradigm.name!r} needs; leave the task out "
                "with `tasks` of the mixture entry, or use another paradigm"
            )
        kind = "uniform" if part.code in ("auto", "linear", "gato") else part.code
        found = []
        for field in fields:
            given = self.tokens(field).encoding
            codec = self.reward(field, part, kind if given == "auto" else given)
            found.append(Element("reward", field.name, codec, codec.tokens))
        return found

    def observations(self, part: Part) -> list[Element]:
        """Images, then discrete and continuous fields together; both groups are sorted by name."""
        fields = [f for f in self.shown("observation") if f.modality != "text"]
        fields.sort(key=lambda f: (_IMAGES if f.modality == "image" else _REST, f.name))
        elements = []
        for field in fields:
            codec = self.observation(field, part)
            augment = self.augment(field, codec)
            stride = max(1, self.tokens(field).stride)
            elements.append(
                Element(
                    "observation",
                    field.name,
                    codec,
                    codec.tokens,
                    stride=stride,
                    constant=field.per == "episode",
                    augment=augment,
                )
            )
        return elements

    def augment(self, field: FieldSpec, codec: Codec) -> dict[str, float]:
        """How a picture is changed in training; empty: not. Raises DataError if it cannot be."""
        given = self.tokens(field).augment
        plain = type(given)()
        changed = {n: float(v) for n, v in vars(given).items() if v != getattr(plain, n)}
        if not changed:
            return {}
        if not isinstance(codec, Patches):
            if field.name in self.objective.fields:
                raise DataError(f"{self.where(field)}: `augment` is for images, and this field is not encoded as one")
            return {}  # a pattern may match other fields too
        if field.dtype != "uint8" or (codec.black, codec.white) != (0.0, 255.0):
            raise DataError(
                f"{self.where(field)}: `augment` is for images of uint8 from 0 to 255, not of {field.dtype} from "
                f"{codec.black:g} to {codec.white:g}; leave it out for this field"
            )
        if "saturation" in changed and codec.size[2] != 3:
            raise DataError(
                f"{self.where(field)}: `augment.saturation` needs 3 channels, not {codec.size[2]}; leave it out"
            )
        return changed

    def actions(self, part: Part) -> list[Element]:
        codecs = [(field, self.action(field, part)) for field in self.shown("action")]
        return [
            self.in_frame(Element("action", field.name, codec, codec.tokens, available=self.available(field, codec)))
            for field, codec in codecs
        ]

    def in_frame(self, element: Element) -> Element:
        """The element of an action with what it is counted from."""
        frame = self.frame(self.task.field(element.field))
        return element if frame is None else replace(element, to=frame.to, columns=frame.columns)

    def frame(self, field: FieldSpec) -> Frame | None:
        """What an action is counted from. Raises DataError if that cannot be."""
        frame = frame_of(self.task, field, self.tokens(field).relative)
        if frame is not None and self.paradigm.mask == BOTH:
            raise DataError(
                f"{self.where(field)}: paradigm {self.paradigm.name!r} infers actions, so they stay absolute"
            )
        if frame is not None and (self.paradigm.views != ONE or self.paradigm.acting[0] == "beam"):
            raise DataError(f"{self.where(field)}: paradigm {self.paradigm.name!r} has absolute actions only")
        return frame

    def normalisation(
        self, field: FieldSpec, kind: str, horizon: int
    ) -> tuple[tuple[float, ...], tuple[float, ...], float]:
        """(low, high) of an action that become −1 and 1, by the values that are predicted; and the share of them outside."""
        frame = self.frame(field)
        if frame is not None:
            assert self.framed is not None
            found = self.framed(field, frame, horizon)
        elif (known := self.statistics.get(field.name)) is None or not known.count:
            raise DataError(
                f"{self.where(field)}: `normalise: {kind}` needs statistics of the field, and the dataset has none"
            )
        else:
            found = known
        low, high = range_of(found, kind)
        if len(low) != flat_entries(field.shape):
            raise DataError(
                f"{self.where(field)}: the dataset has no statistics of its single entries; set `encoding: skip`"
            )
        values = found.at(_LEVELS)
        return _numbers(low), _numbers(high), float(((values < low) | (values > high)).mean())

    def chunked(self, field: FieldSpec, loss: str) -> Codec:
        """The codec of chunks of actions that one head predicts."""
        chunk, given = self.chunk(), self.tokens(field).normalise
        horizon = self.objective.horizon or chunk
        low, high, _ = self.normalisation(field, "quantile" if given == "auto" else given, horizon)
        flow, entries = self.objective.flow, flat_entries(field.shape)
        more = (
            {"width": flow.width, "depth": flow.depth, "draws": flow.draws, "euler": flow.steps}
            if loss == "flow"
            else {}
        )
        more |= {"insulate": bins} if (bins := self.objective.insulate) else {}
        name = f"vector:{field.name}:{chunk}x{entries}" + (f":{horizon}" if horizon > chunk else "") + f":{loss}"
        name += f":{bins}" if bins else ""
        return Chunk(name, field.shape, chunk, horizon, low, high, loss, **more, dtype=field.dtype)

    # the codec of one field

    def wanted(self, field: FieldSpec, part: Part) -> str:
        """The encoding that the recipe gives a field, else the code that the part gives to fields of its kind."""
        given = self.tokens(field).encoding
        if given != "auto" or (part.code in ("uniform", "quantile") and field.modality != "continuous"):
            return given
        return part.code

    def observation(self, field: FieldSpec, part: Part) -> Codec:
        kind = self.wanted(field, part)
        if kind == "auto":
            kind = self.scheme if self.scheme == "gato" else self.compact(field)
        if kind in ("integer", "sign"):
            raise DataError(f"{self.where(field)}: encoding {kind!r} is for rewards, not for an observation")
        if kind in GRIDS:
            return self.grid(field, kind)
        if kind == "vector":
            return self.vector(field)
        if kind in ("uniform", "quantile"):
            return self.binned(field, kind)
        if field.modality == "image":
            return self.patches(field)
        if field.modality == "discrete":
            return self.discrete(field)
        return self.gato_bins(field)

    def compact(self, field: FieldSpec) -> str:
        if field.modality == "continuous":
            return "vector"
        if field.modality == "discrete" and len(field.shape) in (2, 3):
            return "grid"
        if field.modality == "discrete" and np.prod(field.shape, dtype=np.int64) > _MANY:
            return "vector"
        return "gato"

    def action(self, field: FieldSpec, part: Part) -> Codec:
        kind = self.wanted(field, part)
        kind = "auto" if kind == "linear" else kind
        if kind in ("vector", *GRIDS, "integer", "sign"):
            raise DataError(
                f"{self.where(field)}: an action cannot have encoding {kind!r}; `discretise: no` regresses it as a vector"
            )
        if field.modality == "discrete":
            return self.discrete(field)
        if field.modality != "continuous":
            raise DataError(
                f"{self.where(field)}: an action must be discrete or continuous, not {field.modality!r}; "
                "set `encoding: skip` for it"
            )
        frame, normalise, head = self.frame(field), self.tokens(field).normalise, self.objective.head
        if self.beyond_bins() or (self.linear(part) and frame is not None):
            return self.chunked(field, "l2" if head == "auto" else head)
        if kind == "quantile" and frame is None and normalise == "auto":
            return self.binned(field, kind)
        if frame is not None or normalise != "auto":
            low, high, beyond = self.normalisation(field, "bounds" if normalise == "auto" else normalise, self.chunk())
            self.refuse_clipped(field, beyond, "choose `normalise: bounds`")
        else:
            low, high = self.action_range(field)
        if kind == "auto" and self.linear(part):
            numbers = int(np.prod(field.shape, dtype=np.int64))
            return Affine(f"vector:{field.name}:{numbers}", field.shape, low, high, 1.0, field.dtype)
        bins = self.tokens(field).bins if kind == "uniform" else CONTINUOUS_BINS
        return Bins("", field.shape, self.ranges.continuous, bins, low, high, False, field.dtype)

    def beyond_bins(self) -> bool:
        """Whether the objective predicts whole chunks as vectors, whatever else is said of the action."""
        return self.objective.head in ("l2", "l1", "flow") or self.objective.horizon > self.chunk()

    def action_range(self, field: FieldSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(low, high) that is mapped to [-1, 1]: the bounds of the space, else the range of the data.

        If that range is within [-1, 1], it becomes ((-1,), (1,)): values stay as they are. Raises DataError if more than 0.1 % of
        the data would be clamped, unless `allow_clipped` is at least that share.
        """
        low, high = self._data_range(field) if (bounds := _bounds(field)) is None else bounds
        self.refuse_clipped(field, self.clipped(field), "widen `low`/`high` in the mapping file and convert again")
        if _within_unit(low, high):
            return (-1.0,), (1.0,)
        return _numbers(low), _numbers(high)

    def refuse_clipped(self, field: FieldSpec, clipped: float, instead: str) -> None:
        """Raises DataError if more of a field's values would be clamped than the objective allows."""
        if clipped > float(self.option("allow_clipped", CLIPPED)):
            raise DataError(
                f"{self.where(field)}: {clipped:.2%} of its values lie outside low/high and would be clipped; {instead}, or set "
                f"`options: {{allow_clipped: {math.ceil(clipped * 1e4) / 1e4:.4f}}}` of the objective"
            )

    def _data_range(self, field: FieldSpec) -> tuple[np.ndarray, np.ndarray]:
        found = self.statistics.get(field.name)
        if found is None or not found.count:
            raise DataError(
                f"{self.where(field)}: it has no bounds, and the dataset has no statistics of it; give `low` and `high` in the "
                "mapping file and convert again"
            )
        quantile = float(self.option("action_quantile", 0.0))
        low, high = _quantiles(found, (quantile, 1 - quantile), field)
        return low, high

    def clipped(self, field: FieldSpec) -> float:
        """Share of an action field's values in the data that are clamped."""
        found, bounds = self.statistics.get(field.name), _bounds(field)
        tokens = self.tokens(field)
        if field.modality == "continuous" and (tokens.relative.to or tokens.normalise != "auto" or self.beyond_bins()):
            return self.clipped_in_frame(field)
        if field.modality != "continuous" or found is None or not found.count:
            return 0.0
        if bounds is None:
            return 2 * float(self.option("action_quantile", 0.0))
        if _within_unit(*bounds) and _within_unit(found.min, found.max):
            return 0.0
        return found.clipped

    def clipped_in_frame(self, field: FieldSpec) -> float:
        """Share of the clamped values of an action that is relative or normalised by its data; 0 for chunks."""
        codecs = [self.action(field, part) for part in self.paradigm.timestep if part.kind == ACTION]
        if not codecs or isinstance(codecs[0], Chunk):
            return 0.0
        kind = self.tokens(field).normalise
        return self.normalisation(field, "bounds" if kind == "auto" else kind, self.chunk())[2]

    def discrete(self, field: FieldSpec) -> Codec:
        values, low = self.counted(field)
        if max(values) > self.ranges.discrete_size:
            raise DataError(
                f"{self.where(field)}: it has {max(values)} values, more than the {self.ranges.discrete_size} discrete ids; set "
                "`encoding: skip` for it, or declare it continuous"
            )
        return Discrete("", field.shape, self.ranges.discrete, values, low, field.dtype)

    def counted(self, field: FieldSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The number of values of each entry of a discrete field, and its lowest value."""
        found = self.statistics.get(field.name)
        # If the statistics count the values beyond the range, `data.on_bad_value` decides what is done about them
        exact = not self.superset and (found is None or found.beyond is None)
        return discrete_range(field, found, self.where(field), exact=exact)

    def gato_bins(self, field: FieldSpec) -> Codec:
        return Bins("", field.shape, self.ranges.continuous, CONTINUOUS_BINS, companded=True, dtype=field.dtype)

    def binned(self, field: FieldSpec, kind: str) -> Codec:
        """Bins for each dimension: uniform over the field's bounds (else the data's range), or by the data's quantiles."""
        bins = self.tokens(field).bins
        if field.modality not in ("continuous", "discrete"):
            raise DataError(
                f"{self.where(field)}: encoding {kind!r} is for continuous and discrete fields, not for {field.modality!r}"
            )
        found = self.statistics.get(field.name)
        bounds = _bounds(field) if kind == "uniform" else None
        if bounds is None and (found is None or not found.count):
            raise DataError(
                f"{self.where(field)}: encoding {kind!r} needs statistics of the field, and the dataset has none"
            )
        if kind == "uniform":
            low, high = bounds or _quantiles(found, (0.0, 1.0), field)  # type: ignore[arg-type]
            return Bins(
                "", field.shape, self.ranges.continuous, bins, _numbers(low), _numbers(high), False, field.dtype
            )
        edges = np.stack(_quantiles(found, np.linspace(0, 1, bins + 1), field), axis=1)  # type: ignore[arg-type]
        return Quantiles("", field.shape, self.ranges.continuous, tuple(map(Quantiles.merged, edges)), field.dtype)

    def patches(self, field: FieldSpec) -> Codec:
        tokens, shape = self.tokens(field), field.shape
        first = len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4)
        if len(shape) not in (2, 3):
            raise DataError(
                f"{self.where(field)}: an image has shape [height, width] or [height, width, channels], not {shape}; "
                "skip the field, or convert each camera to a field of its own"
            )
        if 0 in shape and not tokens.resize:
            raise DataError(
                f"{self.where(field)}: its images differ in size; give `resize`, so that all become the same size"
            )
        known = field.image_range
        if known is None:
            raise DataError(
                f"{self.where(field)}: its images are {field.dtype} without bounds, so the values of black and white are "
                "unknown; give `low` and `high` in the mapping file and convert again, or set `encoding: skip` for it"
            )
        black, white = known
        channels = (shape[0] if first else shape[2]) if len(shape) == 3 else 1
        return Patches(f"patch:{channels}", shape, tokens.crop, tokens.resize, first, white, black)

    def grid(self, field: FieldSpec, kind: str) -> Codec:
        """The codec of a small grid, as one token or one for each row or cell."""
        if len(field.shape) not in (2, 3) or field.modality == "continuous":
            raise DataError(
                f"{self.where(field)}: encoding {kind!r} needs discrete values of shape [height, width] or "
                f"[height, width, channels], not {field.modality} values of shape {field.shape}"
            )
        values, low = ((256,), (0,)) if field.modality == "image" else self.counted(field)
        height, width, channels = (*field.shape, 1)[:3]
        if kind == "grid":
            return Grid(f"grid:{field.name}:{height}x{width}x{channels}", field.shape, values, low, field.dtype)
        tile = (1, width if kind == "rows" else 1)
        name = f"tile:{field.name}:{tile[0]}x{tile[1]}x{channels}"
        return Tiles(name, field.shape, values, low, field.dtype, tile)

    def vector(self, field: FieldSpec) -> Codec:
        numbers = int(np.prod(field.shape, dtype=np.int64))
        found = self.statistics.get(field.name)
        if found is None or not found.count:
            raise DataError(
                f"{self.where(field)}: encoding 'vector' needs statistics of the field, and the dataset has none"
            )
        mean, std = np.asarray(found.mean, np.float64).reshape(-1), np.asarray(found.std, np.float64).reshape(-1)
        # The std of an entry that is constant in the data is 0, which is no scale for a value that differs: use its size.
        std = np.where(std > 1e-6 * (1 + np.abs(mean)), std, np.maximum(1.0, np.abs(mean)))
        return Vector(f"vector:{field.name}:{numbers}", field.shape, _numbers(mean), _numbers(std), field.dtype)

    def check_rewards(self) -> None:
        """Raises DataError if every return of the task would be 0, because its data have no rewards."""
        if reason := without_rewards(self.task, self.objective, self.paradigm):
            raise DataError(reason)

    def reward(self, field: FieldSpec, part: Part, kind: str) -> Codec:
        """The codec of a reward."""
        if kind == "sign":
            return Sign("", field.shape, self.ranges.discrete, field.dtype)
        if kind == "integer":
            found = self.statistics.get(field.name)
            known = (float(np.min(found.min)), float(np.max(found.max))) if found is not None and found.count else None
            return self.integers(self.where(field), field.shape, part, known)
        return self.binned(field, kind)

    def integers(self, where: str, shape: tuple[int, ...], part: Part, known: tuple[float, float] | None) -> Codec:
        """Integers from the part's `low` to its `high`; where it has none, over the range of the data."""
        low, high = (
            part.options.get(key, None if known is None else known[i]) for i, key in enumerate(("low", "high"))
        )
        if low is None or high is None:
            raise DataError(f"{where}: its code 'integer' needs a range, but the dataset has no statistics of it")
        low, high = math.floor(low), math.ceil(high)
        if high - low >= self.ranges.discrete_size:
            raise DataError(
                f"{where}: it goes from {low} to {high}, which is more than {self.ranges.discrete_size} integers; give the part "
                "`low` and `high`, or the code 'uniform'"
            )
        return Integers("", shape, self.ranges.discrete, low, high)

    def returns(self, part: Part) -> Element:
        """The element of a return, or of what else a source computes from the future."""
        source, argument = source_of(part.rule)
        if source.argument == "field":
            chosen = str(self.option("histogram", argument))
            rule, options = f"{part.rule.partition(':')[0]}:{chosen}", self.histogram_range(part, chosen)
            shape = (int(options["bins"]) * len(options["low"]),)
            codec: Codec = Histogram(f"vector:{rule}:{shape[0]}", shape)
            return Element("return", codec=codec, source=rule, options=options)
        codec = self.return_codec(part)
        return Element("return", codec=codec, size=codec.tokens, source=part.rule)

    def histogram_range(self, part: Part, name: str) -> dict[str, Any]:
        """`bins`, `low` and `high` of the histograms of a field: the part's, else the field's bounds, else those of the data."""
        given = dict(source_of(part.rule)[0].options) | dict(part.options)
        field = self.task.field(name)
        if field.modality not in ("continuous", "discrete") or field.per != "step":
            raise DataError(f"{self.where(field)}: a histogram needs numbers at each step, not {field.modality} values")
        if given["low"] is None or given["high"] is None:
            if field.modality == "discrete":
                values, least = self.counted(field)
                given["bins"] = max(values)  # a bin for each value
                low, high = np.asarray(least, float), np.asarray(least, float) + np.asarray(max(values), float)
            elif (bounds := _bounds(field)) is not None:
                low, high = bounds
            else:
                low, high = self._data_range(field)
            given["low"], given["high"] = low, high
        entries = int(np.prod(field.shape, dtype=np.int64))
        ends = {key: np.broadcast_to(np.asarray(given[key], float).reshape(-1), (entries,)) for key in ("low", "high")}
        return {"bins": int(given["bins"]), **{key: list(_numbers(end)) for key, end in ends.items()}}

    def return_codec(self, part: Part) -> Codec:
        scale = self.largest_return or 1.0
        if part.code in ("auto", "linear"):
            return Affine("vector:return:1", (), (-scale,), (scale,), _RETURN_LIMIT)
        if part.code == "uniform":
            low, high = self.return_range(part, scale)
            return Bins("", (), self.ranges.continuous, CONTINUOUS_BINS, (low,), (high,), False)
        where = f"task {self.task.name!r}, return"
        if part.code == "quantile":
            edges = self.return_statistics(part, where).at(np.linspace(0, 1, _RETURN_BINS + 1))[:, 0]
            return Quantiles("", (), self.ranges.continuous, (Quantiles.merged(edges),))
        if part.code == "integer":
            return self.integers(where, (), part, (-scale, scale))
        if part.code == "sign":
            return Sign("", (), self.ranges.discrete)
        raise DataError(f"{where}: a return cannot have the code {part.code!r}")

    def return_statistics(self, part: Part, where: str) -> FieldStatistics:
        """Statistics of the returns of a rule over the data."""
        from tiphys.dataio.statistics import RETURN_TO_GO

        if part.rule != "to_go":
            if not any(field.name == REWARD_FIELD for field in self.task.fields):
                raise DataError(
                    f"{where}: the code 'quantile' needs rewards, and the data have none; use the code 'uniform'"
                )
            discount = float(source_of(part.rule)[1] or 1)  # `after` is not discounted
            assert self.discounted is not None
            return self.discounted(discount)
        found = self.statistics.get(RETURN_TO_GO)
        if found is None or not found.count:
            raise DataError(
                f"{where}: the code 'quantile' needs statistics of the returns, which datasets of earlier versions lack; "
                "write the dataset again, or use the code 'uniform'"
            )
        return found

    def return_range(self, part: Part, scale: float) -> tuple[float, float]:
        """What uniform bins of a return cover: only what the data can have.

        A policy that prefers low returns would otherwise draw one that stands for nothing, and bins would be wider than needed.
        """
        from tiphys.dataio.statistics import RETURN_TO_GO

        found, rewards = self.statistics.get(RETURN_TO_GO), self.statistics.get(REWARD_FIELD)
        if found is None or not found.count or not np.max(found.max) > np.min(found.min):
            return -scale, scale
        low, high = float(np.min(found.min)), float(np.max(found.max))
        if part.rule == "to_go":
            return low, high
        low, high = min(low, 0.0), max(high, 0.0)
        if rewards is None or not rewards.count or np.min(rewards.min) < 0 < np.max(rewards.max):
            # Σ γᵏ r of both signs is a return-to-go less a weighted mean of later ones (summation by parts)
            return low - high, high - low
        return low, high  # a discount moves a sum of rewards of one sign towards 0


def without_rewards(task: TaskSpec, objective: Objective, paradigm: Paradigm) -> str:
    """Why an objective cannot be learned from a task's data, if it requires rewards and they have none; empty if it can."""
    if REWARD not in paradigm.requires or objective.options.get("without_rewards", False):
        return ""
    if not task.with_role("action") or any(field.name == "reward" for field in task.fields):
        return ""
    return (
        f"task {task.name!r} has no field 'reward', so paradigm {paradigm.name!r} would be told a return of 0 at every step; "
        "use another objective for it, leave it out with `tasks` of the mixture entry, or set `options: {without_rewards: true}` "
        "of the objective"
    )


def _numbers(array: np.ndarray) -> tuple[float, ...]:
    return tuple(np.asarray(array, np.float64).reshape(-1).tolist())


def _bounds(field: FieldSpec) -> tuple[np.ndarray, np.ndarray] | None:
    """The bounds of the space, one number or one for each entry; None if one is not finite or high is not above low."""
    if field.low is None or field.high is None:
        return None
    low, high = (
        np.asarray(b, np.float64) if len(b) == 1 else field.entries(b).reshape(-1) for b in (field.low, field.high)
    )
    usable = np.isfinite(low).all() and np.isfinite(high).all() and (high > low).all()
    return (low, high) if usable else None


def _within_unit(low: np.ndarray, high: np.ndarray) -> bool:
    return bool(np.min(low) >= -1 and np.max(high) <= 1)


def _quantiles(found: FieldStatistics, shares: Sequence[float] | np.ndarray, field: FieldSpec) -> Any:
    """[len(shares)] arrays [numbers]: quantiles of the data."""
    numbers = int(np.prod(field.shape, dtype=np.int64))
    out = found.at(shares)
    return list(np.broadcast_to(out, (len(out), numbers)))
