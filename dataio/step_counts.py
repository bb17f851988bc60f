"""Token counts of texts that change from step to step: files beside a dataset, so that a plan knows them without reading texts.

A file holds one number for each step of each episode, in the order of the index. Its name is a hash of the dataset's
fingerprint, the field and the tokenizer, so counts of another dataset or another tokenizer are never used by mistake.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.episode import DataError, FieldSpec
from tiphys.dataio.plan.cost import Savings
from tiphys.dataio.storage import Store

if TYPE_CHECKING:
    from tiphys.dataio.index import EpisodeIndex

FOLDER = "lengths"
MOST = np.iinfo(np.uint16).max  # longer texts count as this many
Count = Callable[[Iterable[str]], Iterable[int]]


def path_of(index: EpisodeIndex, field: str, tokenizer: str) -> str:
    """Where the counts of a field lie, below the dataset's URL. `tokenizer` is its definition."""
    digest = hashlib.sha256(tokenizer.encode()).hexdigest()
    key = hashlib.sha256(json.dumps([index.fingerprint, field, digest]).encode()).hexdigest()
    return f"{FOLDER}/{key[:32]}.npy"


def read(index: EpisodeIndex, field: str, tokenizer: str) -> NDArray[np.uint16] | None:
    """Tokens of the field's text at each step of the dataset, uint16 [steps of all episodes]; None if nobody has counted them.

    Raises DataError if the file has another size than the dataset has steps.
    """
    path, steps = path_of(index, field, tokenizer), int(_steps(index).sum())
    store, header = Store(index.url), _header(steps)
    if not store.exists(path):
        return None
    data = store.read(path, 4096 + 8 * steps)
    # The header is compared, not parsed: one that claims a huge array would make NumPy allocate it
    if len(data) != len(header) + 2 * steps or not data.startswith(header):
        raise DataError(f"{index.url}/{path}: not an array of {steps} token counts; delete it and count again")
    return np.frombuffer(data, "<u2", offset=len(header))


def are_there(index: EpisodeIndex, field: str, tokenizer: str) -> bool:
    """Whether somebody has counted the tokens of the field. The file is not read."""
    return Store(index.url).exists(path_of(index, field, tokenizer))


def write(index: EpisodeIndex, field: str, tokenizer: str, count: Count) -> str:
    """Count the field's texts in all tasks that have it, and write the file. Returns its path.

    Raises DataError if an episode cannot be read, StoreError if the file cannot be written beside the dataset.
    """
    from tiphys.dataio.dataset import read_field

    parts, wanted = [], {i for i, task in enumerate(index.tasks) if any(_is_step_text(f, field) for f in task.fields)}
    for episode, steps in enumerate(_steps(index).tolist()):
        if int(index.task[episode]) in wanted:
            texts = [str(t) for t in read_field(index, episode, field)[:steps]]
            found = np.minimum(np.fromiter(count(texts), np.int64, len(texts)), MOST)
            parts.append(np.pad(found, (0, steps - len(found))).astype(np.uint16))
        else:
            parts.append(np.zeros(steps, np.uint16))
    file = io.BytesIO()
    np.save(file, np.concatenate([np.zeros(0, np.uint16), *parts]), allow_pickle=False)
    path = path_of(index, field, tokenizer)
    Store(index.url).write(path, file.getvalue())
    return path


def savings(index: EpisodeIndex, parts: Iterable[tuple[NDArray[np.bool_], NDArray[np.uint16], int, int]]) -> Savings:
    """How many tokens fewer than planned the steps take.

    Each part is (bool [episodes]: where it holds; counts as from `read`; tokens planned for each step; stride: it is shown at the
    steps whose number this divides).
    """
    steps = _steps(index)
    first = np.concatenate([[0], np.cumsum(steps + 1)])[:-1]
    episode = np.repeat(np.arange(len(steps)), steps)
    place = np.arange(len(episode)) + episode + 1  # of each step: one more zero before each episode
    number = place - first[episode] - 1
    saved = np.zeros(int(steps.sum()) + len(steps), np.int64)
    for mine, counts, planned, stride in parts:
        shown = mine[episode] & (number % stride == 0)
        saved[place[shown]] += planned - np.minimum(counts[shown], planned)
    running = np.cumsum(saved)
    running -= np.repeat(running[first], steps + 1) if len(steps) else 0
    return Savings(first, running.astype(np.int32))


def _is_step_text(spec: FieldSpec, name: str) -> bool:
    return spec.name == name and spec.modality == "text" and spec.per == "step"


def _header(steps: int) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (steps,)})
    return file.getvalue()


def _steps(index: EpisodeIndex) -> NDArray[np.int64]:
    return np.maximum(np.asarray(index.steps, np.int64), 0)
