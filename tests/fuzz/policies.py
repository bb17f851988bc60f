"""Readers of policies, checkpoints, recipes, published weights, and frames of clients."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.dataio.convert import mutate
from tests.fuzz.reader import Reader, damaged_bytes, damaged_json, damaged_yaml, files_of, packed, unpacked, write_files
from tiphys.dataio.episode import DataError
from tiphys.dataio.storage import StoreError


def make(folder: Path) -> dict[str, Callable[[], Reader]]:
    """Every reader by name, made when it is called."""
    return {
        "processor.json": lambda: Reader((_PROCESSOR.read_bytes(),), damaged_json, _read_processor),
        "config.json": lambda: Reader((_config(),), damaged_json, _read_config),
        "checkpoint": lambda: _checkpoint(folder),
        "recipe": _recipe,
        "mapping": lambda: Reader((_MAPPING,), damaged_yaml, _read_mapping),
        "wire": _wire,
        "follow": lambda: _follow(folder),
    }


_PROCESSOR = Path(__file__).parent.parent / "pretrain" / "acting" / "data" / "processor.json"


def _read_processor(data: bytes, _: Path) -> None:
    from tiphys.pretrain.acting.processor import Processor

    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise DataError("not JSON") from None
    processor = Processor.from_dict(values)
    for objective, by_task in processor.layouts.items():
        for task in by_task:
            if by_task[task].has_actions and task in processor.tasks and task in processor.best_return:
                processor.history(task, 1, objective=objective)


def _config() -> bytes:
    from tiphys.pretrain.model.config import DecisionConfig

    ranges = [["text", 0, 260], ["continuous", 260, 1284]]
    patch = {"kind": "patch", "shape": [16, 16, 3], "values": 0}
    config = DecisionConfig(vocab_size=1284, ranges=ranges, embedders={"patch:3": patch}, tasks=["a"], num_experts=4)
    return config.to_json_string().encode()


def _read_config(data: bytes, _: Path) -> None:
    from tiphys.pretrain.model.config import DecisionConfig

    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise DataError("not JSON") from None
    if isinstance(values, dict):  # transformers reads nothing else
        DecisionConfig.from_dict(values)


def _checkpoint(folder: Path) -> Reader:
    import torch

    from tiphys.pretrain import checkpoint_files as files
    from tiphys.pretrain.checkpoint import Checkpoint, export_weights
    from tiphys.pretrain.checkpoint_snapshot import Snapshot, write

    tensors = {"w@0|master": torch.arange(6.0)}
    index = [{"name": "w", "shape": [2, 3], "start": 0, "numel": 6, "keys": ["master"], "step": 1.0}]
    made = write(Snapshot(1, 0, 1, "s", tensors, index, {"torch": ""}, {"step": 1}), folder / "run")
    names = (files.MANIFEST, "rank00000.json", "rank00000.safetensors")
    seeds = {name: (made / name).read_bytes() for name in names}

    def damage(data: bytes, rng: random.Random) -> bytes:
        return damaged_bytes(data, rng) if data == seeds[names[2]] else damaged_json(data, rng)

    def read(data: bytes, empty: Path) -> None:
        target = empty / made.name
        target.mkdir()
        try:
            old = next(name for name in names if data[:9] == seeds[name][:9])
        except StopIteration:
            old = names[len(data) % 3]
        for path in made.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        (target / old).write_bytes(data)
        if old != files.MANIFEST:  # an attacker writes a manifest that fits
            manifest = json.loads(seeds[files.MANIFEST])
            manifest["files"][old] = files.digest(target / old)
            (target / files.MANIFEST).write_text(json.dumps(manifest))
        found = Checkpoint.open(target)
        found.verify()
        export_weights(found)

    return Reader(tuple(seeds.values()), damage, read, (files.CheckpointError,))


def _recipe() -> Reader:
    from tiphys.recipes.load import FOLDER, RecipeError, load_recipe

    def read(data: bytes, folder: Path) -> None:
        (folder / "r.yaml").write_bytes(data)
        load_recipe(folder / "r.yaml")

    return Reader(tuple(p.read_bytes() for p in sorted(FOLDER.glob("*.yaml"))), damaged_yaml, read, (RecipeError,))


_MAPPING = b"""
task: name
fields:
  state: observation.state
  action: {name: action, role: action, modality: continuous}
