"""Sampling without replacement: epochs over disjoint tiles of the episodes. It is a pure function of (step, row) too.

An episode of T units is cut into ⌈T/K⌉ tiles of at most K units. The tiles of one entry in one bucket form a *stream* of tokens,
epoch after epoch, each epoch in another order. Each row of the stream takes the next stretch of it. A tile that is cut at the end
of a row continues in the stream's next row, so each epoch delivers every unit exactly once.

Which stretch a row takes: rows stand on the line at distances of `UNIT`, from an offset that moves by a constant (modulo `UNIT`)
from step to step. So the number of a stream's rows before a step is a sum of floors, which Euclid's algorithm computes in about
twenty rounds.

The order of an epoch: the tiles of the stream are dealt into blocks of about a thousand, in another way each epoch. The blocks
are put into a random order, and so are the tiles of each block. Only blocks in use are computed.

What weights mean: an entry's weight is its share of the delivered tiles or tokens, so it decides how fast the epochs of the entry
go by. A row holds windows of one entry only. A priority of 0 leaves an episode out; all other priorities mean the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from tiphys.dataio.philox import EPOCH, Words, words
from tiphys.dataio.plan.draws import Columns, Drawer, Ints
from tiphys.dataio.plan.index import PlanIndex, tile_count
from tiphys.dataio.plan.mixture import UNIT, Mix, cuts, running_share

_BLOCK = 1024  # tiles of a block: enough to make the tiles of a row as random as tiles of the whole stream
_MOST = 2048  # most blocks whose tiles are kept in memory: 80 MiB
_SHARE = 2**20  # resolution of the share of rows with a prompt
_T = TypeVar("_T")


def floor_sum(n: Ints, modulus: int, slope: int, intercept: Ints) -> Ints:
    """Σ ⌊(slope · i + intercept) / modulus⌋ over 0 ≤ i < n, elementwise (Graham, Knuth, Patashnik 1994, section 3.5)."""
    n, b = np.broadcast_arrays(np.asarray(n, np.int64), np.asarray(intercept, np.int64))
    total = n * (b // modulus)
    n, b, a, m = n.copy(), b % modulus, np.int64(slope), np.int64(modulus)
    while True:
        total = total + n * (n - 1) // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        top = a * n + b
        if a == 0 or (top < m).all():
            return total
        n, b = top // m, top % m
        a, m = m, a


def rows_below(cut: Ints, steps: Ints, slope: int, offset: int) -> Ints:
    """Rows below `cut` on the line in the first `steps` steps. Step i has the offset (offset + slope · i) mod UNIT."""
    cut, steps = np.asarray(cut, np.int64), np.asarray(steps, np.int64)
    last = slope * np.maximum(steps - 1, 0)
    return (
        steps
        + floor_sum(steps, UNIT, slope, cut - 1 - offset - last)
        + floor_sum(steps, UNIT, slope, np.full_like(steps, offset))
    )


@dataclass(frozen=True)
class Rows:
    """How the rows of each entry cut its streams.

    Attributes
    ----------
    length : int64 [entries]
        Tokens of the stream that a row takes. This is less than a row has: a tile that is cut repeats its fixed tokens in the
        next row, and a row completes its last unit.
    prompt : int64 [entries]
        How many tokens fewer a row with a prompt takes.
    prompted : int64 [entries]
        Share of rows with a prompt, times _SHARE.
    """

    length: Ints
    prompt: Ints
    prompted: Ints

    @classmethod
    def of(cls, index: PlanIndex, entries: int, budget: int) -> Rows:
        strata, costs = index.strata, index.costs
        length, prompt, prompted = (np.zeros(entries, np.int64) for _ in range(3))
        for e in range(entries):
            s = np.flatnonzero(strata.entry == e)
            if not len(s):
                continue
            fixed = (strata.fixed_high + costs.once)[s]
            length[e] = budget - fixed.max() - (costs.each[s].max() - 1)
            prompted[e] = round(float(strata.prompt[s].max()) * _SHARE)
            room = np.maximum(length[e] - fixed - costs.each[s], 0) // costs.each[s]
            prompt[e] = (np.minimum(strata.prompt_units[s], room) * costs.each[s]).max()
            prompted[e] *= prompt[e] > 0
        return cls(length, prompt, prompted)

    @property
    def payload(self) -> NDArray[np.float64]:
        """Mean tokens of the stream that a row takes [entries]."""
        return self.length - self.prompt * self.prompted / _SHARE

    def start(self, entry: Ints, number: Ints) -> Ints:
        """Token of its stream at which each row begins. `number` is the number of the row in its stream."""
        return number * self.length[entry] - (number * self.prompted[entry] // _SHARE) * self.prompt[entry]

    def has_prompt(self, entry: Ints, number: Ints) -> NDArray[np.bool_]:
        return (number + 1) * self.prompted[entry] // _SHARE > number * self.prompted[entry] // _SHARE


def epoch_mix(index: PlanIndex, shares: NDArray[np.float64], rows: int, budget: int, unit: str) -> Mix:
    """How the weights divide the rows among the streams. The segment of a stream is bucket · entries + entry."""
    strata, entries = index.strata, len(shares)
    to_entry = np.zeros((len(strata), entries))
    to_entry[np.arange(len(strata)), strata.entry] = 1
    cell_tokens = np.diff(index.tokens[index.first]).reshape(index.buckets, -1)
    tokens, tiles = cell_tokens @ to_entry, index.cell_mass @ to_entry
    all_tokens, all_tiles = np.maximum(tokens.sum(0), 1), np.maximum(tiles.sum(0), 1)
    payload = Rows.of(index, entries, budget).payload
    per_entry = shares * (all_tokens / all_tiles if unit == "windows" else 1.0)
    per_entry = np.divide(per_entry, payload, where=payload > 0, out=np.zeros(entries))
    segments = tokens * (per_entry / all_tokens)
    segments /= segments.sum()
    delivered = segments * rows * payload / np.maximum(tokens, 1)  # epochs of each stream in one step
    per_cell = delivered[:, strata.entry]
    return Mix(
        cut=cuts(segments.reshape(-1), rows),
        choice=running_share(per_cell * index.cell_mass),
        windows=per_cell * index.cell_mass,
        tokens=per_cell * cell_tokens,
    )


class _Kept(Generic[_T]):
    """Keeps the most recently used results of a pure function."""

    def __init__(self, make: Callable[..., _T], most: int) -> None:
        self._make, self._most = make, most
        self._values: OrderedDict[tuple[int, ...], _T] = OrderedDict()

    def __call__(self, *key: int) -> _T:
        value = self._values.get(key)
        if value is None:
            value = self._values[key] = self._make(*key)
            if len(self._values) > self._most:
                self._values.popitem(last=False)
        else:
            self._values.move_to_end(key)
        return value


class EpochDrawer(Drawer):
    """Draws rows from the streams.

    Parameters
    ----------
    slope, offset : int
        Step i has the offset (offset + slope · i) mod UNIT. Steps are counted with the skipped ones.
    begun : int
        First step of the phase, counted with the skipped ones.
    before : int64 [streams]
        Rows that each stream had before the phase.
    generation : int64 [entries]
        How often the episodes of each entry have changed. Each change starts the epochs of the entry again.
    """

    def __init__(
        self,
        index: PlanIndex,
        mix: Mix,
        budget: int,
        seed: int,
        *,
        slope: int,
        offset: int,
        begun: int,
        before: Ints,
        generation: Ints,
    ) -> None:
        super().__init__(index, mix, budget, seed, tiles=True)
        self.entries = len(before) // index.buckets
        self.slope, self.begun, self.before, self.generation = slope, begun, before, generation
        self.offset = (offset + slope * begun) % UNIT
        self.shape = Rows.of(index, self.entries, budget)
        self.reserve = np.minimum(self.reserve, self.shape.prompt[index.strata.entry])
        self._strata = [np.flatnonzero(index.strata.entry == e) for e in range(self.entries)]
        streams = index.buckets * self.entries
        self._totals, self._costs = _Kept(self._total, 2 * streams), _Kept(self._block_costs, 2 * streams)
        self._orders, self._blocks = _Kept(self._order, 3 * streams), _Kept(self._tiles, min(2 * streams, _MOST))

    def numbers(self, segment: Ints, counter: Ints) -> Ints:
        """How many rows each stream has in the steps before `counter`."""
        steps = counter - self.begun
        low, high = self.mix.cut[segment], self.mix.cut[segment + 1]
        below = rows_below(np.concatenate([low, high]), np.tile(steps, 2), self.slope, self.offset)
        return self.before[segment] + below[len(segment) :] - below[: len(segment)]

    def rows(self, counter: Ints, row: Ints, segment: Ints) -> tuple[Columns, Columns]:
        """As in `Drawer`; `segment` is the number of the stream."""
        offset = (self.offset + self.slope * ((counter - self.begun) % UNIT)) % UNIT
        first_row = -((offset - self.mix.cut[segment]) // UNIT)  # first row of the segment in this step
        number = self.numbers(segment, counter) + row - first_row
        entry = segment % self.entries
        begin, end = self.shape.start(entry, number), self.shape.start(entry, number + 1)
        windows = self._cut(*self._stretches(segment.tolist(), begin.tolist(), end.tolist()))
        counts = np.bincount(windows["at"], minlength=len(row))
        first = np.cumsum(counts) - counts
        at = np.flatnonzero(self.shape.has_prompt(entry, number) & (counts > 0))
        head = first[at]
        heads = {k: v[head] for k, v in windows.items()} | {"at": at}
        return windows, self.prompt(heads, counter[at], row[at], 0)

    def _stretches(self, segments: list[int], begins: list[int], ends: list[int]) -> tuple[Ints, Ints, Ints, Ints]:
        """The tiles [5, n] (see `_tiles`) that overlap each stretch [begin, end) of a stream, one stretch after the other. For
        each tile also the number of its stretch, and the bounds of the stretch, counted in tokens of the tile's block."""
        parts, owner, low, high = [], [], [], []
        for number, (segment, begin, end) in enumerate(zip(segments, begins, ends)):
            total = self._totals(segment)
            while begin < end:
                epoch, x = divmod(begin, total)
                order, at = self._orders(segment, epoch)
                i = int(at.searchsorted(x, "right")) - 1
                first, stop = int(at[i]), min(end - begin + x, int(at[i + 1]))
                tiles = self._blocks(segment, epoch, int(order[i]))
                where = tiles[0]
                j, k = where.searchsorted(x - first, "right") - 1, where.searchsorted(stop - first, "left")
                parts.append(tiles[:, j:k])
                owner.append(number)
                low.append(x - first)
                high.append(stop - first)
                begin += stop - x
        sizes = [p.shape[1] for p in parts]
        tiles = np.concatenate(parts, axis=1) if parts else np.zeros((5, 0), np.int64)
        return tiles, np.repeat(owner, sizes), np.repeat(low, sizes), np.repeat(high, sizes)

    def _cut(self, tiles: Ints, owner: Ints, low: Ints, high: Ints) -> Columns:
        """What each stretch takes of its tiles: the units whose first token lies in the stretch."""
        at, cell, place, start, units = tiles
        stratum, costs = cell % len(self.index.strata), self.index.costs
        fixed, per_unit = self.index.fixed[place] + costs.once[stratum], costs.each[stratum]
        from_unit = np.maximum(-(-(low - at - fixed) // per_unit), 0)
        to_unit = np.minimum(-(-(high - at - fixed) // per_unit), units)
        some = np.flatnonzero(to_unit > from_unit)
        taken, owner = (to_unit - from_unit)[some], owner[some].astype(np.int64)
        return {
            "at": owner,
            "slot": np.arange(len(owner)) - np.searchsorted(owner, owner) + 1,
            "cell": cell[some],
            "place": place[some],
            "start": (start + from_unit)[some],
            "units": taken,
            "tokens": fixed[some] + taken * per_unit[some],
        }

    # -- streams -----------------------------------------------------------------------------------------------------

    def _places(self, segment: int) -> tuple[int, int]:
        bucket, entry = divmod(segment, self.entries)
        s, number = self._strata[entry], len(self.index.strata)
        return int(self.index.first[bucket * number + s[0]]), int(self.index.first[bucket * number + s[-1] + 1])

    def _total(self, segment: int) -> int:
        low, high = self._places(segment)
        return int(self.index.tokens[high] - self.index.tokens[low])

    def _block_costs(self, segment: int, epoch: int) -> Ints:
        """Tokens of each block of a stream in an epoch."""
        low, high = self._places(segment)
        bucket, number = segment // self.entries, len(self.index.strata)
        cells = bucket * number + self._strata[segment % self.entries]
        stratum = np.repeat(cells % number, self.index.first[cells + 1] - self.index.first[cells])
        costs, units = self.index.costs, self.index.units[low:high].astype(np.int64)
        window, per_unit = self.index.window(stratum, self.index.fixed[low:high]), costs.each[stratum]
        fixed = self.index.fixed[low:high] + costs.once[stratum]
        count = tile_count(units, window)
        cost = np.repeat(fixed + window * per_unit, count)
        cost[np.cumsum(count) - 1] = fixed + (units - (count - 1) * window) * per_unit
        blocks = max(1, len(cost) // _BLOCK)
        deals = -(-len(cost) // blocks)
        padded = np.zeros(deals * blocks, np.int64)
        padded[: len(cost)] = cost
        turned = (np.arange(blocks) - self._turns(segment, epoch, deals, blocks)[:, None]) % blocks
        return np.take_along_axis(padded.reshape(deals, blocks), turned, axis=1).sum(0)

    def _turns(self, segment: int, epoch: int, deals: int, blocks: int) -> Ints:
        """Each deal gives one tile to each block, and starts at a random block. So in each epoch other tiles share a block."""
        return (self._words(segment, epoch, np.arange(deals), 2)[0] % np.uint64(blocks)).astype(np.int64)

    def _keys(self, segment: int, epoch: int, item: Ints, kind: int) -> Ints:
        """A random order of some items in an epoch."""
        a, b, *_ = self._words(segment, epoch, item, kind)
        return np.argsort(a << np.uint64(32) | b, kind="stable")

    def _words(self, segment: int, epoch: int, item: Ints, kind: int) -> tuple[Words, Words, Words, Words]:
        generation = int(self.generation[segment % self.entries])
        count = generation << 40 | epoch << 2 | kind
        return words(self.seed, count, item, segment & 0xFFFF, segment >> 16, EPOCH)

    def _order(self, segment: int, epoch: int) -> tuple[Ints, Ints]:
        """Blocks in the order of an epoch, and the token of the epoch at which each begins [blocks + 1]."""
        costs = self._costs(segment, epoch)
        order = self._keys(segment, epoch, np.arange(len(costs)), 0)
        return order, np.concatenate([[0], np.cumsum(costs[order])])

    def _tiles(self, segment: int, epoch: int, block: int) -> Ints:
        """Tiles of a block in the order of an epoch [5, tiles]: first token in the block, cell, place, start, units."""
        low, high = self._places(segment)
        index, number = self.index, len(self.index.strata)
        first = index.mass[low]
        tiles, blocks = int(index.mass[high] - first), len(self._costs(segment, epoch))
        deal = np.arange(-(-tiles // blocks))
        tile = deal * blocks + (block - self._turns(segment, epoch, len(deal), blocks)) % blocks
        tile = tile[tile < tiles]
        tile = tile[self._keys(segment, epoch, tile, 1)]
        place = index.find(first + tile)
        cell = np.searchsorted(index.first, place, side="right") - 1
        stratum = cell % number
        window = index.window(stratum, index.fixed[place])
        start = (first + tile - index.mass[place]).astype(np.int64) * window
        units = np.minimum(index.units[place] - start, window)
        cost = index.fixed[place] + index.costs.once[stratum] + units * index.costs.each[stratum]
        return np.stack([np.cumsum(cost) - cost, cell, place, start, units]).astype(np.int64)
