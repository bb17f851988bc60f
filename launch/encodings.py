"""`python -m tiphys.launch.encodings` writes the tables and excerpts of docs/encodings.md, between two marker comments."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tiphys.dataio.episode import Episode, FieldSpec, TaskSpec, Window
from tiphys.dataio.index import EpisodeIndex
from tiphys.dataio.messages import say
from tiphys.dataio.shards import ShardWriter
from tiphys.launch.tokens import Row, as_text
from tiphys.pretrain.acting.ask import demonstration
from tiphys.pretrain.objectives import Objectives
from tiphys.pretrain.tokens.batch import TokenBatch
from tiphys.pretrain.tokens.describe import view_windows
from tiphys.pretrain.tokens.encoding import OPTIONS
from tiphys.recipes.keys import key_of, section_fields
from tiphys.recipes.load import load_recipe
from tiphys.recipes.sections.objective import FieldTokens, Objective

PAGE = Path(__file__).resolve().parents[1] / "docs" / "encodings.md"
BEGIN = "<!-- begin of what `python -m tiphys.launch.encodings` writes -->"
END = "<!-- end -->"
_WIDTH = 100
_STEPS = 8  # of the example's episode
# Keys that decide how much is shown, or what is done with an answer, but not what the tokens of a step are
UNSEEN = {
    FieldTokens: {"augment"},
    Objective: {
        "context",
        "window",
        "prompt_steps",
        "target_return",
        "flow",
        "insulate",
        "fields",
        "options",
        "paradigm",
    },
}

ARM = TaskSpec(
    "arm",
    (
        FieldSpec("observation.state", "observation", "continuous", "float32", (3,)),
        FieldSpec("action", "action", "continuous", "float32", (2,), low=(-1.0,), high=(1.0,)),
        FieldSpec("reward", "reward", "continuous", "float32"),
    ),
)
GRID = TaskSpec(
    "grid",
    (
        FieldSpec("observation.map", "observation", "discrete", "uint8", (2, 2, 1), values=5),
        FieldSpec("instruction", "text", "text", "str", per="episode"),
        FieldSpec("action", "action", "discrete", "int64", values=4),
        FieldSpec("reward", "reward", "continuous", "float32"),
    ),
)
CAMERA = TaskSpec(
    "camera",
    (
        FieldSpec("observation.front", "observation", "image", "uint8", (48, 32, 3)),
        FieldSpec("action", "action", "discrete", "int64", values=4),
    ),
)


@dataclass(frozen=True)
class Example:
    """Settings of an objective, and the task whose tokens show what they do.

    key     what the settings are about: a key of `FieldTokens` or `Objective`, with its value if it is a choice
    prompt  a prompt stands before the window
    """

    key: str
    task: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 1
    prompt: bool = False


def _of(name: str, **tokens: Any) -> dict[str, Any]:
    return {"fields": {name: tokens}}


def _rewards(encoding: str) -> dict[str, Any]:
    """Of a paradigm that predicts rewards. It predicts observations too, so these need ids."""
    return {"paradigm": "tt", "fields": {_MAP: {"encoding": "gato"}, "reward": {"encoding": encoding}}}


_STATE, _MAP, _FRONT = "observation.state", "observation.map", "observation.front"
_RELATIVE = {"to": _STATE, "columns": [0, 1]}
ENCODINGS = (
    Example("encoding: auto", "arm"),
    Example("encoding: auto", "grid"),
    Example("encoding: auto", "camera"),
    Example("encoding: gato", "arm", _of(_STATE, encoding="gato")),
    Example("encoding: vector", "grid", _of(_MAP, encoding="vector")),
    Example("encoding: grid", "grid", _of(_MAP, encoding="grid")),
    Example("encoding: rows", "grid", _of(_MAP, encoding="rows")),
    Example("encoding: cells", "grid", _of(_MAP, encoding="cells")),
    Example("encoding: uniform", "arm", _of(_STATE, encoding="uniform", bins=16)),
    Example("encoding: quantile", "arm", _of(_STATE, encoding="quantile", bins=16)),
    Example("encoding: integer", "grid", _rewards("integer")),
    Example("encoding: sign", "grid", _rewards("sign")),
    Example("encoding: skip", "grid", _of("instruction", encoding="skip")),
    Example("resize", "camera", _of(_FRONT, resize=32)),
    Example("crop", "camera", _of(_FRONT, crop=32)),
    Example("stride", "camera", _of(_FRONT, stride=2), steps=2),
    Example("chunk", "arm", _of("action", chunk=2), steps=2),
    Example("relative", "arm", _of("action", relative=_RELATIVE)),
    Example("normalise", "arm", {"options": {"allow_clipped": 0.4}, **_of("action", normalise="standard")}),
)
SETTINGS = (
    Example("scheme: gato", "arm", {"scheme": "gato"}),
    Example("scheme: compact", "arm", {"scheme": "compact"}),
    Example("softmax: vocabulary", "grid", {"softmax": "vocabulary"}),
    Example("softmax: range", "grid", {"softmax": "range"}),
    Example("discretise: yes", "arm", {"discretise": "yes"}),
    Example("discretise: no", "arm", {"discretise": "no"}),
    Example("prompt", "arm", {"prompt": 1.0}, prompt=True),
    Example("chunk", "arm", {"chunk": 2}, steps=2),
    Example("horizon", "arm", {"horizon": 4, "chunk": 2, "head": "l2"}, steps=2),
    Example("head: bins", "arm", {"head": "bins"}),
    Example("head: l2", "arm", {"head": "l2", "horizon": 2}),
    Example("head: l1", "arm", {"head": "l1", "horizon": 2}),
    Example("head: flow", "arm", {"head": "flow", "horizon": 2}),
)


def write_data(folder: str) -> None:
    """A small dataset of the three tasks, without any randomness."""
    with ShardWriter(folder, [ARM, GRID, CAMERA]) as writer:
        t = np.arange(_STEPS)
        for number in range(2):
            state = np.stack([np.sin((t + number + 1) / 3), np.cos(t / 3), (t + 1) / 10], 1).astype(np.float32)
            action = np.diff(state[:, :2], axis=0, append=state[-1:, :2]).astype(np.float32)
            reward = np.where(t % 3 == 0, 2, 0).astype(np.float32)
            cells = ((t[:, None] + np.arange(4) + number) % 5).reshape(-1, 2, 2, 1).astype(np.uint8)
            pictures = np.broadcast_to((t * 25).astype(np.uint8)[:, None, None, None], (_STEPS, 48, 32, 3)).copy()
            by_task: dict[str, dict[str, Any]] = {
                "arm": {_STATE: state, "action": action, "reward": reward},
                "grid": {_MAP: cells, "instruction": "go to 3", "action": (t + number) % 4, "reward": reward},
                "camera": {_FRONT: pictures, "action": (t + number) % 4},
            }
            for task, values in by_task.items():
                writer.write(Episode(f"{task}/{number}", task, values, _STEPS))
        writer.close()


def excerpt(example: Example, data: str) -> str:
    """What `tiphys tokens` shows of the first steps of an episode."""
    recipe = {
        "name": "example",
        "data": {"mixture": [{"dataset": data, "objective": "it", "tasks": [example.task]}]},
        "objectives": {"it": {"paradigm": "bc", "context": 200} | dict(example.settings)},
        "model": {"text_vocabulary": 280},
        "deepspeed": {"train_batch_size": 1},
        "run": {"dir": "runs/example"},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(json.dumps(recipe))
        file.flush()
        objectives = Objectives(load_recipe(file.name), [EpisodeIndex.open(data)])
    whole = demonstration(f"{data}:{example.task}/0", example.task)
    shown = [_part(whole, 3, example.steps, max(0, objectives.needs(0).after))]
    if example.prompt:
        shown.insert(0, _part(whole, 0, 1, 0, prompt=True))
    batch = TokenBatch.from_arrays(objectives.make_batch(0, np.array([0]), [shown], seed=0))
    views = view_windows(batch, 0, shown, objectives.layouts, objectives.vocabulary, objectives.text, 0)
    return as_text(Row(0, 0, batch.real_tokens, batch.length, views), _WIDTH).partition("\n\n")[2]


def _part(whole: Window, start: int, steps: int, after: int, *, prompt: bool = False) -> Window:
    rows = slice(start, start + steps + after)
    fields = {n: v[rows] if isinstance(v, np.ndarray) else v for n, v in whole.fields.items()}
    return replace(
        whole,
        start=start,
        steps=steps,
        fields=fields,
        step=whole.step[rows],
        returns_to_go=whole.returns_to_go[rows],
        valid=whole.valid[rows],
        prompt=prompt,
    )


def sections(data: str) -> Iterator[str]:
    """The page's generated lines."""
    yield "## Encodings of fields\n"
    yield "These are keys below `objectives.NAME.fields.FIELD`.\n"
    yield from _table(FieldTokens)
    yield from _excerpts(ENCODINGS, data)
    yield "## Settings of an objective\n"
    yield "These are keys below `objectives.NAME`.\n"
    yield from _table(Objective)
    yield from _excerpts(SETTINGS, data)
    yield "## Options of a paradigm\n"
    yield "These are keys below `objectives.NAME.options`. An option that the paradigm does not have is refused.\n"
    yield "| option | meaning |\n|---|---|"
    yield from (f"| `{name}` | {meaning} |" for name, meaning in sorted(OPTIONS.items()))
    yield ""


