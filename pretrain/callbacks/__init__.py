"""Callbacks of the training loop, one file each."""

from tiphys.pretrain.callbacks.base import Callback, Every
from tiphys.pretrain.callbacks.checkpointer import Checkpointer
from tiphys.pretrain.callbacks.metrics_writer import MetricsWriter
from tiphys.pretrain.callbacks.progress import Progress
from tiphys.pretrain.callbacks.track import Tracked, TrackRun
from tiphys.pretrain.callbacks.validator import Validator

__all__ = ["Callback", "Checkpointer", "Every", "MetricsWriter", "Progress", "TrackRun", "Tracked", "Validator"]
