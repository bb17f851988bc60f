"""Checkpoints that do not depend on the layout: saved on one layout, they load on any other, bit for bit.

Each rank saves the flat ranges of masters and moments that it owns, under canonical parameter names (`deepspeed_state`).
Saving copies them to host memory, then a thread writes them (`checkpoint_writer`), without a collective; `checkpoint_files`
says when the result counts. Loading reads only those parts of all ranks' files that overlap the ranges of this rank. The files
are safetensors and JSON.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tiphys.dataio.atomic import atomic_path, write_json
from tiphys.dataio.messages import logger
from tiphys.pretrain import checkpoint_files as files
from tiphys.pretrain.checkpoint_files import CheckpointError, WriteError
from tiphys.pretrain.distributed import deepspeed_state as state_of
from tiphys.recipes.load import differences, digest, from_dict, to_dict
from tiphys.recipes.resume import may_change

if TYPE_CHECKING:
    from tiphys.pretrain.engine import Engine
    from tiphys.recipes.schema import Recipe

log = logger(__name__)
AVERAGE = state_of.AVERAGE
_TRAINED = ("master", AVERAGE)


@dataclass
class Snapshot:
    """One rank's part of a checkpoint, in host memory. `save` identifies this save; it is the same on all ranks."""

    step: int
    rank: int
    world: int
    save: str
    tensors: dict[str, torch.Tensor]
    index: list[dict[str, Any]]
    rng: dict[str, str]
    state: dict[str, Any] = field(default_factory=dict)  # rank 0 only: what goes into state.json


class _Piece(NamedTuple):
    start: int
    stop: int
    rank: int
    step: float


class Buffers:
    """Host memory that snapshots are copied to. It is allocated once and used by every snapshot of an engine.

    New memory for each snapshot would raise the peak: the allocator cannot always use what an earlier snapshot gave back.
    """

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def allocate(self, name: str, view: torch.Tensor) -> torch.Tensor:
        """The buffer of this name, with the shape and type of `view`."""
        held = self._held.get(name)
        if held is None or held.shape != view.shape or held.dtype != view.dtype:
            # a GPU copies to pinned memory several times as fast
            held = torch.zeros(view.shape, dtype=view.dtype, pin_memory=view.is_cuda)
            self._held[name] = held
        return held

    def copy(self, name: str, view: torch.Tensor) -> torch.Tensor:
        return self.allocate(name, view).copy_(view.detach())


def allocate(engine: Engine, buffers: Buffers) -> None:
    """Allocate what the snapshots of an engine need. Not collective. Raises UnknownState if the engine cannot be saved."""
    state_of.materialise(engine.deepspeed)
    for fragment in state_of.fragments(engine.deepspeed, engine.address):
        for key, view in fragment.views.items() if fragment.owner else ():
            buffers.allocate(_tensor_name(fragment.name, fragment.start, key), view)


def snapshot(engine: Engine, save: str, state: Mapping[str, Any], buffers: Buffers | None = None) -> Snapshot:
    """Copy what this rank owns. Not collective. Raises CheckpointError if the engine's state cannot be saved now.

    buffers   where to; the snapshot is valid until the next one with the same buffers
    """
    buffers = buffers or Buffers()
    if state_of.inside_accumulation(engine.deepspeed):
        raise CheckpointError(
            "a checkpoint between the micro-batches of a step would lose their gradients; save after the step"
        )
    state_of.materialise(engine.deepspeed)
    tensors: dict[str, torch.Tensor] = {}
    index: list[dict[str, Any]] = []
    for fragment in state_of.fragments(engine.deepspeed, engine.address):
        _check_weight(fragment)
        if not fragment.owner:
            continue
        step = float(fragment.slot["step"]) if fragment.slot is not None else None
        _add(buffers, tensors, index, fragment.name, fragment.shape, fragment.start, fragment.views, step)
    if engine.world.replica == 0:
        for name, buffer in engine.buffers():
            _add(buffers, tensors, index, name, tuple(buffer.shape), 0, {"buffer": buffer.reshape(-1)}, None)
    progress = state_of.progress(engine.deepspeed) if engine.world.rank == 0 else {}
    meta = {**state, "engine": progress} if engine.world.rank == 0 else {}
    return Snapshot(engine.step, engine.world.rank, engine.world.world, save, tensors, index, _rng(), meta)


