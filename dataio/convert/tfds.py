"""`features.json` of TensorFlow Datasets: the leaves of its tree, without TensorFlow.

tensorflow_datasets/core/proto/feature.proto, in its JSON form.
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
    """A leaf of features.json. `shape` is that of one step; −1 stands for a length that varies."""

    path: str
    kind: str  # tensor | image | text
    dtype: str
    shape: tuple[int, ...]
    encoding: str = "none"
    classes: int = 0

    @property
    def in_steps(self) -> bool:
        return self.path.startswith("steps/")

    @property
    def field(self) -> str:
        """`steps/observation/image_0` -> `observation.image_0`."""
        return canonical(self.path.removeprefix("steps/").replace("/", "."))


def leaves(node: Mapping[str, Any], path: str, left_out: list[str]) -> Iterator[Feature]:
    """The leaves below a node of the JSON form of tensorflow_datasets' feature.proto (camel or snake case)."""

    def get(camel: str) -> Any:
        return node.get(camel, node.get(re.sub(r"([A-Z])", lambda m: "_" + m.group(1).lower(), camel)))

    kind = str(get("pythonClassName") or "").rpartition(".")[2]
    if get("featuresDict") is not None:
        for key, child in sorted(get("featuresDict")["features"].items()):
            yield from leaves(child, f"{path}/{key}" if path else key, left_out)
    elif get("sequence") is not None:
        inner, length = get("sequence")["feature"], int(get("sequence").get("length") or -1)
        if path == "steps" or kind == "Dataset":
            yield from leaves(inner, path, left_out)
            return
        for leaf in leaves(inner, path, left_out):
            if leaf.kind == "tensor" and leaf.encoding == "none":
                yield Feature(leaf.path, leaf.kind, leaf.dtype, (length, *leaf.shape), leaf.encoding, leaf.classes)
            else:
                left_out.append(f"{leaf.path} (a sequence of {leaf.kind}s within a step)")
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
                left_out.append(f"{path} (an array of texts within a step)")
            else:
                yield Feature(path, "text", "str", ())
            return
        if np.dtype(dtype).kind not in "biuf":
            raise DataError(f"feature {path!r} has dtype {dtype!r}, which is not read")
        yield Feature(path, "tensor", dtype, shape, str(tensor.get("encoding") or "none").lower())
    else:
        left_out.append(f"{path} (a {kind or 'feature of unknown kind'})")


def _dimensions(shape: Any) -> tuple[int, ...]:
    """`{"dimensions": ["64", "-1"]}` as ints; −1 for one that varies."""
    sizes = tuple(int(d) for d in (shape or {}).get("dimensions", []))
    check_shape([max(s, 0) for s in sizes], 1, "features.json")
    return sizes
