"""Small sources of every format, written by the format's own library if there is one, and the episodes they contain.

Each maker writes to a folder and returns {id: (steps, fields)}: the episodes that a converter must find there. They do
not come from one of our readers.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c
from PIL import Image

from tiphys.dataio.format import priority

Expected = dict[str, tuple[int, dict[str, Any]]]
LENGTHS = (5, 3, 4)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def picture(data: np.ndarray, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(data if data.shape[-1] != 1 else data[..., 0]).save(out, kind)
    return out.getvalue()


# ---- LeRobot


def video(path: Path, frames: np.ndarray, fps: int = 10, codec: str = "libx264", gop: int = 4) -> np.ndarray:
    """Write an MP4. Returns its frames as PyAV decodes them from start to end."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"svtav1-params": "lp=1", "preset": "10"} if codec == "libsvtav1" else {"threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        with priority.kept():
            stream.codec_context.open()
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def scene(count: int, seed: int, size: int = 64) -> np.ndarray:
    """Frames that clearly differ from each other: a bright block that moves over a dark background."""
    frames = np.full((count, size, size, 3), 20, np.uint8)
    for i in range(count):
        at = (7 * i + seed * 5) % (size - 16)
        frames[i, at : at + 16, (3 * i) % (size - 16) :][:, :16] = (200, 40 + 12 * (i % 16), 90)
    return frames


def _lerobot_rows(number: int, length: int, first: int, fps: int) -> dict[str, Any]:
    r = rng(number)
    return {
        "observation.state": r.normal(size=(length, 3)).astype(np.float32),
        "action": r.normal(size=(length, 2)).astype(np.float32),
        "next.reward": r.normal(size=length).astype(np.float32),
        "next.done": np.arange(length) == length - 1,
        "timestamp": (np.arange(length) / fps).astype(np.float32),
        "frame_index": np.arange(length),
        "episode_index": np.full(length, number),
        "index": np.arange(first, first + length),
        "task_index": np.full(length, number % 2),
    }


_TASKS = ("Pick it up.", "Put it down.")


def _lerobot_info(version: str, codec: str, fps: int) -> dict[str, Any]:
    v3 = version == "v3.0"
    place = (
        "chunk-{chunk_index:03d}/file-{file_index:03d}"
        if v3
        else "chunk-{episode_chunk:03d}/episode_{episode_index:06d}"
    )
    video_path = (
        "videos/{video_key}/" + place
        if v3
        else "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}"
    )
    number = {"dtype": "int64", "shape": [1], "names": None}
    return {
        "codebase_version": version,
        "total_episodes": len(LENGTHS),
        "chunks_size": 1000,
        "fps": fps,
        "data_path": f"data/{place}.parquet",
        "video_path": f"{video_path}.mp4",
        "features": {
            "observation.state": {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]},
            "action": {"dtype": "float32", "shape": [2], "names": None},
            "observation.images.top": {"dtype": "video", "shape": [64, 64, 3], "names": ["height", "width", "channel"]},
            "next.reward": {"dtype": "float32", "shape": [1], "names": None},
            "next.done": {"dtype": "bool", "shape": [1], "names": None},
            "timestamp": {"dtype": "float32", "shape": [1], "names": None},
            **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), number),
        },
    }


def _table(rows: dict[str, Any]) -> Any:
    import pyarrow as pa

    return pa.table(
        {
            k: pa.array(v.tolist(), pa.list_(pa.from_numpy_dtype(v.dtype))) if v.ndim > 1 else pa.array(v)
            for k, v in rows.items()
        }
    )


def _lerobot_expected(
    name: str, number: int, rows: dict[str, Any], frames: np.ndarray
) -> tuple[str, tuple[int, dict[str, Any]]]:
    fields = {
        "observation.state": rows["observation.state"],
        "action": rows["action"],
        "reward": rows["next.reward"],
        "terminated": rows["next.done"],
        "observation.images.top": frames,
        "instruction": _TASKS[number % 2],
    }
    return f"{name}/{number:06d}", (len(frames), fields)


