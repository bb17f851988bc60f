"""The training loop. Everything else happens in callbacks, at named stages."""

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

from tiphys.dataio.errors import Explained
from tiphys.pretrain.callbacks import Callback
from tiphys.pretrain.checkpoint import Checkpoint, check_recipe, recipe_state
from tiphys.pretrain.checkpoint_files import CheckpointError
from tiphys.pretrain.health import Health
from tiphys.pretrain.metrics import StepMetrics, Stopwatch, peak_rate
from tiphys.pretrain.phases import mark, phases
from tiphys.pretrain.tokens.batch import TokenBatch

if TYPE_CHECKING:
    import numpy as np

    from tiphys.pretrain.engine import Engine, StepResult
    from tiphys.pretrain.parallel import Sum
    from tiphys.recipes.schema import Recipe


# What callbacks may say to the callbacks of all ranks: `Trainer.votes`, `Trainer.agreed`
VOTES = ("save", "failed")


class TrainingError(RuntimeError):
    """Training cannot continue."""


class Diverged(Explained, TrainingError):
    """The loss is infinite or not a number, or stays far too high."""


class Spiked(Explained, TrainingError):
    """The last steps damaged the model. A checkpoint from before them is ready to be resumed, and their rows are skipped."""


class Loaded(Protocol):
    """One step's rows from a loader. The arrays are valid until `release()`. `quarantined`: events for the plan's log."""

    step: int
    arrays: dict[str, np.ndarray]
    counters: dict[str, float]
    quarantined: list[dict[str, Any]]

    def release(self) -> None: ...