def _tensor_name(name: str, start: int, key: str) -> str:
    return f"{name}@{start}|{key}"


def _add(
    buffers: Buffers,
    tensors: dict[str, torch.Tensor],
    index: list[dict[str, Any]],
    name: str,
    shape: Sequence[int],
    start: int,
    views: Mapping[str, torch.Tensor],
    step: float | None,
) -> None:
    numel = 0
    for key, view in views.items():
        tensor = _tensor_name(name, start, key)
        tensors[tensor] = buffers.copy(tensor, view)
        numel = view.numel()
    index.append(
        {"name": name, "shape": list(shape), "start": start, "numel": numel, "keys": list(views), "step": step}
    )


def _check_weight(fragment: state_of.Fragment) -> None:
    """Raises CheckpointError if the weight that the model computes with is not the rounded master."""
    master, weight = fragment.views.get("master"), fragment.weight
    if master is None or weight is None:
        return
    if not torch.equal(master.to(weight.dtype).to(weight.device), weight):
        why = (
            "holds NaN" if bool(torch.isnan(master).any()) else "differs from the weights that the model computes with"
        )
        stop = fragment.start + fragment.numel
        raise CheckpointError(
            f"{fragment.name}[{fragment.start}:{stop}]: the fp32 master {why}; this checkpoint is not saved"
        )


def write(
    snap: Snapshot,
    run_dir: str | Path,
    timeout: float = 1800.0,
    *,
    permit: Callable[[], None] = lambda: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Path:
    """Write one rank's part. Rank 0 then waits for the other ranks and commits; the folder counts from then on.

    `permit` and `cancelled` are those of `checkpoint_files.commit`. Raises WriteError if a file cannot be written.
    """
    folder = files.folder_of(run_dir, snap.step)
    tensors, name = files.rank_files(snap.rank)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / files.MANIFEST).unlink(
            missing_ok=True
        )  # before files are replaced, an older save of this step stops counting
        with atomic_path(folder / tensors) as path:
            save_file(snap.tensors, path)
        index = {"save": snap.save, "file": files.digest(folder / tensors), "fragments": snap.index, "rng": snap.rng}
        write_json(folder / name, index)
        if snap.rank == 0:
            files.commit(
                folder, snap.step, snap.world, snap.save, snap.state, timeout, permit=permit, cancelled=cancelled
            )
    except (OSError, SafetensorError) as error:
        report_failure(folder / name, snap.save, error)
        raise WriteError(f"{folder}: not written, so this checkpoint does not exist: {error}") from error
    return folder


def report_failure(path: Path, save: str, error: Exception) -> None:
    """Write the error for rank 0, which waits for this rank's part. If this fails too, rank 0 waits until its timeout."""
    try:
        write_json(path, {"save": save, "error": str(error)})
    except OSError:
        return


