"""Pre-trained starts: a new model begins with the weights of an earlier policy or run, and draws what that one lacks.

A parameter is looked up by its name in the whole model. Tables whose rows stand for something are matched row by row: tokens
by their text, special tokens and tasks by their names, values of a grid by channel. Embedders and regression heads carry the name
and the size of their field, so they match if both are equal. Weights are read when a parameter is filled, so a pipeline stage
reads its own only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor

from tiphys.dataio.episode import DataError
from tiphys.pretrain.model.embedding import module_name
from tiphys.pretrain.tokens.text import TextTokenizer
from tiphys.pretrain.tokens.vocabulary import SPECIALS, Vocabulary
from tiphys.pretrain.upcycle import UpcycledWeights, is_upcycled, upcycled_config
from tiphys.pretrain.weight_files import PolicyWeights, Weights, weight_files

if TYPE_CHECKING:
    from tiphys.pretrain.checkpoint import Checkpoint
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.model.transformer import DecisionModel
    from tiphys.pretrain.parallel import ParallelDims
    from tiphys.recipes.schema import Recipe
    from tiphys.recipes.sections.model import Model

# Sizes that the layers of both models must share: attribute of the config -> key of the recipe
SIZES = {
    "hidden_size": "model.hidden",
    "num_attention_heads": "model.heads",
    "num_key_value_heads": "model.kv_heads",
    "head_size": "model.head_size",
    "intermediate_size": "model.ffn",
    "norm_epsilon": "model.norm_epsilon",
    "qk_norm": "model.qk_norm",
    "qkv_bias": "model.qkv_bias",
    "theta": "model.rope.theta",
    "rope": "model.rope",
}
EXPERTS = {
    "num_experts": "model.moe.experts",
    "moe_every": "model.moe.every",
    "first_dense": "model.moe.first_dense",
    "moe_intermediate_size": "model.moe.hidden",
    "shared_expert": "model.moe.shared",
}
_TABLES = ("token.weight", "output.weight")
_ROWS = 4096  # of a table that are copied at once


@dataclass(frozen=True)
class Found:
    """Where the values of one parameter of the new model are in the old one.

    Attributes
    ----------
    name : str
        The name there.
    new, old : ndarray of int64, or None
        Rows of the new parameter, and the rows there that they get; None: all rows, in place.
    """

    name: str
    new: np.ndarray | None = None
    old: np.ndarray | None = None


class Pretrained:
    """The weights that a new model begins with.

    Parameters
    ----------
    weights : Weights
        Of the earlier model.
    old, new : (DecisionConfig, Vocabulary)
        Of the earlier model, and of the one that begins.
    renamed : mapping of str to str
        Earlier name of a field or task -> its name now.
    where : str
        What messages call the earlier model.
    zeros : collection of str
        Parameters that begin at 0 if the earlier model lacks them, because it computes the same then.
    resemble : bool
        Rows of the token tables that are not found have the mean of the found rows, and their standard deviation around it.
    seed : int
        Of the columns that are drawn if a dense model becomes a mixture of experts.
    fresh : float
        Share of each expert's inner columns that is drawn then (`upcycle`).

    Raises
    ------
    DataError
        If the layers of the two models have different sizes: the message names each key of the recipe and both values. If
        `renamed` has a name that neither model knows. If experts are to be copies, and a token passes through one only; if
        `fresh` is not 0 and no experts are copies.
    """

    def __init__(
        self,
        weights: Weights,
        old: tuple[DecisionConfig, Vocabulary],
        new: tuple[DecisionConfig, Vocabulary],
        renamed: Mapping[str, str] | None = None,
        where: str = "model.init",
        zeros: Collection[str] = (),
        resemble: bool = False,
        seed: int = 0,
        fresh: float = 0.0,
    ) -> None:
        self.weights, self.where = weights, where
        self.zeros, self.resemble = frozenset(zeros), resemble
        (self.old, self._old_words), (self.new, self._new_words) = old, new
        self._upcycled: list[str] = []
        self._earlier = {now: was for was, now in (renamed or {}).items()}
        wrong = list(size_errors(self.old, self.new))
        if wrong:
            raise DataError(f"{where}: its layers have other sizes: " + "; ".join(f"{key} {why}" for key, why in wrong))
        if is_upcycled(self.old, self.new):
            self.old = upcycled_config(self.old, self.new)
            self.weights = experts = UpcycledWeights(weights, self.old, fresh, seed)
            self._upcycled = experts.lines()
        elif fresh:
            raise DataError(
                f"model.upcycle.fresh: {fresh}, but no expert is a copy: that needs a dense model at model.init ({where}) and "
                "model.moe.experts; remove the key"
            )
        for was, now in (renamed or {}).items():
            for name, config, whose in ((was, self.old, where), (now, self.new, "this recipe")):
                if name not in (known := _names(config)):
                    raise DataError(
                        f"model.init_map: {{{was}: {now}}}: {whose} has no field or task {name!r} with weights of its own; it "
                        f"has {', '.join(sorted(known))}"
                    )

    def find(self, name: str, shape: tuple[int, ...]) -> Found | None:
        """Where the parameter `name` of the new whole model is found; None: nowhere, so it is drawn."""
        source = self._source(name)
        there = self.weights.shapes.get(source)
        if there is None or there[1:] != shape[1:]:
            return None
        rows = self._rows(name, there[0], shape[0]) if shape else None
        if rows is None:
            return Found(source) if there == shape else None
        return Found(source, *rows) if len(rows[0]) else None

    def covers(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether every value of a parameter is found, so that none has to be drawn."""
        found = self.find(name, shape)
        if found is None:
            return name in self.zeros
        return found.new is None or len(found.new) == shape[0]

    @torch.no_grad()
    def copy(self, name: str, target: Tensor, first: int = 0, whole: int | None = None) -> None:
        """Write what is found into `target`, which holds the rows from `first` on of a parameter with `whole` rows."""
        shape = tuple(target.shape) if whole is None else (whole, *target.shape[1:])
        found = self.find(name, shape)
        if found is None:
            if name in self.zeros:
                target.zero_()
            return
        if found.new is None or found.old is None:
            target.copy_(self.weights.read(found.name, first, len(target) if whole is not None else None))
            return
        mine = (found.new >= first) & (found.new < first + len(target))
        resemble = self.resemble and name in _TABLES
        needed = found.old if resemble else found.old[mine]
        if not len(needed):
            return
        low = int(needed.min())
        rows = self.weights.read(found.name, low, int(needed.max()) + 1 - low)
        new, old = torch.from_numpy(found.new[mine] - first), torch.from_numpy(found.old[mine] - low)
        for some in torch.arange(len(new)).split(_ROWS):
            target[new[some]] = rows[old[some]].to(target)
        if resemble:
            others = torch.ones(len(target), dtype=torch.bool)
            others[new] = False
            mean, std = _spread(rows, torch.from_numpy(found.old - low))
            target[others] = mean.to(target) + target[others] / self.new.initializer_range * std.to(target)

    def lines(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """What of a model with these parameters is taken over, drawn and left out, for people."""
        found = {name: self.find(name, shape) for name, shape in shapes.items()}
        whole = [n for n, f in found.items() if f is not None and self.covers(n, shapes[n])]
        partly = [
            f"{n} ({len(f.new)} of {shapes[n][0]} rows)"
            for n, f in found.items()
            if f is not None and f.new is not None and n not in whole
        ]
        used, there = {f.name for f in found.values() if f is not None}, self.weights.shapes
        out = [f"{len(whole)} of {len(found)} tensors come from {self.where}", *self._upcycled]
        for what, names in (
            ("in part", partly),
            ("begin at 0", [n for n in found if n in self.zeros and found[n] is None]),
            ("drawn", _folded([n for n, f in found.items() if f is None and n not in self.zeros], found)),
            (
                "left out",
                _folded([n for n in there if n not in used and not self._alias(n)], there),
            ),
        ):
            out += [f"{what}: {', '.join(names)}"] if names else []
        return out

    # the name and the rows of a parameter in the earlier model

    def _source(self, name: str) -> str:
        if name == "output.weight" and name not in self.weights.shapes:
            return "token.weight"  # they were one matrix, which is stored once
        if name == "token.weight" and name not in self.weights.shapes:
            return "output.weight"
        for prefix, modules in self._modules.items():
            if name.startswith(prefix):
                module, _, rest = name.removeprefix(prefix).partition(".")
                return f"{prefix}{modules.get(module, module)}.{rest}"
        return name

    def _alias(self, name: str) -> bool:
        return name in _TABLES and self.new.tie_word_embeddings

    @cached_property
    def _modules(self) -> dict[str, dict[str, str]]:
        """Prefix of the names -> module of an embedder or head now -> its module earlier, for fields that were renamed."""
        found: dict[str, dict[str, str]] = {"embedding.values.": {}, "head.regressions.": {}, "head.chunks.": {}}
        for prefix, names in (
            ("embedding.values.", self.new.embedders),
            ("head.regressions.", self.new.regressions),
            ("head.chunks.", self.new.chunks),
        ):
            for name in names:
                for now, was in self._earlier.items():
                    parts = name.split(":")
                    if now in parts:
                        old = ":".join(was if part == now else part for part in parts)
                        found[prefix][module_name(name)] = module_name(old)
        return found

    def _rows(self, name: str, old: int, new: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(rows now, rows earlier) of a table whose rows stand for something; None: any other parameter."""
        if name in _TABLES:
            return self._tokens
        if name.endswith(".router.task"):
            earlier = {task: i + 1 for i, task in enumerate(self.old.tasks)}
            pairs = [(i + 1, earlier.get(self._earlier.get(task, task))) for i, task in enumerate(self.new.tasks)]
            return _pairs([(0, 0), *pairs])
        if name in ("embedding.timestep.weight", "embedding.local.weight"):
            same = np.arange(min(old, new))
            return same, same
        if name.startswith("embedding.values.") and name.endswith(".cell.weight") and old != new:
            return self._cells(name, old, new)
        return None

    def _cells(self, name: str, old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a grid's table: the values of the first channel, of the second, …"""
        module = name.removeprefix("embedding.values.").partition(".")[0]
        values = next(e["values"] for n, e in self.new.embedders.items() if module_name(n) == module)
        channels = new // values
        was = old // channels
        both = np.arange(min(values, was))
        return (
            (np.arange(channels)[:, None] * values + both).reshape(-1),
            (np.arange(channels)[:, None] * was + both).reshape(-1),
        )

    @cached_property
    def _tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the token table: texts by their pieces, values by their numbers, special tokens by their names."""
        pairs: list[tuple[int, int | None]] = []
        old, new = self._old_words, self._new_words
        nothing: dict[str, Any] = {"embedders": {}, "regressions": {}, "chunks": {}, "tasks": ()}
        if replace(old, **nothing) == replace(new, **nothing):
            return np.arange(new.size), np.arange(new.size)
        if old.text_tokenizer == new.text_tokenizer:
            low, high = new.range("text")
            pairs += [(i, i) for i in range(low, min(high, old.range("text")[1]))]
        else:
            pieces = TextTokenizer(old.text_tokenizer).pieces()
            known = range(*old.range("text"))  # a tokenizer may have pieces that the model has no row for
            now = TextTokenizer(new.text_tokenizer).pieces()
            pairs += [(i, pieces[piece]) for piece, i in now.items() if pieces.get(piece, -1) in known]
        for name, low, high in new.ranges:
            if name not in ("text", "special") and any(known == name for known, *_ in old.ranges):
                first, last = old.range(name)
                pairs += [(low + i, first + i) for i in range(min(high - low, last - first))]
        if any(name == "special" for name, *_ in old.ranges):
            pairs += [(getattr(new, name), getattr(old, name)) for name in SPECIALS]
        return _pairs(pairs)


def _names(config: DecisionConfig) -> set[str]:
    """Names of the fields that have an embedder or a regression head, and of the tasks."""
    fields = {name.split(":")[1] for name in config.embedders if name.count(":") > 1}
    fields |= {name.rpartition(":")[0] for name in config.regressions} | {name.split(":")[0] for name in config.chunks}
    return fields | set(config.tasks)


def _pairs(pairs: list[tuple[int, int | None]]) -> tuple[np.ndarray, np.ndarray]:
    kept = np.array([(a, b) for a, b in pairs if b is not None], np.int64).reshape(-1, 2)
    return kept[:, 0], kept[:, 1]


def _spread(rows: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each column over the rows `used`, float64 [D], in parts of _ROWS."""
    mean = sum((rows[some].double().sum(0) for some in used.split(_ROWS)), torch.zeros(rows.shape[1])) / len(used)
    squares = sum(((rows[some].double() - mean).square().sum(0) for some in used.split(_ROWS)), torch.zeros_like(mean))
    return mean, (squares / len(used)).sqrt()


def _folded(names: Iterable[str], among: Iterable[str]) -> list[str]:
    """Parameter names, with one name for a layer, an embedder or a head if all of its parameters among these are meant."""
    groups: dict[str, set[str]] = {}
    for name in among:
        groups.setdefault(_group(name), set()).add(name)
    meant, found = set(names), dict[str, None]()
    for name in names:
        group = _group(name)
        found[group if groups[group] <= meant else name] = None
    return list(found)


def _group(name: str) -> str:
    parts = name.split(".")
    return ".".join([*parts[: 3 if parts[0] in ("embedding", "head") else 2], "*"]) if len(parts) > 3 else name


def size_errors(old: DecisionConfig, new: DecisionConfig) -> Iterator[tuple[str, str]]:
    """(key of the recipe, reason) for each size of the layers in which the models differ.

    A mixture of experts may begin with a dense model, whose MLPs have the width of its experts.
    """
    if is_upcycled(old, new) and new.moe_intermediate_size != old.intermediate_size:
        yield (
            "model.moe.hidden",
            f"is {new.moe_intermediate_size} here, and the MLPs there have {old.intermediate_size}",
        )
    experts = EXPERTS if old.num_experts else {}
    for attribute, key in {**SIZES, **experts}.items():
        was, now = getattr(old, attribute), getattr(new, attribute)
        if was != now:
            yield key, f"is {now!r} here and {was!r} there"


def policy_digest(source: str | Path) -> str:
    """SHA-256 of the weights, sizes and vocabulary of a policy, a run or a model of another library.

    Raises DataError or OSError if there is none.
    """
    from tiphys.pretrain.policy_files import TOKENIZERS, local_policy

    folder, digest = local_policy(source), hashlib.sha256()
    if (folder / "processor.json").is_file():
        texts = ["processor.json"]
    else:
        texts = ["config.json", *(name for name in TOKENIZERS if (folder / name).is_file())]
    for file in (*(folder / name for name in texts), *weight_files(folder)):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def open_pretrained(recipe: Recipe, new: tuple[DecisionConfig, Vocabulary]) -> Pretrained | None:
    """What the model of a recipe begins with; None: nothing, so it is drawn.

    Raises
    ------
    DataError, OSError
        If there is no policy and no known model at `model.init`, or one whose layers have other sizes.
    """
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.policy_files import local_policy

    if not recipe.model.init:
        return None
    folder = local_policy(recipe.model.init, recipe.model.init_commit or recipe.model.init_revision)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("model_type") != "tiphys":
            return _adopted(folder, recipe, new)
        processor = json.loads((folder / "processor.json").read_text(encoding="utf-8"))
        vocabulary = Vocabulary.from_dict(processor["vocabulary"])
    except DataError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: processor.json or config.json is not valid ({error})") from None
    old = DecisionConfig.from_pretrained(folder)
    renamed = {str(was): str(now) for was, now in recipe.model.init_map.items()}
    return Pretrained(PolicyWeights(folder), (old, vocabulary), new, renamed, recipe.model.init, **_fresh(recipe))


def _adopted(folder: Path, recipe: Recipe, new: tuple[DecisionConfig, Vocabulary]) -> Pretrained:
    """A model of `transformers`. Raises DataError, with the whole `model:` section to set, if the recipe has other sizes."""
    from tiphys.pretrain.adopt.families import family_config, misfits, section
    from tiphys.pretrain.adopt.tokenizer import text_vocabulary, tokenizer_file
    from tiphys.pretrain.adopt.weights import ZEROS, AdoptedWeights

    init, old = recipe.model.init, family_config(folder)
    if recipe.model.init_map:
        raise DataError(f"model.init_map: {init} has no fields and tasks; remove the key")
    wrong = [*size_errors(old, new[0]), *misfits(old, new[0])]
    if wrong:
        keys = "; ".join(f"{key} {why}" for key, why in wrong)
        whole = yaml.safe_dump(
            {"model": section(old, init, str(tokenizer_file(folder) or ""))},
            default_flow_style=True,
            sort_keys=False,
            width=10**6,
        )
        raise DataError(f"{init}: its layers have other sizes: {keys}; the section that fits is {whole.strip()[1:-1]}")
    vocabulary = text_vocabulary(folder, old.vocab_size, new[1])
    weights, known = AdoptedWeights(folder, old), (old, vocabulary)
    return Pretrained(weights, known, new, where=init, zeros=ZEROS, resemble=True, **_fresh(recipe))


def _fresh(recipe: Recipe) -> dict[str, Any]:
    return {"seed": recipe.train.seed, "fresh": recipe.model.upcycle.fresh}


def begin(recipe: Recipe, vocabulary: Vocabulary, *, fresh: bool = True, divided: bool = False) -> DecisionModel:
    """The model of a recipe as training begins.

    Parameters
    ----------
    recipe : Recipe
    vocabulary : Vocabulary
        Of the recipe's objectives.
    fresh : bool
        False: a checkpoint follows, so `model.init` is not opened.
    divided : bool
        The model is on the meta device: no rank holds all weights, so each draws or reads its part when the engine is built.
    """
    from tiphys.pretrain.model.config import DecisionConfig
    from tiphys.pretrain.model.transformer import DecisionModel

    config = DecisionConfig.from_recipe(recipe.model, vocabulary)
    source = open_pretrained(recipe, (config, vocabulary)) if fresh else None
    with torch.device("meta") if divided else nullcontext():
        return DecisionModel(config, seed=recipe.train.seed, source=source)


def start_lines(model: DecisionModel) -> list[str]:
    """What of a model is taken over from `model.init`, drawn and left out, for people; empty: everything is drawn."""
    if not isinstance(model.source, Pretrained):
        return []
    return model.source.lines({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def pinned(recipe: Recipe, resume: Checkpoint | None, world: ParallelDims | None = None) -> Recipe:
    """The recipe with the digest of `model.init`, by which its hash names the weights that it began with.

    If they come from a hub, it also has their commit, so that all ranks fetch the same one. A run that continues keeps the digest
    and the commit of its checkpoint, and does not open the source.

    Parameters
    ----------
    recipe : Recipe
    resume : Checkpoint, optional
        The checkpoint that the run continues; None: the run begins.
    world : ParallelDims, optional
        The grid of this launch; None: this process is alone. Collective.

    Raises
    ------
    DataError
        If there is no such source, or the recipe has another digest than it.
    """
    if not recipe.model.init:
        return recipe
    model = recipe.model
    if resume is not None:
        saved = resume.state()["recipe"]["model"]
        kept = {key: getattr(model, key) or saved.get(key, "") for key in ("init_digest", "init_commit")}
        return replace(recipe, model=replace(model, **kept))
    digest, commit = _digest_and_commit(model, world)
    if model.init_digest not in ("", digest):
        raise DataError(
            f"model.init_digest: the recipe was pinned to {model.init_digest[:16]}…, but {model.init} now has "
            f"{digest[:16]}…; restore that policy, or remove model.init_digest"
        )
    return replace(recipe, model=replace(model, init_digest=digest, init_commit=commit))


def _digest_and_commit(model: Model, world: ParallelDims | None) -> tuple[str, str]:
    """Of the source of a model. The first rank reads it for all, and its error is the error of all ranks."""
    from tiphys.pretrain.policy_files import hub_commit, local_policy

    digest = commit = error = ""
    revision = model.init_commit or model.init_revision
    if revision and not model.init.startswith("hf://"):
        raise DataError(
            f"model.init_revision: {revision}: only a repository of a hub has revisions, but model.init is {model.init}; remove "
            "the key, and model.init_commit if it is set"
        )
    if world is None or world.rank == 0:
        try:
            folder = local_policy(model.init, revision)
            digest = policy_digest(folder)
            commit = hub_commit(folder) if model.init.startswith("hf://") else ""
        except (OSError, ValueError, RuntimeError) as found:
            error = str(found)
    if world is not None:
        digest, commit, error = world.gather([digest, commit, error])[0]
    if error:
        raise DataError(f"model.init: {error}")
    return digest, commit
