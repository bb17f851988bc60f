"""Datasets, episodes and scores as text and pictures for people."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.inplace.summary import lines as video_lines
from tiphys.dataio.messages import counted, printable
from tiphys.pretrain.tokens.paradigms import NOTHING

_BARS = "▁▂▃▄▅▆▇█"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> str:
    """A plain table of up to 200 columns of text, whatever the width of the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(title=Text(title) if title else None, header_style="bold", title_justify="left")
    for i, name in enumerate(header):
        view.add_column(Text(name), justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:  # as Text, because names may contain what looks like markup
        view.add_row(*(Text(printable(_cell(value), "")) for value in row))
    out = io.StringIO()
    Console(file=out, width=200).print(view)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def paradigm_lines(rows: Sequence[Mapping[str, str]], whole: bool, width: int = 80) -> str:
    """The rows of `paradigms.table()` in at most `width` columns. `whole`: with everything that is known of each."""
    out = []
    shown = tuple(rows[0])[2:] if whole else ("each step", "acts by", "needs")
    for row in rows:
        out += textwrap.wrap(f"{row['name']}: {row['source']}", width, subsequent_indent="  ")
        for name in shown:
            if row[name] != NOTHING:
                out += textwrap.wrap(row[name], width, initial_indent=f"  {name:<14}", subsequent_indent=" " * 16)
    legend = (
        "A part with * is predicted (*5: its targets weigh 5 times as much); one in [brackets] is hidden in the input."
    )
    name = rows[0]["name"] if whole else "NAME"
    more = f"`tiphys train {name}` trains its recipe." if whole else "`tiphys objectives NAME` says more of one."
    return "\n".join([*out, "", *textwrap.wrap(f"{legend} {more}", width)])


def histogram(counts: Sequence[float]) -> str:
    """Counts as one line of bars; 0 is a space."""
    top = max(counts, default=0) or 1
    return "".join(_BARS[min(7, int(8 * c / top))] if c else " " for c in counts)


def scores(found: Mapping[str, Any]) -> str:
    """The table of the contents of an `evaluation.json`."""
    from tiphys.pretrain.acting.scores import by_objective

    found_by = list(by_objective(found))
    asked = any("target_return" in one for _, _, one in found_by)
    rows = [
        (
            name,
            objective or None,
            *([one.get("target_return")] if asked else []),
            one["episodes"],
            one["mean_return"],
            one["success_rate"],
            one["random"],
            one["expert"],
            one["expert_normalized"],
            _interval(one.get("expert_normalized_interval")),
        )
        for name, objective, part in found_by
        for one in (part, *part.get("curve", ()))
    ]
    header = (
        *("task", "objective", *(["asked"] if asked else []), "episodes", "return", "success"),
        *("random", "expert", "normalised", "95 % interval"),
    )
    unknown = dict.fromkeys(name for name, _, one in found_by if one["random"] is None or one["expert"] is None)
    note = (
        f"\nnot normalised, because the mean scores of random actions and of an expert are unknown: {', '.join(unknown)}; "
        "state them as `random` and `expert` in a mapping file when you convert the data (docs/converting.md)"
    )
    return table(header, rows) + (printable(note) if unknown else "")


def _interval(bounds: Any) -> str | None:
    return f"{bounds[0]:.2f} … {bounds[1]:.2f}" if bounds else None


def episode(url: str, number: int, picture: str = "") -> str:
    """Describe the fields of one episode. With `picture`, also write its frames there, as a .png strip or a .gif.

    Raises IndexError if there is no such episode, ValueError if it has no images or `picture` has another suffix.
    """
    from tiphys.dataio.dataset import read_episode
    from tiphys.dataio.index import EpisodeIndex

    index = EpisodeIndex.open(url)
    if not 0 <= number < index.episodes:
        raise IndexError(f"{url}: there is no episode {number}; the dataset has episodes 0 … {index.episodes - 1}")
    found = read_episode(index, number)
    returned = f"{found.total_return:.3f}" if "reward" in found.fields else "–"
    lines = [
        f"episode {number}: {found.id}",
        f"task {found.task}, {counted(found.steps, 'step')}, return {returned}, success {found.success}, agent {found.agent}",
    ]
    for name, value in sorted(found.fields.items()):
        if isinstance(value, str):
            lines.append(f"  {name}: {value!r}")
        else:
            array = np.asarray(value)
            lines.append(f"  {name}: {array.dtype}{list(array.shape)} {_values(array)}")
    if picture:
        lines.append(f"written: {_picture(found.fields, picture)}")
    return printable("\n".join(lines))


def _values(array: np.ndarray) -> str:
    """The first two steps of a small field; the smallest and largest value of a large one."""
    if array.ndim > 2 and array.dtype.kind in "iuf" and array.size:
        return f"from {array.min():g} to {array.max():g}"
    return " ".join(np.array2string(array[:2], threshold=12, precision=3).split())


def _picture(fields: Mapping[str, Any], path: str) -> str:
    from PIL import Image

    images = [v for v in fields.values() if isinstance(v, np.ndarray) and v.dtype == np.uint8 and v.ndim == 4]
    images = [v for v in images if v.shape[-1] in (1, 3) and min(v.shape[1:3]) >= 16]
    if not images:
        raise ValueError("--picture: this episode has no field of images (uint8, 1 or 3 channels, at least 16 × 16)")
    frames = [Image.fromarray(f if f.shape[-1] == 3 else f[..., 0]) for f in images[0]]
    if Path(path).suffix == ".gif":
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=100, loop=0)
    elif Path(path).suffix == ".png":
        chosen = frames[:: max(1, len(frames) // 8)][:8]
        strip = Image.new(chosen[0].mode, (sum(f.width for f in chosen), chosen[0].height))
        for i, frame in enumerate(chosen):
            strip.paste(frame, (i * frame.width, 0))
        strip.save(path)
    else:
        raise ValueError(f"--picture {path}: the name must end in .png or .gif")
    return path


def summary(found: Mapping[str, Any]) -> str:
    """What `tiphys.dataio.dataset.inspect` returned, as text."""
    lines = [
        f"{found['url']}: {counted(found['episodes'], 'episode')}, {counted(found['steps'], 'step')}, "
        f"{human_bytes(found['bytes'])} in {counted(found['shards'], 'shard')}"
        + (f", {found['quarantined']} quarantined" if found.get("quarantined") else "")
        + (f", {found['skipped']} left out" if found.get("skipped") else "")
    ]
    rows = [
        (
            name,
            t["episodes"],
            t["steps"],
            _range(t["lengths"]),
            _range(t["returns"]),
            t["success"],
            histogram(t["returns"]["histogram"]),
        )
        for name, t in found["tasks"].items()
    ]
    lines.append(table(("task", "episodes", "steps", "length", "return", "success", "returns"), rows))
    played = {name: t["environment"] for name, t in found["tasks"].items() if t["environment"] not in ("", name)}
    lines += [f"environment of {name}: {environment}" for name, environment in played.items()]
    fields = [
        (
            n,
            f["role"],
            f["modality"],
            f["dtype"],
            str(tuple(f["shape"])),
            f["per"],
            _bound(f["low"]),
            _bound(f["high"]),
            f["values"],
            f["unit"] or None,
        )
        for n, f in found["fields"].items()
    ]
    for task, by_field in found["bad_values"].items():
        for field, bad in by_field.items():
            if bad["text"]:
                lines.append(bad_values(task, field, bad["text"], bad["first"]))
    unknown = sorted({f for by_field in found["bad_values"].values() for f, b in by_field.items() if not b["text"]})
    if unknown:
        lines.append(f"bad values of {', '.join(unknown)}: unknown, because an earlier version wrote the dataset")
    lines.append(table(("field", "role", "modality", "dtype", "shape", "per", "low", "high", "values", "unit"), fields))
    lines += video_lines(found["videos"])
    return printable("\n".join(lines))


def bad_values(task: str, field: str, text: str, first: Sequence[str]) -> str:
    """A line about values of a field that cannot be learned from. `first`: ids of the first episodes that have some."""
    return f"bad values: task {task!r}, field {field!r}: {text} (first: {', '.join(first[:5]) or 'unknown'})"


def _bound(values: Any) -> str | None:
    """The bounds of a field's elements; only the smallest and the largest if there are more than three."""
    if values is None or isinstance(values, str):
        return values
    if len(values) > 3:
        return f"{min(values):g} … {max(values):g}"
    return ", ".join(f"{v:g}" for v in values)


def _range(spread: Mapping[str, Any]) -> str | None:
    if spread["mean"] is None:
        return None
    return f"{spread['min']:.4g} … {spread['mean']:.4g} … {spread['max']:.4g}"


def human_bytes(count: float) -> str:
    """A number of bytes with a binary unit: `512 B`, `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
