"""`tiphys serve`: a policy behind a WebSocket, from the command line to the signal that ends it."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from tiphys.dataio.episode import DataError
from tiphys.dataio.messages import say
from tiphys.launch.statuses import Status
from tiphys.pretrain.policy_files import local_policy

if TYPE_CHECKING:
    from tiphys.pretrain.serving.server import Server

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_LONGEST_WAIT = 10.0  # seconds
_MOST_SESSIONS = 4096


def serve(
    name: str,
    *,
    task: str = "",
    renamed: Sequence[str] = (),
    execute: int = 0,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: str = "",
    open: bool = False,
    sessions: int = 64,
    batch: int = 32,
    wait: str = "5ms",
    sample: bool | None = None,
    seed: int = 0,
    device: str = "",
    follow: bool = False,
) -> Status:
    """Serve a policy until SIGINT or SIGTERM. The arguments are those of the command.

    Raises
    ------
    DataError, OSError
        If the policy cannot be served so, or the address cannot be listened at.
    ImportError
        If the extra `serve` is not installed.
    """
    try:
        import msgpack  # noqa: F401
        import websockets  # noqa: F401
    except ImportError as error:
        raise ImportError(f"serving needs {error.name}; install it with: pip install 'tiphys[serve]'") from None
    from tiphys.pretrain.follow.follower import Follower
    from tiphys.pretrain.serving.observed import Names
    from tiphys.pretrain.serving.renewal import Renewal
    from tiphys.pretrain.serving.served import Served, Settings
    from tiphys.pretrain.serving.server import Door, Server, read_key

    seconds = duration(wait)
    for option, value, most in (("sessions", sessions, _MOST_SESSIONS), ("batch", batch, _MOST_SESSIONS)):
        if not 1 <= value <= most:
            raise DataError(f"--{option} {value} is not from 1 to {most}")
    if not 0 <= port < 1 << 16:
        raise DataError(f"--port {port} is not from 0 to {(1 << 16) - 1}")
    door = Door(host, port, read_key(api_key_file) if api_key_file else "", open)
    names = Names.from_words(renamed)
    settings = Settings(task, execute, sessions, sample, seed, device)
    follower = Follower(name) if follow else None
    folder = local_policy(name) if follower is None else follower.fetch()
    server = Server(Served.load(folder, settings), door, names, batch=batch, wait=seconds)
    if door.open and not door.api_key:
        say(f"--open: whoever reaches {host} may use this policy", error=True)

    def ready() -> None:
        shown = f"[{host}]" if ":" in host else host
        say(f"serving {name} at ws://{shown}:{server.port} (vla-eval: /vla-eval); Ctrl-C stops it")

    with follower or nullcontext(), nullcontext() if follower is None else Renewal(server, follower):
        asyncio.run(_until_signalled(server, ready))
    return Status.DONE


async def _until_signalled(server: Server, ready: Callable[[], None]) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await server.run(stop, ready)


def duration(text: str) -> float:
    """Seconds of a time such as ``5ms``. Raises DataError if it is none, or longer than 10 s."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(us|ms|s)", text)
    seconds = float(found[1]) * _UNITS[found[2]] if found else -1.0
    if not 0 <= seconds <= _LONGEST_WAIT:
        raise DataError(f"--wait {text!r} is not a time of at most {_LONGEST_WAIT:.0f} s, such as 500us, 5ms or 1s")
    return seconds