def _table(section: type) -> Iterator[str]:
    yield "| key | allowed | meaning |\n|---|---|---|"
    for name, (_, of) in section_fields(section).items():
        key = key_of(of)
        yield f"| `{name}` | {key.allowed() or key.text} | {key.help} |"
    yield ""


def _excerpts(examples: tuple[Example, ...], data: str) -> Iterator[str]:
    before = ""
    for example in examples:
        if example.key != before:
            yield f"### `{example.key}`\n"
        before = example.key
        if example.settings:
            yield f"`{_flow(dict(example.settings))}`\n"
        yield f"```text\n{excerpt(example, data)}\n```\n"


def _flow(value: Any) -> str:
    """Settings in one line of YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_flow(one)}" for name, one in value.items()) + "}"
    return json.dumps(value) if isinstance(value, list) else str(value)


def updated(page: str) -> str:
    """The page with what this code shows between the markers. Raises ValueError if the markers are missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must contain the lines {BEGIN!r} and {END!r}")
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "data")
        write_data(data)
        made = "\n".join(sections(data))
    return f"{before}{BEGIN}\n\n{made}\n{END}{after}"


def main() -> int:
    if not PAGE.is_file():
        say(f"{PAGE}: no such file; run this in a checkout of Tiphys")
        return 2
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    say(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
