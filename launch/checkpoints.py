"""`tiphys checkpoint`: what the checkpoints of a run contain, and whether they are whole."""

from __future__ import annotations

import math
import textwrap
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.messages import counted
from tiphys.dataio.plan.log import described
from tiphys.pretrain import checkpoint_files as files
from tiphys.pretrain.checkpoint_choice import ASIDE
from tiphys.pretrain.checkpoint_files import CheckpointError

if TYPE_CHECKING:
    from tiphys.pretrain.checkpoint import Checkpoint

_LONGEST_LIST = 20  # parameters that are shown without --json
_WIDTH, _INDENT = 79, " " * 12  # of reasons below a row
_UNFINISHED = "it is being written, or its writer was stopped"
_SET_ASIDE = f"a launch found damaged bytes and set it aside ({ASIDE})"


def listed(run: str | Path) -> list[dict[str, Any]]:
    """The checkpoints of a run, oldest first: folder, step, ranks, bytes, when it was saved (seconds), its state, and why.

    state  `whole`, `trusted` (whole, and followed by healthy steps), `damaged` or `incomplete`
    why    of a checkpoint that is not whole

    Raises FileNotFoundError if the run has none.
    """
    found = []
    proven = _proven(Path(run))
    for step, folder in files.folders(run):
        row: dict[str, Any] = {"step": step, "folder": str(folder), "ranks": None, "bytes": None, "saved": None}
        row["why"] = ""
        try:
            manifest = files.read_manifest(folder)
        except CheckpointError as error:
            found.append({**row, "state": "damaged", "why": _within(folder, error)})
            continue
        if manifest is None:
            aside = (folder / ASIDE).is_file()
            found.append(
                {**row, "state": "damaged" if aside else "incomplete", "why": _SET_ASIDE if aside else _UNFINISHED}
            )
            continue
        sizes = [entry["size"] for entry in manifest["files"].values()]
        row |= {"ranks": manifest["world"], "bytes": sum(sizes), "saved": (folder / files.MANIFEST).stat().st_mtime}
        found.append({**row, "state": "trusted" if step <= proven else "whole"})
    if not found:
        raise FileNotFoundError(f"{run}: there are no checkpoints")
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """`listed` for people."""
    lines = [f"{'step':>10}  {'saved':<16}  {'ranks':>5}  {'size':>9}  state"]
    for row in rows:
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["saved"])) if row["saved"] else "–"
        size = _size(row["bytes"]) if row["bytes"] is not None else "–"
        lines.append(f"{row['step']:>10}  {saved:<16}  {row['ranks'] or '–':>5}  {size:>9}  {row['state']}")
        if row["why"]:
            lines += textwrap.wrap(row["why"], _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
    if any(row["state"] == "trusted" for row in rows):
        lines.append("trusted: healthy steps followed, so the run can go back to it after a spike")
    return "\n".join(lines)


def verified(path: str | Path) -> Iterator[tuple[Path, str]]:
    """(folder, what is damaged) of each checkpoint of a run, or of one checkpoint. Empty: all its files have their digests.

    Folders that are not whole are damaged too, unless they are newer than all whole ones: those are being written.

    Raises FileNotFoundError if there is no checkpoint.
    """
    from tiphys.pretrain.checkpoint import Checkpoint

    folders = [folder for _, folder in files.folders(path)]
    if not folders and not ((Path(path) / files.MANIFEST).is_file() or (Path(path) / ASIDE).is_file()):
        raise FileNotFoundError(f"{path}: there are no checkpoints")
    folders = folders or [Path(path)]
    whole = [folder for folder in folders if (folder / files.MANIFEST).is_file()]
    for folder in folders:
        if (folder / ASIDE).is_file():
            yield folder, _SET_ASIDE
            continue
        if whole and folder > whole[-1]:
            continue
        try:
            Checkpoint.open(folder).verify()
        except CheckpointError as error:
            yield folder, _within(folder, error)
        else:
            yield folder, ""


def inspected(path: str | Path) -> dict[str, Any]:
    """What a checkpoint contains; `path` is its folder, or a run, whose newest whole one is meant.

    Raises CheckpointError if there is none, or if it cannot be read.
    """
    from tiphys.pretrain.checkpoint import Checkpoint
    from tiphys.pretrain.checkpoint_weights import RangeReader

    checkpoint: Checkpoint | None
    checkpoint = Checkpoint.open(path) if (Path(path) / files.MANIFEST).is_file() else Checkpoint.newest_whole(path)
    if checkpoint is None:
        raise CheckpointError(f"{path}: neither a whole checkpoint nor a run that has one")
    state = checkpoint.state()
    with RangeReader(checkpoint) as reader:
        tensors = [
            {"name": name, "shape": list(reader.shapes[name]), "saved": sorted(keys)}
            for name, keys in reader.pieces.items()
        ]
        parameters = sum(math.prod(reader.shapes[name]) for name, keys in reader.pieces.items() if "buffer" not in keys)
    return {
        "folder": str(checkpoint.path),
        "step": checkpoint.step,
        "ranks": checkpoint.world,
        "bytes": sum(entry["size"] for entry in checkpoint.manifest["files"].values()),
        "recipe": state["recipe"].get("name", ""),
        "hash": state["hash"],
        "datasets": state["datasets"],
        "log": state["loader"].get("log", []),
        "parameters": parameters,
        "tensors": tensors,
    }


def shown(found: dict[str, Any]) -> str:
    """`inspected` for people."""
    kinds = Counter(", ".join(t["saved"]) for t in found["tensors"])
    entries = Counter(d[:12] for d in found["datasets"])
    lines = [
        f"checkpoint   {found['folder']}",
        f"step         {found['step']}, saved by {counted(found['ranks'], 'rank')}; any number can load it",
        f"recipe       {found['recipe']}  ({found['hash'][:12]})",
        *_labelled(
            "datasets", [f"{digest} ({count} entries)" if count > 1 else digest for digest, count in entries.items()]
        ),
        f"parameters   {found['parameters']:,} in {len(found['tensors'])} tensors, {_size(found['bytes'])}",
        *_labelled("saved", [f"{kind} of {count} tensors" for kind, count in kinds.most_common()]),
        *(f"changed      from step {event['step']} on: {described(event)}" for event in found["log"]),
    ]
    for tensor in found["tensors"][:_LONGEST_LIST]:
        lines.append(f"  {tensor['name']}  {tensor['shape']}")
    if len(found["tensors"]) > _LONGEST_LIST:
        lines.append(f"  … {len(found['tensors']) - _LONGEST_LIST} more; --json lists all")
    return "\n".join(lines)


def _labelled(label: str, items: list[str]) -> list[str]:
    """One item a line, the first beside the label."""
    return [f"{label if not i else '':<13}{item}" for i, item in enumerate(items)]


def _within(folder: Path, error: CheckpointError) -> str:
    """An error of a checkpoint without its folder, which stands beside it."""
    return str(error).removeprefix(f"{folder}/").removeprefix(f"{folder}: ")


def _proven(run: Path) -> int:
    """The newest step that the run trusts, as its newest whole checkpoint knows it."""
    for folder, _ in files.whole(run):
        try:
            return int((files.read_json(folder / files.STATE).get("health") or {}).get("proven", -1))
        except (CheckpointError, ValueError, TypeError, AttributeError):
            continue
    return -1


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