def lerobot_v2(folder: Path, codec: str = "libx264") -> Expected:
    import pyarrow.parquet as pq

    fps, first, out = 10, 0, {}
    (folder / "meta").mkdir(parents=True)
    (folder / "data/chunk-000").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(_lerobot_info("v2.1", codec, fps)))
    (folder / "meta/tasks.jsonl").write_text(
        "".join(json.dumps({"task_index": i, "task": t}) + "\n" for i, t in enumerate(_TASKS))
    )
    lines = []
    for number, length in enumerate(LENGTHS):
        rows = _lerobot_rows(number, length, first, fps)
        first += length
        pq.write_table(_table(rows), folder / f"data/chunk-000/episode_{number:06d}.parquet")
        path = folder / f"videos/chunk-000/observation.images.top/episode_{number:06d}.mp4"
        frames = video(path, scene(length, number), fps, codec)
        lines.append(json.dumps({"episode_index": number, "tasks": [_TASKS[number % 2]], "length": length}))
        key, value = _lerobot_expected(folder.name, number, rows, frames)
        out[key] = value
    (folder / "meta/episodes.jsonl").write_text("\n".join(lines) + "\n")
    return out


def lerobot_v3(folder: Path, codec: str = "libx264") -> Expected:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fps, out = 10, {}
    for sub in ("meta/episodes/chunk-000", "data/chunk-000"):
        (folder / sub).mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(_lerobot_info("v3.0", codec, fps)))
    pq.write_table(pa.table({"task_index": [0, 1], "__index_level_0__": list(_TASKS)}), folder / "meta/tasks.parquet")
    tables, scenes, first = [], [], 0
    for number, length in enumerate(LENGTHS):
        tables.append(_lerobot_rows(number, length, first, fps))
        scenes.append(scene(length, number))
        first += length
    # two data files but one video file for all episodes: they may be split differently
    pq.write_table(pa.concat_tables([_table(t) for t in tables[:2]]), folder / "data/chunk-000/file-000.parquet")
    pq.write_table(_table(tables[2]), folder / "data/chunk-000/file-001.parquet")
    frames = video(folder / "videos/observation.images.top/chunk-000/file-000.mp4", np.concatenate(scenes), fps, codec)
    starts = np.cumsum([0, *LENGTHS])
    key = "videos/observation.images.top"
    pq.write_table(
        pa.table(
            {
                "episode_index": list(range(len(LENGTHS))),
                "tasks": [[_TASKS[i % 2]] for i in range(len(LENGTHS))],
                "length": list(LENGTHS),
                "data/chunk_index": [0, 0, 0],
                "data/file_index": [0, 0, 1],
                f"{key}/chunk_index": [0, 0, 0],
                f"{key}/file_index": [0, 0, 0],
                f"{key}/from_timestamp": (starts[:-1] / fps).tolist(),
                f"{key}/to_timestamp": (starts[1:] / fps).tolist(),
            }
        ),
        folder / "meta/episodes/chunk-000/file-000.parquet",
    )
    for number, rows in enumerate(tables):
        name, value = _lerobot_expected(folder.name, number, rows, frames[starts[number] : starts[number + 1]])
        out[name] = value
    return out


# ---- RLDS


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _message(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def example(features: dict[str, Any]) -> bytes:
    """A serialised tf.Example, encoded by hand from its .proto definition."""
    entries = b""
    for key, value in features.items():
        if isinstance(value, list):
            body = _message(1, b"".join(_message(1, v) for v in value))
        elif value.dtype.kind == "f":
            body = _message(2, _message(1, value.astype("<f4").tobytes()))
        else:
            body = _message(3, _message(1, b"".join(_varint(int(v)) for v in value.reshape(-1))))
        entries += _message(1, _message(1, key.encode()) + _message(2, body))
    return _message(1, entries)


def tfrecord(records: list[bytes]) -> bytes:
    def masked(data: bytes) -> bytes:
        crc = crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    heads = [struct.pack("<Q", len(r)) for r in records]
    return b"".join(h + masked(h) + r + masked(r) for h, r in zip(heads, records, strict=True))


TFDS_TEXT: dict[str, Any] = {"pythonClassName": "x.Text", "text": {}}


def tfds_tensor(dtype: str, *shape: int, **more: Any) -> dict[str, Any]:
    dimensions = {"dimensions": [str(s) for s in shape]} if shape else {}
    return {"pythonClassName": "x.Tensor", "tensor": {"shape": dimensions, "dtype": dtype, "encoding": "none", **more}}


def tfds_dict(**children: Any) -> dict[str, Any]:
    return {"pythonClassName": "x.FeaturesDict", "featuresDict": {"features": children}}


def tfds_sequence(feature: dict[str, Any], kind: str = "Sequence") -> dict[str, Any]:
    return {"pythonClassName": f"x.{kind}", "sequence": {"feature": feature, "length": "-1"}}


def write_tfds(folder: Path, tree: dict[str, Any], records: list[bytes], **info: Any) -> None:
    """A TFDS folder with one shard."""
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps(tree))
    (folder / "dataset_info.json").write_text(json.dumps({"name": "toy", **info}))
    (folder / "toy-train.tfrecord-00000-of-00001").write_bytes(tfrecord(records))


