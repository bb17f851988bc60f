"""Which sizes a model cannot have, and why: one wording of each rule, for `tiphys check` and for `DecisionConfig`."""

from __future__ import annotations

from collections.abc import Iterator

MOST_PARAMETERS = 10**13


def size_errors(
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    experts: int,
    experts_per_token: int,
    every: int,
    head_size: int = 0,
    first_dense: int = 0,
) -> Iterator[tuple[str, str]]:
    """(key path in the recipe, reason) for each rule that the sizes break.

    kv_heads     0: as many as heads
    every        every n-th layer has experts; `experts_per_token` and `every` count only if there are experts
    head_size    0: hidden / heads
    first_dense  so many layers at the beginning have no experts
    """
    sizes = {"layers": layers, "hidden": hidden, "heads": heads}
    small = [
        (f"model.{name}", f"{size} is out of range; allowed: at least 1") for name, size in sizes.items() if size < 1
    ]
    if small:
        yield from small
        return
    if head_size % 2:
        yield "model.head_size", f"{head_size} is an odd number; rotary positions need an even head size"
    elif not head_size and hidden % (2 * heads):
        yield (
            "model.heads",
            f"model.hidden ({hidden}) must be a multiple of 2 × model.heads ({2 * heads}), "
            f"because rotary positions need an even head size; set {_that_fit(hidden, heads)}",
        )
    if kv_heads and heads % kv_heads:
        yield "model.kv_heads", f"model.heads ({heads}) must be a multiple of model.kv_heads ({kv_heads})"
    if not experts:
        return
    if not 1 <= experts_per_token <= experts:
        yield (
            "model.moe.experts_per_token",
            f"{experts_per_token} is out of range; allowed: 1 to model.moe.experts ({experts})",
        )
    if not 1 <= every <= layers:
        yield "model.moe.every", f"{every} is out of range; allowed: 1 to model.layers ({layers})"
    elif first_dense >= (last := layers // every * every):
        yield "model.moe.first_dense", f"{first_dense} leaves no layer with experts; allowed: less than {last}"


def _that_fit(hidden: int, heads: int) -> str:
    """The nearest number of heads that fits the width, and the next width that fits the heads."""
    wider = f"model.hidden={hidden + -hidden % (2 * heads)}"
    fitting = [n for n in range(1, min(heads, hidden // 2) + 1) if hidden % (2 * n) == 0]
    return f"model.heads={fitting[-1]} or {wider}" if fitting else wider


def parameter_errors(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    text_vocabulary: int,
    timesteps: int,
    experts: int,
    every: int,
    expert_hidden: int,
    heads: int = 0,
    head_size: int = 0,
    first_dense: int = 0,
) -> Iterator[tuple[str, str]]:
    """Whether the sizes, each of them allowed, together make a model that no machine holds. 0 stands for the default width."""
    dense = ffn or 8 * hidden // 3
    mixtures = max(layers // every - first_dense // every, 0) if experts else 0
    attention = max(hidden, heads * head_size)
    matrices = 3 * hidden * (dense * (layers - mixtures) + (expert_hidden or dense) * experts * mixtures)
    count = 4 * hidden * attention * layers + matrices + hidden * (2 * text_vocabulary + timesteps)
    if count > MOST_PARAMETERS:
        yield "model", f"the model would have about {count:.1e} parameters; allowed: at most {MOST_PARAMETERS:.0e}"
