"""The training loop, on one screen; everything else happens in callbacks at named stages."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tiphys.pretrain.callbacks import Callback
from tiphys.pretrain.checkpoint import Checkpoint, check_recipe, describe
from tiphys.pretrain.checkpoint_files import CheckpointError
from tiphys.pretrain.metrics import StepMetrics, Stopwatch, peak_rate
from tiphys.pretrain.tokens.batch import TokenBatch

if TYPE_CHECKING:
    import numpy as np

    from tiphys.pretrain.engine import Engine
    from tiphys.pretrain.parallel import Sum
    from tiphys.recipes.schema import Recipe


class TrainingError(RuntimeError):
    """Training cannot go on."""


class Loaded(Protocol):
    """One step's rows from a loader; its arrays are valid until `release()`. `quarantined`: events for the plan's log."""

    step: int
    arrays: dict[str, np.ndarray]
    counters: dict[str, float]
    quarantined: list[dict[str, Any]]

    def release(self) -> None: ...


class Loader(Protocol):
    """An iterator of steps that can be put back to any of them."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def append(self, events: Sequence[dict[str, Any]]) -> None: ...


@dataclass(frozen=True)
class _Question:
    """What a rank has asked the others: its events for the plan's log, and a sum that is on its way."""

    events: list[dict[str, Any]]
    sums: Sum


