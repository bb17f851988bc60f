"""What `deepspeed` starts on every rank: `deepspeed launch/train.py RECIPE key=value …`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    # Started by its path: the package `tiphys` beside this folder is wanted, not the modules inside it.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tiphys.launch.check import check
from tiphys.recipes.load import RecipeError


def main(argv: Sequence[str] | None = None) -> int:
    arguments = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank")]
    if not arguments:
        print("usage: deepspeed launch/train.py RECIPE [key=value …]", file=sys.stderr)
        return 2
    try:
        recipe = check(arguments[0], arguments[1:], data=False)
    except RecipeError as error:
        print(f"tiphys: {error}", file=sys.stderr)
        return 1
    from tiphys.launch.run import run

    return run(recipe)


if __name__ == "__main__":
    sys.exit(main())
