"""What `deepspeed` starts as every rank: `deepspeed launch/train.py RECIPE [key=value …] [--verbose] [--accept-changed-data]`."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # Started by its path: import the package `tiphys` beside this folder, not the modules inside it.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tiphys.launch.changed_data import FLAG
from tiphys.launch.check import check
from tiphys.launch.statuses import Status
from tiphys.recipes.load import RecipeError

# DeepSpeed warns of this on every rank at every start with a schedule, although nothing is wrong.
_HARMLESS = "Attempting to get learning rate from scheduler before it has started"


def main(argv: Sequence[str] | None = None) -> Status:
    words = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank")]
    recipe_and_overrides = [a for a in words if a not in ("--verbose", FLAG)]
    if not recipe_and_overrides:
        print(f"usage: deepspeed launch/train.py RECIPE [key=value …] [--verbose] [{FLAG}]", file=sys.stderr)
        return Status.USAGE
    if "--verbose" not in words:
        logging.getLogger("DeepSpeed").addFilter(lambda record: record.getMessage() != _HARMLESS)
    try:
        recipe = check(recipe_and_overrides[0], recipe_and_overrides[1:], data=False)
    except (RecipeError, OSError) as error:
        print(f"tiphys: {error}", file=sys.stderr)
        return Status.REFUSED
    from tiphys.launch.run import run

    return run(recipe, accept_changed_data=FLAG in words)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C outside the training loop ends a rank without a traceback
    sys.exit(main())
