"""Oracle of what a window hides: the words of `tiphys.pretrain.tokens.hiding` for people, one step and part at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tiphys.dataio.philox import HIDE, uniform32, words


def hidden_and_learnt(layout: Any, steps: int, acted: int, keys: tuple[int, int, int, int]) -> tuple[Any, Any]:
    """({(step, part): hidden}, {(step, part): learnt}) of a window. `keys`: seed, step, row and slot."""
    parts = layout.parts
    choice, u, v, _ = (float(uniform32(w)) for w in words(*keys, 0, HIDE))
    total, at = sum(share for _, share in layout.hiding), 0.0
    names = []
    for scheme, share in layout.hiding:
        at += share / total
        names += [scheme] if choice < at else []
    name = names[0]
    drawn = {}
    for s in range(steps):
        for i, part in enumerate(parts):
            counter = 1 + s * -(-len(parts) // 4) + i // 4
            drawn[s, part] = float(uniform32(words(*keys, counter, HIDE)[i % 4]))
    seen, learnt = set(), set()
    for s, part, is_seen, is_learnt in _rules(name, steps, acted, parts, u, v, drawn):
        if is_seen:
            seen.add((s, part))
        if is_learnt:
            learnt.add((s, part))
    cells = [(s, part) for s in range(steps) for part in parts]
    return {c: c not in seen for c in cells}, {c: c in learnt for c in cells}


def _rules(
    name: str, steps: int, acted: int, parts: Any, u: float, v: float, drawn: Any
) -> Iterator[tuple[int, str, bool, bool]]:
    left = min(acted, steps - 1)  # actions between two observations
    one, other = sorted((int(u * steps), int(v * steps)))
    for s in range(steps):
        for part in parts:
            late = part == "return" and s > 0
            observed, moved = part == "observation", part in ("action", "reward")
            if name == "random":
                yield s, part, drawn[s, part] >= u and not late, drawn[s, part] < u and not late
                continue
            if name in ("bc", "rc", "goal", "waypoint"):
                choices = acted if name in ("bc", "rc") else left
                at = int(u * choices) if choices else -1
                seen = (observed and s <= at) or (moved and s < at)
                seen |= name == "rc" and part == "return" and s == 0
                seen |= name in ("goal", "waypoint") and observed and s == steps - 1
                seen |= name == "waypoint" and observed and s in (0, steps // 3, 2 * steps // 3)
                learnt = part == "action" and s == at
            elif name == "past":
                first = 1 + int(u * (steps - 1)) if steps > 1 else 0
                seen, learnt = (observed or moved) and s >= first, (observed or moved) and s < first
            elif name == "future":
                last = int(u * (steps - 1))
                seen, learnt = (observed or moved) and s <= last, (observed or moved) and s > last
            elif name == "span":
                inside = one <= s <= other
                seen, learnt = (observed or moved) and not inside, (observed or moved) and inside
            elif name == "forward":
                at = int(u * left) if left else -1
                seen, learnt = (observed or moved) and s == at, observed and s == at + 1 and at >= 0
            else:
                assert name == "backward"
                at = int(u * left) if left else -1
                # Without a choice the first observation is the one "after" it
                seen, learnt = observed and s in (at, at + 1), part == "action" and s == at
            yield s, part, bool(seen), bool(learnt)
