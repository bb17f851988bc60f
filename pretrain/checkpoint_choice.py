"""The checkpoint that a run resumes from: the newest one whose bytes are those that were written, on every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiphys.dataio.messages import logger
from tiphys.pretrain import checkpoint_files as files
from tiphys.pretrain.checkpoint import Checkpoint, CheckpointError

log = logger(__name__)

ASIDE = files.MANIFEST + ".damaged"


def newest_sound(run_dir: str | Path, world: Any) -> Checkpoint | None:
    """The newest checkpoint of a run whose digests are right. Collective: the ranks share the work and agree.

    A disk or a copy can change bytes of a file and keep its size. Such a checkpoint is set aside, with a warning that names
    the file: its `manifest.json` becomes `manifest.json.damaged`, so that no later launch takes it. Its other files stay.

    Parameters
    ----------
    run_dir : str or Path
    world : ParallelDims
        Rank 0 chooses; each rank compares the digests of its share of the files.

    Returns
    -------
    Checkpoint or None
        None if the run has no whole checkpoint. `verified` is True.

    Raises
    ------
    CheckpointError
        On all ranks, if the run has checkpoints and none of them is sound. Then nothing is set aside.
    """
    candidates = [str(checkpoint.path) for checkpoint in Checkpoint.all(run_dir)] if world.rank == 0 else []
    damaged: list[tuple[Path, str]] = []
    for path in map(Path, world.gather(candidates)[0]):
        checkpoint, errors = _examine(path, world)
        if checkpoint is not None and not errors:
            if world.rank == 0:
                for folder, error in damaged:
                    log.warning("set aside a damaged checkpoint: %s", error)
                    (folder / files.MANIFEST).rename(folder / ASIDE)
            world.barrier()
            checkpoint.verified = True
            return checkpoint
        damaged.append((path, errors[0]))
    if damaged:
        told = "\n".join(error for _, error in damaged)
        raise CheckpointError(
            f"{run_dir}: none of its checkpoints is sound:\n{told}\nPut a sound copy of a checkpoint back"
        )
    return None


def _examine(path: Path, world: Any) -> tuple[Checkpoint | None, list[str]]:
    """Open a checkpoint and compare this rank's share of its files. Returns what all ranks found wrong."""
    checkpoint, error = None, ""
    try:
        checkpoint = Checkpoint.open(path)
        checkpoint.verify(world.rank, world.world)
    except CheckpointError as caught:
        error = str(caught)
    return checkpoint, [found for found in world.gather(error) if found]
