"""Reads `features.json` of TensorFlow Datasets, a tree of features, without TensorFlow.

The file is the JSON form of tensorflow_datasets/core/proto/feature.proto.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
    name: str = ""  # of the field, if it is not the usual one

    @property
    def in_steps(self) -> bool:
        return self.path.startswith("steps/")

    @property
    def field(self) -> str:
        """`steps/observation/image_0` -> `observation.image_0`."""
        return self.name or canonical(self.path.removeprefix("steps/").replace("/", "."))


def leaves(node: Mapping[str, Any], path: str, skipped: list[str]) -> Iterator[Feature]:
    """The leaves below a node, whose keys may be in camel or snake case.

    What cannot be read is appended to `skipped`. Raises DataError if a dtype cannot be read.
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
                skipped.append(f"{leaf.path} (a sequence of {leaf.kind}s in one step)")
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
                skipped.append(f"{path} (an array of texts in one step)")
            else:
                yield Feature(path, "text", "str", ())
            return
        if np.dtype(dtype).kind not in "biuf":
            raise DataError(f"feature {path!r} has dtype {dtype!r}, which cannot be read")
        yield Feature(path, "tensor", dtype, shape, str(tensor.get("encoding") or "none").lower())
    else:
        skipped.append(f"{path} (a {kind or 'feature of unknown kind'})")


def _dimensions(shape: Any) -> tuple[int, ...]:
    """`{"dimensions": ["64", "-1"]}` as ints."""
    sizes = tuple(int(d) for d in (shape or {}).get("dimensions", []))
    check_shape([max(s, 0) for s in sizes], 1, "features.json")
    return sizes
