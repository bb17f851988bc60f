"""The layout of a task's timesteps under one objective: which parts each step has, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.pretrain.tokens.action_codecs import action_codec, available, check_chunks, in_frame
from tiphys.pretrain.tokens.codec import Codec
from tiphys.pretrain.tokens.encoding import Encoding
from tiphys.pretrain.tokens.field_codecs import observation_codec
from tiphys.pretrain.tokens.id_codecs import Discrete
from tiphys.pretrain.tokens.paradigm import (
    ACTION,
    AGENT,
    END,
    OBSERVATION,
    RETURN,
    REWARD,
    SEPARATOR,
    TEXT,
    Part,
    hiding_of,
)
from tiphys.pretrain.tokens.picture_codecs import Patches
from tiphys.pretrain.tokens.return_codecs import check_rewards, return_element, reward_codec
from tiphys.pretrain.tokens.timestep import Element, TimestepLayout
from tiphys.pretrain.tokens.vector_codecs import Affine, Chunk, Histogram, Vector
from tiphys.pretrain.tokens.views import AGENTS, ONE

_IMAGES, _REST = 0, 1


def task_layout(encoding: Encoding, number: int, weight: float) -> TimestepLayout:
    """The layout of the task's timesteps.

    Parameters
    ----------
    encoding : Encoding
        The task and its objective.
    number : int
        Number of the task in the run.
    weight : float
        Loss weight of its targets.

    Raises
    ------
    DataError
        If a field has no encoding, or the context is too short.
    """
    objective, paradigm = encoding.objective, encoding.paradigm
    if paradigm.views == AGENTS and not encoding.agents:
        return task_layout(encoding.of_agents(), number, weight)
    texts = [f for f in encoding.shown("observation", "text") if f.modality == "text"]
    said = any(part.kind == TEXT for part in paradigm.head)
    preamble = tuple(f.name for f in texts if f.per == "episode" and said)
    has_actions, pairs = bool(encoding.shown("action")), paradigm.loss == "pairs"
    _check(encoding, preamble)
    elements = (_learnt(encoding, e, part) for part in paradigm.timestep for e in _elements(encoding, part))
    layout = TimestepLayout(
        task=encoding.task.name,
        number=number,
        elements=tuple(elements),
        preamble=preamble,
        predict_text=paradigm.predicts_text,
        text_last=not has_actions and not pairs,
        chunk=encoding.chunk(),
        softmax=encoding.softmax,
        weight=weight,
        context=objective.context,
        window=objective.window or paradigm.window if has_actions or pairs else 1,
        mask=paradigm.mask,
        tail=tuple(_tail(encoding, part) for part in paradigm.tail) if has_actions or pairs else (),
        hiding=hiding_of(paradigm, objective.options) if has_actions else (),
        future=paradigm.future if has_actions else 0,
        loss=paradigm.loss,
        prompt_parts=paradigm.prompt.parts,
        prompt_reverse=paradigm.prompt.reverse,
        views=paradigm.views,
        swap=float(encoding.option("swap", paradigm.swap)) if has_actions else 0.0,
        agents=encoding.agents,
        agent_fields=encoding.agent_fields,
    )
    return _with_text_limit(encoding, _with_prompts(encoding, layout))


def _check(encoding: Encoding, preamble: Sequence[str]) -> None:
    """Raises DataError if the paradigm cannot learn from the task."""
    paradigm, has_actions = encoding.paradigm, bool(encoding.shown("action"))
    if paradigm.loss == "pairs" or paradigm.swap:
        _check_pairs(encoding, preamble)
    elif not has_actions and not (paradigm.predicts_text and preamble):
        raise DataError(
            f"task {encoding.task.name!r} has neither actions nor a text that paradigm {paradigm.name!r} predicts, so there "
            "is nothing to learn; leave the task out with `tasks` of the mixture entry, or use another paradigm"
        )
    if has_actions and REWARD in paradigm.requires:
        check_rewards(encoding)
    if has_actions:
        check_chunks(encoding)


def _elements(encoding: Encoding, part: Part) -> list[Element]:
    """What a part of the paradigm's timestep shows of the task."""
    has_actions = bool(encoding.shown("action"))
    if part.kind == OBSERVATION:
        return _observations(encoding, part)
    if part.kind == ACTION:
        return _actions(encoding, part)
    if part.kind == TEXT:
        texts = encoding.shown("observation", "text")
        return [_step_text(encoding, f) for f in texts if f.modality == "text" and f.per == "step"]
    if part.kind == REWARD:
        return _rewards(encoding, part)
    if part.kind == AGENT:
        number_of = Discrete("", (), encoding.ranges.discrete, (encoding.agents,), (0,), "int64")
        return [Element("agent", codec=number_of, source="agent")]
    if part.kind == RETURN:
        return [return_element(encoding, part)] if has_actions else []
    assert part.kind == SEPARATOR
    return [Element("separator")] if has_actions else []


