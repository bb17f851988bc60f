"""Newer weights for a policy server while it serves: episodes that have begun keep theirs, new ones begin with the newest."""

from __future__ import annotations

import threading
import weakref
from copy import deepcopy
from typing import TYPE_CHECKING

from torch import nn

from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import say
from tiphys.pretrain.follow.follower import Follower, FollowError, Weights, jittered
from tiphys.pretrain.hub_errors import FetchError
from tiphys.pretrain.serving.served import Served
from tiphys.pretrain.serving.server import Server

if TYPE_CHECKING:
    from tiphys.pretrain.model.transformer import DecisionModel

_MOST_MODELS = 4  # in memory at once; each old one serves the episodes that began with it
_LONGEST_PAUSE = 600.0  # seconds between two polls after repeated trouble


class Renewal:
    """A thread that gives a server the weights that are published. A context manager.

    Parameters
    ----------
    server : Server
        The server. Its policy is the one that the follower has fetched.
    follower : Follower
        What it follows.
    every : float
        Seconds between two polls, about.
    """

    def __init__(self, server: Server, follower: Follower, every: float = 10.0) -> None:
        self._server, self._follower, self._every = server, follower, every
        self._waiting: Weights | None = None
        self._known: weakref.WeakSet[Served] = weakref.WeakSet([server.served])
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)

    def __enter__(self) -> Renewal:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        pause, problem = self._every, ""
        while not self._ended.wait(jittered(pause)):
            try:
                self.look()
                pause, problem = self._every, ""
            except (FollowError, FetchError, DataError, OSError) as error:
                if str(error) != problem:
                    say(f"{error}; the server goes on with step {self._server.served.step}", error=True)
                pause, problem = min(2 * pause, _LONGEST_PAUSE), str(error)

    def look(self) -> bool:
        """Take what was published since the last look. Returns whether there was something.

        Raises
        ------
        FollowError, FetchError, DataError, OSError
            If it cannot be read. The server then goes on with what it has.
        """
        self._waiting = self._follower.poll() or self._waiting
        new = self._waiting
        if new is None:
            return False
        if len(self._known) >= _MOST_MODELS:
            models = f"{len(self._known)} models are in memory"
            raise DataError(f"clients are still in episodes of older weights ({models}), so step {new.step} waits")
        model = with_weights(self._server.served.model, new)
        served = self._server.served.renewed(model, new.step, new.digest)
        self._known.add(served)
        self._waiting, self._server.served = None, served
        say(f"new episodes act with step {new.step}")
        return True


def with_weights(model: DecisionModel, new: Weights) -> DecisionModel:
    """A model of the same sizes with these weights. The old one does not change, and its weights are not copied.

    Replies wait for this thread only while it runs Python, so tensors are made beforehand and put in place by the copy.
    """
    mine, ready = dict(model.state_dict(keep_vars=True)), new.prepare(model)
    copied = {
        id(old): nn.Parameter(ready[name], old.requires_grad) if isinstance(old, nn.Parameter) else ready[name]
        for name, old in mine.items()
    }
    return deepcopy(model, copied)
