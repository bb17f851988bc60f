"""`make bench`: every benchmark after another, each in a process of its own; or those that are named."""

import subprocess
import sys

NAMES = ("plan", "loader", "train", "convert")

for name in sys.argv[1:] or NAMES:
    print(f"== {name}", flush=True)
    status = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode
    if status:
        sys.exit(status)