class Checkpoint:
    """A whole checkpoint on disk: every file of its manifest exists and has the size that the manifest says.

    Attributes
    ----------
    path : Path
        Its folder, `<run.dir>/checkpoints/step-00001000`.
    manifest : mapping
        The contents of `manifest.json`.
    step : int
        The training step after which it was saved.
    world : int
        Number of ranks that saved it.
    verified : bool
        The digests of its files were compared on the ranks of this launch; `load` does not compare them again.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path, self.manifest = path, manifest
        self.verified = False

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r})"

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a checkpoint.

        Parameters
        ----------
        path : str or Path
            Its folder.

        Returns
        -------
        Checkpoint

        Raises
        ------
        CheckpointError
            If there is no manifest, or a file is missing or has another size.
        """
        manifest = files.read_manifest(Path(path))
        if manifest is None:
            raise CheckpointError(f"{path}: not a whole checkpoint: it has no {files.MANIFEST}")
        return cls(Path(path), manifest)

    @classmethod
    def all(cls, run_dir: str | Path) -> list[Checkpoint]:
        """The whole checkpoints of a run, newest first."""
        return [cls(folder, manifest) for folder, manifest in files.whole(run_dir)]

    @classmethod
    def newest_whole(cls, run_dir: str | Path, *, verify: bool = False) -> Checkpoint | None:
        """The newest whole checkpoint of a run.

        Damaged checkpoints are skipped, with a warning that names the damage.

        Parameters
        ----------
        run_dir : str or Path
        verify : bool
            Also compare the digests of all files.

        Returns
        -------
        Checkpoint or None
            None if the run has no whole checkpoint.
        """

        def damaged(error: CheckpointError) -> None:
            log.warning("skipped a damaged checkpoint: %s", error)

        for folder, manifest in files.whole(run_dir, damaged):
            checkpoint = cls(folder, manifest)
            if verify:
                try:
                    checkpoint.verify()
                except CheckpointError as error:
                    damaged(error)
                    continue
            return checkpoint
        return None

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def world(self) -> int:
        return int(self.manifest["world"])

    def state(self) -> dict[str, Any]:
        """`state.json`: step, state of the loader, recipe and its hash, the engine's progress, fingerprints of the datasets."""
        return files.read_json(self.path / files.STATE)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the digests of all files, or of part number `part` of `parts`. Raises CheckpointError if one differs."""
        files.verify(self.path, self.manifest, part, parts)

    def load(self, engine: Engine) -> dict[str, Any]:
        """Load this checkpoint into an engine of any layout. Collective.

        Parameters
        ----------
        engine : Engine
            Its masters, moments, buffers, step counters and schedule are overwritten, bit for bit with what was saved. On as
            many ranks as saved, torch's random generators are restored too.

        Returns
        -------
        dict
            `state()`.

        Raises
        ------
        CheckpointError
            On all ranks, if digests, parameters or shapes differ on any rank. The engine's state is then undefined.
        """
        world = engine.world
        if not self.verified:
            _agree(world, lambda: self.verify(world.rank, world.world), "verify")
        state = self.state()
        state_of.materialise(engine.deepspeed)
        with RangeReader(self) as reader:
            _agree(world, lambda: self._fill(engine, reader), "load")
            if self.world == world.world:
                _set_rng(reader.rng[world.rank])
        state_of.refresh(engine.deepspeed)
        state_of.set_progress(engine.deepspeed, state["engine"])
        world.barrier()
        return state

    def _fill(self, engine: Engine, reader: RangeReader) -> None:
        steps: set[float] = set()
        wanted: set[str] = set()
        for fragment in state_of.fragments(engine.deepspeed, engine.address):
            wanted.add(fragment.name)
            for key, view in fragment.views.items():
                steps |= reader.copy(fragment.name, key, fragment.shape, fragment.start, view)
        for name, buffer in engine.buffers():
            wanted.add(name)
            flat = torch.empty(buffer.numel(), dtype=buffer.dtype)
            reader.copy(name, "buffer", tuple(buffer.shape), 0, flat)
            buffer.copy_(flat.view(buffer.shape))
        extra = sorted(set(reader.pieces) - wanted) if engine.world.world == 1 else []
        if extra:
            raise CheckpointError(f"{self.path}: contains {', '.join(extra[:5])}, which this model does not have")
        if len(steps) > 1:
            raise CheckpointError(f"{self.path}: its parameters are from different steps: {sorted(steps)}")
        if not steps and reader.steps:
            steps = {max(reader.steps)}  # this rank holds no part of a trained parameter
        if steps:
            state_of.set_step(engine.deepspeed, steps.pop())


class RangeReader:
    """Reads flat ranges of canonical parameters from the files of all ranks. Opens only the files that it needs."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.pieces: dict[str, dict[str, list[_Piece]]] = {}
        self.rng: list[dict[str, str]] = []
        self.steps: set[float] = set()
        self.bytes = 0  # number of bytes read so far
        self._files: dict[int, Any] = {}
        for rank in range(checkpoint.world):
            file = self.path / files.rank_files(rank)[1]
            index = files.read_json(file)
            try:
                self.rng.append(dict(index["rng"]))
                for entry in index["fragments"]:
                    self._index(rank, entry)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise CheckpointError(f"{file}: not the index of a rank: {error!r}") from error

    def _index(self, rank: int, entry: Mapping[str, Any]) -> None:
        name, start, numel, step = str(entry["name"]), entry["start"], entry["numel"], entry["step"]
        self.shapes[name] = tuple(entry["shape"])
        if any(type(n) is not int or not 0 <= n < 1 << 60 for n in (start, numel, *self.shapes[name])):
            raise ValueError(f"a size of {name} is not possible")
        if step is not None:
            step = float(step)
            self.steps.add(step)
        piece = _Piece(start, start + numel, rank, step)
        for key in entry["keys"]:
            self.pieces.setdefault(name, {}).setdefault(key, []).append(piece)

    def copy(self, name: str, key: str, shape: tuple[int, ...], start: int, into: torch.Tensor) -> set[float]:
        """Fill the flat tensor `into` with elements from `start` on. Returns the optimizer steps that they are from."""
        if name not in self.shapes:
            raise CheckpointError(f"{self.path}: has no parameter {name!r}")
        if self.shapes[name] != tuple(shape):
            raise CheckpointError(
                f"{self.path}: {name} has shape {self.shapes[name]}, but {tuple(shape)} in this model"
            )
        if key not in self.pieces[name]:
            have = ", ".join(self.pieces[name])
            raise CheckpointError(
                f"{self.path}: {name} was saved as {have}, not as {key}; check model.freeze and train.ema, which must be as they "
                "were"
            )
        stop, found, steps = start + into.numel(), 0, set()
        for piece in self.pieces[name][key]:
            low, high = max(piece.start, start), min(piece.stop, stop)
            if low < high:
                part = self._slice(
                    piece.rank, _tensor_name(name, piece.start, key), low - piece.start, high - piece.start
                )
                into[low - start : high - start].copy_(part)
                found += high - low
                self.bytes += part.numel() * part.element_size()
                if piece.step is not None:
                    steps.add(piece.step)
        if found != into.numel():
            raise CheckpointError(
                f"{self.path}: {name}|{key}: only {found} of {into.numel()} elements from {start} on were saved"
            )
        return steps

    def whole(self, name: str, key: str) -> torch.Tensor:
        """A whole parameter, moment or buffer, in its canonical shape."""
        shape = self.shapes[name]
        saved = max(piece.stop for piece in self.pieces[name][key])
        if math.prod(shape) != saved:
            raise CheckpointError(f"{self.path}: {name}|{key} has shape {shape}, but {saved} elements were saved")
        out = torch.empty(int(torch.Size(shape).numel()), dtype=self.dtype(name, key))
        self.copy(name, key, shape, 0, out)
        return out.view(shape)

    def dtype(self, name: str, key: str) -> torch.dtype:
        first = self.pieces[name][key][0]
        return self._slice(first.rank, _tensor_name(name, first.start, key), 0, 0).dtype

    def _slice(self, rank: int, key: str, low: int, high: int) -> torch.Tensor:
        file = self.path / files.rank_files(rank)[0]
        try:
            if rank not in self._files:
                self._files[rank] = safe_open(file, "pt").__enter__()
            found = self._files[rank].get_slice(key)[low:high]
        except (SafetensorError, OSError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"{file}: {key} cannot be read: {error}") from error
        if found.dim() != 1 or len(found) != high - low:
            raise CheckpointError(f"{file}: {key} has not the elements {low} to {high} that its index names")
        return found

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.__exit__(*error)
        self._files.clear()