class Trainer:
    """Trains `engine` on `loader` for `recipe.train.steps` steps.

    loader      None on pipeline stages that take no data
    fingerprints  of the datasets; a resumed run must have the same
    requests    asked after every step, on whichever ranks it is given: events for the plan's log (`tiphys mixture`)
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        loader: Loader | None,
        callbacks: Sequence[Callback] = (),
        fingerprints: Sequence[str] = (),
        requests: Callable[[], list[dict[str, Any]]] = list,
    ) -> None:
        self.recipe, self.engine, self.loader = recipe, engine, loader
        self.callbacks, self.fingerprints, self.requests = list(callbacks), list(fingerprints), requests
        self.world, self.steps = engine.world, recipe.train.steps
        self.resumed: Checkpoint | None = None
        self.peak = 0.0  # FLOP/s of all processes together
        self.stop_signal = 0  # SIGINT or SIGTERM if one stopped the run early, the same on every rank
        self._counters: list[str] | None = None

    @property
    def step(self) -> int:
        """Steps done."""
        return self.engine.step

    def fit(self, resume: Checkpoint | None = None) -> bool:
        """Train to the end; False when a signal stopped the run early (after saving).

        Raises CheckpointError where `resume` does not continue this recipe, TrainingError where the loss is not finite.
        """
        self._resume(resume)
        mine = peak_rate(self.world.device, torch.bfloat16 if self.engine.bf16 else torch.float32)
        self.peak = self.world.sum([mine]).result()[0]
        try:
            self._notify("on_start")
            with Signals(self.world.rank == 0) as signals:
                self._loop(signals)
            self._notify("on_end")
        finally:
            self._notify("close")
        return not self.stopped

    @property
    def stopped(self) -> bool:
        """A signal stopped the run early."""
        return self.stop_signal != 0

    def _loop(self, signals: Signals) -> None:
        clock = Stopwatch()
        for batch, wait, loaded in self._batches():
            question = self._ask(signals.asked, wait, loaded)
            result = self.engine.train_step(batch)
            stop, wait, counters = self._answer(question, batch.step)
            if not math.isfinite(result.loss):
                raise TrainingError(
                    f"step {result.step}: the loss is {result.loss}; no checkpoint has been written since it became non-finite"
                )
            self._notify("on_step", StepMetrics(result, clock.lap(), wait, self.peak, counters))
            if stop:
                self.stop_signal = stop
                break

    def _resume(self, checkpoint: Checkpoint | None) -> None:
        self.resumed = checkpoint
        if checkpoint is None:
            return
        state = checkpoint.state()
        check_recipe(state, self.recipe, str(checkpoint.path))
        if state["datasets"] != self.fingerprints:
            raise CheckpointError(
                f"{checkpoint.path}: the datasets have changed since (fingerprints {state['datasets']} -> {self.fingerprints}); "
                "use another run.dir, or put the old datasets back"
            )
        checkpoint.load(self.engine)
        if self.loader is not None:
            self.loader.load_state_dict(state["loader"])

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds beside the engine."""
        loader = {"step": self.step} if self.loader is None else {**self.loader.state_dict(), "step": self.step}
        return {"step": self.step, "loader": loader, "datasets": self.fingerprints, **describe(self.recipe)}

    def _batches(self) -> Iterator[tuple[TokenBatch, float, Loaded | None]]:
        """(rows of this rank, seconds waited for them, what the loader gave), with the next step's counts under way."""
        steps = iter(range(self.step, self.steps))
        loader = None if self.loader is None else iter(self.loader)
        following = self._next(loader, next(steps, None))
        while following is not None:
            batch, wait, loaded = following
            following = self._next(loader, next(steps, None))
            yield batch, wait, loaded
            if loaded is not None:
                loaded.release()

    def _next(
        self, loader: Iterator[Loaded] | None, step: int | None
    ) -> tuple[TokenBatch, float, Loaded | None] | None:
        """The rows of a step, announced. Every rank announces in the same order, with rows or without."""
        if step is None:
            return None
        watch, loaded = Stopwatch(), None
        if loader is None:
            batch = TokenBatch.empty(step, 0)
        else:
            loaded = next(loader)
            if loaded.step != step:
                raise TrainingError(f"the loader gave step {loaded.step} where step {step} was due")
            batch = TokenBatch.from_arrays(loaded.arrays)
        self.engine.announce(batch)
        return batch, watch.lap(), loaded

    def _ask(self, stop: int, wait: float, loaded: Loaded | None) -> _Question:
        """Start the sum of what the ranks must agree on, while the step runs: whether to stop, and what their loaders saw."""
        counters = loaded.counters if loaded is not None else {}
        if self._counters is None:  # every rank must send the same numbers: agree once on their names
            self._counters = sorted({name for names in self.world.gather(list(counters)) for name in names})
        events = [*(loaded.quarantined if loaded is not None else []), *self.requests()]
        values = [counters.get(name, 0.0) for name in self._counters]
        stops = [stop == signal.SIGINT, stop == signal.SIGTERM]
        return _Question(events, self.world.sum([*stops, loaded is not None, wait, len(events), *values]))

    def _answer(self, question: _Question, step: int) -> tuple[int, float, dict[str, float]]:
        """The same on every rank: (signal that stops the run or 0, mean wait of the loaders, their counters: summed, rates
        averaged). SIGINT goes before SIGTERM.

        Events that any rank had go into the plan's log.
        """
        interrupts, terminations, loaders, waits, changes, *totals = question.sums.result()
        if changes:
            self._change([event for some in self.world.gather(question.events) for event in some], step + 2)
        named = dict(zip(self._counters or (), totals, strict=True))
        means = {
            name: total / max(loaders, 1.0) if name.endswith(("_rate", "_bound")) else total
            for name, total in named.items()
        }
        stop = signal.SIGINT if interrupts else signal.SIGTERM if terminations else 0
        return int(stop), waits / max(loaders, 1.0), means

    def _change(self, events: list[dict[str, Any]], first: int) -> None:
        """Put events into the plan's log, the same on every rank; in force from `first` on, for the step before is drawn."""
        once = {(e["kind"], e.get("entry"), e.get("episode"), str(e.get("weights"))): e for e in events}
        if self.loader is not None:
            self.loader.append([{**event, "step": max(event.get("step", 0), first)} for event in once.values()])

    def _notify(self, stage: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, stage)(self, *arguments)


class Signals:
    """While it lasts, SIGINT and SIGTERM ask for a stop after the step that runs; a second Ctrl-C ends the process at once.

    SIGTERM may come more than once: a launcher sends its own beside the terminal's Ctrl-C.
    """

    def __init__(self, speaks: bool) -> None:
        self.asked = 0  # the first signal that came
        self._interrupts, self._speaks = 0, speaks
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            os._exit(130)
        if self._speaks and not self.asked:
            # os.write: print may be what was interrupted
            os.write(sys.stderr.fileno(), b"\nstopping after this step, then saving; Ctrl-C again ends at once\n")
        self.asked = self.asked or number