def _check_pairs(encoding: Encoding, preamble: Sequence[str]) -> None:
    """Raises DataError if the task has no texts, or no observations, that windows can be told from each other by."""
    lacks = "" if preamble else "text that stays the same for a whole episode"
    if not [f for f in encoding.shown("observation") if f.modality != "text"]:
        lacks = "observation that is not a text"
    if lacks:
        raise DataError(
            f"task {encoding.task.name!r} has no {lacks}, and paradigm {encoding.paradigm.name!r} learns which text fits which "
            "window; leave the task out with `tasks` of the mixture entry, or use another paradigm"
        )


def _with_prompts(encoding: Encoding, layout: TimestepLayout) -> TimestepLayout:
    """The layout with room for a prompt before each window. Raises DataError if the prompts of a row cannot be reversed."""
    prompt = encoding.paradigm.prompt
    if encoding.paradigm.views != ONE and encoding.prompt_share:
        raise DataError(
            f"task {encoding.task.name!r}: paradigm {encoding.paradigm.name!r} has no prompts; set `prompt: 0`, or leave it out"
        )
    if prompt.reverse and layout.chunk > 1:
        raise DataError(f"task {encoding.task.name!r}: prompts are reversed, so its actions cannot have a `chunk`")
    if not prompt.every_window or not layout.has_actions or not encoding.prompt_share:
        return layout
    steps = encoding.objective.prompt_steps or prompt.steps or max(1, layout.fit(encoding.objective.context // 2))
    return replace(layout, prompt_steps=steps)


def _with_text_limit(encoding: Encoding, layout: TimestepLayout) -> TimestepLayout:
    """Limits the texts so that one timestep fits beside them. Raises DataError if it does not fit even without texts."""
    room = encoding.objective.context - layout.width * layout.copies - (layout.extra - layout.text_last)
    if room < 0:
        parts = ", ".join(f"{e.field or e.role} {e.size}" for e in layout.elements)
        raise DataError(
            f"task {encoding.task.name!r}: a context of {encoding.objective.context} cannot hold one timestep of "
            f"{layout.width * layout.copies} tokens ({parts}); raise `context`, or resize, skip or encode a field "
            "as one token"
        )
    if layout.document:
        return replace(layout, text_limit=int(encoding.option("text_tokens", 0)))
    if not layout.preamble:
        return layout
    each = (room // layout.copies - layout.text_last) // len(layout.preamble)
    limit = min(each, int(encoding.option("text_tokens", each)))
    if limit < 1:
        raise DataError(
            f"task {encoding.task.name!r}: a context of {encoding.objective.context} holds one timestep, but not also "
            f"the texts of {', '.join(layout.preamble)}; raise `context`"
        )
    return replace(layout, text_limit=limit)


def _tail(encoding: Encoding, part: Part) -> Element:
    """The element of a token after the last step. An `end` is that of the world, if the data tell it from a time limit."""
    ends = encoding.task.with_role("terminated")
    name = ends[0].name if part.kind == END and ends else ""
    return _learnt(encoding, Element(part.kind, name), part)


def _learnt(encoding: Encoding, element: Element, part: Part) -> Element:
    """The element with what the part says of its targets, and of whether it is shown."""
    if not part.weight:
        return element if part.shown else replace(element, shown=False)
    codec = element.codec
    head = codec.embedder.removeprefix("vector:") if isinstance(codec, Affine | Vector | Histogram | Chunk) else ""
    if codec is not None and codec.embedder and not head:
        raise DataError(
            f"task {encoding.task.name!r}: paradigm {encoding.paradigm.name!r} predicts the {element.role} {element.field!r}, "
            "which is encoded as one embedded vector; give it `encoding: uniform` or `encoding: quantile`, or skip it"
        )
    return replace(element, predicted=True, head=head, weight=part.weight, shown=part.shown)


def _observations(encoding: Encoding, part: Part) -> list[Element]:
    """Images, then discrete and continuous fields together; both groups are sorted by name."""
    fields = [f for f in encoding.shown("observation") if f.modality != "text"]
    fields.sort(key=lambda f: (_IMAGES if f.modality == "image" else _REST, f.name))
    elements = []
    for field in fields:
        codec = observation_codec(encoding, field, part)
        augment = _augmentation(encoding, field, codec)
        stride = max(1, encoding.tokens(field).stride)
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


def _augmentation(encoding: Encoding, field: FieldSpec, codec: Codec) -> dict[str, float]:
    """How a picture is changed in training; empty: not. Raises DataError if it cannot be."""
    given = encoding.tokens(field).augment
    plain = type(given)()
    changed = {n: float(v) for n, v in vars(given).items() if v != getattr(plain, n)}
    if not changed:
        return {}
    if not isinstance(codec, Patches):
        if field.name in encoding.objective.fields:
            raise DataError(f"{encoding.where(field)}: `augment` is for images, and this field is not encoded as one")
        return {}  # a pattern may match other fields too
    if field.dtype != "uint8" or (codec.black, codec.white) != (0.0, 255.0):
        raise DataError(
            f"{encoding.where(field)}: `augment` is for images of uint8 from 0 to 255, not of {field.dtype} from "
            f"{codec.black:g} to {codec.white:g}; leave it out for this field"
        )
    if "saturation" in changed and codec.size[2] != 3:
        raise DataError(
            f"{encoding.where(field)}: `augment.saturation` needs 3 channels, not {codec.size[2]}; leave it out"
        )
    return changed


def _actions(encoding: Encoding, part: Part) -> list[Element]:
    codecs = [(field, action_codec(encoding, field, part)) for field in encoding.shown("action")]
    return [
        in_frame(
            encoding, Element("action", field.name, codec, codec.tokens, available=available(encoding, field, codec))
        )
        for field, codec in codecs
    ]


def _rewards(encoding: Encoding, part: Part) -> list[Element]:
    """The reward of each step."""
    fields = encoding.shown("reward")
    if not fields:
        raise DataError(
            f"task {encoding.task.name!r}: it has no rewards, which paradigm {encoding.paradigm.name!r} needs; leave the task "
            "out with `tasks` of the mixture entry, or use another paradigm"
        )
    kind = "uniform" if part.code in ("auto", "linear", "gato") else part.code
    found = []
    for field in fields:
        given = encoding.tokens(field).encoding
        codec = reward_codec(encoding, field, part, kind if given == "auto" else given)
        found.append(Element("reward", field.name, codec, codec.tokens))
    return found


def _step_text(encoding: Encoding, field: FieldSpec) -> Element:
    """The element of a text that changes from step to step."""
    return Element(
        "text", field.name, size=int(encoding.option("text_tokens", 32)), stride=max(1, encoding.tokens(field).stride)
    )
