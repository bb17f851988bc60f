"""`python -m benchmarks.ideas ROW… [--control] [--seeds 0,1,2] [--json] [--record]`.

Prints what each experiment measures. Exits 1 if a bar is missed, or if a control passes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch

from benchmarks.ideas import marks, page


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ideas", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = marks.rows()
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(known)}; none: all")
    parser.add_argument("--control", action="store_true", help="also measure what must fail")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--record", action="store_true", help="keep the figures, and write docs/paradigms.md again")
    args = parser.parse_args(arguments)
    for row in args.rows:
        if row not in known:
            parser.error(f"no experiment is called {row!r}; there are {', '.join(known)}")
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    for row in args.rows or known:
        began = time.process_time()
        for seed in (int(s) for s in args.seeds.split(",")):
            for mark in marks.measure(row, seed, control=args.control):
                print(json.dumps(mark, ensure_ascii=False) if args.json else line(mark), flush=True)
                found.append(mark)
        print(f"{row}: {time.process_time() - began:.1f} s of processor time", file=sys.stderr)
    if args.record:
        page.record(found)
    for fault in marks.faults(found):
        print(fault, file=sys.stderr)
    return 1 if marks.faults(found) else 0


def line(mark: dict[str, Any]) -> str:
    """A mark for people."""
    text = f"{mark['row']:<12} seed {mark['seed']}  {mark['measure']:<36} {mark['score']:>7.3f} ({mark['bar']})"
    if mark["control"] is not None:
        text += f"   control {mark['control']:.3f} ({mark['control_bar']}; {mark['broken']})"
    return text


if __name__ == "__main__":
    sys.exit(main())
