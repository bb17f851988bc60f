"""Evaluates each step of a run as it is published, until the run has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiphys.dataio.atomic import to_json
from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import logger
from tiphys.paths import expand
from tiphys.pretrain.evaluate import evaluate
from tiphys.pretrain.follow.follower import Follower, FollowError, jittered
from tiphys.pretrain.hub_errors import FetchError


def scored_steps(
    url: str, tasks: list[str] | None, *, every: float = 10.0, out: str | Path = "", **options: Any
) -> Iterator[dict[str, Any]]:
    """The result of `evaluate` for each published step, with `step`, `sequence` and `digest`.

    If nothing is published there yet, it waits for the first step, so that it may be started together with the run.
    If steps are published faster than they are evaluated, the newest is taken and those between are left out.

    Parameters
    ----------
    url : str
        As for `Follower`.
    tasks : list of str, optional
        As for `evaluate`.
    every : float
        Seconds between two polls, about.
    out : str or Path
        File to which each result is added, as a line of JSON; "": none.
    **options
        Those of `evaluate`.
    """
    if not every > 0:
        raise DataError(f"every={every!r}: give the seconds between two polls, above 0")
    out = expand(str(out))
    with Follower(url) as follower:
        new: Any = _first(follower, every)
        while True:
            if new is not None:
                folder = follower.fetch()
                about = {"step": follower.step, "sequence": follower.sequence, "digest": follower.digest}
                found = about | evaluate(folder, tasks, **options)
                if out:
                    with open(out, "a", encoding="utf-8") as file:
                        file.write(to_json(found) + "\n")
                yield found
            new = _poll(follower)
            if new is None and follower.final:
                return
            if new is None:
                time.sleep(jittered(every))


def _first(follower: Follower, every: float) -> Path:
    said = False
    while True:
        try:
            return follower.fetch()
        except FileNotFoundError as error:
            if not said:
                logger(__name__).warning("%s; it is waited for, and Ctrl-C ends that", error)
            said = True
        time.sleep(jittered(every))


def _poll(follower: Follower) -> Any:
    try:
        return follower.poll()
    except (FollowError, FetchError, DataError, OSError) as error:  # the place may be back later
        logger(__name__).warning("%s; it is tried again", error)
        return None
