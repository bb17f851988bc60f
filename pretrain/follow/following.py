"""`Following`: a thread that keeps newer weights ready for a policy. The policy takes them between two actions or episodes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import logger
from tiphys.pretrain.follow.follower import Follower, FollowError, Weights, jittered, swap
from tiphys.pretrain.hub_errors import FetchError

if TYPE_CHECKING:
    import torch

    from tiphys.pretrain.acting.policy import Policy

LONGEST_PAUSE = 600.0  # seconds between two polls after repeated trouble
WHEN = ("act", "episode")


class Following:
    """What `Policy.follow` starts.

    Parameters
    ----------
    url : str
        As for `Follower`.
    every : float
        Seconds between two polls, about.
    when : str
        ``act``: new weights are taken before any action; ``episode``: only before an episode's first.
    best : bool
        As for `Follower`.

    Attributes
    ----------
    folder : Path
        The policy as it was first fetched.
    step, digest : int, str
        Of the weights that the policy acts with.
    problem : str
        Why the last poll failed; empty if it did not.
    """

    def __init__(self, url: str, *, every: float = 10.0, when: str = "act", best: bool = False) -> None:
        if when not in WHEN:
            raise DataError(f"when={when!r}: new weights are taken at one of {', '.join(WHEN)}")
        if not every > 0:
            raise DataError(f"every={every!r}: give the seconds between two polls, above 0")
        self._follower, self._every, self.when, self.problem = Follower(url, best=best), every, when, ""
        self.folder: Path = self._follower.fetch()
        self.step, self.digest = self._follower.step, self._follower.digest
        self._ready: tuple[Weights, dict[str, torch.Tensor]] | None = None
        self._old: list[torch.Tensor] = []  # the thread lets them go
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, policy: Policy) -> None:
        """Begin to poll. Raises DataError if the policy lies on several devices."""
        if getattr(policy.model, "hf_device_map", None):
            raise DataError("a policy that is spread over devices cannot follow; give one device")
        self._model = policy.model
        self._thread = threading.Thread(target=self._poll, name="tiphys-follow", daemon=True)
        self._thread.start()

    def take(self, policy: Policy) -> None:
        """Let the policy act with the newest weights that are ready. It must not be computing."""
        ready, self._ready = self._ready, None
        if ready is None:
            return
        weights, tensors = ready
        self._old = swap(policy.model, tensors)
        policy.forget()
        self.step, self.digest = weights.step, weights.digest

    def close(self) -> None:
        """Stop polling. The policy keeps its weights."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._follower.close()

    def _poll(self) -> None:
        pause = self._every
        while not self._stop.wait(jittered(pause)):
            self._old = []
            try:
                new = self._follower.poll()
                if new is not None:
                    self._ready = new, new.prepare(self._model)
                self.problem, pause = "", self._every
            except (FollowError, FetchError, DataError, OSError) as error:
                if str(error) != self.problem:
                    logger(__name__).warning("%s; the policy goes on with step %d", error, self.step)
                self.problem, pause = str(error), min(2 * pause, max(LONGEST_PAUSE, self._every))
