"""A policy in the Hugging Face form: a folder that acts without this project installed; and its way to a bucket or a hub.

config.json (with auto_map)   model.safetensors   processor.json   *.py (sources of the model and the policy)
recipe.yaml                   evaluation.json     README.md (model card)
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.dataio.atomic import finite, write_json
from tiphys.dataio.episode import DataError
from tiphys.pretrain.sources import code_files

if TYPE_CHECKING:
    import torch

    from tiphys.pretrain.model.config import DecisionConfig

CONFIG, PROCESSOR, RECIPE, EVALUATION, CARD = (
    "config.json",
    "processor.json",
    "recipe.yaml",
    "evaluation.json",
    "README.md",
)


class PublishError(RuntimeError):
    """A policy could not be published. The message says where, why, and what to do; it holds no secret."""


def save_policy(
    folder: str | Path,
    weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    config: DecisionConfig,
    processor: Mapping[str, Any],
    *,
    recipe: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    step: int = 0,
    recipe_digest: str = "",
    license: str = "apache-2.0",
) -> Path:
    """Write a policy's folder, whole or not at all; one that is there already is replaced.

    weights    canonical names (`DecisionModel.state_dict()`), of any floating type, all of them
    processor  `Objectives.processor()`
    recipe     the resolved recipe, as plain values
    evaluation `tiphys.pretrain.evaluate.evaluate`'s result; `add_evaluation` adds it later

    Raises ValueError for weights that are not the model's, FileExistsError where something else than a policy is in the way.
    """
    import yaml
    from huggingface_hub import save_torch_state_dict

    target, tensors = Path(folder), dict(weights)
    _check_weights(tensors, config)
    about = {"license": license, "step": step, "recipe": recipe_digest, "name": str((recipe or {}).get("name", ""))}
    with _replacing(target) as new:
        config.architectures = ["DecisionModel"]
        config.dtype = next(
            (str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()), None
        )
        config.tiphys = about
        config.save_pretrained(new)
        save_torch_state_dict(tensors, new, metadata={"format": "pt"})
        (new / PROCESSOR).write_text(json.dumps(processor, ensure_ascii=False), encoding="utf-8")
        for name, source in code_files().items():
            (new / name).write_text(source, encoding="utf-8")
        if recipe is not None:
            (new / RECIPE).write_text(
                yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True), encoding="utf-8"
            )
        add_evaluation(new, evaluation)
    return target


def add_evaluation(folder: str | Path, evaluation: Mapping[str, Any] | None) -> None:
    """Put an evaluation into a policy's folder: evaluation.json, and its results into the model card."""
    from tiphys.pretrain.card import model_card

    folder = Path(folder)
    if evaluation is not None:
        write_json(folder / EVALUATION, finite(evaluation), indent=1)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    processor = json.loads((folder / PROCESSOR).read_text(encoding="utf-8"))
    (folder / CARD).write_text(model_card(config, processor, evaluation), encoding="utf-8")


def publish(folder: str | Path, to: str, *, private: bool = True) -> str:
    """Copy a policy to a folder, a bucket (`s3://bucket/path`) or a hub (`hf://org/name`). Returns where it is.

    private  hubs: a new repository is private; one that is public already is refused then

    Raises PublishError, FileExistsError where `to` is a folder of something else, or what the store raises.
    """
    source = Path(folder)
    if not is_policy(source):
        raise DataError(f"{source} is no policy: it has no {CONFIG} of a tiphys model")
    if to.startswith("hf://"):
        return _to_hub(source, to.removeprefix("hf://").strip("/"), private)
    if "://" in to and not to.startswith("file://"):
        return _to_bucket(source, to)
    target = Path(to.removeprefix("file://"))
    if target.resolve() != source.resolve():
        with _replacing(target) as new:
            shutil.copytree(source, new, dirs_exist_ok=True)
    return str(target)


def is_policy(folder: Path) -> bool:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "tiphys"


def _to_bucket(source: Path, to: str) -> str:
    """`config.json` goes first and comes last: without it there is no policy, so nobody sees a mixture of two."""
    from tiphys.dataio.storage import Store

    store, files = Store(to), sorted(p.name for p in source.iterdir() if p.is_file())
    there = set(store.list())
    if there and CONFIG not in there and not there <= set(files):
        raise FileExistsError(f"{to} holds something else than a policy; choose an empty place")
    if CONFIG in there:
        store.delete(CONFIG)
    for name in [f for f in files if f != CONFIG] + [CONFIG]:
        store.upload(name, str(source / name))
    for name in there - set(files):
        if "/" not in name and name.endswith((".py", ".json", ".safetensors", ".yaml", ".md")):
            store.delete(name)  # of a version before this one
    return to


def _to_hub(source: Path, name: str, private: bool) -> str:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise DataError(f"hf://{name}: a repository is hf://owner/name")
    if os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") != "https://huggingface.co":
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # Xet's storage belongs to huggingface.co alone
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    constants.HF_HUB_DISABLE_XET = constants.HF_HUB_DISABLE_XET or os.environ.get("HF_HUB_DISABLE_XET", "") in (
        "1",
        "true",
    )
    api = HfApi()
    try:
        try:
            public = not api.model_info(name).private
        except RepositoryNotFoundError:
            public = False
            api.create_repo(name, private=private, exist_ok=True)
        if public and private:
            raise PublishError(f"hf://{name} is public already: publish with --public, or to another name")
        step = json.loads((source / CONFIG).read_text(encoding="utf-8")).get("tiphys", {}).get("step", 0)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=source,
            commit_message=f"Policy at step {step}",
            delete_patterns=["*.py", "*.json", "*.safetensors"],  # what a version before this one had beside these
        )
    except OfflineModeIsEnabled as error:
        raise PublishError(f"hf://{name}: the hub is switched off here (HF_HUB_OFFLINE); unset it") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = {401: "log in with `hf auth login` or set HF_TOKEN", 403: "this token may not write there"}.get(
            status or 0, ""
        )
        # not chained: the request that is part of the original carries the token in its headers
        raise PublishError(without_secrets(f"hf://{name}: {error}" + (f"; {hint}" if hint else ""))) from None
    return f"hf://{name}@{commit.oid}"


def without_secrets(text: str) -> str:
    """The text with everything that looks like a hub's token taken out."""
    for secret in (os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")):
        if secret:
            text = text.replace(secret, "***")
    return re.sub(r"hf_\w{8,}", "***", text)


def _check_weights(tensors: Mapping[str, torch.Tensor], config: DecisionConfig) -> None:
    """Raises ValueError where names or shapes are not those of the model that the config describes."""
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
        told = "; ".join(
            f"{what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}" for what, names in wrong if names
        )
        raise ValueError(f"these are not the weights of the model that the config describes ({told})")


class _replacing:
    """A new folder beside the target, which takes the target's place when the block is left without an exception."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> Path:
        target = self._target
        if target.exists() and not is_policy(target) and any(target.iterdir()):
            raise FileExistsError(f"{target} holds something else than a policy; choose another folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._new = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        self._new.chmod(0o755)
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
    """Mappings and sequences as dicts and lists, which YAML's safe dumper knows."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
