"""The tensors of a `transformers` model under our names, in our order, read one at a time.

Linear maps that we compute together are concatenated: queries, keys and values; gate and up. `transformers` rotates the halves of
a head, we rotate neighbouring pairs, so the rows of queries and keys, and what belongs to them, change their order. Experts are
[outputs, inputs] there and [inputs, outputs] here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tiphys.dataio.episode import DataError
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.weight_files import PolicyWeights

# Tables that are added to all tokens: at 0 the model computes what it did before
ZEROS = ("embedding.local.weight", "embedding.timestep.weight")


@dataclass(frozen=True)
class Part:
    """A tensor there, as rows of one here. `heads` > 0: it has so many heads, whose halves become pairs."""

    name: str
    heads: int = 0


class AdoptedWeights:
    """The weights in the folder of a model of `transformers`, by our names.

    Parameters
    ----------
    folder : Path
        With model*.safetensors.
    config : DecisionConfig
        From `families.family_config`.

    Raises
    ------
    DataError
        If a tensor is missing, has another shape than the config says, or is not known.
    """

    def __init__(self, folder: Path, config: DecisionConfig) -> None:
        self._files, self._config, self._folder = PolicyWeights(folder), config, folder
        self._prefix = "model." if "model.embed_tokens.weight" in self._files.shapes else ""
        self._parts = dict(self._table())
        self._stacks = {
            f"layers.{i}.mlp.experts.{name}": f"{self._prefix}layers.{i}.mlp.experts"
            for i in range(config.num_hidden_layers)
            if config.has_experts(i)
            for name in ("up", "down")
        }
        self.shapes = self._checked()

    def read(self, name: str, first: int = 0, count: int | None = None) -> Tensor:
        """The rows [first, first + count) of a tensor; None: all from `first` on."""
        rows = self.shapes[name][0] - first if count is None else count
        if name in self._stacks:
            return self._experts(name, first, rows)
        parts = self._parts[name]
        if len(parts) == 1 and not parts[0].heads:
            return self._files.read(parts[0].name, first, rows)
        out: Tensor | None = None
        at = 0
        for part in parts:
            values = self._files.read(part.name)
            out = values.new_empty(self.shapes[name]) if out is None else out
            place = out[at : at + len(values)]
            if part.heads:
                shape = (part.heads, 2, len(values) // (2 * part.heads), *values.shape[1:])
                turned = values.view(shape).transpose(1, 2)
                place.view(turned.shape).copy_(turned)
            else:
                place.copy_(values)
            at += len(values)
        assert out is not None
        return out[first : first + rows]

    def _experts(self, name: str, first: int, count: int) -> Tensor:
        base, (_, *shape) = self._stacks[name], self.shapes[name]
        out: Tensor | None = None
        for i in range(count):
            at = 0
            for matrix in self._matrices(base, name.rpartition(".")[2], first + i):
                out = matrix.new_empty((count, *shape)) if out is None else out
                out[i, :, at : at + len(matrix)].copy_(matrix.T)
                at += len(matrix)
        return torch.empty((0, *shape)) if out is None else out

    def _matrices(self, base: str, kind: str, expert: int) -> Iterator[Tensor]:
        """[outputs, inputs] of one expert, side by side along the outputs."""
        stack = f"{base}.{'gate_up_proj' if kind == 'up' else 'down_proj'}"
        if stack in self._files.shapes:
            yield self._files.read(stack, expert, 1)[0]
            return
        for each in self._each(kind):
            yield self._files.read(f"{base}.{expert}.{each}.weight")

    @staticmethod
    def _each(kind: str) -> tuple[str, ...]:
        return ("gate_proj", "up_proj") if kind == "up" else ("down_proj",)

    def _table(self) -> Iterator[tuple[str, tuple[Part, ...]]]:
        """(our name, the tensors there), without experts."""
        config, prefix = self._config, self._prefix
        yield "token.weight", (Part(f"{prefix}embed_tokens.weight"),)
        yield "head.norm.weight", (Part(f"{prefix}norm.weight"),)
        if not config.tie_word_embeddings:
            yield "output.weight", (Part("lm_head.weight"),)
        for i in range(config.num_hidden_layers):
            ours, there = f"layers.{i}", f"{prefix}layers.{i}"
            attention = f"{there}.self_attn"
            heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": 0}
            for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
                yield (
                    f"{ours}.attention.qkv.{kind}",
                    tuple(Part(f"{attention}.{name}_proj.{kind}", n) for name, n in heads.items()),
                )
            for name in ("q_norm", "k_norm") if config.qk_norm else ():
                yield f"{ours}.attention.{name}.weight", (Part(f"{attention}.{name}.weight", 1),)
            yield f"{ours}.attention.out.weight", (Part(f"{attention}.o_proj.weight"),)
            yield f"{ours}.norm1.weight", (Part(f"{there}.input_layernorm.weight"),)
            yield f"{ours}.norm2.weight", (Part(f"{there}.post_attention_layernorm.weight"),)
            if config.has_experts(i):
                yield f"{ours}.mlp.router.weight", (Part(f"{there}.mlp.gate.weight"),)
            else:
                yield (
                    f"{ours}.mlp.up.weight",
                    (Part(f"{there}.mlp.gate_proj.weight"), Part(f"{there}.mlp.up_proj.weight")),
                )
                yield f"{ours}.mlp.down.weight", (Part(f"{there}.mlp.down_proj.weight"),)

    def _checked(self) -> dict[str, tuple[int, ...]]:
        """The shape of each of our tensors, after a look at those there."""
        from tiphys.pretrain.model.transformer import DecisionModel

        with torch.device("meta"):
            wanted = {name: tuple(t.shape) for name, t in DecisionModel(self._config).state_dict().items()}
        shapes, used = dict[str, tuple[int, ...]](), set[str]()
        for name, parts in self._parts.items():
            found = [self._shape(part.name) for part in parts]
            used.update(part.name for part in parts)
            shapes[name] = wanted[name]
            self._compare(name, (sum(s[0] for s in found), *found[0][1:]), wanted[name], parts[0].name)
        for name, base in self._stacks.items():
            shapes[name], kind = wanted[name], name.rpartition(".")[2]
            count, inputs, outputs = wanted[name]
            stack = f"{base}.{'gate_up_proj' if kind == 'up' else 'down_proj'}"
            if stack in self._files.shapes:
                used.add(stack)
                self._compare(name, self._shape(stack), (count, outputs, inputs), stack)
                continue
            each = self._each(kind)
            for expert in range(count):
                for one in (f"{base}.{expert}.{matrix}.weight" for matrix in each):
                    used.add(one)
                    self._compare(name, self._shape(one), (outputs // len(each), inputs), one)
        tied = {"lm_head.weight"} if self._config.tie_word_embeddings else set()
        unknown = [n for n in self._files.shapes if n not in used | tied and not n.endswith("rotary_emb.inv_freq")]
        if unknown:
            raise DataError(
                f"{self._folder}: the tensor {unknown[0]!r} is not one of this family, so what the model computes is not known"
            )
        return shapes

    def _shape(self, name: str) -> tuple[int, ...]:
        try:
            return self._files.shapes[name]
        except KeyError:
            raise DataError(f"{self._folder}: the tensor {name!r} is missing; copy the model again") from None

    def _compare(self, ours: str, found: tuple[int, ...], wanted: tuple[int, ...], there: str) -> None:
        if found != wanted:
            raise DataError(
                f"{self._folder}: the tensors {there!r} … have shape {list(found)}, but config.json says {list(wanted)} "
                f"({ours})"
            )