class SavedWeights(Mapping[str, torch.Tensor]):
    """Canonical name -> whole tensor: masters, frozen parameters and buffers. Each is read when it is asked for.

    Parameters
    ----------
    checkpoint : Checkpoint
    reader : RangeReader
        Of this checkpoint.
    dtype : torch.dtype, optional
        Masters and averages are cast to it.
    weights : "auto", "ema" or "raw"
        The averages of the masters (`train.ema`) or the masters; auto: the averages if there are any.

    Attributes
    ----------
    averaged : bool
        Whether these are the averages.

    Raises
    ------
    CheckpointError
        If a parameter was saved without its weights, or averages are wanted and there are none.
    """

    def __init__(
        self, checkpoint: Checkpoint, reader: RangeReader, dtype: torch.dtype | None = None, weights: str = "raw"
    ) -> None:
        self._reader, self._dtype = reader, dtype
        self._keys: dict[str, str] = {}
        self.averaged = weights != "raw" and any(AVERAGE in keys for keys in reader.pieces.values())
        if weights == "ema" and not self.averaged:
            raise CheckpointError(
                f"{checkpoint.path}: it has no averages of the weights; set `train.ema.decay` before a run begins, or "
                "`publish.weights: raw`"
            )
        order = (*((AVERAGE,) if self.averaged else ()), "master", "frozen", "buffer")
        for name, keys in reader.pieces.items():
            key = next((k for k in order if k in keys), "")
            if not key:
                raise CheckpointError(f"{checkpoint.path}: {name} was saved without its weights")
            self._keys[name] = key

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._reader.whole(name, self._keys[name])
        return tensor.to(self._dtype) if self._dtype is not None and self._keys[name] in _TRAINED else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def describe(self, name: str) -> torch.Tensor:
        """A tensor without data of the same shape and type."""
        key = self._keys[name]
        dtype = self._dtype if self._dtype is not None and key in _TRAINED else self._reader.dtype(name, key)
        return torch.empty(self._reader.shapes[name], dtype=dtype, device="meta")


