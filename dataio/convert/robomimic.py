"""robomimic HDF5: `data/demo_k` with obs, next_obs, actions, rewards, dones, states; `mask/NAME` lists demonstrations.

https://robomimic.github.io/docs/datasets/overview.html. The masks of an episode (train, valid, 20_percent, …) are stored
in its `info`. With the option `mask: NAME` only the demonstrations of that mask are converted.

Instructions are texts of an episode. They come from attributes and from single texts beside the arrays, of a
demonstration or of `data`, and from JSON in the attributes `ep_meta` (robocasa), `problem_info` (LIBERO) and `env_args`.
What a demonstration states counts more than what its file states.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from tiphys.dataio.convert import hdf5
from tiphys.dataio.convert.converter import Converter, Item, Piece, read_each
from tiphys.dataio.convert.infer import canonical, channels_last, is_text_name, language
from tiphys.dataio.convert.limits import EPISODE_STEPS, parse_json
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError, Episode

_PIECE_BYTES = 256 << 20  # approximate size of a piece
_JSON_ATTRIBUTES = ("env_args", "problem_info", "ep_meta")  # the last one counts most
_OF_DATA = {"env_args", "env_name", "problem_info", "total", "num_demos"}  # used, or counts of what is in the file
_INFO_CHARACTERS = 4096  # of an attribute; a longer one does not go into `info`


@dataclass(frozen=True)
class Contents:
    """What one file holds.

    masks  demonstration -> its masks
    texts  field -> (name in the source, text), for all demonstrations of the file
    """

    task: str
    demos: list[str]
    masks: dict[str, list[str]]
    texts: dict[str, tuple[str, str]]


class Robomimic(Converter):
    name = "robomimic"
    options_known = frozenset({"mask"})

    @classmethod
    def recognise(cls, source: Source) -> float:
        for path in hdf5.hdf5_files(source):
            if hdf5.is_hdf5(source, path):
                with hdf5.open_hdf5(source, path) as file:
                    data = hdf5.member(file, "data", source.where(path)) if hdf5.has(file, "data") else {}
                    return 1.0 if hasattr(data, "keys") and any(n.startswith("demo") for n in data) else 0.0
        return 0.0

    @cached_property
    def _files(self) -> list[str]:
        found = hdf5.hdf5_files(self.source)
        if not found:
            raise DataError(f"{self.source.url}: there is no file *.hdf5 or *.h5")
        return found

    @cached_property
    def _contents(self) -> dict[str, Contents]:
        out = {}
        for path in self._files:
            where = self.source.where(path)
            with hdf5.open_hdf5(self.source, path) as file:
                data = hdf5.member(file, "data", where)
                demos = [n for n in hdf5.names(data) if hasattr(hdf5.member(data, n, where), "keys")]
                masks = self._masks(file, where)
                for name in [n for n in hdf5.names(file) if n not in ("data", "mask")]:
                    self.leave_out(name, "outside of `data`")
                attributes = hdf5.attributes(data, where)
            wanted = self.options.get("mask")
            if wanted is not None:
                demos = [d for d in demos if wanted in masks.get(d, [])]
                if not demos:
                    raise DataError(f"{where}: no demonstration has the mask {wanted!r}")
            arguments = _json(attributes, "env_args", where)
            task = str(arguments.get("env_name") or "") or self.source.name
            texts, rest = _texts(attributes, where)
            for name in sorted(rest.keys() - _OF_DATA):
                self.leave_out(f"data, attribute {name}", "describes the file, not an episode")
            out[path] = Contents(task, demos, masks, texts)
        return out

    def _masks(self, file: Any, where: str) -> dict[str, list[str]]:
        """Demonstration -> its masks."""
        masks: dict[str, list[str]] = {}
        if hdf5.has(file, "mask"):
            for mask, dataset in hdf5.datasets(hdf5.member(file, "mask", where), where).items():
                for demo in hdf5.read(dataset, f"{where}, mask/{mask}").reshape(-1).tolist():
                    masks.setdefault(str(demo), []).append(mask)
        return masks

    def pieces(self) -> list[Piece]:
        out: list[Piece] = []
        for path, contents in self._contents.items():
            demos = contents.demos
            each = max(1, int(_PIECE_BYTES * len(demos) / max(self.source.size(path), 1)))
            for first in range(0, len(demos), each):
                out.append(Piece(f"{len(out):06d}", {"files": [path], "demos": demos[first : first + each]}))
        return out

    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        path = piece.data["files"][0]
        contents = self._contents[path]
        where = self.source.where(path)
        with hdf5.open_hdf5(self.source, path) as file:
            data = hdf5.member(file, "data", where)
            yield from read_each(
                piece.data["demos"],
                lambda demo: self._read(data, demo, path, contents, f"{where}, data/{demo}"),
                lambda demo: f"{where}, data/{demo}",
                start,
            )

    def _read(self, data: Any, demo: str, path: str, contents: Contents, where: str) -> Episode:
        group = hdf5.member(data, demo, where)
        found = hdf5.datasets(group, where)
        if "actions" not in found:
            raise DataError(f"{where}: there is no dataset `actions`")
        steps = hdf5.length(found["actions"], f"{where}, actions")
        if not 0 < steps <= EPISODE_STEPS:
            raise DataError(f"{where}: {steps:,} actions; an episode has 1 to {EPISODE_STEPS:,}")
        texts, info = _texts(hdf5.attributes(group, where), where)
        texts = contents.texts | texts
        info = self._info(info)
        usual: dict[str, str] = {}
        for key, dataset in found.items():
            if key.startswith("next_obs."):
                continue
            if dataset.shape and dataset.shape[0] == steps:
                usual[key] = _usual_name(key, dataset)
            elif dataset.shape == () and hdf5.is_text(dataset) and is_text_name(key):
                texts[canonical(key)] = (key, str(hdf5.read(dataset, f"{where}, {key}")))
            else:
                self.leave_out(key, "not an array with one row per action")
        usual |= {source: field for field, (source, _) in texts.items()}
        values = dict(texts.values())
        names = self.names.fields(usual, where)
        fields: dict[str, Any] = {}
        for key, name in names.items():
            if key in values:
                fields[name] = values[key]
                continue
            value = channels_last(hdf5.read(found[key], f"{where}, {key}"))
            if name in ("reward", "terminated"):
                value = value.reshape(steps)
            fields[name] = value.astype(bool) if name == "terminated" else value
        for key, dataset in found.items():
            observed = "obs." + key.removeprefix("next_obs.")
            if key.startswith("next_obs.") and observed in names:
                name = names[observed]
                last = channels_last(hdf5.read(dataset, f"{where}, {key}", steps - 1, steps))
                if last.shape != (1, *fields[name].shape[1:]):
                    raise DataError(f"{where}: the rows of {key} and of the same key under obs have different shapes")
                fields[name] = np.concatenate([fields[name], last.astype(fields[name].dtype)])
            elif key.startswith("next_obs.") and observed not in found:
                self.leave_out(key, "there is no array of this name under `obs`")
        masks = contents.masks.get(demo, [])
        if masks:
            info["masks"] = masks
        task = contents.task
        identity = f"{task}/{demo}" if len(self._files) == 1 else f"{task}/{path}/{demo}"
        return Episode(id=identity, task=task, fields=fields, steps=steps, info=info)

    def _info(self, attributes: dict[str, Any]) -> dict[str, Any]:
        """The attributes of a demonstration that are small enough for `info`."""
        out = {}
        for name, value in attributes.items():
            if value is None or len(str(value)) > _INFO_CHARACTERS:
                reason = "of an unsupported kind" if value is None else f"over {_INFO_CHARACTERS:,} characters"
                self.leave_out(f"attribute {name} of the demonstrations", reason)
            elif name != "num_samples":
                out[name] = value
        return out


def _usual_name(key: str, dataset: Any) -> str:
    name = canonical(key)
    head = name.partition(".")[0]
    if head in ("observation", "action", "reward", "terminated") and not key.startswith("states"):
        return name
    # the state of the simulator, other forms of the actions
    return name if hdf5.is_text(dataset) and is_text_name(key) else f"info.{key}"


def _texts(attributes: dict[str, Any], where: str) -> tuple[dict[str, tuple[str, str]], dict[str, Any]]:
    """The texts in attributes (field -> name in the source, text), and the other attributes."""
    out: dict[str, tuple[str, str]] = {}
    for name in _JSON_ATTRIBUTES:
        for key, text in language(_json(attributes, name, where)).items():
            out[canonical(key) if is_text_name(key) else "instruction"] = (f"{name}.{key}", text)
    direct = {k: v for k, v in attributes.items() if isinstance(v, str) and is_text_name(k)}
    out |= {canonical(k): (k, v) for k, v in direct.items()}
    return out, {k: v for k, v in attributes.items() if k not in direct}


def _json(attributes: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """The JSON object in an attribute; empty if there is none."""
    text = attributes.get(name)
    found = parse_json(text, f"{where}, {name}") if isinstance(text, str) and text else {}
    return found if isinstance(found, dict) else {}
