"""Is a run healthy, and what limits its speed? One line each, from the metrics alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tiphys.launch.report.files import Line, RunFiles, recent

WAITS = 0.05  # share of the step above which waiting for data is worth a look
SAVES = 0.05  # the same for checkpoints and validation
OVERFIT = 0.10  # held-out loss above its lowest value
MANY_EPOCHS = 20.0
_NAMES = {
    "rows": "waiting for data",
    "forward": "forward",
    "backward": "backward",
    "step": "optimizer and exchange",
    "save": "saving checkpoints",
    "validate": "validation",
}


@dataclass(frozen=True)
class Verdict:
    """healthy: nothing needs a look. problems: a sentence each. bottleneck: what a step's time is spent on."""

    healthy: bool
    problems: list[str]
    bottleneck: str

    @property
    def line(self) -> str:
        state = "healthy" if self.healthy else "needs a look: " + "; ".join(self.problems)
        return f"{state}. Bottleneck: {self.bottleneck}"


def verdict(run: RunFiles) -> Verdict:
    """The verdict on a run."""
    if not run.train:
        return Verdict(False, ["no training step yet"], "unknown")
    problems = [*_losses(run), *_speed(run), *_beside(run)]
    return Verdict(not problems, problems, bottleneck(run.train))


def bottleneck(train: Sequence[Line]) -> str:
    """The largest part of a step, with the share of data wait: `compute; data wait 0.6 %`."""
    parts = breakdown(train)
    wait = next((share for name, share in parts if name == _NAMES["rows"]), 0.0)
    largest = max(parts, key=lambda part: part[1])[0] if parts else "compute"
    what = "compute" if largest in ("forward", "backward", "compute") else largest
    return f"{what}; data wait {wait:.1%}"


def breakdown(train: Sequence[Line]) -> list[tuple[str, float]]:
    """(part of a step, its share of the time), of the later half of the steps, in the order in which a step has them."""
    late = recent(train)
    total = sum(float(line["seconds"]) for line in late)
    if not late or total <= 0:
        return []
    wait = sum(float(line["data_wait"]) for line in late) / total
    seconds = {name: sum(float((line.get("phases") or {}).get(name, 0.0)) for line in late) for name in _NAMES}
    if not any(seconds.values()):
        return [(_NAMES["rows"], wait), ("compute", 1 - wait)]
    seconds["rows"] = wait * total  # the mean over all loaders
    known = [(_NAMES[name], value / total) for name, value in seconds.items() if value]
    rest = 1 - sum(share for _, share in known)
    return [*known, ("other", rest)] if rest > 0.005 else known


def epochs(run: RunFiles) -> list[tuple[str, float, float, int]]:
    """(mixture entry, its share of the windows, epochs so far, its episodes), with the changes of the mixture counted in."""
    plans, last = run.kind("plan"), run.train[-1]["step"] if run.train else 0
    done: dict[str, float] = {}
    for at, plan in enumerate(plans):
        begin = plan["first"]
        end = min(plans[at + 1]["first"], last) if at + 1 < len(plans) else last
        for name, entry in plan["entries"].items():
            each = entry.get("steps_per_epoch")
            done[name] = done.get(name, 0.0) + (max(0, end - begin) / each if each else 0.0)
    if not plans:
        return []
    return [(name, entry["windows"], done[name], entry["episodes"]) for name, entry in plans[-1]["entries"].items()]


def _losses(run: RunFiles) -> list[str]:
    found = []
    losses = [line["loss"] for line in run.train]
    if any(loss is None or not math.isfinite(loss) for loss in losses):
        found.append("the loss became infinite or not a number")
    if run.rollbacks:
        found.append(f"{len(run.rollbacks)} rollbacks after a spike of the loss")
    held_out = [(line["step"], line["loss"]) for line in run.kind("validation") if line["loss"] is not None]
    if len(held_out) >= 3:
        step, lowest = min(held_out, key=lambda point: point[1])
        if held_out[-1][1] > lowest * (1 + OVERFIT) and lowest > 0:
            found.append(f"held-out loss rises since step {step} ({lowest:.3g} → {held_out[-1][1]:.3g}): it overfits")
    elif not held_out:
        share = run.values.get("data", {}).get("validation")
        if (
            not share or run.train[-1]["step"] >= run.steps > 0
        ):  # a run with held-out episodes validates at the end at the latest
            so = f" of {share:g} is less than one episode" if share else ""
            found.append(f"no episodes are held out (data.validation{so}), so overfitting would not be seen")
    found += [
        f"{name} was seen {times:.0f} times"
        for name, _, times, _ in epochs(run)
        if times > MANY_EPOCHS and not held_out
    ]
    return found


def _speed(run: RunFiles) -> list[str]:
    parts = dict(breakdown(run.train))
    found = []
    if parts.get(_NAMES["rows"], 0.0) > WAITS:
        found.append(
            f"{parts[_NAMES['rows']]:.0%} of the time is spent waiting for data (data.cache, or more bandwidth to the store)"
        )
    for name, key in (("save", "checkpoint.every"), ("validate", "validate.every")):
        if parts.get(_NAMES[name], 0.0) > SAVES:
            found.append(f"{_NAMES[name]} takes {parts[_NAMES[name]]:.0%} of the time ({key})")
    return found


def _beside(run: RunFiles) -> list[str]:
    failed = run.kind("aside")
    return [f"{len(failed)} evaluations or publications failed beside training"] if failed else []