def export_weights(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, weights: str = "raw"
) -> dict[str, torch.Tensor]:
    """All of `SavedWeights` in memory."""
    with RangeReader(checkpoint) as reader:
        return dict(SavedWeights(checkpoint, reader, dtype, weights))


def optimizer_state(checkpoint: Checkpoint) -> dict[str, dict[str, torch.Tensor]]:
    """Canonical name -> key -> whole tensor, for all that was saved. For comparisons of checkpoints."""
    with RangeReader(checkpoint) as reader:
        return {name: {key: reader.whole(name, key) for key in keys} for name, keys in reader.pieces.items()}


def recipe_state(recipe: Recipe) -> dict[str, Any]:
    """The recipe's part of `state.json`: all its keys, and their hash."""
    return {"recipe": to_dict(recipe), "hash": digest(recipe)}


def check_recipe(state: Mapping[str, Any], recipe: Recipe, where: str) -> None:
    """Raises CheckpointError, naming the keys that differ, if `recipe` cannot continue the saved run."""
    if state["hash"] == digest(recipe):
        return
    changed = differences(from_dict(state["recipe"], where), recipe)
    matter = [line for line in changed if not may_change(line.partition(": ")[0])]
    if matter:
        raise CheckpointError(
            f"{where}: belongs to another recipe. These keys differ (saved -> now):\n  "
            + "\n  ".join(matter)
            + "\nRestore them, or use another run.dir."
        )


def _agree(world: Any, action: Callable[[], None], what: str) -> None:
    """Run `action`. If it fails on any rank, all ranks raise, so that no rank waits for another."""
    error: CheckpointError | None = None
    try:
        action()
    except CheckpointError as caught:
        error = caught
    if world.sum([error is not None]).result()[0]:
        raise error or CheckpointError(f"another rank could not {what} the checkpoint; the log of that rank says why")


def _rng() -> dict[str, str]:
    """State of torch's random generators, which dropout uses. All other randomness is a function of seed, step and row."""
    out = {"cpu": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()}
    if torch.cuda.is_available():
        out["cuda"] = base64.b64encode(torch.cuda.get_rng_state().numpy().tobytes()).decode()
    return out


def _set_rng(states: Mapping[str, str]) -> None:
    def tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    torch.set_rng_state(tensor(states["cpu"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(states["cuda"]))
