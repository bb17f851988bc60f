"""VPT contractor data (OpenAI 2022, arXiv:2206.11795): a recording is `NAME.mp4` with `NAME.jsonl`.

Each line of the `.jsonl` holds the input for one frame. Actions have MineRL's form: `action.buttons` (20 keys in the
order of BUTTONS) and `action.camera` (pitch and yaw, in degrees). As in OpenAI's loader, a mouse movement is scaled by
360/2400, an `attack` that is stuck from the first line until it is pressed again is ignored, and a change of the
selected slot counts as a press of its key.

Options: `resize: [height, width]` of the frames, `segment: N` to cut recordings into episodes of at most N steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from itertools import islice
from typing import Any

import numpy as np

from tiphys.dataio.convert.converter import Converter, Item, Piece, attempt, whole_number
from tiphys.dataio.convert.infer import field_spec
from tiphys.dataio.convert.limits import EPISODE_BYTES, check_shape
from tiphys.dataio.convert.source import Source
from tiphys.dataio.convert.video import VideoFrames, frame_size
from tiphys.dataio.episode import DataError, Episode, TaskSpec

_KEYS = {
    "key.keyboard.w": "forward",
    "key.keyboard.s": "back",
    "key.keyboard.a": "left",
    "key.keyboard.d": "right",
    "key.keyboard.space": "jump",
    "key.keyboard.left.shift": "sneak",
    "key.keyboard.left.control": "sprint",
    "key.keyboard.e": "inventory",
    "key.keyboard.q": "drop",
    "key.keyboard.escape": "ESC",
    **{f"key.keyboard.{i}": f"hotbar.{i}" for i in range(1, 10)},
}
_MOUSE = ("attack", "use", "pickItem")
BUTTONS = (
    *("attack", "back", "drop", "forward"),
    *(f"hotbar.{i}" for i in range(1, 10)),
    *("inventory", "jump", "left", "right", "sneak", "sprint", "use"),
)
_COLUMN = {name: i for i, name in enumerate(BUTTONS)}
_DEGREES_PER_UNIT = 360.0 / 2400.0  # of mouse movement


class Vpt(Converter):
    name = "vpt"
    options_known = frozenset({"resize", "segment"})

    @classmethod
    def recognise(cls, source: Source) -> float:
        names = set(source.files)
        for path in source.files:
            if path.endswith(".mp4") and path[:-4] + ".jsonl" in names:
                with source.open(path[:-4] + ".jsonl") as stream:
                    line = stream.readline(1 << 20)
                if line.strip():
                    return 0.9 if b'"mouse"' in line else 0.0
        return 0.0

    @cached_property
    def _recordings(self) -> list[str]:
        """Names of the recordings, without suffix. One of the two files may be missing."""
        found = sorted({p.rpartition(".")[0] for p in self.source.files if p.endswith((".mp4", ".jsonl"))})
        if not found:
            raise DataError(f"{self.source.url}: there is no file *.mp4 or *.jsonl")
        return found

    def tasks(self) -> list[TaskSpec]:
        shape, problem = None, f"{self.source.url}: there is no video with a frame"
        for name in self._recordings:
            try:
                shape = self._frame_shape(name)
            except DataError as error:
                problem = str(error)
            if shape is not None:
                break
        if shape is None:
            raise DataError(problem)
        fields = (
            field_spec("observation.image", np.uint8, shape, modality="image"),
            field_spec("action.buttons", np.uint8, (len(BUTTONS),), values=2, modality="discrete"),
            field_spec("action.camera", np.float32, (2,), low=(-180.0,), high=(180.0,)),
            field_spec("info.gui", bool, ()),
        )
        return [TaskSpec(self.source.name, fields)]

    def _frame_shape(self, name: str) -> tuple[int, ...] | None:
        """Of the recording's first frame; None if it has no video, or no frame."""
        if not self.source.exists(name + ".mp4"):
            return None
        where = self.source.where(name + ".mp4")
        with (
            self.source.open(name + ".mp4") as stream,
            VideoFrames(stream, where, size=frame_size(self.options)) as video,
        ):
            return next((f.shape for f in video), None)

    def pieces(self) -> list[Piece]:
        return [
            Piece(f"{i:06d}", {"recording": r, "files": [r + ".mp4", r + ".jsonl"]})
            for i, r in enumerate(self._recordings)
        ]

    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        name = piece.data["recording"]
        where = self.source.where(name + ".mp4")
        for path in piece.data["files"]:
            if not self.source.exists(path):
                raise DataError(
                    f"{self.source.where(path)}: is missing; a recording needs both the .mp4 and the .jsonl file"
                )
        ticks = self.source.json_lines(name + ".jsonl")
        if not ticks:
            raise DataError(f"{self.source.where(name + '.jsonl')}: the file has no lines")
        buttons, camera, gui = _actions(ticks, self.source.where(name + ".jsonl"))
        max_steps = whole_number(self.options, "segment") or len(ticks)
        with (
            self.source.open(name + ".mp4") as stream,
            VideoFrames(stream, where, size=frame_size(self.options)) as video,
        ):
            frames = iter(video)
            for number, begin in enumerate(range(0, len(ticks), max_steps)):
                end = min(len(ticks), begin + max_steps)
                rows = (buttons[begin:end], camera[begin:end], gui[begin:end])
                item = attempt(partial(self._episode, name, number, frames, *rows), where)
                if number >= start:
                    yield item
            # The recorder may add one frame at the end, so only a second one is an error.
            if next(frames, None) is not None and next(frames, None) is not None:
                raise DataError(
                    f"{where}: has more frames than {name}.jsonl has lines ({len(ticks)}); the files do not match"
                )

    def _episode(
        self,
        name: str,
        number: int,
        frames: Iterator[np.ndarray],
        buttons: np.ndarray,
        camera: np.ndarray,
        gui: np.ndarray,
    ) -> Episode:
        where = self.source.where(name + ".mp4")
        steps, image, last = len(buttons), None, -1
        for row, frame in enumerate(islice(frames, steps)):
            if image is None:
                image = np.empty(
                    check_shape(
                        (steps, *frame.shape), 1, f"{where} (set the options segment and resize)", EPISODE_BYTES
                    ),
                    np.uint8,
                )
            if frame.shape != image.shape[1:]:
                raise DataError(f"{where}: the frames have different sizes")
            image[row] = frame
            last = row
        if image is None or last != steps - 1:
            raise DataError(f"{where}: has fewer frames than {name}.jsonl has lines; the files do not match")
        fields = {"observation.image": image, "action.buttons": buttons, "action.camera": camera, "info.gui": gui}
        identity = f"{self.source.name}/{name}" + (f"/{number:04d}" if self.options.get("segment") else "")
        return Episode(identity, self.source.name, fields, steps, agent="contractor")