def rlds(folder: Path) -> Expected:
    tensor, features = tfds_tensor, tfds_dict
    image = {
        "pythonClassName": "x.Image",
        "image": {"shape": {"dimensions": ["16", "16", "3"]}, "dtype": "uint8", "encodingFormat": "png"},
    }
    step = features(
        observation=features(image=image, state=tensor("float32", 2), count=tensor("int64")),
        action=tensor("float32", 2),
        reward=tensor("float32"),
        language_instruction=TFDS_TEXT,
        is_first=tensor("bool"),
        is_last=tensor("bool"),
        is_terminal=tensor("bool"),
    )
    tree = features(
        steps=tfds_sequence(step, "Dataset"),
        episode_metadata=features(file_path=TFDS_TEXT),
    )
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps(tree))
    info = {
        "name": "toy",
        "splits": [{"name": "train", "shardLengths": ["2", "1"]}, {"name": "val", "shardLengths": ["1"]}],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    out, records = {}, []
    for number, steps in enumerate(LENGTHS):
        r = rng(number)
        pictures = r.integers(0, 256, (steps, 16, 16, 3), np.uint8)
        fields = {
            "observation.image": pictures,
            "observation.state": r.normal(size=(steps, 2)).astype(np.float32),
            "observation.count": r.integers(-(2**40), 2**40, steps),
            "action": r.normal(size=(steps, 2)).astype(np.float32),
            "reward": r.normal(size=steps).astype(np.float32),
        }
        last = np.arange(steps) == steps - 1
        text = f"do thing {number} ü"
        records.append(
            example(
                {
                    "steps/observation/image": [picture(p) for p in pictures],
                    **{f"steps/{k.replace('.', '/')}": v for k, v in fields.items() if k != "observation.image"},
                    "steps/language_instruction": [text.encode()] * steps,
                    "steps/is_first": np.arange(steps) == 0,
                    "steps/is_last": last,
                    "steps/is_terminal": last & (number == 0),
                    "episode_metadata/file_path": [f"/a/{number}".encode()],
                }
            )
        )
        fields |= {"terminated": last & (number == 0), "truncated": last & (number != 0), "language_instruction": text}
        fields["episode_metadata.file_path"] = f"/a/{number}"
        out[f"toy/train-{number // 2:05d}-{number % 2:06d}"] = (steps, fields)
    (folder / "toy-train.tfrecord-00000-of-00002").write_bytes(tfrecord(records[:2]))
    (folder / "toy-train.tfrecord-00001-of-00002").write_bytes(tfrecord(records[2:]))
    return out


# ---- Minari, D4RL, robomimic


def minari_env() -> Any:
    import gymnasium as gym
    from gymnasium import spaces

    class Everything(gym.Env):  # type: ignore[type-arg]
        observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (32, 32, 3), np.uint8),
                "mission": spaces.Text(12),
                "pair": spaces.Tuple((spaces.Discrete(3), spaces.Box(-1, 1, (2,), np.float32))),
            }
        )
        action_space = spaces.Tuple((spaces.Discrete(4), spaces.Box(-2, 2, (2,), np.float32)))

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.observation_space.seed(seed)
            self.time, self.length = 0, LENGTHS[(seed or 0) % len(LENGTHS)]
            return self.observation_space.sample(), {"speed": 0.0, "mission": "go"}

        def step(self, action: Any) -> Any:
            self.time += 1
            end = self.time >= self.length
            return (
                self.observation_space.sample(),
                float(self.time),
                end,
                False,
                {"speed": float(self.time), "mission": "go"},
            )

    return Everything()


