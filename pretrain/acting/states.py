"""The states of an evaluation: whether the demonstrations contain them, and pictures of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tiphys.dataio import environments
from tiphys.dataio.episode import TaskSpec
from tiphys.dataio.observation import observation_fields

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL = 4096  # bytes; a larger observation is not compared


def state_hash(spec: TaskSpec) -> Callable[[Any], int] | None:
    """A function from a native observation to a 64-bit hash.

    None if observations have other fields than discrete values and text, or are large: they almost never repeat exactly.
    """
    fields = [f for f in spec.with_role("observation", "text") if f.name.startswith("observation")]
    if not fields or sum(f.bytes_per_step for f in fields) > SMALL:
        return None
    if any(f.modality not in ("discrete", "text") for f in fields):
        return None
    kept = [(f.name, f.dtype) for f in fields]

    def hashed(observation: Any) -> int:
        values = observation_fields(observation)
        return hash_values([(values[name], dtype) for name, dtype in kept])

    return hashed


def hash_values(values: Sequence[tuple[Any, str]]) -> int:
    """A 64-bit hash of (value, dtype) pairs, in order."""
    digest = hashlib.blake2b(digest_size=8)
    for value, dtype in values:
        data = str(value).encode() if dtype == "str" else np.ascontiguousarray(value, dtype).tobytes()
        digest.update(len(data).to_bytes(4, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def demonstrated_states(spec: TaskSpec, datasets: Sequence[str], part: tuple[int, int] = (0, 1)) -> np.ndarray:
    """uint64, sorted: hashes of the states of a task in these datasets.

    part  (i, n): only those of every n-th episode, from the i-th on
    """
    from tiphys.dataio.dataset import read_episode
    from tiphys.dataio.index import EpisodeIndex

    if state_hash(spec) is None:
        return np.zeros(0, np.uint64)
    fields = [f for f in spec.with_role("observation", "text") if f.name.startswith("observation")]
    found: set[int] = set()
    for url in datasets:
        index = EpisodeIndex.open(url)
        numbers = [i for i, task in enumerate(index.tasks) if task.name == spec.name]
        for episode in np.flatnonzero(np.isin(index.task, numbers))[part[0] :: part[1]]:
            have = read_episode(index, int(episode)).fields
            rows = max(len(have[f.name]) for f in fields if f.per == "step")
            for row in range(rows):
                found.add(
                    hash_values([(have[f.name] if f.per == "episode" else have[f.name][row], f.dtype) for f in fields])
                )
    return np.array(sorted(found), np.uint64)


def film_strip(environment: str, seed: int, actions: Sequence[Any], frames: int = 6, height: int = 160) -> Image:
    """Pictures of an episode, side by side, in order: the actions are repeated in an environment that can draw."""
    from PIL import Image

    env = environments.make(environment, render_mode="rgb_array")
    try:
        env.reset(seed=seed)
        wanted = set(np.linspace(0, len(actions), frames).round().astype(int).tolist())
        drawn = [np.asarray(env.render())] if 0 in wanted else []
        for number, action in enumerate(actions, 1):
            env.step(action)
            if number in wanted:
                drawn.append(np.asarray(env.render()))
    finally:
        env.close()
    pictures = [Image.fromarray(p.astype(np.uint8)) for p in drawn]
    pictures = [p.resize((max(1, round(p.width * height / p.height)), height)) for p in pictures]
    strip = Image.new("RGB", (sum(p.width for p in pictures) + 4 * (len(pictures) - 1), height), "white")
    left = 0
    for picture in pictures:
        strip.paste(picture, (left, 0))
        left += picture.width + 4
    return strip
