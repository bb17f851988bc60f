"""Bytes of one rank of a run, by part: what DeepSpeed keeps beside the counted activations, read from its source (0.19).

Two moments can be the peak: a micro-batch that finds gradients of earlier ones, and the optimizer's step. `rank_memory` takes the
larger one. Stages are those of ZeRO; `share` is what a rank keeps if weights are divided among the data-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiphys.pretrain.model.counting import Pass

MOST_LIVE = 1_000_000_000  # parameters that ZeRO-3 keeps gathered at once by default (stage3_max_live_parameters)
PREFETCH = 50_000_000  # parameters that ZeRO-3 gathers ahead by default (stage3_prefetch_bucket_size)
CONTEXT = 1 << 30  # bytes of the CUDA context, cuBLAS and NCCL; not yet measured on a GPU
LOOSE = (
    0.04  # share of the memory that CUDA's allocator cannot use, because blocks do not fit; not yet measured on a GPU
)


@dataclass(frozen=True)
class Share:
    """Parameters of one rank's part of the model, and how ZeRO divides them.

    dense    trained parameters without the experts that are divided among ranks
    expert   trained parameters of those experts that this rank holds
    frozen   parameters that are not trained
    largest  elements of the largest parameter
    data     data-parallel ranks
    groups   ranks that hold the same experts: data ÷ parallel.expert
    """

    dense: int
    expert: int
    frozen: int
    largest: int
    data: int
    groups: int

    @property
    def trained(self) -> int:
        return self.dense + self.expert

    @property
    def own(self) -> int:
        """Trained parameters that this rank updates, if ZeRO divides them."""
        return -(-self.dense // self.data) + -(-self.expert // self.groups)


@dataclass(frozen=True)
class Settings:
    """What a configuration says about memory.

    width     bytes of a weight: 2 (bfloat16) or 4
    bucket    elements of the reduction bucket
    overlap   reduction and backward pass overlap, so there are two buckets
    offload   masters and moments are in the host's memory
    offload_weights  so are the weights (ZeRO-3)
    """

    stage: int
    width: int
    bucket: int
    overlap: bool
    offload: bool
    offload_weights: bool
    accumulation: int
    device: str


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by part.

    communication  reduction buckets, and weights that ZeRO-3 has gathered
    optimizer      what the optimizer's step takes for itself
    reserve        what the device needs beside tensors
    """

    weights: int = 0
    masters: int = 0
    moments: int = 0
    gradients: int = 0
    communication: int = 0
    activations: int = 0
    optimizer: int = 0
    reserve: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


def rank_memory(share: Share, s: Settings, passes: Pass, in_flight: int = 1) -> tuple[Memory, int]:
    """The peak of a rank, and the bytes that it has between two steps.

    passes     of one micro-batch: counted with gradients that stay and a bucket (stages 0 and 1) or go (2 and 3)
    in_flight  micro-batches whose activations a pipeline stage holds at once
    """
    fixed = _between_steps(share, s)
    moments = [_micro_batch(share, s, passes, in_flight), _update(share, s)]
    largest = max(moments, key=lambda m: m.total)
    peak = Memory(**{f.name: getattr(fixed, f.name) + getattr(largest, f.name) for f in fields(Memory)})
    if s.device == "cuda":
        peak = Memory(**{**vars(peak), "reserve": CONTEXT + int(LOOSE * peak.total)})
    return peak, fixed.total


def _between_steps(share: Share, s: Settings) -> Memory:
    divided, on_device = s.stage >= 1, not s.offload
    own = share.own if divided else share.trained
    weights = share.trained + share.frozen
    if s.stage == 3:
        weights = 0 if s.offload_weights else share.own + -(-share.frozen // share.data)
    return Memory(
        weights=weights * s.width,
        masters=4 * own * (divided and on_device),
        moments=8 * own * on_device,
        gradients=share.own * s.width * (s.stage == 3 and on_device),
        communication=s.bucket * s.width * (s.stage == 3),
    )


def _micro_batch(share: Share, s: Settings, passes: Pass, in_flight: int) -> Memory:
    """The last micro-batch of a step."""
    earlier = s.accumulation > 1
    held = (in_flight - 1) * (passes.kept + passes.inputs) + passes.inputs
    bucket = s.bucket * s.width
    if s.stage in (0, 1):
        gradients = passes.gradients
        buffers = bucket * s.stage
        first = passes.peak
        later = (gradients + buffers + passes.again) if earlier or in_flight > 1 else 0
        # After the last backward pass stage 1 copies all gradients to the bucket, and its share out of it.
        end = gradients + buffers * (1 + s.overlap) + share.own * s.width * s.stage
        if s.stage == 0 and share.data > 1:
            end += gradients
        top = max(first, later)
        if end > top + held:
            return Memory(gradients=end - buffers * (1 + s.overlap), communication=buffers * (1 + s.overlap))
        known = gradients + buffers if later >= first else 0
        extra = buffers * s.overlap
        return Memory(
            gradients=gradients if known else 0,
            communication=(buffers if known else 0) + extra,
            activations=held + top - known,
        )
    if s.stage == 2:
        own = share.own * s.width
        # what several ranks reduce is a copy of the bucket, and a parameter may belong to two of them
        sent = bucket + share.largest * s.width if share.data > 1 else own
        return Memory(
            gradients=own if earlier else 0,
            communication=bucket * s.overlap,
            activations=held + max(passes.peak, bucket + sent),
        )
    gathered, end = 0, 0
    if share.data > 1 or s.offload_weights:
        gathered = min(share.trained + share.frozen, MOST_LIVE + PREFETCH + share.largest) * s.width
    if share.data > 1:  # the last bucket is copied and reduced, while the largest gradient waits to be added
        end = bucket + (share.own + share.largest) * s.width
    return Memory(communication=gathered + bucket * s.overlap, activations=max(held + passes.peak, end))


def _update(share: Share, s: Settings) -> Memory:
    if s.stage == 0:
        return Memory(gradients=share.trained * 4, optimizer=max(2 * share.largest, share.trained) * 4)
    if s.offload:
        return Memory(gradients=share.own * s.width)
    own = share.own * 4
    # torch's AdamW on a CPU makes two temporaries; the fused one of a GPU makes none.
    if s.device == "cpu":
        return Memory(gradients=own, optimizer=2 * own)
    return Memory(gradients=own + share.own * s.width)