def minari(folder: Path, data_format: str = "hdf5") -> Expected:
    """Recorded by Minari's DataCollector into folder/toy/data-v0. The expected values come from Minari's own reader."""
    import warnings

    old = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import minari as library
            from minari import DataCollector

            env = DataCollector(minari_env(), record_infos=True, data_format=data_format)
            env.action_space.seed(0)
            for number in range(len(LENGTHS)):
                env.reset(seed=number, options={"task": f"pick {number}"})
                done = False
                while not done:
                    *_, terminated, truncated, _ = env.step(env.action_space.sample())
                    done = terminated or truncated
            made = env.create_dataset(
                "toy/data-v0",
                algorithm_name="random",
                author="a",
                author_email="a@b.c",
                code_permalink="-",
                description="-",
            )
            env.close()
            episodes = list(made.iterate_episodes())
            del library
    finally:
        if old is None:
            del os.environ["MINARI_DATASETS_PATH"]
        else:
            os.environ["MINARI_DATASETS_PATH"] = old
    out = {}
    for e in episodes:
        o, a = e.observations, e.actions
        fields = {
            "observation.image": o["image"],
            "observation.mission": np.array([str(t) for t in o["mission"]], object),
            "observation.pair.0": o["pair"][0],
            "observation.pair.1": o["pair"][1],
            "action.0": a[0],
            "action.1": a[1],
            "reward": e.rewards,
            "terminated": e.terminations,
            "truncated": e.truncations,
            "info.speed": np.asarray(e.infos["speed"]).reshape(-1),
            "info.mission": "go",
            "options.task": f"pick {e.id}",
        }
        out[f"toy/data-v0/{e.id:06d}"] = (len(e.rewards), fields)
    return out


def minari_arrow(folder: Path) -> Expected:
    return minari(folder, "arrow")


