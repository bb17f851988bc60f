"""The experiment trackers that a run can be sent to: W&B, Trackio and MLflow, each as one small class."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Tracker(Protocol):
    """One run in a tracker. Each method may raise whatever the tracker's client raises."""

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record numbers of a training step. Steps may come in any order."""

    def finish(self) -> None:
        """Send what still waits, and leave the run."""


class Wandb:
    """A run of W&B, online or offline as `WANDB_MODE` says."""

    def __init__(self, project: str, name: str, id: str, config: Mapping[str, Any], folder: str) -> None:
        import wandb

        settings = wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True)
        self._run = wandb.init(
            project=project, name=name, id=id, resume="allow", config=dict(config), dir=folder, settings=settings
        )
        # `step` is a value of each line, because W&B's own step may not go back, and the line of an evaluation comes late.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({**numbers, "step": step})

    def finish(self) -> None:
        self._run.finish()


class Trackio:
    """A run of Trackio, in its local folder or the Space that its environment variables name."""

    def __init__(self, project: str, name: str, id: str, config: Mapping[str, Any], folder: str) -> None:
        import trackio

        self._run = trackio.init(
            project,
            f"{name}-{id[:8]}",
            config=dict(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step)

    def finish(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow, in the store that `MLFLOW_TRACKING_URI` names. The project is its experiment."""

    def __init__(self, project: str, name: str, id: str, config: Mapping[str, Any], folder: str) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        mine = self._client.search_runs([experiment], f"tags.`tiphys.id` = '{id}'", max_results=1)
        if mine:
            self._id = mine[0].info.run_id
            self._client.update_run(self._id, "RUNNING")
            return
        run = self._client.create_run(experiment, run_name=name, tags={"tiphys.id": id})
        self._id = run.info.run_id
        for key, value in _flat(config, ""):
            self._client.log_param(self._id, key, str(value)[:500])

    def send(self, step: int, numbers: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [self._metric(key, value, now, step) for key, value in numbers.items()])

    def finish(self) -> None:
        self._client.set_terminated(self._id)


# name in a recipe -> (project, name, id of the run, its config, folder for the tracker's own files) -> its run
TRACKERS: dict[str, Callable[[str, str, str, Mapping[str, Any], str], Tracker]] = {
    "wandb": Wandb,
    "trackio": Trackio,
    "mlflow": Mlflow,
}


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping) or not value:
        return [(name, value)]
    return [pair for key, part in value.items() for pair in _flat(part, f"{name}.{key}" if name else str(key))]
