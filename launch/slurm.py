"""`tiphys submit`: a run as a Slurm job that goes on by itself after a time limit, a preemption or a lost node.

The job's script starts `tiphys train` on the first node; several nodes are reached as over a hostfile, by ssh. It passes on the
signal that Slurm sends before the time is up, and requeues the job if the run ended with 70, 75 or 143. The run decides where to
continue from its own files, so the hosts' clocks do not matter.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tiphys.dataio.atomic import write_text
from tiphys.launch.statuses import Status

RETRIED = (Status.NOT_SAVED, Status.GAVE_UP, Status.TERMINATED)
WARNING = 120  # seconds before the end at which Slurm sends the signal

_SCRIPT = """#!/bin/bash
{options}

# Written by `tiphys submit`. To submit it again: sbatch {file}
cd {folder} || exit 3
{hosts}
stop() {{ kill -TERM "$child" 2>/dev/null; }}
trap stop TERM USR1
{command} &
child=$!
while :; do
    wait "$child"
    kill -0 "$child" 2>/dev/null || break    # a signal ends `wait`, not the run
done
wait "$child"
status=$?
case $status in
    {retried}) scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit $status
"""
_HOSTS = """hosts={folder}/hosts-"$SLURM_JOB_ID"
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/$/ slots={slots}/" > "$hosts"
"""


def script(
    name: str,
    run_dir: str | Path,
    words: Sequence[str],
    *,
    nodes: int = 1,
    processes: int = 0,
    options: Sequence[str] = (),
) -> str:
    """The batch script.

    name       of the job
    run_dir    folder of the run; output goes to its folder `slurm`
    words      of `tiphys train`: recipe, overrides, options
    nodes      number of nodes
    processes  ranks of each node; 0: one for each GPU that Slurm gives, or 2 if there is none
    options    further options of `sbatch`, which come after those of Tiphys and so replace them

    Raises ValueError if an option is none, or has a line break.
    """
    folder = Path(os.path.abspath(run_dir)) / "slurm"
    given = [
        f"--job-name={re.sub(r'[^A-Za-z0-9_.-]+', '-', name) or 'tiphys'}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--output={folder}/%j.out",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:TERM@{WARNING}",
        *options,
    ]
    for option in given:
        if not option.startswith("-") or re.search(r"[\n\r]", option):
            raise ValueError(
                f"{option!r} is not an option of sbatch; write it as --name=value, without spaces around `=`"
            )
    slots = str(processes) if processes else "${SLURM_GPUS_ON_NODE:-2}"
    where = ["--hostfile", '"$hosts"'] if nodes > 1 else ["--processes", f'"{slots}"']
    command = [shlex.quote(word) for word in (sys.executable, "-P", "-m", "tiphys", "train", *words)]
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in given),
        file=shlex.quote(str(folder / "job.sh")),
        folder=shlex.quote(os.getcwd()),
        hosts=_HOSTS.format(folder=shlex.quote(str(folder)), slots=slots) if nodes > 1 else "",
        command=" ".join([*command, *where]),
        retried="|".join(str(status.value) for status in RETRIED),
    )


def submit(run_dir: str | Path, text: str) -> str:
    """Write the script to `<run_dir>/slurm/job.sh` and submit it. Returns what sbatch says.

    Raises FileNotFoundError if there is no sbatch, and OSError with its words if it refuses.
    """
    file = Path(os.path.abspath(run_dir)) / "slurm" / "job.sh"
    write_text(file, text)
    try:
        done = subprocess.run(["sbatch", str(file)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no command sbatch on this machine; the script is written: use `sbatch {file}` where there is one"
        ) from None
    if done.returncode:
        raise OSError(f"sbatch refused {file}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return f"{done.stdout.strip()}  ({file})"
