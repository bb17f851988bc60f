"""From tokens and values to vectors: the token table, an embedder for each kind of value, and position embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiphys.dataio.episode import DataError
from tiphys.pretrain.model.flops import CHANNELS
from tiphys.pretrain.model.layers import Linear, Module, Table, only_acts

if TYPE_CHECKING:
    from tiphys.pretrain.model.config import DecisionConfig

BINS = 128  # for the row of a patch or tile, and for its column (Reed et al. 2022, app. C.3)


def begins(std: float, inputs: int) -> float:
    """Standard deviation of the last matrix of an embedder, so that its vectors begin about as large as those of the token table.

    A vector that is many times larger than what attention adds to it hides the instruction from its own position for long.
    """
    return std * float(2 / inputs) ** 0.5  # GELU halves the mean square, about


class Convolution(Module):
    """A 3 × 3 convolution over [n, C, H, W] that keeps the size, or divides it by `stride`."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.weight: nn.Parameter
        self.bias: nn.Parameter
        self.declare("weight", outputs, inputs, 3, 3, std=(1 / (9 * inputs)) ** 0.5)
        self.declare("bias", outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, stride=self.stride, padding=1)


class GroupNorm(Module):
    """GroupNorm with 32 groups (Wu and He 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight: nn.Parameter
        self.bias: nn.Parameter
        self.declare("weight", channels, fill=1.0)
        self.declare("bias", channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.weight, self.bias)


class PatchEmbedder(Module):
    """Gato's (Reed et al. 2022): a pre-activation ResNet block on a patch, plus embeddings of the patch's row and column.

    Values [n, H, W, C]: floats as the codec scaled them, or uint8 pixels, which are scaled to [−1, 1] / √16 here.
    """

    def __init__(self, shape: tuple[int, ...], size: int, std: float) -> None:
        super().__init__()
        height, width, channels = shape
        self.stem = Convolution(channels, CHANNELS, stride=2)
        self.norm1, self.conv1 = GroupNorm(CHANNELS), Convolution(CHANNELS, CHANNELS)
        self.norm2, self.conv2 = GroupNorm(CHANNELS), Convolution(CHANNELS, CHANNELS)
        inputs = CHANNELS * -(-height // 2) * -(-width // 2)
        self.out = Linear(inputs, size, std=begins(std, inputs), bias=True)
        self.row, self.column = Table(BINS, size, std=std), Table(BINS, size, std=std)

    def forward(self, value: Tensor, place: Tensor, text: Tensor) -> Tensor:
        if value.dtype == torch.uint8:
            value = (value.float() / 127.5 - 1) / 4
        x = self.stem(value.permute(0, 3, 1, 2).to(self.stem.bias.dtype))
        x = x + self.conv2(F.gelu(self.norm2(self.conv1(F.gelu(self.norm1(x))))))
        return self.out(x.flatten(1)) + self.row(place[:, 0]) + self.column(place[:, 1])


class VectorEmbedder(Module):
    """A whole vector as one token: two layers and GELU on values [n, *shape], as the codec scaled them."""

    def __init__(self, shape: tuple[int, ...], size: int, std: float) -> None:
        super().__init__()
        inputs = prod(shape)
        self.hidden = Linear(inputs, size, std=inputs**-0.5, bias=True)
        self.out = Linear(size, size, std=begins(std, size), bias=True)

    def forward(self, value: Tensor, place: Tensor, text: Tensor) -> Tensor:
        return self.out(F.gelu(self.hidden(value.flatten(1).to(self.hidden.weight.dtype))))


class Film(Module):
    """A text scales and shifts features: x · (1 + scale) + shift, both linear in the text (FiLM, Perez et al. 2018).

    Without it, a model has to learn the product of an instruction and of what a single vector shows from sums, which takes it
    very long (docs/quality.md).
    """

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.map = Linear(size, 2 * channels, std=size**-0.5, bias=True)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x [n, C, H, W], text [n, D] -> [n, C, H, W]."""
        scale, shift = self.map(text.to(x.dtype))[:, :, None, None].chunk(2, 1)
        return x * (1 + scale) + shift


