"""Chooses the codecs of rewards and returns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio.episode import DataError, FieldSpec, TaskSpec
from tiphys.pretrain.tokens.codec import Codec
from tiphys.pretrain.tokens.derived import REWARD_FIELD, source_of
from tiphys.pretrain.tokens.encoding import Encoding, bounds_of, plain_numbers
from tiphys.pretrain.tokens.field_codecs import binned_codec, counted
from tiphys.pretrain.tokens.id_codecs import Bins, Integers, Quantiles, Sign
from tiphys.pretrain.tokens.paradigm import REWARD, Paradigm, Part
from tiphys.pretrain.tokens.timestep import Element
from tiphys.pretrain.tokens.vector_codecs import Affine, Histogram
from tiphys.pretrain.tokens.vocabulary import CONTINUOUS_BINS

if TYPE_CHECKING:
    from tiphys.dataio.statistics import FieldStatistics
    from tiphys.recipes.sections.objective import Objective

_RETURN_LIMIT = 10.0
_RETURN_BINS = 100  # of a return whose bins are quantiles (Janner et al. 2021)


def check_rewards(encoding: Encoding) -> None:
    """Raises DataError if every return of the task would be 0, because its data have no rewards."""
    if reason := without_rewards(encoding.task, encoding.objective, encoding.paradigm):
        raise DataError(reason)


def reward_codec(encoding: Encoding, field: FieldSpec, part: Part, kind: str) -> Codec:
    """The codec of a reward."""
    if kind == "sign":
        return Sign("", field.shape, encoding.ranges.discrete, field.dtype)
    if kind == "integer":
        found = encoding.statistics.get(field.name)
        known = (float(np.min(found.min)), float(np.max(found.max))) if found is not None and found.count else None
        return integers_codec(encoding, encoding.where(field), field.shape, part, known)
    return binned_codec(encoding, field, kind)


def integers_codec(
    encoding: Encoding, where: str, shape: tuple[int, ...], part: Part, known: tuple[float, float] | None
) -> Codec:
    """Integers from the part's `low` to its `high`; where it has none, over the range of the data."""
    low, high = (part.options.get(key, None if known is None else known[i]) for i, key in enumerate(("low", "high")))
    if low is None or high is None:
        raise DataError(f"{where}: its code 'integer' needs a range, but the dataset has no statistics of it")
    low, high = math.floor(low), math.ceil(high)
    if high - low >= encoding.ranges.discrete_size:
        raise DataError(
            f"{where}: it goes from {low} to {high}, which is more than {encoding.ranges.discrete_size} integers; give the part "
            "`low` and `high`, or the code 'uniform'"
        )
    return Integers("", shape, encoding.ranges.discrete, low, high)


def return_element(encoding: Encoding, part: Part) -> Element:
    """The element of a return, or of what else a source computes from the future."""
    source, argument = source_of(part.rule)
    if source.argument == "field":
        chosen = str(encoding.option("histogram", argument))
        rule, options = f"{part.rule.partition(':')[0]}:{chosen}", histogram_range(encoding, part, chosen)
        shape = (int(options["bins"]) * len(options["low"]),)
        codec: Codec = Histogram(f"vector:{rule}:{shape[0]}", shape)
        return Element("return", codec=codec, source=rule, options=options)
    codec = return_codec(encoding, part)
    return Element("return", codec=codec, size=codec.tokens, source=part.rule)


def histogram_range(encoding: Encoding, part: Part, name: str) -> dict[str, Any]:
    """`bins`, `low` and `high` of the histograms of a field: the part's, else the field's bounds, else those of the data."""
    given = dict(source_of(part.rule)[0].options) | dict(part.options)
    field = encoding.task.field(name)
    if field.modality not in ("continuous", "discrete") or field.per != "step":
        raise DataError(f"{encoding.where(field)}: a histogram needs numbers at each step, not {field.modality} values")
    if given["low"] is None or given["high"] is None:
        if field.modality == "discrete":
            values, least = counted(encoding, field)
            given["bins"] = max(values)  # a bin for each value
            low, high = np.asarray(least, float), np.asarray(least, float) + np.asarray(max(values), float)
        elif (bounds := bounds_of(field)) is not None:
            low, high = bounds
        else:
            low, high = encoding.data_range(field)
        given["low"], given["high"] = low, high
    entries = int(np.prod(field.shape, dtype=np.int64))
    ends = {key: np.broadcast_to(np.asarray(given[key], float).reshape(-1), (entries,)) for key in ("low", "high")}
    return {"bins": int(given["bins"]), **{key: list(plain_numbers(end)) for key, end in ends.items()}}


def return_codec(encoding: Encoding, part: Part) -> Codec:
    scale = encoding.largest_return or 1.0
    if part.code in ("auto", "linear"):
        return Affine("vector:return:1", (), (-scale,), (scale,), _RETURN_LIMIT)
    if part.code == "uniform":
        low, high = return_range(encoding, part, scale)
        return Bins("", (), encoding.ranges.continuous, CONTINUOUS_BINS, (low,), (high,), False)
    where = f"task {encoding.task.name!r}, return"
    if part.code == "quantile":
        edges = return_statistics(encoding, part, where).at(np.linspace(0, 1, _RETURN_BINS + 1))[:, 0]
        return Quantiles("", (), encoding.ranges.continuous, (Quantiles.merged(edges),))
    if part.code == "integer":
        return integers_codec(encoding, where, (), part, (-scale, scale))
    if part.code == "sign":
        return Sign("", (), encoding.ranges.discrete)
    raise DataError(f"{where}: a return cannot have the code {part.code!r}")


def return_statistics(encoding: Encoding, part: Part, where: str) -> FieldStatistics:
    """Statistics of the returns of a rule over the data."""
    from tiphys.dataio.statistics import RETURN_TO_GO

    if part.rule != "to_go":
        if not any(field.name == REWARD_FIELD for field in encoding.task.fields):
            raise DataError(
                f"{where}: the code 'quantile' needs rewards, and the data have none; use the code 'uniform'"
            )
        discount = float(source_of(part.rule)[1] or 1)  # `after` is not discounted
        assert encoding.discounted is not None
        return encoding.discounted(discount)
    found = encoding.statistics.get(RETURN_TO_GO)
    if found is None or not found.count:
        raise DataError(
            f"{where}: the code 'quantile' needs statistics of the returns, which datasets of earlier versions lack; "
            "write the dataset again, or use the code 'uniform'"
        )
    return found


def return_range(encoding: Encoding, part: Part, scale: float) -> tuple[float, float]:
    """What uniform bins of a return cover: only what the data can have.

    A policy that prefers low returns would otherwise draw one that stands for nothing, and bins would be wider than needed.
    """
    from tiphys.dataio.statistics import RETURN_TO_GO

    found, rewards = encoding.statistics.get(RETURN_TO_GO), encoding.statistics.get(REWARD_FIELD)
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
