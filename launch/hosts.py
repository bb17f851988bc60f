"""The hostfile of a run on several hosts: one line `name slots=8` for each host. It is checked before DeepSpeed and ssh see it.

DeepSpeed puts the names on the command line of ssh, so a name that begins with `-` would be an option of ssh.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from tiphys.paths import expand

NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
MOST_SLOTS = 4096
_MOST_BYTES = 1 << 20
_CHOOSING = ("--include", "-i", "--exclude", "-e")
_PLACING = ("--master_addr", "--no_ssh")
_COUNTING = ("--num_nodes", "--num_gpus", "--num_accelerators")


class HostfileError(ValueError):
    """Everything that is wrong with a hostfile, one line each, with the number of its line."""


def read_hosts(path: str) -> dict[str, int]:
    """Name of each host -> its number of ranks, in the order of the file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    HostfileError
        With every line that is not `name slots=8`, or names a host again.
    """
    file = Path(expand(path))
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such hostfile; write one line per host: `name slots=8`")
    with file.open("rb") as opened:
        data = opened.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise HostfileError(f"{path}: is larger than {_MOST_BYTES} bytes, so it is not a hostfile")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise HostfileError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    if text.startswith("\ufeff"):
        raise HostfileError(
            f"{path}:1: begins with a byte order mark, which DeepSpeed would read as part of a name; remove it"
        )
    hosts: dict[str, int] = {}
    first: dict[str, int] = {}
    errors = []
    for number, line in enumerate(text.splitlines(), 1):
        words = re.sub(r"(^|\s)#.*", "", line).split()
        if not words:
            continue
        wrong = _wrong(words)
        if not wrong and words[0] in hosts:
            wrong = f"host {words[0]!r} is already on line {first[words[0]]}; write each host once, with all its slots"
        if wrong:
            errors.append(f"{path}:{number}: {wrong}")
        else:
            hosts[words[0]], first[words[0]] = int(words[1].partition("=")[2]), number
    if errors or not hosts:
        raise HostfileError("\n".join(errors) or f"{path}: names no host; write one line per host: `name slots=8`")
    return hosts


def _wrong(words: Sequence[str]) -> str:
    """Why the words of a line are not a host and its slots; empty if they are."""
    name, *rest = words
    if bad := bad_name(name):
        return bad
    if not rest:
        return f"host {name!r} has no slots; write `{name} slots=8`"
    key, _, value = rest[0].partition("=")
    if key != "slots":
        near = difflib.get_close_matches(key, ["slots"])
        return f"{rest[0]!r} is not `slots=8`" + (" (did you mean 'slots'?)" if near else "")
    if not re.fullmatch(r"[0-9]{1,9}", value) or not 1 <= int(value) <= MOST_SLOTS:
        return f"slots={value} is not allowed; allowed: a whole number from 1 to {MOST_SLOTS}, the ranks of the host"
    if len(rest) > 1:
        return f"{' '.join(rest[1:])!r} stands after the slots; only a comment (# …) may"
    return ""


def bad_name(name: str) -> str:
    """Why a word cannot be the name of a host; empty if it can."""
    if NAME.fullmatch(name):
        return ""
    return f"{name!r} is not the name of a host: a name begins with a letter or digit, then letters, digits, '.', '-' or '_'"


def check_choice(options: Sequence[str], hosts: dict[str, int]) -> None:
    """Check `--include` and `--exclude` among further options of `deepspeed`. Raises HostfileError with all errors."""
    errors = []
    for option, value in _chosen(options):
        for part in value.split("@"):
            name, colon, slots = part.partition(":")
            if bad := bad_name(name):
                errors.append(f"{option} {value}: {bad}")
            elif hosts and name not in hosts:
                near = difflib.get_close_matches(name, hosts, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(hosts)}"
                errors.append(f"{option} {value}: the hostfile has no host {name!r}; {hint}")
            elif colon and not re.fullmatch(r"\d{1,9}(,\d{1,9})*", slots, re.ASCII):
                errors.append(f"{option} {value}: {slots!r} are not slots; write for example {name}:0,2")
            elif colon and hosts and (high := max(map(int, slots.split(",")))) >= hosts[name]:
                errors.append(
                    f"{option} {value}: {name} has {hosts[name]} slots, numbered from 0; there is no slot {high}"
                )
    if errors:
        raise HostfileError("\n".join(errors))


def _chosen(options: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each option that chooses hosts, with its value; argparse also takes shortened names, and values after `=`."""
    for i, word in enumerate(options):
        name, sign, value = word.partition("=")
        if _stands_for(name, _CHOOSING):
            yield name, value if sign else (options[i + 1] if i + 1 < len(options) else "")
        elif re.match(r"-[ie][^-]", word) and not word.startswith("--"):
            yield word[:2], word[2:]


def ranks(hosts: dict[str, int], processes: int, options: Sequence[str]) -> int:
    """Number of ranks that a run on these hosts has; 0: the further options of `deepspeed` decide it.

    processes  ranks on each host; 0: as many as it has slots
    """
    names = (word.partition("=")[0] for word in options)
    if any(_stands_for(name, _CHOOSING + _COUNTING) or re.match(r"-[ie]", name) for name in names):
        return 0
    return processes * len(hosts) if processes else sum(hosts.values())


def ranks_of_hosts(hosts: dict[str, int], processes: int, options: Sequence[str]) -> dict[str, int]:
    """Number of ranks of each host, in the order of their ranks; empty: the further options of `deepspeed` decide it, or one
    of them names the first host.

    processes  ranks on each host; 0: as many as it has slots
    """
    named = (word.partition("=")[0] for word in options)
    if not ranks(hosts, processes, options) or any(_stands_for(name, _PLACING) for name in named):
        return {}
    return {name: processes or slots for name, slots in hosts.items()}


def needs_pdsh(options: Sequence[str]) -> bool:
    """Whether `deepspeed` reaches the hosts with pdsh, as it does unless it is told otherwise."""
    names = [word.partition("=")[0] for word in options]
    return not any(_stands_for(name, ("--launcher", "--no_ssh")) for name in names)


def _stands_for(word: str, names: Sequence[str]) -> bool:
    return word in names or (len(word) > 3 and word.startswith("--") and any(name.startswith(word) for name in names))
