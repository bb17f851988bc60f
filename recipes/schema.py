"""What a run is: `Recipe` and its sections, as frozen structured configs (OmegaConf).

`deepspeed:` is DeepSpeed's own section, verbatim; it alone owns batch sizes, optimizer, schedule, clipping, precision
and ZeRO. Everything else that a run needs stands here, each value in one place. `load.py` reads a file into this;
`launch/check.py` names every error of one at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass(frozen=True)
class Entry:
    """One line of the mixture: a dataset, how often it is drawn, and what is learned from it."""

    dataset: str = MISSING  # folder or URL of a dataset (dataset.json, index.parquet, shards/)
    weight: float = 1.0  # relative share, in `data.weight_unit`
    objective: str = "gato"  # a key of `objectives`, or the name of a paradigm
    tasks: list[str] = field(default_factory=list)  # only these tasks (names or globs); empty: all
    prefer: str = "uniform"  # uniform | return (weight grows with the return's rank) | top (see `top`) | success
    top: float = 1.0  # with prefer: top, the share of episodes of each task with the highest returns
    loss_weight: float = 1.0  # multiplies the loss of this entry's target tokens


@dataclass(frozen=True)
class Cache:
    """The loader's cache on one node, divided among the node's loaders."""

    dir: str = ""  # folder of the disk tier; empty: memory only
    memory: str = "1GiB"
    disk: str = "0GiB"


@dataclass(frozen=True)
class Data:
    mixture: list[Entry] = field(default_factory=list)
    validation: float = 0.01  # share of episodes held out, by a hash of the episode's id
    weight_unit: str = "windows"  # windows | tokens: what `weight` counts
    replacement: bool = True  # False: epochs over disjoint tiles of the episodes
    buckets: int = 0  # V of the placement; 0: chosen from cache, batch and number of episodes
    cache: Cache = field(default_factory=Cache)
    requests: int = 64  # range requests in flight for each loader
    prefetch: str = "256MiB"  # finished batches that may wait for the trainer, for each loader
    timeout: float = 10.0  # seconds without a byte after which a request is made again
    attempts: int = 8  # most tries of one request
    unit_rows: int = 0  # steps of an episode that are fetched and cached as one; 0: chosen from cache and data


@dataclass(frozen=True)
class FieldTokens:
    """How one field of a timestep becomes tokens: overrides the objective's scheme for fields that the key matches."""

    encoding: str = "auto"  # auto (the scheme decides) | gato | vector | grid | uniform | quantile | skip
    bins: int = 1024  # uniform, quantile: bins a dimension
    resize: int = 0  # images: resize so that height = width = resize; 0: as stored
    crop: int = 0  # images: centre crop to crop × crop before resizing; 0: none
    stride: int = 1  # keep every stride-th step of this field's observations
    chunk: int = 1  # actions: predict this many steps at once


@dataclass(frozen=True)
class Objective:
    """A row of the table of paradigms with its options (docs/recipes.md)."""

    paradigm: str = ""  # a paradigm's name; empty: the key under `objectives`
    context: int = 1024  # most tokens of one window; the row length is the largest context of a recipe
    window: int = 0  # most steps of one window; 0: as many as fit the context
    scheme: str = "auto"  # gato | compact; auto: gato for paradigm gato, else compact
    softmax: str = "auto"  # vocabulary | range (normalise over the target's own range); auto: vocabulary for gato
    prompt: float = -1.0  # share of rows that begin with a prompt of the same task; -1: the paradigm's own
    prompt_steps: int = 0  # most steps of a prompt; 0: half of the row's tokens
    discretise: str = "auto"  # actions as tokens (yes) or regressed vectors (no); auto: the paradigm's own
    target_return: float = 0.0  # dt at evaluation: multiple of the best return in the data; 0: 1.0
    fields: dict[str, FieldTokens] = field(default_factory=dict)  # by field name or glob
    options: dict[str, Any] = field(default_factory=dict)  # further options of one paradigm


@dataclass(frozen=True)
class Experts:
    experts: int = 0  # 0: dense
    experts_per_token: int = 2
    every: int = 2  # every n-th layer is a mixture of experts, the last one of each n
    hidden: int = 0  # inner width of one expert; 0: the dense layer's
    shared: bool = False  # one more expert that every token passes through
    balance: float = 0.01  # coefficient of the balance loss (shares of the previous step × probabilities of this one)
    z_loss: float = 0.001
    bias_rate: float = 0.0  # > 0: bias-only balancing instead of the balance loss, moved by this much a step
    modality: bool = True  # the router sees the token's modality
    task: bool = False  # the router sees the token's task
    task_dropout: float = 0.1  # with task: share of rows whose task is hidden


@dataclass(frozen=True)
class Model:
    freeze: list[str] = field(default_factory=list)  # globs of parameter names that stay as they are
    layers: int = 8
    hidden: int = 512
    heads: int = 8
    kv_heads: int = 0  # 0: as many as heads
    ffn: int = 0  # inner width of the gated MLP; 0: 8/3 × hidden, rounded up to a multiple of 64
    dropout: float = 0.0  # elementwise; stands outside the claim that every layout has the same loss
    rope_theta: float = 10000.0
    timesteps: int = 0  # size of a learned embedding of the step's number (Decision Transformer); 0: none
    tie: bool = False  # one matrix for token embedding and output
    text_vocabulary: int = 32000  # size of the text range
    text_tokenizer: str = (
        ""  # tokenizer.json or SentencePiece model; empty: bytes, then BPE learned from the recipe's texts
    )
    checkpointing: bool = False  # recompute activations in the backward pass
    moe: Experts = field(default_factory=Experts)


@dataclass(frozen=True)
class Parallel:
    pipeline: int = 1
    expert: int = 1
    measure: bool = True  # cut the stages by the measured time of each layer; False: by its operations


@dataclass(frozen=True)
class Train:
    steps: int = 1000
    seed: int = 0
    log_every: int = 1
    compile: bool = False


@dataclass(frozen=True)
class Checkpoints:
    every: int = 1000  # 0: only at the end
    keep: int = 3
    asynchronous: bool = True


@dataclass(frozen=True)
class Validation:
    every: int = 0  # 0: only at the end, where there are held-out episodes
    rows: int = 64


@dataclass(frozen=True)
class Evaluation:
    every: int = 0  # 0: only at the end, where there are tasks
    tasks: list[str] = field(default_factory=list)
    episodes: int = 20
    processes: int = 0  # 0: as many as cores
    seed: int = 1_000_000  # first evaluation seed; demonstrations use seeds below it
    sample: bool = False  # draw actions instead of taking the most probable
    videos: int = 1  # rollouts of each task whose pictures go into the report


@dataclass(frozen=True)
class Publish:
    to: str = ""  # folder, s3://…, hf://org/name; empty: only <run.dir>/policy
    every: int = 0
    keep: str = "last"  # last | best
    private: bool = True
    license: str = "apache-2.0"


@dataclass(frozen=True)
class Run:
    dir: str = MISSING


@dataclass(frozen=True)
class Recipe:
    name: str = MISSING
    data: Data = field(default_factory=Data)
    objectives: dict[str, Objective] = field(default_factory=dict)
    model: Model = field(default_factory=Model)
    parallel: Parallel = field(default_factory=Parallel)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoints = field(default_factory=Checkpoints)
    validate: Validation = field(default_factory=Validation)
    evaluate: Evaluation = field(default_factory=Evaluation)
    publish: Publish = field(default_factory=Publish)
    run: Run = field(default_factory=Run)