class Loader(Protocol):
    """An iterator over steps that can be set to any step."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def append(self, events: Sequence[dict[str, Any]]) -> None: ...


@dataclass(frozen=True)
class _Exchange:
    """An exchange of numbers between the ranks that has started: this rank's events for the plan's log, and the sums."""

    events: list[dict[str, Any]]
    sums: Sum


class Trainer:
    """Trains a model until `recipe.train.steps` steps are done.

    Parameters
    ----------
    recipe : Recipe
    engine : Engine
        The model under DeepSpeed.
    loader : Loader or None
        This rank's rows of each step; None on pipeline stages that get no data.
    callbacks : sequence of Callback
        Called at every stage, in this order.
    fingerprints : sequence of str
        Those of the datasets. A resumed run must have the same.
    requests : callable
        Called at every step; returns events for the plan's log (from `tiphys mixture`). Any ranks may return events.
    earlier : sequence of sequence of str
        Fingerprints that the datasets had earlier in this run, and that a checkpoint may have.
    events : sequence of dict
        Events for the plan's log that a checkpoint may lack: those of rollbacks.

    Attributes
    ----------
    step : int
        Number of steps done.
    steps : int
        Number of steps of the whole run.
    resumed : Checkpoint or None
        The checkpoint that the run continues.
    stopped : bool
        Whether a signal stopped the run early.
    votes : dict of str to float
        One number for each of `VOTES`. A callback sets them; they are summed over the ranks while the next step runs.
    agreed : dict of str to float
        The sums of the votes that were set before this step, the same on every rank.
    peak : float
        Floating-point operations per second that all processes together could reach.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        loader: Loader | None,
        callbacks: Sequence[Callback] = (),
        fingerprints: Sequence[str] = (),
        requests: Callable[[], list[dict[str, Any]]] = list,
        earlier: Sequence[Sequence[str]] = (),
        events: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.health, self._events = Health.of(recipe), list(events)
        self._changes: list[int] = []  # steps from which a change of the mixture is in force
        self.earlier = [list(some) for some in earlier]
        self.recipe, self.engine, self.loader = recipe, engine, loader
        self.callbacks, self.fingerprints, self.requests = list(callbacks), list(fingerprints), requests
        self.world, self.steps = engine.world, recipe.train.steps
        self.resumed: Checkpoint | None = None
        self.peak = 0.0  # FLOP/s of all processes together
        self.votes, self.agreed = dict.fromkeys(VOTES, 0.0), dict.fromkeys(VOTES, 0.0)
        self.stop_signal = 0  # SIGINT or SIGTERM if one stopped the run early, the same on every rank
        self._counters: list[str] | None = None

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.engine.step

    def fit(self, resume: Checkpoint | None = None) -> bool:
        """Train to the end. Collective.

        Parameters
        ----------
        resume : Checkpoint, optional
            The checkpoint to continue from.

        Returns
        -------
        bool
            False if a signal stopped the run early; the callbacks have finished their work, and a checkpoint is saved.

        Raises
        ------
        CheckpointError
            If `resume` belongs to another recipe or other datasets, or cannot be loaded.
        Diverged
            If the loss is not finite and `train.rollbacks` is 0, or if rollbacks did not help. No checkpoint of that step is
            written. All ranks raise it.
        Spiked
            If the run can go back: make everything again and resume from the newest checkpoint. All ranks raise it.
        """
        self._resume(resume)
        mine = peak_rate(self.world.device, torch.bfloat16 if self.engine.bf16 else torch.float32)
        self.peak = self.world.sum([mine]).result()[0]
        try:
            self._notify("on_start")
            with Signals(self.world.rank == 0) as signals:
                self._loop(signals)
                mark("save")
                self._notify("on_end")
                mark("end")
                self._late_stop(signals)
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
            exchange = self._start_exchange(signals.stop, wait, loaded)
            mark("forward", step=batch.step + 1)
            result = self.engine.train_step(batch)
            stop, wait, counters = self._finish_exchange(exchange, batch.step)
            self._check_health(result)
            self._notify("on_step", StepMetrics(result, clock.lap(), wait, self.peak, counters, phases.spent()))
            if stop:
                self.stop_signal = stop
                break

    def _check_health(self, result: StepResult) -> None:
        """Raises Spiked after the callbacks have prepared a rollback, or Diverged if there is none."""
        if any(step < result.step for step in self._changes):
            self._changes = [step for step in self._changes if step >= result.step]
            self.health.forget()
        spike = self.health.observe(result.step, result.loss, result.gradient_norm, result.loss_by_task)
        if spike is None:
            return
        if self.recipe.train.rollbacks:
            self._notify("on_spike", spike)
            raise Spiked(f"step {spike.last}: {spike.why}")
        if not (math.isfinite(result.loss) and math.isfinite(result.gradient_norm)):
            raise Diverged(
                f"step {result.step}: {spike.why}; no checkpoint has been written since it became non-finite. "
                "Lower the learning rate, or clip gradients (deepspeed.gradient_clipping), and use another run.dir"
            )

    def _late_stop(self, signals: Signals) -> None:
        """A signal that came after the last step, while the end was saved: what follows training is left out."""
        if not self.stop_signal:
            interrupts, terminations = self.world.sum(_stops(signals.stop)).result()
            self.stop_signal = _first_of(interrupts, terminations)

    def _resume(self, checkpoint: Checkpoint | None) -> None:
        self.resumed = checkpoint
        if checkpoint is None:
            self._changes = [event["step"] for event in _of_mixture(self._events)]
            if self.engine.balance is not None:
                self.engine.balance.follow(self._events)
            if self.loader is not None and self._events:
                self.loader.load_state_dict({**self.loader.state_dict(), "log": self._events})
            return
        state = checkpoint.state()
        check_recipe(state, self.recipe, str(checkpoint.path))
        if state["datasets"] not in (self.fingerprints, *self.earlier):
            raise CheckpointError(
                f"{checkpoint.path}: the datasets have changed since it was saved (fingerprints {state['datasets']} -> "
                f"{self.fingerprints}); use another run.dir, or restore the old datasets. If only values were corrected, "
                "`tiphys train … --accept-changed-data` continues with them"
            )
        checkpoint.load(self.engine)
        if self.engine.balance is not None and "balance" in state:
            self.engine.balance.load_state_dict(state["balance"])
        self.health.load_state_dict(state.get("health") or {**self.health.state_dict(), "proven": checkpoint.step})
        loader = state["loader"]
        log = loader.get("log", [])
        if lacking := [event for event in self._events if event not in log]:
            loader = {**loader, "log": [*log, *lacking]}
        if self.loader is not None:
            self.loader.load_state_dict(loader)
        if self.engine.balance is not None:
            self.engine.balance.follow(loader.get("log", []))
        changes = _of_mixture(loader.get("log", []))  # on all ranks, because all judge the losses
        self._changes = [event["step"] for event in changes if event["step"] >= self.step]

    def state(self) -> dict[str, Any]:
        """What a checkpoint contains besides the engine's state."""
        loader = {"step": self.step} if self.loader is None else {**self.loader.state_dict(), "step": self.step}
        state = {"step": self.step, "loader": loader, "health": self.health.state_dict()}
        if self.engine.balance is not None and self.engine.balance.chooses:
            state["balance"] = self.engine.balance.state_dict()
        return {**state, "datasets": self.fingerprints, **recipe_state(self.recipe)}

    def _batches(self) -> Iterator[tuple[TokenBatch, float, Loaded | None]]:
        """(rows of this rank, seconds of waiting for them, the loader's item) of each step. The next step is announced before."""
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
        """Get and announce the rows of a step. All ranks announce in the same order, also ranks without rows."""
        if step is None:
            return None
        watch, loaded = Stopwatch(), None
        mark("rows", step=self.step + 1)
        if loader is None:
            batch = TokenBatch.empty(step, 0)
        else:
            loaded = next(loader)
            if loaded.step != step:
                raise TrainingError(f"the loader returned step {loaded.step}, but step {step} is next")
            batch = TokenBatch.from_arrays(loaded.arrays)
        self.engine.announce(batch)
        return batch, watch.lap(), loaded

    def _start_exchange(self, stop: int, wait: float, loaded: Loaded | None) -> _Exchange:
        """Start to sum, while the step runs, what the ranks must agree on: whether to stop, and the numbers of their loaders."""
        counters = loaded.counters if loaded is not None else {}
        if self._counters is None:  # all ranks must sum the same counters: agree once on their names
            self._counters = sorted({name for names in self.world.gather(list(counters)) for name in names})
        events = [*(loaded.quarantined if loaded is not None else []), *self.requests()]
        values = [counters.get(name, 0.0) for name in self._counters]
        votes = [self.votes[name] for name in VOTES]
        numbers = [*_stops(stop), loaded is not None, wait, len(events), *votes, *values]
        return _Exchange(events, self.world.sum(numbers))

    def _finish_exchange(self, exchange: _Exchange, step: int) -> tuple[int, float, dict[str, float]]:
        """(signal that stops the run or 0, mean wait of the loaders, sums of their counters, or means of rates), the same on
        every rank. SIGINT goes before SIGTERM.

        The events of all ranks are added to the plan's log.
        """
        interrupts, terminations, loaders, waits, changes, *totals = exchange.sums.result()
        self.agreed = dict(zip(VOTES, totals, strict=False))
        totals = totals[len(VOTES) :]
        if changes:
            self._change([event for some in self.world.gather(exchange.events) for event in some], step + 2)
        named = dict(zip(self._counters or (), totals, strict=True))
        means = {
            name: total / max(loaders, 1.0) if name.endswith(("_rate", "_bound")) else total
            for name, total in named.items()
        }
        return _first_of(interrupts, terminations), waits / max(loaders, 1.0), means

    def _change(self, events: list[dict[str, Any]], first: int) -> None:
        """Add events to the plan's log, the same on all ranks. They apply from step `first` on; earlier steps are drawn."""
        once = {(e["kind"], e.get("entry"), e.get("episode"), str(e.get("weights"))): e for e in events}
        events = [{**event, "step": max(event.get("step", 0), first)} for event in once.values()]
        if self.loader is not None:
            self.loader.append(events)
        if changes := [event for event in events if event["kind"] != "quarantine"]:
            self._changes += [event["step"] for event in _of_mixture(changes)]
            if self.engine.balance is not None:
                self.engine.balance.follow(changes)
            self._notify("on_change", changes)

    def _notify(self, stage: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, stage)(self, *arguments)


def _of_mixture(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events of a plan's log after which other data are drawn than before."""
    return [event for event in events if event["kind"] in ("weights", "priority", "dataset")]


def _stops(number: int) -> list[float]:
    """What a rank adds to the sums for a signal that it got."""
    return [float(number == signal.SIGINT), float(number == signal.SIGTERM)]


def _first_of(interrupts: float, terminations: float) -> int:
    return int(signal.SIGINT if interrupts else signal.SIGTERM if terminations else 0)


class Signals:
    """Inside the block, SIGINT and SIGTERM request a stop after the current step; a second Ctrl-C ends the process at once.

    Several SIGTERM are one request, because a launcher may send its own after the Ctrl-C of the terminal.
    """

    def __init__(self, prints: bool) -> None:
        self.stop = 0  # the first signal that came
        self._interrupts, self._prints = 0, prints
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
        if self._prints and not self.stop:
            # os.write, because the signal may have interrupted a print
            os.write(sys.stderr.fileno(), b"\nstopping after this step, then saving; Ctrl-C again ends at once\n")
        self.stop = self.stop or number
