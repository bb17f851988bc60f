"""From a recipe to processes: the DeepSpeed launcher on this machine, or over the hosts of a hostfile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tiphys.launch.statuses import Status, stopped_by

TRAIN = ("--module", "tiphys.launch.train")
# By default glibc gives large arrays back to the kernel when they are freed, and every step pays for their pages again: a third
# of the time of element-wise operations on a CPU (benchmarks/RESULTS.md). With these settings it keeps them, and resident memory
# stays at its peak.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def launcher(
    processes: int, *, port: int = 0, hostfile: str = "", extra: Sequence[str] = (), verbose: bool = False
) -> list[str]:
    """The launcher's command line, up to the script.

    processes  ranks on this machine (or on each host); 0: one per device, or 2 if there is no device
    port       TCP port of the rendezvous on the first host; 0: a free one
    extra      further options of `deepspeed`, passed on unchanged
    verbose    show the launcher's own lines (on hosts that it reaches by pdsh they are always shown)
    """
    command = [str(Path(sys.executable).with_name("deepspeed"))]
    if hostfile:
        if not Path(hostfile).is_file():
            raise FileNotFoundError(f"{hostfile}: no such hostfile; write one line per host: `name slots=8`")
        command += ["--hostfile", hostfile]
        if processes:
            command += ["--num_accelerators", str(processes)]
    else:
        command += ["--num_accelerators", str(processes or devices() or 2)]
    # Even at the level "error" the launcher reports a run that was stopped and saved as an error; `explain` speaks in its place.
    level = "info" if verbose else "critical"
    return [*command, "--master_port", str(port or free_port()), "--no_local_rank", "--log_level", level, *extra]


def devices() -> int:
    """Number of CUDA devices of this machine. Does not import torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip()])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def environment(verbose: bool = False) -> dict[str, str]:
    """The ranks' environment: the CPU if there is no device, one thread per rank, compiled extensions inside our own virtual
    environment, and no FutureWarning unless `verbose`."""
    env = dict(os.environ)
    if not devices():
        env.setdefault("DS_ACCELERATOR", "cpu")
        env = {**KEEP_MEMORY, **env}
    # Two OpenMP threads of one rank become many times slower if another process needs the core; one thread per rank is safe.
    env.setdefault("OMP_NUM_THREADS", "1")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    if not verbose:
        env.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    # The launcher looks for tools of its own environment on PATH.
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"
    return env


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def port_in_use(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("", port))
        except OSError:
            return True
    return False


def submit(
    recipe: str,
    overrides: Sequence[str],
    *,
    processes: int = 0,
    port: int = 0,
    hostfile: str = "",
    extra: Sequence[str] = (),
    verbose: bool = False,
    options: Sequence[str] = (),
) -> int:
    """Run `tiphys.launch.train` under the launcher and wait for it. Returns a `Status`, or the launcher's own status.

    options   further options of `tiphys.launch.train`

    The first Ctrl-C (or SIGTERM) is passed on to the ranks, which save and end by themselves. The second one kills them.
    """
    if port and port_in_use(port):
        raise OSError(f"port {port} is in use on this machine; choose another with --port, or leave it out")
    command = [
        *launcher(processes, port=port, hostfile=hostfile, extra=extra, verbose=verbose),
        *(*TRAIN, recipe, *overrides),
        *(["--verbose"] if verbose else []),
        *options,
    ]
    # A session of its own: the terminal's Ctrl-C then reaches only this process, which passes it on to the ranks alone.
    child = subprocess.Popen(command, env=environment(verbose), start_new_session=True)
    return wait(child)


def wait(child: subprocess.Popen[bytes]) -> int:
    """Wait for the launcher; see `submit`."""
    import psutil

    asked: list[int] = []

    def stop(number: int, frame: object) -> None:
        asked.append(number)
        if len(asked) > 1:
            os.killpg(child.pid, signal.SIGKILL)
            return
        for process in psutil.Process(child.pid).children(recursive=True):
            try:
                if TRAIN[1] in process.cmdline() and "deepspeed.launcher.launch" not in process.cmdline():
                    process.send_signal(number)
            except psutil.Error:
                continue  # it has just ended

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return explain(child.wait(), asked[0] if asked else 0)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def explain(status: int, asked: int = 0) -> int:
    """The launcher's exit status as one of `Status`, if it can be told; says which signal killed a rank.

    asked  the signal that was passed on to the ranks, or 0

    The launcher exits with the status of the first rank that ended badly. If a signal killed that rank, this is 256 − signal.
    """
    killed = 256 - status if 192 <= status < 256 else max(0, -status)
    if asked and (killed or status == Status.TRY_AGAIN):
        return stopped_by(
            asked
        )  # outside the training loop the signal ends a rank at once: there is nothing new to save
    if not killed:
        return status
    try:
        name = signal.Signals(killed).name
    except ValueError:
        name = f"signal {killed}"
    print(
        f"tiphys: a process of the run was killed by {name}"
        + ("; the machine may be short of memory. The same command resumes" if killed == signal.SIGKILL else ""),
        file=sys.stderr,
        flush=True,
    )
    return Status.TRY_AGAIN if killed == signal.SIGKILL else Status.CRASHED
