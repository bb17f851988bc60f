"""`restart.shrink`: a run on several hosts goes on without a host that failed twice.

The supervisor keeps account of the hosts that failed (`Blame`) and writes a hostfile without one (`without_host`). Whether the
run fits on the ranks that are left is computed as for `tiphys layout` (`fewer_ranks`), in a process that imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tiphys.dataio.atomic import write_text

if TYPE_CHECKING:
    from tiphys.launch.supervise import Job

FILE = "launches/hosts"  # in a run's folder: the hostfile of the hosts that are left


class Blame:
    """Counts how often the same host failed without a newer checkpoint.

    Attributes
    ----------
    host : str
        The host that failed last; empty: nobody knows, or more than one did.
    times : int
    """

    def __init__(self) -> None:
        self.host, self.times = "", 0

    def add(self, host: str, *, progress: bool) -> None:
        """A launch failed. `progress`: it had saved a newer checkpoint."""
        again = bool(host) and host == self.host and not progress
        self.host, self.times = host, self.times + 1 if again else int(bool(host))


def host_of(ranks: Sequence[int], hosts: Mapping[str, int]) -> str:
    """The host that all of these ranks are on; empty if there is none. Hosts are in the order of their ranks."""
    places = [name for name, count in hosts.items() for _ in range(count)]
    found = {places[rank] for rank in ranks if rank < len(places)}
    return found.pop() if len(found) == 1 else ""


@dataclass(frozen=True)
class Fewer:
    """A layout on fewer ranks.

    overrides  `key=value` words for it
    said       the layout in words
    """

    overrides: list[str]
    said: str


def fewer_ranks(path: str, overrides: Sequence[str], world: int, before: int, each: int) -> Fewer:
    """The layout of a recipe on `world` ranks that fits and changes least. Each step has the same rows as on `before` ranks.

    First only the accumulation changes, then the micro-batch, then all keys that `parallel.auto` knows.

    Parameters
    ----------
    path, overrides
        The recipe as it was trained on `before` ranks.
    world : int
        Number of ranks that are left.
    before : int
    each : int
        Most ranks of one host. The hosts are taken to be alike: the memory is that of this machine.

    Raises
    ------
    NothingFits
        If no layout fits.
    """
    from tiphys.launch.devices import device_memory
    from tiphys.launch.layout import changed
    from tiphys.launch.layout_auto import choices
    from tiphys.launch.layout_command import NothingFits, any_rates, has_cuda, known_rates, sized
    from tiphys.pretrain.distributed.deepspeed_config import derive
    from tiphys.pretrain.parallel import Grid
    from tiphys.recipes.automatic import KEYS

    found = sized(path, overrides)
    recipe, kind = found.recipe, "cuda" if has_cuda() else "cpu"
    grid = Grid(0, before, recipe.parallel.pipeline, recipe.parallel.expert)
    old = derive(recipe, grid, accelerator=kind)
    kept, config = changed(recipe, found.config, {"micro_batch": old.micro_batch})
    memory = device_memory(each)
    for keys in ([], ["micro_batch"], list(KEYS)):
        offered = choices(
            kept,
            config,
            found.batches.worst,
            world,
            keys,
            memory,
            device=kind,
            rates=known_rates(recipe, "", kind) or any_rates(kind),
            step_tokens=found.batches.tokens,
        )
        if offered:
            new = offered[0].needs.derived
            words = offered[0].overrides(keys if "micro_batch" in keys else ["micro_batch"])
            if "gradient_accumulation_steps" in recipe.deepspeed:
                words.append(f"deepspeed.gradient_accumulation_steps={new.accumulation}")
            ranks = "1 rank" if world == 1 else f"{world} ranks"
            return Fewer(
                words,
                f"{ranks} of {new.accumulation} × {new.micro_batch} rows instead of {before} of {old.accumulation} × "
                f"{old.micro_batch}, the same {new.rows} rows a step",
            )
    raise NothingFits(f"no layout on {world} ranks fits {memory / 2**30:.1f} GiB")


def without_host(job: Job, name: str, run_dir: str, overrides: Sequence[str]) -> Job:
    """The job on the other hosts. Raises OSError if their hostfile cannot be written."""
    hosts = {other: count for other, count in job.hosts.items() if other != name}
    file = Path(run_dir) / FILE
    write_text(file, "".join(f"{other} slots={count}\n" for other, count in hosts.items()))
    words = list(job.words)
    words[words.index("--hostfile") + 1] = str(file)
    if "--force_multi" not in words:  # otherwise DeepSpeed starts the ranks of a single host on this machine
        words.insert(words.index("--hostfile"), "--force_multi")
    return replace(job, words=words, ranks=[*job.ranks, *overrides], hosts=hosts, world=sum(hosts.values()))
