"""Loads a policy's model and processor, and says which device it can be on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tiphys.dataio.episode import DataError
from tiphys.dataio.private import read_regular
from tiphys.paths import expand
from tiphys.pretrain.acting.processor import Processor

if TYPE_CHECKING:
    from tiphys.pretrain.model.transformer import DecisionModel

PROCESSOR = "processor.json"
_PROCESSOR_BYTES = 256 << 20  # most bytes of processor.json


def load_model(folder: str | Path, device: str) -> DecisionModel:
    """The model of a policy, on a device. Arguments and errors are those of `Policy.load`."""
    from importlib import import_module

    from transformers.utils import logging

    from tiphys.pretrain.model.transformer import DecisionModel

    logging.disable_progress_bar()  # an evaluation loads the policy in each of its worker processes
    published = "://" in str(folder) or (Path(expand(folder)) / "latest.json").is_file()
    if published:  # a policy's own code has no stores, so this module is not among its imports
        folder = import_module("tiphys.pretrain.policy_files").local_policy(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    folder = expand(folder)
    _check_kind(Path(folder))
    try:
        model: Any = DecisionModel.from_pretrained(folder, **_placement(device))
    except (OSError, MemoryError, torch.OutOfMemoryError, DataError):
        raise
    except Exception as error:  # transformers and safetensors raise errors of many classes
        said = " ".join(str(error).split())[:300]
        raise DataError(
            f"{folder}: its weights or its config.json are damaged, or do not belong together ({said})"
        ) from error
    return model if device == "auto" else model.to(device)


def load_processor(model: DecisionModel) -> Processor:
    """The processor beside the weights of a loaded model. Errors are those of `Policy.of`."""
    from transformers.utils import cached_file

    revision = getattr(model.config, "_commit_hash", None)
    file = cached_file(str(model.name_or_path), PROCESSOR, revision=revision)
    assert file is not None  # it raises if there is none
    data = read_regular(file, _PROCESSOR_BYTES)
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: is not valid JSON: {error}") from None
    try:
        processor = Processor.from_dict(values)
    except DataError as error:
        raise DataError(f"{Path(file).parent}: {error}") from None
    if processor.vocabulary.size != model.config.vocab_size:
        raise DataError(f"{file}: its vocabulary has {processor.vocabulary.size} ids, that of the model another number")
    return processor


def draws_by_default(model: DecisionModel) -> bool:
    """Whether the recipe of a policy evaluates it with drawn actions."""
    about = getattr(model.config, "tiphys", None)
    return isinstance(about, dict) and about.get("sample") is True


def _placement(device: str) -> dict[str, Any]:
    """Options of `from_pretrained`. Most CPUs compute several times as slowly in bf16 as in float32."""
    if device == "auto":
        return {"device_map": device}
    return {"dtype": torch.float32} if torch.device(device).type == "cpu" else {}


def check_device(name: str) -> None:
    """Raises DataError if there is no such torch device. "" and "auto" are always valid."""
    if name in ("", "auto"):
        return
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DataError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DataError(f"device {name!r}: this machine has {torch.cuda.device_count()} GPUs that torch can use")


def _check_kind(folder: Path) -> None:
    """Raises DataError if a local folder holds another kind of model. A damaged config.json is left to transformers."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(config, dict) or config.get("model_type") != "tiphys":
        found = config.get("model_type") if isinstance(config, dict) else None
        raise DataError(f"{folder}: not a policy of Tiphys; its config.json has model_type {found!r}, not 'tiphys'")
