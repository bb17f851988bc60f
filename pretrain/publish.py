"""A policy in the Hugging Face format (a folder that acts without Tiphys installed), and its publication to a bucket or a hub.

config.json (with auto_map)   model.safetensors   processor.json   *.py (source code of the model and the policy)
recipe.yaml                   evaluation.json     README.md (model card)
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.atomic import atomic_path, finite, to_json, write_json
from tiphys.dataio.episode import DataError
from tiphys.paths import expand, local
from tiphys.plain_yaml import dump
from tiphys.pretrain.follow.chain import STEPS
from tiphys.pretrain.follow.hub import PublishError, publish_to_hub
from tiphys.pretrain.follow.writer import How, mark_final, publish_to_store
from tiphys.pretrain.sources import code_files

if TYPE_CHECKING:
    import torch

    from tiphys.dataio.storage import Store
    from tiphys.pretrain.model.config import DecisionConfig

__all__ = ["How", "PublishError", "add_evaluation", "is_policy", "policy_files", "publish", "save_policy", "say_final"]
CONFIG, PROCESSOR, RECIPE, EVALUATION, CARD = (
    "config.json",
    "processor.json",
    "recipe.yaml",
    "evaluation.json",
    "README.md",
)


_LARGEST_FILE = 1 << 30  # bytes of one file of weights, unless a tensor is larger: what an export holds in memory

# The files that `save_policy` writes: names that mean nothing in a glob
_POLICY_FILE = re.compile(
    r"(config|processor|evaluation|model\.safetensors\.index)\.json|recipe\.yaml|README\.md|LICENSE|\w+\.py|model[\w-]*\.safetensors"
)


def save_policy(
    folder: str | Path,
    weights: Mapping[str, torch.Tensor],
    config: DecisionConfig,
    processor: Mapping[str, Any],
    *,
    recipe: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    step: int = 0,
    recipe_digest: str = "",
    license: str = "",
    averaged: bool = False,
) -> Path:
    """Write a policy's folder, whole or not at all. It replaces a policy that is already there.

    Parameters
    ----------
    folder : str or Path
        The folder to write.
    weights : mapping of str to Tensor
        All weights, under the names of `DecisionModel.state_dict()`, in any floating type. A mapping that reads a tensor when it
        is asked for (`tiphys.pretrain.checkpoint_weights.SavedWeights`) keeps at most one file of weights in memory.
    config : DecisionConfig
        Shape of the model.
    processor : mapping
        `Objectives.processor()`.
    recipe : mapping, optional
        The resolved recipe, as plain values.
    evaluation : mapping, optional
        Result of `tiphys.pretrain.evaluate.evaluate`; `add_evaluation` can add it later.
    step : int
        Number of training steps.
    recipe_digest : str
        Hash of the recipe, for the model card.
    license : str
        SPDX identifier, for the model card; empty: none is stated.
    averaged : bool
        The weights are a moving average; config.json and the model card say so.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If names or shapes of the weights are not those of the model.
    FileExistsError
        If the folder contains something other than a policy.
    """
    target, described = Path(folder), _described(weights, config)
    _check_weights(described, config)
    about: dict[str, Any] = {
        "license": license,
        "step": step,
        "recipe": recipe_digest,
        "name": str((recipe or {}).get("name", "")),
    }
    if averaged:
        about["weights"] = "average"
    if ((recipe or {}).get("evaluate") or {}).get("sample"):
        about["sample"] = True  # a policy acts by default as its recipe evaluates it
    with _Replacing(target) as new:
        config.architectures = ["DecisionModel"]
        config.dtype = next(
            (str(t.dtype).removeprefix("torch.") for t in described.values() if t.is_floating_point()), None
        )
        config.tiphys = about
        config.save_pretrained(new)
        _save_weights(new, weights, described)
        (new / PROCESSOR).write_text(to_json(processor, ensure_ascii=False), encoding="utf-8")
        for name, source in code_files().items():
            (new / name).write_text(source, encoding="utf-8")
        if recipe is not None:
            (new / RECIPE).write_text(dump(_plain(recipe)), encoding="utf-8")
        add_evaluation(new, evaluation)
    return target


def _described(weights: Mapping[str, torch.Tensor], config: DecisionConfig) -> dict[str, torch.Tensor]:
    """Name -> a tensor without data of the same shape and type. Of tied weights only one is there."""
    from tiphys.pretrain.model.transformer import DecisionModel

    tied = set(DecisionModel._tied_weights_keys) if config.tie_word_embeddings else set()
    names = [name for name in weights if name not in tied]
    shape_of = getattr(weights, "describe", lambda name: weights[name].to("meta"))
    return {name: shape_of(name) for name in names}


def _save_weights(folder: Path, weights: Mapping[str, torch.Tensor], described: Mapping[str, torch.Tensor]) -> None:
    """Write the weights, file by file: one of at most `_LARGEST_FILE` bytes, or several and their index."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(dict(described), max_shard_size=_LARGEST_FILE)
    for name, tensors in split.filename_to_tensors.items():
        with atomic_path(folder / name) as path:
            save_file({key: weights[key].contiguous() for key in tensors}, path, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": {"total_size": split.metadata["total_size"]}, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index, indent=2)


def add_evaluation(folder: str | Path, evaluation: Mapping[str, Any] | None) -> None:
    """Add an evaluation to a policy's folder: write evaluation.json, and the model card with the results."""
    from tiphys.pretrain.card import model_card

    folder = Path(folder)
    if evaluation is not None:
        write_json(folder / EVALUATION, finite(evaluation), indent=1)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    processor = json.loads((folder / PROCESSOR).read_text(encoding="utf-8"))
    (folder / CARD).write_text(model_card(config, processor, evaluation), encoding="utf-8")


def publish(folder: str | Path, to: str, *, private: bool = True, how: How | None = None) -> str:
    """Publish a policy to a folder, a bucket or a hub, in the form that others can follow (docs/following.md).

    Parameters
    ----------
    folder : str or Path
        The policy's folder, from `save_policy`.
    to : str
        A folder, a bucket (`s3://bucket/path`) or a repository of a hub (`hf://owner/name`).
    private : bool
        Only for hubs: a new repository is private, and a public one is refused.
    how : How, optional
        What a delta is made from, limits, and the score. None: whole weights, without a limit, and nothing newer will come.

    Returns
    -------
    str
        Where the policy is: a folder of its own below `to`; for a hub `hf://owner/name@commit`.

    Raises
    ------
    DataError
        If `folder` is not a policy or contains links, or `to` is not a valid address of a repository.
    PublishError
        If the hub refuses, cannot be reached, or the repository is public but `private` is true.
    FollowError
        If another run publishes there, or somebody else published there at the same time.
    FileExistsError
        If `to` contains something other than a policy.
    OSError
        If a bucket cannot be read or written.
    """
    source, to, how = Path(expand(folder)), expand(to), how or How(final=True)
    if not is_policy(source):
        raise DataError(f"{source} is not a policy: it has no {CONFIG} of a tiphys model")
    names = policy_files(source)
    if to.startswith("hf://"):
        return publish_to_hub(source, names, to.removeprefix("hf://").strip("/"), private, how)
    remote = "://" in to and not to.startswith("file://")
    place = to if remote else str(local(to))
    if not remote and Path(place).resolve() == source.resolve():
        return str(source)
    return f"{place.rstrip('/')}/{publish_to_store(source, names, place, how, _older_policy)}"


def say_final(to: str, run: str = "") -> None:
    """Tell those who follow a folder or a bucket that nothing newer will come. A hub has no such mark without a publication.

    run   identity of the run; a place of another one is left as it is
    """
    to = expand(to)
    if not to.startswith("hf://"):
        mark_final(to if "://" in to and not to.startswith("file://") else str(local(to)), run)


def policy_files(folder: Path) -> list[str]:
    """Sorted names of a folder's files that belong to a policy. Other files are never published.

    Raises DataError if one of these names is a link or no regular file: what it points at may be anything.
    """
    names = sorted(name for name in os.listdir(folder) if _POLICY_FILE.fullmatch(name))
    for name in names:
        if not stat.S_ISREG((folder / name).lstat().st_mode):
            raise DataError(
                f"{folder / name} is a link or no regular file, so it is not published; replace it by the file that is meant"
            )
    return names


def is_policy(folder: Path) -> bool:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "tiphys"


def _older_policy(store: Store) -> list[str]:
    """The files of a policy at the root of a place, its config first. Raises FileExistsError if there is something else."""
    there = {path for path in store.list() if not path.startswith(f"{STEPS}/")}
    files = {path for path in there if _POLICY_FILE.fullmatch(path)}
    if there and CONFIG not in there and there != files:
        raise FileExistsError(f"{store.url} contains something other than a policy; choose an empty path")
    return sorted(files, key=lambda path: path != CONFIG)


def _check_weights(tensors: Mapping[str, torch.Tensor], config: DecisionConfig) -> None:
    """Raises ValueError if names or shapes are not those of the config's model."""
    from accelerate import init_empty_weights

    from tiphys.pretrain.model.transformer import DecisionModel

    with init_empty_weights(include_buffers=True):
        model = DecisionModel(config)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    tied = set(model._tied_weights_keys) if config.tie_word_embeddings else set()
    missing = sorted(set(expected) - set(tensors) - tied)
    unknown = sorted(set(tensors) - set(expected))
    shapes = sorted(n for n in set(expected) & set(tensors) if expected[n] != tuple(tensors[n].shape))
    if missing or unknown or shapes:
        wrong = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        problems = "; ".join(
            f"{what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" for what, names in wrong if names
        )
        raise ValueError(f"the weights do not fit the config's model ({problems})")


class _Replacing:
    """A new folder next to the target. It replaces the target when the block ends without an exception."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> Path:
        target = self._target
        if target.exists() and not is_policy(target) and any(target.iterdir()):
            raise FileExistsError(f"{target} contains something other than a policy; choose another folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._new = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        mask = os.umask(0o077)
        os.umask(mask)
        self._new.chmod(0o777 & ~mask)  # mkdtemp gives 0700, whatever the umask allows
        return self._new

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            shutil.rmtree(self._new, ignore_errors=True)
            return
        old = None
        if self._target.exists():
            old = Path(tempfile.mkdtemp(dir=self._target.parent, prefix=f".{self._target.name}.old."))
            os.rename(self._target, old / "policy")
        os.rename(self._new, self._target)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)


def _plain(value: Any) -> Any:
    """Mappings as dicts and sequences as lists, for YAML."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
