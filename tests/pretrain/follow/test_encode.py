"""A delta is lossless for every way, type and shape; it is small; a damaged or foreign one is refused."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from tiphys.pretrain.follow import encode as coding
from tiphys.pretrain.follow.encode import DeltaError, apply, encode
from tiphys.pretrain.follow.weights import Weights, raw

DTYPES = (
    "bfloat16",
    "float16",
    "float32",
    "float64",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "float8_e4m3fn",
)


def weights(step: int = 0, **tensors: torch.Tensor) -> Weights:
    return Weights({name: raw(tensor) for name, tensor in sorted(tensors.items())}, step)


def random_bits(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Every bit pattern is likely: infinities, NaN with payloads, −0, subnormal numbers."""
    kind = getattr(torch, dtype)
    made = torch.empty(shape, dtype=kind)
    data = np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 256, made.nbytes, np.uint8)
    return torch.from_numpy(data).view(kind).reshape(shape) if made.nbytes else made


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "BLOCK", 64)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_returns(dtype: str, tmp_path: Path) -> None:
    shapes = {"empty": (0, 3), "one": (), "odd": (7, 31), "block": (64,), "many": (3, 5, 100)}
    base = weights(**{n: random_bits(dtype, shape, 1) for n, shape in shapes.items()})
    new = weights(**{n: random_bits(dtype, shape, 2) for n, shape in shapes.items()})
    few = {n: tensor.clone() for n, tensor in ((n, random_bits(dtype, s, 1)) for n, s in shapes.items())}
    few["many"].reshape(-1)[::97] = random_bits(dtype, (16,), 3)
    for target in (new, base, weights(**few)):
        encode(base, target, tmp_path / "delta", threads=2)
        got = apply(base, tmp_path / "delta", 5, threads=2)
        assert got.digest == target.digest
        assert got.step == 5


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("way", ["sparse", "ulp", "whole"])
def test_each_way_is_lossless(way: str) -> None:
    for dtype in DTYPES:
        base, new = raw(random_bits(dtype, (200,), 1)), raw(random_bits(dtype, (200,), 2))
        out = np.empty_like(new.elements())
        for start in range(0, 200, 64):
            parts = coding.encode_block(way, base, new, start)
            coding.decode_block(way, base, out, start, parts)
        assert np.array_equal(out, new.elements())


def moved(scale: float, count: int = 300_000) -> tuple[Weights, Weights]:
    drawn = torch.Generator().manual_seed(0)
    start = torch.randn(count, generator=drawn) * 0.02
    step = torch.randn(count, generator=drawn) * scale
    return weights(w=start.bfloat16()), weights(w=(start + step).bfloat16())


def test_the_smallest_way_is_chosen(tmp_path: Path) -> None:
    sizes = {}
    for scale, way in ((0.0, "same"), (1e-7, "sparse"), (1e-4, "ulp"), (10.0, "whole")):
        base, new = moved(scale)
        assert coding.choose(base.tensors["w"], new.tensors["w"]) == way
        sizes[way] = encode(base, new, tmp_path / "delta") / new.bytes
    assert sizes["same"] < 0.001
    assert sizes["sparse"] < 0.02
    assert sizes["ulp"] < 0.4
    base, new = (one.tensors["w"] for one in moved(10.0))
    starts = range(0, len(new.elements()), coding.BLOCK)
    whole = sum(len(part) for start in starts for part in coding.encode_block("whole", base, new, start))
    assert sizes["whole"] * len(new.data) <= 1.01 * whole


def test_noise_costs_no_more_than_itself(tmp_path: Path) -> None:
    base, new = (weights(w=random_bits("bfloat16", (100_000,), seed)) for seed in (1, 2))
    assert encode(base, new, tmp_path / "delta") <= 1.01 * new.bytes


def test_a_delta_of_another_model_is_refused(tmp_path: Path) -> None:
    base = weights(a=torch.zeros(3), b=torch.zeros(4))
    for other in (weights(a=torch.zeros(3)), weights(a=torch.zeros(3), b=torch.zeros(2, 2))):
        with pytest.raises(ValueError, match="tensor 'b'"):
            encode(base, other, tmp_path / "delta")
    encode(base, base, tmp_path / "delta")
    with pytest.raises(DeltaError, match="other tensors"):
        apply(weights(a=torch.zeros(3)), tmp_path / "delta")
    with pytest.raises(DeltaError, match="another type or shape"):
        apply(weights(a=torch.zeros(3), b=torch.zeros(4).half()), tmp_path / "delta")


def test_a_damaged_delta_is_an_error_or_another_digest(tmp_path: Path) -> None:
    base, new = moved(1e-4, 2000)
    file = tmp_path / "delta"
    encode(base, new, file)
    whole = file.read_bytes()
    generator = np.random.default_rng(0)
    for trial in range(150):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            damaged = damaged[: generator.integers(len(whole))]
        else:
            damaged[generator.integers(len(whole))] ^= 1 << generator.integers(8)
        file.write_bytes(damaged)
        with contextlib.suppress(DeltaError):
            assert apply(base, file).digest != new.digest or bytes(damaged) == whole


def test_an_index_cannot_ask_for_memory(tmp_path: Path) -> None:
    file = tmp_path / "delta"
    text = json.dumps({"version": 1, "tensors": {"w": ["float32", [4], "ulp", [1 << 60, 0, 0, 0]]}}).encode()
    for length in (len(text), 1 << 62):
        file.write_bytes(text + struct.pack("<Q", length))
        with pytest.raises(DeltaError, match="delta"):
            apply(weights(w=torch.zeros(4)), file)