class GridEmbedder(Module):
    """A small grid of symbols as one token: a table for each channel, summed in each cell, then two convolutions and a matrix.

    Values int [n, H, W, C] in [0, values); values outside are clamped. With `film`, the text before the grid [n, D] changes the
    features between the convolutions.
    """

    def __init__(self, shape: tuple[int, ...], values: int, size: int, std: float, film: bool = False) -> None:
        super().__init__()
        height, width, self.channels = (*shape, 1)[:3]
        self.values = values
        self.cell = Table(values * self.channels, CHANNELS, std=self.channels**-0.5)
        stride = max(1, -(-max(height, width) // 9))  # a grid of up to 9 × 9 keeps its resolution
        self.conv1, self.conv2 = Convolution(CHANNELS, CHANNELS), Convolution(CHANNELS, CHANNELS, stride)
        inputs = CHANNELS * -(-height // stride) * -(-width // stride)
        self.out = Linear(inputs, size, std=begins(std, inputs), bias=True)
        self.film = Film(size, CHANNELS) if film else None

    def forward(self, value: Tensor, place: Tensor, text: Tensor) -> Tensor:
        value = value.reshape(*value.shape[:3], self.channels).long().clamp(0, self.values - 1)
        offset = torch.arange(self.channels, device=value.device) * self.values
        x = self.cell(value + offset).sum(3).permute(0, 3, 1, 2)
        x = x + F.gelu(self.conv1(x))
        if self.film is not None:
            x = self.film(x, text)
        return self.out(F.gelu(self.conv2(x)).flatten(1))


class TileEmbedder(Module):
    """A part of a small grid of symbols as one token: a table for each channel, summed in each cell, then two layers and GELU.

    Values int [n, h, w, C] in [0, values); values outside are clamped. The tile's row and column are added before GELU, with the
    variance of what they are added to: a small position beside a large value would be learned late.
    """

    def __init__(self, shape: tuple[int, ...], values: int, size: int, std: float) -> None:
        super().__init__()
        height, width, self.channels = shape
        self.values = values
        self.cell = Table(values * self.channels, CHANNELS, std=self.channels**-0.5)
        inputs = height * width * CHANNELS
        self.hidden = Linear(inputs, size, std=inputs**-0.5, bias=True)
        self.row, self.column = Table(BINS, size, std=1.0), Table(BINS, size, std=1.0)
        self.out = Linear(size, size, std=begins(std, size), bias=True)

    def forward(self, value: Tensor, place: Tensor, text: Tensor) -> Tensor:
        value = value.long().clamp(0, self.values - 1)
        offset = torch.arange(self.channels, device=value.device) * self.values
        x = self.hidden(self.cell(value + offset).sum(3).flatten(1))
        return self.out(F.gelu(x + self.row(place[:, 0]) + self.column(place[:, 1])))


def make_embedder(spec: Mapping[str, Any], size: int, std: float) -> nn.Module:
    """The embedder of a spec of `DecisionConfig.embedders`; `std` is that of its vectors at the start."""
    shape = tuple(spec["shape"])
    if spec["kind"] == "patch":
        return PatchEmbedder(shape, size, std)
    if spec["kind"] == "grid":
        return GridEmbedder(shape, spec["values"], size, std, "film" in spec)
    if spec["kind"] == "tile":
        return TileEmbedder(shape, spec["values"], size, std)
    return VectorEmbedder(shape, size, std)


class TokenTable(Module):
    """The table of the vocabulary [vocab, D]; the output layer may share it."""

    def __init__(self, config: DecisionConfig) -> None:
        super().__init__()
        self.weight: nn.Parameter
        self.declare("weight", config.vocab_size, config.hidden_size, std=config.initializer_range)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Embedding(Module):
    """Puts embedded values in place of the table's rows, and adds the embeddings of local position and timestep."""

    def __init__(self, config: DecisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.names = {name: module_name(name) for name in sorted(config.embedders)}
        if len(set(self.names.values())) < len(self.names):
            raise DataError(f"embedder names must differ in more than punctuation: {', '.join(self.names)}")
        self.shapes = {name: tuple(e["shape"]) for name, e in config.embedders.items()}
        self.reading = {name for name, e in config.embedders.items() if "film" in e}
        std = config.initializer_range
        self.values = nn.ModuleDict({self.names[n]: make_embedder(config.embedders[n], size, std) for n in self.names})
        self.local = Table(config.locals, size, std=std)
        self.timestep = Table(config.timesteps, size, std=std) if config.timesteps else None

    def forward(self, x: Tensor, inputs: Mapping[str, Tensor], earlier: Tensor | None = None) -> Tensor:
        """x [T, D] from the token table, and the same of `texts/earlier` [m, D] -> [T, D]."""
        texts = self._texts(x, inputs, earlier) if self.reading else x[:0]
        positions = self.local(inputs["local"])
        if self.timestep is not None:
            positions = positions + self.timestep(inputs["timestep"])
        for name in self.names:
            embedder = self.values[self.names[name]]
            index = inputs.get(f"embedded/{name}/index")
            if index is None or len(index) == 0:
                if only_acts():
                    continue
                # ZeRO and expert groups need a gradient of every parameter in every backward pass on every rank: add zero.
                value = torch.zeros(1, *self.shapes[name], device=x.device)
                nothing = embedder(value, torch.zeros(1, 2, dtype=torch.int32, device=x.device), texts[:1])
                positions = positions + 0.0 * nothing
            else:
                value, place = (inputs[f"embedded/{name}/{key}"] for key in ("value", "place"))
                text = texts.index_select(0, inputs[f"embedded/{name}/text"]) if name in self.reading else texts
                x = x.index_copy(0, index, embedder(value, place, text).to(x.dtype))
        return x + positions

    def _texts(self, x: Tensor, inputs: Mapping[str, Tensor], earlier: Tensor | None) -> Tensor:
        """The mean of the words of each text, normed, float32 [1 + texts, D]; zeros for text 0, which is no text."""
        if "texts/size" not in inputs:
            return x.new_zeros(1, x.shape[1], dtype=torch.float32)
        words = x if earlier is None else torch.cat([x, earlier])
        words = words.index_select(0, inputs["texts/place"]).float()
        size = inputs["texts/size"]
        sums = words.new_zeros(len(size), x.shape[1]).index_add(0, inputs["texts/number"], words)
        return F.rms_norm(sums / size[:, None], (x.shape[1],), eps=1e-6)


def module_name(name: str) -> str:
    """An embedder's or head's name as part of a parameter's name: letters, digits and underscores only."""
    return re.sub(r"[^0-9A-Za-z_]", "_", name)
