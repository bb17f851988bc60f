"""robomimic HDF5: `data/demo_k` with obs, next_obs, actions, rewards, dones, states; `mask/NAME` lists demonstrations.

https://robomimic.github.io/docs/datasets/overview.html. The masks of an episode (train, valid, 20_percent, …) are stored
in its `info`. With the option `mask: NAME` only the demonstrations of that mask are converted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from tiphys.dataio.casting import checked_cast, checked_flags
from tiphys.dataio.convert import hdf5
from tiphys.dataio.convert.converter import Converter, Item, Piece, read_each
from tiphys.dataio.convert.infer import canonical, channels_last
from tiphys.dataio.convert.limits import EPISODE_STEPS, parse_json
from tiphys.dataio.convert.source import Source
from tiphys.dataio.episode import DataError, Episode

_PIECE_BYTES = 256 << 20  # approximate size of a piece


class Robomimic(Converter):
    name = "robomimic"
    options_known = frozenset({"mask"})

    @classmethod
    def recognise(cls, source: Source) -> float:
        for path in hdf5.hdf5_files(source):
            if hdf5.is_hdf5(source, path):
                with hdf5.open_hdf5(source, path) as file:
                    if "data" not in file or not hasattr(file["data"], "keys"):
                        return 0.0
                    return 1.0 if any(n.startswith("demo") for n in file["data"]) else 0.0
        return 0.0

    @cached_property
    def _files(self) -> list[str]:
        found = hdf5.hdf5_files(self.source)
        if not found:
            raise DataError(f"{self.source.url}: there is no file *.hdf5 or *.h5")
        return found

    @cached_property
    def _contents(self) -> dict[str, tuple[str, list[str], dict[str, list[str]]]]:
        """file -> (task, names of the demonstrations, demonstration -> its masks)."""
        out = {}
        for path in self._files:
            where = self.source.where(path)
            with hdf5.open_hdf5(self.source, path) as file:
                data = hdf5.member(file, "data", where)
                demos = [n for n in hdf5.names(data) if hasattr(hdf5.member(data, n, where), "keys")]
                masks: dict[str, list[str]] = {}
                if "mask" in file:
                    for mask, dataset in hdf5.datasets(hdf5.member(file, "mask", where), where).items():
                        for demo in hdf5.read(dataset, f"{where}, mask/{mask}").reshape(-1).tolist():
                            masks.setdefault(str(demo), []).append(mask)
                arguments = hdf5.attribute(data, "env_args")
                known = parse_json(arguments, f"{where}, env_args") if isinstance(arguments, str) else {}
            wanted = self.options.get("mask")
            if wanted is not None:
                demos = [d for d in demos if wanted in masks.get(d, [])]
                if not demos:
                    raise DataError(f"{where}: no demonstration has the mask {wanted!r}")
            task = str(known.get("env_name") or "") if isinstance(known, dict) else ""
            out[path] = (task or self.source.name, demos, masks)
        return out

    def pieces(self) -> list[Piece]:
        out: list[Piece] = []
        for path, (_, demos, _) in self._contents.items():
            each = max(1, int(_PIECE_BYTES * len(demos) / max(self.source.size(path), 1)))
            for first in range(0, len(demos), each):
                out.append(Piece(f"{len(out):06d}", {"files": [path], "demos": demos[first : first + each]}))
        return out

    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        path = piece.data["files"][0]
        task, _, masks = self._contents[path]
        where = self.source.where(path)
        with hdf5.open_hdf5(self.source, path) as file:
            data = hdf5.member(file, "data", where)
            yield from read_each(
                piece.data["demos"],
                lambda demo: self._read(data, demo, task, path, masks.get(demo, []), f"{where}, data/{demo}"),
                lambda demo: f"{where}, data/{demo}",
                start,
            )

    def _read(self, data: Any, demo: str, task: str, path: str, masks: list[str], where: str) -> Episode:
        group = hdf5.member(data, demo, where)
        found = hdf5.datasets(group, where)
        if "actions" not in found:
            raise DataError(f"{where}: there is no dataset `actions`")
        steps = hdf5.length(found["actions"], f"{where}, actions")
        if not 0 < steps <= EPISODE_STEPS:
            raise DataError(f"{where}: {steps:,} actions; an episode has 1 to {EPISODE_STEPS:,}")
        fields: dict[str, Any] = {}
        for key, dataset in found.items():
            if key.startswith("next_obs.") or not dataset.shape or dataset.shape[0] != steps:
                continue
            value = channels_last(hdf5.read(dataset, f"{where}, {key}"))
            name = canonical(key)
            if name.partition(".")[0] not in ("observation", "action", "reward", "terminated") or key.startswith(
                "states"
            ):
                name = f"info.{key}"  # the state of the simulator, other forms of the actions
            if name in ("reward", "terminated"):
                value = value.reshape(steps)
            fields[name] = checked_flags(value, f"{where}, {key}") if name == "terminated" else value
        for key, dataset in found.items():
            name = "observation." + key.removeprefix("next_obs.")
            if key.startswith("next_obs.") and name in fields:
                last = channels_last(hdf5.read(dataset, f"{where}, {key}", steps - 1, steps))
                if last.shape != (1, *fields[name].shape[1:]):
                    raise DataError(f"{where}: the rows of {key} and of the same key under obs have different shapes")
                fields[name] = np.concatenate([fields[name], checked_cast(last, fields[name].dtype, f"{where}, {key}")])
        episode_metadata = hdf5.attribute(group, "ep_meta")
        meta = parse_json(episode_metadata, f"{where}, ep_meta") if isinstance(episode_metadata, str) else {}
        if isinstance(meta, dict) and isinstance(meta.get("lang"), str):
            fields["instruction"] = meta["lang"]
        identity = f"{task}/{demo}" if len(self._files) == 1 else f"{task}/{path}/{demo}"
        return Episode(id=identity, task=task, fields=fields, steps=steps, info={"masks": masks} if masks else {})
