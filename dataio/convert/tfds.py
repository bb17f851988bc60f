"""Reads `features.json` of TensorFlow Datasets, a tree of features, without TensorFlow.

The file is the JSON form of tensorflow_datasets/core/proto/feature.proto. A prepared dataset lies in the folder
NAME/VERSION or NAME/CONFIG/VERSION; `choose_folders` decides which of them are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tiphys.dataio.convert.infer import canonical
from tiphys.dataio.convert.limits import check_shape
from tiphys.dataio.episode import DataError


@dataclass(frozen=True)
class Feature:
    """A leaf of features.json. `shape` is the shape of one step; −1 is a length that varies."""

    path: str
    kind: str  # tensor | image | text
    dtype: str
    shape: tuple[int, ...]
    encoding: str = "none"
    classes: int = 0
    optional: bool = False
    name: str = ""  # of the field, if it is not the usual one

    @property
    def in_steps(self) -> bool:
        return self.path.startswith("steps/")

    @property
    def field(self) -> str:
        """`steps/observation/image_0` -> `observation.image_0`."""
        return self.name or canonical(self.path.removeprefix("steps/").replace("/", "."))


def name_episode_features(features: Sequence[Feature]) -> list[Feature]:
    """The features, in which those of an episode are called `episode.NAME` if NAME belongs to the steps.

    NAME belongs to the steps if a feature of the steps has it, or if its role is one of a step, as for `reward`.
    """
    taken = {f.field for f in features if f.in_steps}
    by_step = ("observation", "action", "reward", "terminated", "truncated", "mask")
    return [
        replace(f, name=f"episode.{f.field}"[:64])
        if not f.in_steps and (f.field in taken or f.field.partition(".")[0] in by_step)
        else f
        for f in features
    ]


@dataclass(frozen=True)
class DatasetFolder:
    """A folder with a features.json, and which dataset it holds."""

    path: str
    name: str
    config: str
    version: str

    @classmethod
    def of(cls, path: str, info: Mapping[str, Any], source: str) -> DatasetFolder:
        """From dataset_info.json; what it lacks is taken from the path, or from the name of the source."""
        parts = [p for p in path.split("/") if p]
        version = parts.pop() if parts and re.fullmatch(r"\d+\.\d+\.\d+", parts[-1]) else ""
        return cls(
            path,
            str(info.get("name") or (parts[0] if parts else source)),
            str(info.get("configName") or info.get("config_name") or (parts[1] if len(parts) == 2 else "")),
            str(info.get("version") or version),
        )


def choose_folders(folders: Sequence[DatasetFolder], options: Mapping[str, Any], where: str) -> list[str]:
    """The paths of the folders to read: of each dataset one config and one version.

    options   `config` and `version` choose one: a text for all datasets of the source, or {name of a dataset: text}

    Raises DataError that lists what there is, if more than one remains, or none has what an option names.
    """
    out: list[str] = []
    for name in dict.fromkeys(f.name for f in folders):
        rest = [f for f in folders if f.name == name]
        for key in ("config", "version"):
            wanted = options.get(key)
            wanted = wanted.get(name) if isinstance(wanted, Mapping) else wanted
            if wanted is None:
                continue
            there = sorted({getattr(f, key) for f in rest})
            rest = [f for f in rest if getattr(f, key) == str(wanted)]
            if not rest:
                raise DataError(
                    f"{where}: options: {key} {wanted!r}: dataset {name!r} has {', '.join(there) or 'none'}"
                )
        if len(rest) > 1:
            raise DataError(_several(name, rest, where))
        out.append(rest[0].path)
    return out


def _several(name: str, folders: Sequence[DatasetFolder], where: str) -> str:
    for key in ("config", "version"):
        there = sorted({getattr(f, key) for f in folders})
        if len(there) > 1:
            return (
                f"{where}: dataset {name!r} has the {key}s {', '.join(there)}; choose one in the mapping file "
                f"(`options: {{{key}: {there[-1]}}}`), or convert the folder of one"
            )
    paths = ", ".join(f.path or "." for f in folders)
    return f"{where}: dataset {name!r} is there more than once, in the folders {paths}; convert one of them"


def leaves(node: Mapping[str, Any], path: str, skipped: list[str]) -> Iterator[Feature]:
    """The leaves below a node, whose keys may be in camel or snake case.

    What cannot be read is appended to `skipped`.
    """

    def get(camel: str) -> Any:
        return node.get(camel, node.get(re.sub(r"([A-Z])", lambda m: "_" + m.group(1).lower(), camel)))

    kind = str(get("pythonClassName") or "").rpartition(".")[2]
    if get("featuresDict") is not None:
        for key, child in sorted(get("featuresDict")["features"].items()):
            yield from leaves(child, f"{path}/{key}" if path else key, skipped)
    elif get("sequence") is not None:
        inner, length = get("sequence")["feature"], int(get("sequence").get("length") or -1)
        if path == "steps" or kind == "Dataset":
            yield from leaves(inner, path, skipped)
            return
        for leaf in leaves(inner, path, skipped):
            if leaf.kind == "tensor" and leaf.encoding == "none":
                yield Feature(leaf.path, leaf.kind, leaf.dtype, (length, *leaf.shape), leaf.encoding, leaf.classes)
            else:
                kind = "encoded tensor" if leaf.kind == "tensor" else leaf.kind
                skipped.append(f"{leaf.path} (a sequence of {kind}s in one {_scope(leaf.path)})")
    elif get("image") is not None:
        image = get("image")
        yield Feature(path, "image", str(image.get("dtype") or "uint8"), _dimensions(image.get("shape")))
    elif get("text") is not None or kind == "Text":
        yield Feature(path, "text", "str", ())
    elif get("classLabel") is not None:
        yield Feature(path, "tensor", "int64", (), classes=int(get("classLabel").get("numClasses") or 0))
    elif get("tensor") is not None:
        tensor = get("tensor")
        dtype, shape = str(tensor.get("dtype")), _dimensions(tensor.get("shape"))
        if dtype in ("string", "str", "object"):
            if shape:
                skipped.append(f"{path} (an array of texts in one {_scope(path)})")
            else:
                yield Feature(path, "text", "str", (), optional=bool(tensor.get("optional")))
        elif not _is_number(dtype):
            skipped.append(f"{path} (its dtype {dtype} cannot be read)")
        else:
            encoding = str(tensor.get("encoding") or "none").lower()
            yield Feature(path, "tensor", dtype, shape, encoding, optional=bool(tensor.get("optional")))
    else:
        skipped.append(f"{path} (a {kind or 'feature of unknown kind'})")


def _scope(path: str) -> str:
    return "step" if path.startswith("steps/") else "episode"


def _is_number(dtype: str) -> bool:
    try:
        return np.dtype(dtype).kind in "biuf"
    except TypeError:
        return False


def _dimensions(shape: Any) -> tuple[int, ...]:
    """`{"dimensions": ["64", "-1"]}` as ints."""
    sizes = tuple(int(d) for d in (shape or {}).get("dimensions", []))
    check_shape([max(s, 0) for s in sizes], 1, "features.json")
    return sizes
