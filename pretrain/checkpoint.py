"""Checkpoints that do not depend on the layout: saved on one layout, they load on any other, bit for bit.

Each rank saves the flat ranges of masters and moments that it owns, under canonical parameter names (`deepspeed_state`).
Saving copies them to host memory, then a thread writes them (`checkpoint_writer`), without a collective; `checkpoint_files`
says when the result counts. Loading reads only those parts of all ranks' files that overlap the ranges of this rank. The files
are safetensors and JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tiphys.dataio.messages import logger
from tiphys.pretrain import checkpoint_files as files
from tiphys.pretrain.checkpoint_files import CheckpointError
from tiphys.pretrain.checkpoint_snapshot import set_random_states
from tiphys.pretrain.checkpoint_weights import RangeReader, SavedWeights
from tiphys.pretrain.distributed import deepspeed_state as state_of
from tiphys.recipes.load import differences, digest, from_dict, to_dict
from tiphys.recipes.resume import may_change

if TYPE_CHECKING:
    from tiphys.pretrain.engine import Engine
    from tiphys.recipes.schema import Recipe

log = logger(__name__)


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
                set_random_states(reader.rng[world.rank])
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
