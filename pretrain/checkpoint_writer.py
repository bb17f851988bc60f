"""`Writer`: saves checkpoints in one thread, which lives as long as the run."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiphys.pretrain import checkpoint_snapshot
from tiphys.pretrain.checkpoint_files import WriteError
from tiphys.pretrain.checkpoint_snapshot import Buffers, Snapshot

if TYPE_CHECKING:
    from tiphys.pretrain.engine import Engine


class Writer:
    """Saves checkpoints, one at a time, in a thread. Each process has one writer.

    The thread starts with the writer, and its memory is allocated before the first step. A thread for each save could fail to
    start when memory is short, long after the run began, and each would leave a heap of its own behind.

    Parameters
    ----------
    run_dir : str or Path
    launch : str
        Identifies this launch; the same on all ranks.
    asynchronous : bool
        False: `save` returns when the checkpoint is written.
    timeout : float
        Seconds that rank 0 waits for the parts of other ranks.
    permit : callable
        Called right before a checkpoint becomes whole. It raises if this run may not save any more.

    Attributes
    ----------
    failure : WriteError or None
        Why the last save is not whole, as far as this rank knows. The next save forgets it.
    stall : float
        Seconds that the last save stopped training: waiting for the save before it, and copying.
    """

    def __init__(
        self,
        run_dir: str | Path,
        launch: str,
        *,
        asynchronous: bool = True,
        timeout: float = 1800.0,
        permit: Callable[[], None] = lambda: None,
    ) -> None:
        self.run_dir, self.launch = Path(run_dir), launch
        self.asynchronous, self.timeout, self.permit = asynchronous, timeout, permit
        self.failure: WriteError | None = None
        self._cancelled = False
        self.stall = 0.0
        self._saves = 0
        self._error: BaseException | None = None
        self._buffers = Buffers()
        self._work: queue.SimpleQueue[tuple[Snapshot, Callable[[Path], None] | None] | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self._idle.set()
        # A daemon, so that a process that lost its peers ends although rank 0 waits here for their parts. `close` waits.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def allocate(self, engine: Engine) -> None:
        """Allocate the memory of all snapshots of this engine now."""
        checkpoint_snapshot.allocate(engine, self._buffers)

    def save(
        self,
        engine: Engine,
        state: Mapping[str, Any],
        then: Callable[[Path], None] | None = None,
        *,
        wait: bool = False,
    ) -> None:
        """Copy now and write in the background. `then` is called with the folder when it is written (on rank 0: committed).

        Raises the error of this one's copy, and errors that end a run. A previous save that could not be written does not matter.
        """
        start = time.perf_counter()
        self.wait()
        self._saves += 1
        self.failure, self._cancelled = None, False
        snap = checkpoint_snapshot.snapshot(engine, f"{self.launch}-{self._saves}", state, self._buffers)
        self.stall = time.perf_counter() - start
        self._idle.clear()
        self._work.put((snap, then))
        if wait or not self.asynchronous:
            self.wait()

    @property
    def busy(self) -> bool:
        """A save is being written."""
        return not self._idle.is_set()

    def cancel(self) -> None:
        """Do not wait any longer for the parts of other ranks: one of them could not write."""
        self._cancelled = True

    def check(self) -> None:
        """Raise the error of the last save if it ends the run. One that could not be written is `failure`."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Wait until nothing is being written. Raises as `check` does."""
        self._idle.wait()
        self.check()

    def close(self, limit: float = 30.0) -> None:
        """Finish the save that is being written, if that takes less than `limit` seconds, and end the thread."""
        self._work.put(None)
        self._thread.join(limit)

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            snap, then = item
            try:
                folder = checkpoint_snapshot.write(
                    snap, self.run_dir, self.timeout, permit=self.permit, cancelled=lambda: self._cancelled
                )
                if then is not None:
                    then(folder)
            except WriteError as error:
                self.failure = error
            except BaseException as error:
                self._error = error
            finally:
                self._idle.set()
