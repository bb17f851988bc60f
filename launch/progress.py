"""Progress of a command: lines, or a bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tiphys.dataio.messages import counted, say


def progress_lines() -> Callable[[str, int, int], None]:
    """A function (name, done, total). On a terminal it updates one line per name; elsewhere it prints one when a name is done."""
    terminal = sys.stderr.isatty()

    def show(name: str, done: int, whole: int) -> None:
        if terminal:
            say(f"{name}: {done}/{whole}", start="\r", end="\n" if done == whole else "", error=True)
        elif done == whole:
            say(f"{name}: {counted(done, 'episode')}", error=True)

    return show


def progress_bar(what: str) -> Callable[[int, int], None]:
    """A function (done, total). On a terminal it shows a bar with the time left; elsewhere it prints a line every ten seconds."""
    import time

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        bar = Progress(console=Console(stderr=True))
        task = bar.add_task(what, total=None)
        bar.start()

        def show(done: int, whole: int) -> None:
            bar.update(task, completed=done, total=whole)
            if done >= whole:
                bar.stop()

        return show
    began = last = time.monotonic()

    def tell(done: int, whole: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 10 or done >= whole:
            last, rate = now, done / max(now - began, 1e-9)
            left = f"{(whole - done) / rate:.0f} s left" if rate else "no rate yet"
            say(f"{what}: {done}/{whole}  {rate:.1f}/s  {left}", error=True)

    return tell