def _actions(ticks: list[dict[str, Any]], where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Buttons uint8 [T, 20]; camera float32 [T, 2]; whether a menu was open, bool [T]."""
    buttons = np.zeros((len(ticks), len(BUTTONS)), np.uint8)
    camera = np.zeros((len(ticks), 2), np.float32)
    gui = np.zeros(len(ticks), bool)
    attack_stuck, slot = False, 0
    for row, tick in enumerate(ticks):
        try:
            mouse, keyboard = tick["mouse"], tick["keyboard"]
            pressed, newly_pressed = list(mouse["buttons"]), list(mouse.get("newButtons") or [])
            if row == 0:
                attack_stuck = pressed == [0]
            elif attack_stuck and 0 in newly_pressed:
                attack_stuck = False
            for number in pressed:
                if number in (0, 1, 2) and not (attack_stuck and number == 0) and _MOUSE[number] in _COLUMN:
                    buttons[row, _COLUMN[_MOUSE[number]]] = 1
            for key in keyboard["keys"]:
                if _KEYS.get(key) in _COLUMN:
                    buttons[row, _COLUMN[_KEYS[key]]] = 1
            moved = np.array([float(mouse["dy"]), float(mouse["dx"])]) * _DEGREES_PER_UNIT
            camera[row] = np.where(np.abs(moved) > 180, 0, moved)  # the cursor jumps when a menu opens
            new_slot = int(tick.get("hotbar", slot))
            if row and new_slot != slot and f"hotbar.{new_slot + 1}" in _COLUMN:
                buttons[row, _COLUMN[f"hotbar.{new_slot + 1}"]] = 1
            slot, gui[row] = new_slot, bool(tick.get("isGuiOpen", False))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{where}, line {row + 1}: not a tick of a VPT recording ({type(error).__name__}: {error})"
            ) from None
    if not np.isfinite(camera).all():
        raise DataError(f"{where}: a mouse movement is not finite")
    return buttons, camera, gui
