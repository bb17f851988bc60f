"""Zarr replay buffers of Diffusion Policy: arrays `data/NAME` over all steps, cut at `meta/episode_ends`.

https://github.com/real-stanford/diffusion_policy, `replay_buffer.py`. A folder or a `.zarr.zip`, Zarr 2 or 3. Only codecs
that decode bytes are allowed: no pickles, no objects. If an array has the metadata of both versions, version 3 counts, as
in the zarr library.

Instructions are texts of an episode. They come from `meta/NAME` with one text for each episode, and from attributes of the
groups. Other values of `meta/` with one value for each episode go into the episode's `info`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from tiphys.dataio.convert.converter import Converter, Item, Piece, read_each
from tiphys.dataio.convert.infer import canonical, channels_last, is_image_shape, is_text_name, texts
from tiphys.dataio.convert.limits import EPISODE_STEPS, FIELDS, check_shape
from tiphys.dataio.convert.source import Source
from tiphys.dataio.convert.zarr_files import (
    Files,
    check_metadata,
    holds_texts,
    is_group,
    read_attributes,
    read_metadata,
    zarr_store,
)
from tiphys.dataio.episode import DataError, Episode

_IMAGE_NAME = re.compile(r"(img|image|rgb|camera)")
_PIECE_BYTES = 512 << 20  # approximate size of a piece, decoded


class Zarr(Converter):
    name = "zarr"
    archives = (".zip",)

    @classmethod
    def recognise(cls, source: Source) -> float:
        if source.single:
            return 0.9 if source.single.endswith(".zarr.zip") else 0.0
        return 1.0 if any(re.search(r"(^|/)meta/episode_ends/(\.zarray|zarr\.json)$", p) for p in source.files) else 0.0

    @cached_property
    def _files(self) -> Files:
        return Files(self.source)

    @cached_property
    def _root(self) -> str:
        """The folder of the Zarr group; '' if it is the source itself."""
        pattern = re.compile(r"(.*?)/?meta/episode_ends/(?:\.zarray|zarr\.json)")
        found = list({m.group(1) for p in self._files.names if (m := pattern.fullmatch(p))})
        if len(found) != 1:
            raise DataError(
                f"{self.source.url}: there are {len(found)} arrays meta/episode_ends, but one replay buffer is expected"
            )
        return found[0]

    def _path(self, name: str) -> str:
        return "/".join(p for p in (self._root, name) if p)

    def _arrays(self, folder: str) -> list[str]:
        """The names of the arrays below a folder of the group."""
        prefix = f"{self._path(folder)}/".removeprefix("/")
        pattern = re.compile(re.escape(prefix) + r"(.+)/(?:\.zarray|zarr\.json)")
        found = {m.group(1) for p in self._files.names if (m := pattern.fullmatch(p))}
        return sorted(n for n in found if not is_group(self._files, prefix + n, self.source.url))

    def _array(self, name: str) -> Any:
        import zarr

        where = f"{self.source.url}, {name}"
        path = self._path(name)
        version, metadata = read_metadata(self._files, path, where)
        check_metadata(version, metadata, where)
        try:
            return zarr.open_array(zarr_store(self._files), path=path, mode="r", zarr_format=version)
        except DataError:
            raise
        except Exception as error:  # zarr raises whatever its metadata parsers and codecs do
            raise DataError(f"{where}: not a readable Zarr array ({type(error).__name__}: {error})") from None

    def _read(self, array: Any, start: int, stop: int, where: str) -> np.ndarray:
        check_shape((stop - start, *array.shape[1:]), array.dtype.itemsize, where)
        try:
            value = np.asarray(array[start:stop])
        except DataError:
            raise
        except Exception as error:  # as above
            raise DataError(f"{where}: cannot be decoded ({type(error).__name__}: {error})") from None
        if value.dtype.kind in "UTO":
            return texts(value.reshape(-1).tolist(), where).reshape(value.shape)
        return value.astype(value.dtype.newbyteorder("="), copy=False)

    @cached_property
    def _ends(self) -> np.ndarray:
        array = self._array("meta/episode_ends")
        where = f"{self.source.url}, meta/episode_ends"
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise DataError(f"{where}: must be a one-dimensional array of integers")
        ends = self._read(array, 0, int(array.shape[0]), where).astype(np.int64)
        if not len(ends) or bool(np.any(np.diff(ends, prepend=0) <= 0)):
            raise DataError(f"{where}: the row numbers must be positive and ascend")
        return ends

    @cached_property
    def _names(self) -> dict[str, str]:
        """Name in the source -> field: `NAME` of arrays in data/, `meta/NAME` of texts by episode, `@NAME` of attributes."""
        usual = {}
        for key in self._arrays("data"):
            name = canonical(key.replace("/", "."))
            _, metadata = read_metadata(self._files, self._path(f"data/{key}"), f"{self.source.url}, data/{key}")
            keep = name.partition(".")[0] in ("observation", "action", "reward", "terminated", "truncated")
            if not keep and not (holds_texts(metadata) and is_text_name(key)):
                name = f"observation.{name}"
            usual[key] = name
        usual |= {f"meta/{k}": canonical(k) for k, v in self._by_episode.items() if _is_text(v) and is_text_name(k)}
        usual |= {source: canonical(source.rpartition("@")[2]) for source in self._texts}
        return self.names.fields(usual, self.source.url)

    @cached_property
    def _columns(self) -> dict[str, Any]:
        """Name in the source -> array with one row per step."""
        names = [n for n in self._arrays("data") if n in self._names]
        if not names or len(names) > FIELDS:
            raise DataError(
                f"{self.source.url}: there are {len(names)} arrays under data/; 1 to {FIELDS:,} are expected"
            )
        arrays = {n: self._array(f"data/{n}") for n in names}
        rows = int(self._ends[-1])
        for name, array in arrays.items():
            if not array.shape or array.shape[0] < rows:
                raise DataError(
                    f"{self.source.url}, data/{name}: shape {array.shape} has fewer than the {rows:,} rows of episode_ends"
                )
        return arrays

    @cached_property
    def _by_episode(self) -> dict[str, np.ndarray]:
        """Arrays `meta/NAME` with one number or text for each episode."""
        out = {}
        for name in self._arrays("meta"):
            if name == "episode_ends":
                continue
            try:
                array = self._array(f"meta/{name}")
                if array.shape != (len(self._ends),):
                    raise DataError(f"shape {array.shape}, not one value for each of {len(self._ends):,} episodes")
                out[name] = self._read(array, 0, len(self._ends), f"{self.source.url}, meta/{name}")
            except DataError as error:
                self.leave_out(f"meta/{name}", str(error).removeprefix(f"{self.source.url}, meta/{name}: "))
        return out

    @cached_property
    def _texts(self) -> dict[str, str]:
        """Texts in the attributes of the groups, which hold for all episodes: `@NAME` or `data@NAME` -> text."""
        out = {}
        for group in ("", "data", "meta"):
            for name, value in read_attributes(self._files, self._path(group), self.source.url).items():
                if isinstance(value, str) and is_text_name(name):
                    out[f"{group}@{name}"] = value
                else:
                    self.leave_out(f"{group or 'root'}, attribute {name}", "describes the file, not an episode")
        for path in self._arrays(""):
            if path.partition("/")[0] not in ("data", "meta"):
                self.leave_out(path, "outside of data/ and meta/")
        return out

    def pieces(self) -> list[Piece]:
        row = sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in self._columns.values())
        bounds = [0, *self._ends.tolist()]
        out: list[Piece] = []
        first = 0
        for number in range(1, len(bounds)):
            if (bounds[number] - bounds[first]) * row >= _PIECE_BYTES or number == len(bounds) - 1:
                out.append(
                    Piece(f"{len(out):06d}", {"first": first, "bounds": bounds[first : number + 1], "files": []})
                )
                first = number
        return out

    def versions(self, piece: Piece) -> list[str]:
        return self._files.versions()

    def episodes(self, piece: Piece, start: int = 0) -> Iterator[Item]:
        first, bounds = piece.data["first"], piece.data["bounds"]

        def where(i: int) -> str:
            return f"{self.source.url}, episode {first + i} (rows {bounds[i]}–{bounds[i + 1]})"

        yield from read_each(
            range(len(bounds) - 1), lambda i: self._episode(first + i, bounds[i], bounds[i + 1], where(i)), where, start
        )

    def _episode(self, number: int, begin: int, end: int, where: str) -> Episode:
        if end - begin > EPISODE_STEPS:
            raise DataError(f"{where}: {end - begin:,} steps; the limit is {EPISODE_STEPS:,}")
        fields: dict[str, Any] = {}
        for key, name in self._names.items():
            if key in self._texts:
                fields[name] = self._texts[key]
            elif key not in self._columns:
                fields[name] = str(self._by_episode[key.removeprefix("meta/")][number])
        for key, array in self._columns.items():
            name = self._names[key]
            value = self._read(array, begin, end, f"{where}, data/{key}")
            if name in ("reward", "terminated", "truncated"):
                value = value.reshape(end - begin)
            if name in ("terminated", "truncated"):
                value = value.astype(bool)
            fields[name] = channels_last(_as_image(value, key, f"{where}, data/{key}"))
        rest = {k: v[number] for k, v in self._by_episode.items() if not (_is_text(v) and is_text_name(k))}
        info = {k: v if isinstance(v, str) else v.item() for k, v in rest.items()}
        return Episode(f"{self.source.name}/{number:06d}", self.source.name, fields, end - begin, info=info)


def _is_text(array: np.ndarray) -> bool:
    return array.dtype.kind == "T"


def _as_image(value: np.ndarray, key: str, where: str) -> np.ndarray:
    """Images stored as floats from 0 to 255 (as in PushT) as uint8; other values as they are.

    Raises DataError if an image holds other values, such as fractions.
    """
    if value.dtype.kind != "f" or value.ndim != 4 or not is_image_shape(value.shape[1:]) or not _IMAGE_NAME.search(key):
        return value
    with np.errstate(invalid="ignore"):
        out = value.astype(np.uint8)
    if not bool(np.all(out == value)):
        raise DataError(f"{where}: images of {value.dtype} must hold whole numbers from 0 to 255")
    return out
