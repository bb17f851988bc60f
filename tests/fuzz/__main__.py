"""`python -m tests.fuzz --inputs N --reader R`: counts what damaged inputs do to every reader of foreign bytes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.fuzz.readers import make
from tests.fuzz.run import fuzz


def main() -> int:
    names = sorted(make(Path("unused")))
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000, help="inputs for each reader (default: %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="number of the first input: a seed (default: %(default)s)")
    parser.add_argument("--reader", nargs="*", choices=names, default=names, help="readers (default: all)")
    args = parser.parse_args()
    wrong = 0
    for name in args.reader:
        counts, reports, peak = fuzz(name, args.inputs, args.start)
        print(f"{name}: {dict(counts)}, {peak >> 20} MiB at the peak", flush=True)
        print("\n".join(reports))
        wrong += sum(counts.values()) - counts["read"] - counts["refused"]
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
