"""From a recipe to processes: the DeepSpeed launcher on this machine, or over the hosts of a hostfile."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tiphys.dataio.python_path import child_environment
from tiphys.launch.devices import devices
from tiphys.launch.hosts import check_choice, needs_pdsh, ranks, ranks_of_hosts, read_hosts
from tiphys.launch.statuses import Status
from tiphys.paths import expand

if TYPE_CHECKING:
    from tiphys.launch.supervise import Job

TRAIN = ("--module", "tiphys.launch.train")
ACCEPT_CHANGED_DATA = "--accept-changed-data"
PACKED = "--packed="
NO_PDSH = (
    "DeepSpeed reaches several hosts with the program pdsh, which is not on this machine; install it (a package of most "
    "systems), or name another launcher, for example with --launcher '--launcher openmpi'"
)
EMPTY = "/"  # where the launcher starts for several hosts: a folder that they all have, without Python modules
_EXPORTED = (
    "PYTHON",
    "NCCL",
    "UCX",
    "MV2",
    "MLFLOW",
)  # beginnings of the variables that DeepSpeed passes to other hosts
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
    hosts = read_hosts(hostfile) if hostfile else {}
    check_choice(extra, hosts)
    if hostfile:
        command += ["--hostfile", expand(hostfile)]
        if processes:
            command += ["--num_accelerators", str(processes)]
    else:
        # No hostfile: by default DeepSpeed would use /job/hostfile if there is one.
        command += ["--hostfile", os.devnull, "--num_accelerators", str(processes or devices() or 2)]
    # Even at the level "error" the launcher reports a run that was stopped and saved as an error; the supervisor speaks instead.
    level = "info" if verbose else "critical"
    return [*command, "--master_port", str(port or free_port()), "--no_local_rank", "--log_level", level, *extra]


def local_launcher(processes: int, *, port: int = 0, verbose: bool = False) -> list[str]:
    """Options of DeepSpeed's launcher of one machine, up to the script. The command `deepspeed` would import as much again."""
    visible = [d.strip() for d in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if d.strip()]
    places = visible[:processes] if len(visible) >= processes else list(range(processes))
    world = base64.urlsafe_b64encode(json.dumps({"localhost": places}).encode()).decode()
    level = "info" if verbose else "critical"
    return [
        f"--world_info={world}",
        "--master_addr=127.0.0.1",
        f"--master_port={port or free_port()}",
        "--no_local_rank",
        f"--log_level={level}",
    ]


def environment(verbose: bool = False) -> dict[str, str]:
    """The ranks' environment: the CPU if there is no device, one thread per rank, compiled extensions inside our own virtual
    environment, and no FutureWarning unless `verbose`."""
    env = child_environment()
    # DeepSpeed sets the variables of this file on every host. By default it also reads one in the current folder.
    own = Path.home() / ".deepspeed_env"
    settings = env.get("DS_ENV_FILE")
    env["DS_ENV_FILE"] = os.path.abspath(settings) if settings else str(own) if own.is_file() else os.devnull
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


def packed(words: Sequence[str]) -> str:
    """Words of a command line, and the current folder, as one word without any character that a shell could change."""
    content = json.dumps([os.getcwd(), *words]).encode()
    return PACKED + base64.urlsafe_b64encode(content).decode().rstrip("=")


def unpacked(word: str) -> tuple[str, list[str]]:
    """The folder and the words of `packed`."""
    content = word.removeprefix(PACKED)
    folder, *words = json.loads(base64.urlsafe_b64decode(content + "=" * (-len(content) % 4)))
    return folder, words


def _exported(env: Mapping[str, str]) -> None:
    """Raises ValueError if the launcher would export a variable to other hosts whose value their shells would change."""
    for name, value in env.items():
        if name.startswith(_EXPORTED) and re.search(r'["$`\\\n]', value):
            raise ValueError(
                f"environment variable {name}={value!r}: DeepSpeed passes it to other hosts through their shells, which would "
                'change it; remove the characters " $ ` \\ from it'
            )


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
    with_traceback: bool = False,
) -> Status:
    """Check a recipe, train it under DeepSpeed's launcher, and start it again if a process was lost (`launch/supervise.py`).

    options   further options of `tiphys.launch.train`

    The first Ctrl-C (or SIGTERM) is passed on to the ranks, which save and end by themselves. A second Ctrl-C kills them.
    """
    from tiphys.launch.supervise import supervise

    return supervise(
        job(
            recipe,
            overrides,
            processes=processes,
            port=port,
            hostfile=hostfile,
            extra=extra,
            verbose=verbose,
            options=options,
            with_traceback=with_traceback,
        )
    )


def world_of(processes: int, hostfile: str = "", extra: Sequence[str] = ()) -> int:
    """Number of ranks that these options of `tiphys train` start."""
    known = read_hosts(os.path.abspath(os.path.expanduser(hostfile))) if hostfile else {"localhost": devices() or 2}
    return ranks(known, processes, extra)


def job(
    recipe: str,
    overrides: Sequence[str],
    *,
    processes: int,
    port: int,
    hostfile: str,
    extra: Sequence[str],
    verbose: bool,
    options: Sequence[str],
    with_traceback: bool,
) -> Job:
    """What the supervisor runs for these arguments of `submit`."""
    from tiphys.launch.supervise import Job

    if port and port_in_use(port):
        raise OSError(f"port {port} is in use on this machine; choose another with --port, or leave it out")
    hosts = os.path.abspath(os.path.expanduser(hostfile)) if hostfile else ""
    env = environment(verbose)
    world = world_of(processes, hostfile, extra)
    more = [*(["--verbose"] if verbose else []), *(["--traceback"] if with_traceback else []), *options]
    several = bool(hostfile or extra)
    if several:
        _exported(env)  # to other hosts all words go through shells
        words = [*launcher(processes, port=port, hostfile=hosts, extra=extra, verbose=verbose), *TRAIN]
    else:
        words = [*local_launcher(world, port=port, verbose=verbose), *TRAIN]
    counted = ranks_of_hosts(read_hosts(hosts), processes, extra) if hosts else {}
    return Job(
        check={
            "recipe": recipe,
            "overrides": list(overrides),
            "world": world,
            # with a hostfile, the environments are played on the first host, which may be another machine than this
            "environments": not hostfile,
            "traceback": with_traceback,
            "index": True,  # of raw LeRobot folders
        },
        module=None if several else "deepspeed.launcher.launch",
        words=words,
        ranks=[recipe, *overrides, *more],
        # The launcher also puts its current folder on the Python path of other hosts.
        packed=(lambda words: [packed(words)]) if several else list,
        folder=EMPTY if several else "",
        world=world,
        environment=env,
        hosts=counted,
        missing=NO_PDSH
        if len(counted) > 1 and needs_pdsh(extra) and not shutil.which("pdsh", path=env["PATH"])
        else "",
    )