"""


def _read_mapping(data: bytes, _: Path) -> None:
    from tiphys.dataio.convert.mapping import Mapping

    Mapping.parse(data.decode("utf-8", "replace"), "x")


# -- Clients of a server ----------------------------------------------------------------------------------------------

_FRAMES = Path(__file__).parent.parent / "pretrain" / "serving" / "data" / "frames.json"


def _wire() -> Reader:
    """Frames up to the fields of the policy, of both kinds of clients."""
    import msgpack

    from tiphys.pretrain.acting.processor import Processor
    from tiphys.pretrain.serving import openpi, vla_eval, wire
    from tiphys.pretrain.serving.observed import Names, Needed, fit

    processor = Processor.from_dict(json.loads(_PROCESSOR.read_bytes()))
    needed = [Needed.of(processor, task) for task in processor.tasks]
    seeds = [bytes.fromhex(text) for text in json.loads(_FRAMES.read_text()).values()]
    for one in needed:
        zeros = {name: _zeros(spec) for name, spec in one.fields.items()}
        seeds.append(wire.encode({**zeros, **dict.fromkeys(one.texts, "go"), "reward": 1.0, "task": one.task}))
    limit = {"name": "action", "shape": [2], "values": 3, "low": [0, 0], "high": [2, 2]}
    reset = {"endpoint": "reset", "task": needed[0].task, "target_return": "q0.9", "stream": 7, "limits": [limit]}
    seeds.append(wire.encode({**reset, "sample": True, "session_id": "a"}))

    def damage(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return damaged_bytes(data, rng)
        found = msgpack.unpackb(data, strict_map_key=False)
        return bytes(msgpack.packb(_changed(found, rng)))

    def read(data: bytes, _: Path) -> None:
        message = wire.decode(data)
        if "payload" in message:
            message = dict(vla_eval._parts(message)[1])
        if message.get("endpoint") == "reset":
            openpi.wish(message)
            return
        sent = Names().sent({name: value for name, value in message.items() if name not in openpi._CONTROL})
        fit(next((one for one in needed if one.task == message.get("task")), needed[0]), sent)
        wire.encode(sent.values)

    return Reader(tuple(seeds), damage, read)


def _zeros(spec: Any) -> Any:
    import numpy as np

    return np.zeros([n or 3 for n in spec.shape], spec.dtype)


def _changed(value: Any, rng: random.Random) -> Any:
    """As `mutate.tree`, also within bytes, for maps whose keys may be bytes."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value, key=str))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _changed(value[key], rng)}
    if isinstance(value, bytes) and rng.random() < 0.8:
        return damaged_bytes(value, rng)
    made = mutate.tree(value, rng) if not isinstance(value, bytes) else mutate.tree(0, rng)
    return min(made, 2**63) if isinstance(made, int) else made


# -- Published weights ------------------------------------------------------------------------------------------------


def _follow(folder: Path) -> Reader:
    """A place with a keyframe and two deltas. Whoever damages a file mostly writes the checksums that fit."""
    from tests.pretrain.follow.publishing import policy, publish_all
    from tiphys.pretrain.follow.chain import FollowError
    from tiphys.pretrain.follow.follower import Follower

    publish_all([policy(folder / "policies", step) for step in range(3)], str(folder / "place"))
    seed = packed(files_of(folder / "place"))

    def read(data: bytes, empty: Path) -> None:
        place = write_files(unpacked(data), empty / "place")
        with Follower(str(place), threads=1) as follower:
            follower.fetch()

    return Reader((seed,), _damaged_place, read, (FollowError, DataError, StoreError, FileNotFoundError))


def _damaged_place(data: bytes, rng: random.Random) -> bytes:
    files = unpacked(data)
    name = rng.choice(sorted(files))
    files[name] = _damaged_delta(files[name], rng) if name.endswith(".delta") else mutate.mutate(name, files[name], rng)
    if rng.random() < 0.8 and not name.endswith("latest.json"):
        _with_checksums(files, name)
    return packed(files)


def _damaged_delta(data: bytes, rng: random.Random) -> bytes:
    """Bytes are changed, or the index is."""
    if rng.random() < 0.5:
        return damaged_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[-8:])
    text = json.dumps(mutate.tree(json.loads(data[-8 - length : -8]), rng)).encode()
    return data[: -8 - length] + text + struct.pack("<Q", len(text))


def _with_checksums(files: dict[str, bytes], name: str) -> None:
    """Let all manifests and the pointer name the files as they are now."""
    manifests = {n: json.loads(files[n]) for n in files if n.endswith("manifest.json") and n != name}
    about = {"size": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
    for path in sorted(manifests):  # by step, so a chain leads to files that are final
        manifest = manifests[path]
        for file in [*manifest["files"].values(), *([manifest["delta"]] if manifest["delta"] else [])]:
            if file["path"] == name:
                file |= about
        for link in manifest["chain"]:
            link["sha256"] = hashlib.sha256(files[link["manifest"]]).hexdigest()
        files[path] = json.dumps(manifest).encode()
    pointer = json.loads(files["latest.json"])
    pointer["sha256"] = hashlib.sha256(files[pointer["manifest"]]).hexdigest()
    files["latest.json"] = json.dumps(pointer).encode()
