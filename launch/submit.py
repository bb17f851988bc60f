"""From a recipe to processes: the DeepSpeed launcher on this machine, or over the hosts of a hostfile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TRAIN = ("--module", "tiphys.launch.train")
# glibc gives large arrays back to the kernel when they are freed, and every step pays for their pages again: a third of the
# time of element-wise operations on a CPU (benchmarks/RESULTS.md). These keep them; resident memory stays at its peak.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def launcher(processes: int, *, port: int = 0, hostfile: str = "", extra: Sequence[str] = ()) -> list[str]:
    """The launcher's command line, up to the script.

    processes  on this machine (or on each host); 0: one a device, or 2 without one
    port       of the rendezvous on the first host; 0: a free one
    extra      further options of `deepspeed`, verbatim
    """
    command = [str(Path(sys.executable).with_name("deepspeed"))]
    if hostfile:
        if not Path(hostfile).is_file():
            raise FileNotFoundError(f"{hostfile}: no such hostfile; one line a host: `name slots=8`")
        command += ["--hostfile", hostfile]
        if processes:
            command += ["--num_accelerators", str(processes)]
    else:
        command += ["--num_accelerators", str(processes or devices() or 2)]
    return [*command, "--master_port", str(port or free_port()), "--no_local_rank", *extra]


def devices() -> int:
    """CUDA devices of this machine, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip()])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def environment() -> dict[str, str]:
    """The ranks' environment: CPU where there is no device, one thread a rank, builds inside our own environment."""
    env = dict(os.environ)
    if not devices():
        env.setdefault("DS_ACCELERATOR", "cpu")
        env = {**KEEP_MEMORY, **env}
    # A competing process collapses two OpenMP threads of one rank; one thread a rank is safe.
    env.setdefault("OMP_NUM_THREADS", "1")
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    # The launcher asks for `which`-found tools of its own environment.
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
) -> int:
    """Run `tiphys.launch.train` under the launcher and wait; the launcher's exit status.

    The first Ctrl-C reaches the ranks, which save and end by themselves; only a second one ends the launcher.
    """
    if port and port_in_use(port):
        raise OSError(f"port {port} is in use on this machine; choose another with --port, or leave it out")
    command = [*launcher(processes, port=port, hostfile=hostfile, extra=extra), *TRAIN, recipe, *overrides]
    # A group of its own: the terminal's Ctrl-C then reaches only us, and we pass it on to the ranks alone.
    child = subprocess.Popen(command, env=environment(), start_new_session=True)
    return wait(child)


def wait(child: subprocess.Popen[bytes]) -> int:
    import psutil

    asked = 0

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            os.killpg(child.pid, signal.SIGKILL)
            return
        for process in psutil.Process(child.pid).children(recursive=True):
            try:
                if TRAIN[1] in process.cmdline() and "deepspeed.launcher.launch" not in process.cmdline():
                    process.send_signal(signal.SIGTERM)
            except psutil.Error:
                continue  # it has just ended

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return child.wait()
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
