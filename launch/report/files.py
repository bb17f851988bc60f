"""What a report reads from the folder of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiphys.dataio.episode import DataError
from tiphys.plain_yaml import read

Line = Mapping[str, Any]


@dataclass
class RunFiles:
    """The files of a run.

    folder      of the run
    lines       of metrics.jsonl, by step
    evaluation  evaluation.json, or None
    recipe      the resolved recipe as text, or ""
    rollbacks   lines of rollbacks.jsonl
    """

    folder: Path
    lines: Sequence[Line]
    evaluation: Mapping[str, Any] | None = None
    recipe: str = ""
    rollbacks: Sequence[Line] = ()
    train: list[Line] = field(init=False)

    def __post_init__(self) -> None:
        self.train = [line for line in self.lines if "kind" not in line]

    @classmethod
    def read(cls, run_dir: str | Path) -> RunFiles:
        """Raises FileNotFoundError if the folder has no metrics.jsonl, and DataError if a file is damaged."""
        folder = Path(run_dir)
        if not (folder / "metrics.jsonl").is_file():
            raise FileNotFoundError(f"{folder}: not the folder of a run that has trained: it has no metrics.jsonl")
        lines = _lines(folder / "metrics.jsonl")
        back = folder / "rollbacks.jsonl"
        return cls(
            folder,
            sorted(lines, key=lambda line: line["step"]),  # results of what runs beside training come late
            _json(folder / "evaluation.json"),
            _text(folder / "recipe.yaml"),
            [dict(line) for line in _objects(back)] if back.is_file() else (),
        )

    def kind(self, kind: str) -> list[Line]:
        """The lines of a kind."""
        return [line for line in self.lines if line.get("kind") == kind]

    @property
    def values(self) -> Mapping[str, Any]:
        """The recipe as plain values."""
        return (read(self.recipe, "recipe.yaml").values or {}) if self.recipe else {}

    @property
    def name(self) -> str:
        return str(self.values.get("name", "run"))

    @property
    def steps(self) -> int:
        """Training steps of the whole run; 0 if the recipe does not say."""
        steps = (self.values.get("train") or {}).get("steps", 0)
        return steps if isinstance(steps, int) else 0

    @property
    def score(self) -> float | None:
        """Mean expert-normalised score of the evaluation."""
        found = [t.get("expert_normalized") for t in (self.evaluation or {"tasks": {}})["tasks"].values()]
        known = [float(score) for score in found if isinstance(score, int | float)]
        return sum(known) / len(known) if known else None


def recent(train: Sequence[Line]) -> Sequence[Line]:
    """The later half of the steps: the start of a run, when caches are empty, says little about it."""
    return train[len(train) // 2 :]


def mean(lines: Sequence[Line], key: str) -> float:
    return sum(float(line.get(key) or 0.0) for line in lines) / max(1, len(lines))


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); remove it, or write it again with `tiphys evaluate`") from error


def _objects(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, a line each. An incomplete last line, of a run that was killed, is left out."""
    found = []
    texts = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(texts, 1):
        try:
            value = json.loads(text or "{}")
        except ValueError as error:
            if number == len(texts):
                break
            raise DataError(f"{path}, line {number}: not JSON ({error}); remove the line") from error
        if not isinstance(value, dict) or (text and not value):
            raise DataError(f"{path}, line {number}: not a line of metrics: {text[:60]}; remove the line")
        if text:
            found.append(value)
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    found = _objects(path)
    for number, line in enumerate(found, 1):
        if not isinstance(line.get("step"), int):
            raise DataError(f"{path}, line {number}: not a line of metrics: it has no step; remove the line")
    return found


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""