def d4rl(folder: Path) -> Expected:
    import h5py

    folder.mkdir(parents=True)
    total, r = sum(LENGTHS), rng()
    observations = r.normal(size=(total, 4)).astype(np.float32)
    following = np.concatenate([observations[1:], r.normal(size=(1, 4))]).astype(np.float32)
    ends = np.cumsum(LENGTHS)
    terminals, timeouts = np.zeros(total, bool), np.zeros(total, bool)
    terminals[ends[0] - 1] = True
    timeouts[ends[1] - 1] = True
    for end in ends:
        following[end - 1] = r.normal(size=4)
    columns = {
        "actions": r.normal(size=(total, 2)).astype(np.float32),
        "rewards": r.normal(size=total).astype(np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
        "infos/qpos": r.normal(size=(total, 3)),
    }
    with h5py.File(folder / "hopper.hdf5", "w") as file:
        for key, value in columns.items():
            file.create_dataset(key, data=value, compression="gzip")
        file["observations"], file["next_observations"] = observations, following
        file["metadata/algorithm"] = "SAC"
    out, begin = {}, 0
    for number, end in enumerate(ends):
        fields = {
            "observation": np.concatenate([observations[begin:end], following[end - 1 : end]]),
            "action": columns["actions"][begin:end],
            "reward": columns["rewards"][begin:end],
            "terminated": terminals[begin:end],
            "truncated": timeouts[begin:end],
            "info.qpos": columns["infos/qpos"][begin:end],
        }
        out[f"hopper/{number:08d}"] = (int(end - begin), fields)
        begin = end
    return out


def robomimic(folder: Path) -> Expected:
    import h5py

    folder.mkdir(parents=True)
    out: Expected = {}
    with h5py.File(folder / "low_dim.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {}})
        for number, steps in zip((0, 2, 10), LENGTHS, strict=True):
            r = rng(number)
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = steps
            image = r.integers(0, 256, (steps + 1, 24, 24, 3), np.uint8)
            pose = r.normal(size=(steps + 1, 3))
            fields = {
                "action": r.normal(size=(steps, 7)),
                "reward": r.normal(size=steps),
                "terminated": np.arange(steps) == steps - 1,
                "info.states": r.normal(size=(steps, 5)),
                "observation.agentview_image": image,
                "observation.robot0_eef_pos": pose,
            }
            demo["actions"], demo["rewards"], demo["states"] = fields["action"], fields["reward"], fields["info.states"]
            demo["dones"] = fields["terminated"].astype(np.int64)
            for group, rows in (("obs", slice(None, -1)), ("next_obs", slice(1, None))):
                demo[f"{group}/agentview_image"], demo[f"{group}/robot0_eef_pos"] = image[rows], pose[rows]
            out[f"Lift/demo_{number}"] = (steps, fields)
        file["mask/train"] = np.array([b"demo_0", b"demo_10"])
        file["mask/valid"] = np.array([b"demo_2"])
    return out


# ---- Zarr, NPZ, text, pictures


def zarr_buffer(folder: Path, zarr_format: int = 2) -> Expected:
    import zarr

    total, r = sum(LENGTHS), rng()
    data = {
        "img": r.integers(0, 256, (total, 16, 16, 3)).astype(np.float32),
        "state": r.normal(size=(total, 5)).astype(np.float32),
        "action": r.normal(size=(total, 2)).astype(np.float32),
    }
    root = zarr.open_group(str(folder), mode="w", zarr_format=zarr_format)
    for key, value in data.items():
        root.create_array(f"data/{key}", data=value, chunks=(max(4, total // 8), *value.shape[1:]))
    root.create_array("meta/episode_ends", data=np.cumsum(LENGTHS).astype(np.int64))
    out, begin = {}, 0
    for number, end in enumerate(np.cumsum(LENGTHS).tolist()):
        fields = {
            "observation.img": data["img"][begin:end].astype(np.uint8),
            "observation": data["state"][begin:end],
            "action": data["action"][begin:end],
        }
        out[f"{folder.name.removesuffix('.zarr')}/{number:06d}"] = (end - begin, fields)
        begin = end
    return out


def zarr_zip(folder: Path) -> Expected:
    import zipfile

    folder.mkdir(parents=True)
    inner = folder / "buffer.zarr"
    out = zarr_buffer(inner)
    with zipfile.ZipFile(folder / "buffer.zarr.zip", "w") as archive:
        for path in sorted(inner.rglob("*")):
            if path.is_file():
                archive.write(path, str(path.relative_to(inner)))
    import shutil

    shutil.rmtree(inner)
    return out


def npz(folder: Path) -> Expected:
    folder.mkdir(parents=True)
    out: Expected = {}
    for number, steps in enumerate(LENGTHS):
        r = rng(number)
        image = r.integers(0, 256, (steps + 1, 3, 20, 20), np.uint8)
        fields = {
            "observation.vector": r.normal(size=(steps + 1, 3)),
            "action": r.integers(0, 4, steps),
            "reward": r.normal(size=steps),
        }
        np.savez_compressed(
            folder / f"{number:03d}.npz",
            **{
                "obs.vector": fields["observation.vector"],
                "obs.image": image,
                "actions": fields["action"],
                "rewards": fields["reward"],
            },
            instruction=np.array(f"go {number}"),
        )
        fields |= {"observation.image": np.moveaxis(image, 1, -1), "instruction": f"go {number}"}
        out[f"{folder.name}/{number:03d}"] = (steps, fields)
    return out


def npz_flat(folder: Path) -> Expected:
    folder.mkdir(parents=True)
    total, r = sum(LENGTHS), rng()
    data = {"observations": r.normal(size=(total, 3)), "actions": r.normal(size=(total, 2))}
    np.savez(folder / "all.npz", **data, episode_ends=np.cumsum(LENGTHS))
    out, begin = {}, 0
    for number, end in enumerate(np.cumsum(LENGTHS).tolist()):
        fields = {"observation": data["observations"][begin:end], "action": data["actions"][begin:end]}
        out[f"{folder.name}/all/{number:06d}"] = (end - begin, fields)
        begin = end
    return out


def jsonl(folder: Path) -> Expected:
    folder.mkdir(parents=True)
    words = ["First document.", "Second ü\nwith two lines.", "Third."]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": w, "meta": 1}) + "\n" for w in words[:2]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": words[2]}).encode()))
    keys = ["a.jsonl/00000000", "a.jsonl/00000001", "b.jsonl.gz/00000000"]
    return {f"{folder.name}/{k}": (0, {"text": w}) for k, w in zip(keys, words, strict=True)}


def text_parquet(folder: Path) -> Expected:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    words = ["One.", "Two.", "Three."]
    pq.write_table(pa.table({"content": words, "score": [1, 2, 3]}), folder / "a.parquet")
    return {f"{folder.name}/a.parquet/{i:08d}": (0, {"text": w}) for i, w in enumerate(words)}


def plain_text(folder: Path) -> Expected:
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("Alpha\nbeta")
    (folder / "b.md").write_text("# Gamma")
    return {
        f"{folder.name}/a.txt/00000000": (0, {"text": "Alpha\nbeta"}),
        f"{folder.name}/b.md/00000000": (0, {"text": "# Gamma"}),
    }


def image_text(folder: Path) -> Expected:
    folder.mkdir(parents=True)
    out: Expected = {}
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(3):
            image = rng(number).integers(0, 256, (10 + number, 12, 3), np.uint8)
            for name, data in ((f"x/{number}.png", picture(image)), (f"x/{number}.txt", f"caption {number}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            out[f"{folder.name}/0.tar/x/{number}"] = (0, {"image": image[None], "text": f"caption {number}"})
    return out


# ---- Atari, Minecraft


def dqn_replay(folder: Path) -> Expected:
    logs = folder / "Pong/1/replay_logs"
    logs.mkdir(parents=True)
    out: Expected = {}
    for checkpoint in range(2):
        total, r = sum(LENGTHS), rng(checkpoint)
        columns = {
            "observation": r.integers(0, 256, (total, 84, 84), np.uint8),
            "action": r.integers(0, 6, total).astype(np.int32),
            "reward": r.integers(-1, 2, total).astype(np.float32),
            "terminal": np.isin(np.arange(total), np.cumsum(LENGTHS[:2]) - 1).astype(np.uint8),
        }
        columns["action"][0] = 5
        for kind, value in columns.items():
            data = io.BytesIO()
            np.save(data, value)
            (logs / f"$store$_{kind}_ckpt.{checkpoint}.gz").write_bytes(gzip.compress(data.getvalue(), 1))
        begin = 0
        for number, end in enumerate(np.cumsum(LENGTHS).tolist()):
            fields = {
                "observation.image": columns["observation"][begin:end, :, :, None],
                "action": columns["action"][begin:end],
                "reward": columns["reward"][begin:end],
                "terminated": columns["terminal"][begin:end].astype(bool),
            }
            out[f"Pong/1-{checkpoint:03d}/{number:06d}"] = (end - begin, fields)
            begin = end
    return out


def vpt(folder: Path) -> Expected:
    from tiphys.dataio.convert.vpt import BUTTONS

    out: Expected = {}
    for number, steps in enumerate(LENGTHS):
        name = f"cheeky-{number}"
        frames = video(folder / f"{name}.mp4", scene(steps, number), 20)
        lines, buttons = [], np.zeros((steps, len(BUTTONS)), np.uint8)
        camera = np.zeros((steps, 2), np.float32)
        for t in range(steps):
            jump = t % 2 == 0
            lines.append(
                {
                    "mouse": {
                        "dx": 10.0 * t,
                        "dy": -4.0,
                        "buttons": [0] if t == 2 else [],
                        "newButtons": [0] if t == 2 else [],
                    },
                    "keyboard": {
                        "keys": ["key.keyboard.w", *(["key.keyboard.space"] if jump else [])],
                        "newKeys": [],
                        "chars": "",
                    },
                    "hotbar": 0 if t < 1 else 3,
                    "isGuiOpen": False,
                }
            )
            buttons[t, BUTTONS.index("forward")] = 1
            buttons[t, BUTTONS.index("jump")] = jump
            buttons[t, BUTTONS.index("attack")] = t == 2
            buttons[t, BUTTONS.index("hotbar.4")] = t == 1
            camera[t] = (-4.0 * 0.15, 10.0 * t * 0.15)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        fields = {
            "observation.image": frames,
            "action.buttons": buttons,
            "action.camera": camera,
            "info.gui": np.zeros(steps, bool),
        }
        out[f"{folder.name}/{name}"] = (steps, fields)
    return out


MAKERS: dict[str, tuple[str, Callable[[Path], Expected]]] = {
    "lerobot-v2": ("lerobot", lerobot_v2),
    "lerobot-v3": ("lerobot", lerobot_v3),
    "rlds": ("rlds", rlds),
    "minari-hdf5": ("minari", minari),
    "minari-arrow": ("minari", minari_arrow),
    "d4rl": ("d4rl", d4rl),
    "webdataset": ("webdataset", image_text),
    "jsonl": ("text", jsonl),
    "text-parquet": ("text", text_parquet),
    "plain": ("text", plain_text),
    "robomimic": ("robomimic", robomimic),
    "zarr.zarr": ("zarr", zarr_buffer),
    "zarr-zip": ("zarr", zarr_zip),
    "dqn-replay": ("dqn-replay", dqn_replay),
    "vpt": ("vpt", vpt),
    "npz": ("npz", npz),
    "npz-flat": ("npz", npz_flat),
}
