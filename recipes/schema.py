"""Every key of a recipe: `Recipe` and its sections, as frozen structured configs (OmegaConf).

`deepspeed:` is DeepSpeed's own section, passed on as it is. Batch sizes, optimizer, schedule, clipping, precision and ZeRO are
set only there. Everything else that a run needs is here, each value in one place. `load.py` reads a file into these classes;
`launch/check.py` reports every error of a recipe at once; docs/recipes.md shows the keys as tables (`reference.py`).
"""

# ruff: noqa: RUF009  (`key` returns a dataclass field)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from tiphys.recipes.keys import key

SEEDS = 2**63 - 1  # the largest seed
# Numbers that are far above what anybody trains. They keep a slip of the pen from being a run that hangs or fills the memory.
STEPS = 10**12
POSITIONS = 2**24  # tokens or steps of one window
TRACKERS = ("wandb", "trackio", "mlflow")  # also the names of their packages


@dataclass(frozen=True)
class Entry:
    """One entry of the mixture: a dataset, how often it is drawn, and what is learned from it."""

    dataset: str = key(
        MISSING,
        "Dataset to train on",
        text="folder or URL that holds dataset.json, index.parquet and shards/",
        path=True,
    )
    weight: float = key(
        1.0, "Relative share of the training data, counted in `data.weight_unit`; 0: not drawn", low=0, high=1e9
    )
    objective: str = key("gato", "What is learned from it", text="key of `objectives`, or name of a paradigm")
    tasks: list[str] = key(
        list, "Train on these tasks only; empty: on all tasks of the dataset", text="task names or globs"
    )
    prefer: str = key(
        "uniform",
        "Which episodes are drawn: all alike, more often the higher their return, only the best (`top`), only successful ones",
        choices=("uniform", "return", "top", "success"),
    )
    top: float = key(1.0, "With `prefer: top`, the share of each task's data that counts as best", above=0, high=1)
    top_of: str = key(
        "episodes", "What `top` is a share of; %BC counts steps (Chen et al. 2021)", choices=("episodes", "steps")
    )
    loss_weight: float | str = key(
        1.0,
        "Factor on the loss of this entry's target tokens; `auto`: so that its share of the gradient is that of its `weight`",
        low=0,
        high=1e6,
        words=("auto",),
    )


@dataclass(frozen=True)
class Cache:
    """The loaders' cache on one node, divided among the node's loaders."""

    dir: str = key("", "Folder of the disk cache; empty: memory only", text="folder", path=True, resume=True)
    memory: str = key("1GiB", "Memory for cached data on each node", size=True, resume=True)
    disk: str = key("0GiB", "Disk space for cached data on each node", size=True, resume=True)


@dataclass(frozen=True)
class Data:
    """What is trained on, and how it is drawn and loaded."""

    mixture: list[Entry] = key(list, "Datasets to train on, one entry each; at least one is needed")
    validation: float = key(
        0.01, "Share of episodes held out for validation, by a hash of the episode's id", low=0, below=1
    )
    weight_unit: str = key("windows", "What `weight` counts", choices=("windows", "tokens"))
    starts: str = key(
        "steps",
        "What is equally likely: each step of a task, or each full window (then first and last steps are rare)",
        choices=("steps", "windows"),
    )
    replacement: bool = key(
        True, "Draw windows independently; false: epochs that cut the episodes into disjoint windows"
    )
    buckets: int = key(
        0,
        "Groups into which the episodes are placed; 0: chosen from the number of episodes and of rows",
        low=0,
        high=2**20,
    )
    cache: Cache = key(Cache, "The loaders' cache on one node, divided among the node's loaders")
    requests: int = key(64, "Range requests in flight, for each loader", unit="requests", low=1, high=4096, resume=True)
    timeout: float = key(
        10.0,
        "Time without a byte after which a request is made again",
        unit="seconds",
        above=0,
        high=86400,
        resume=True,
    )
    attempts: int = key(
        8, "How often a request is tried before it fails", unit="attempts", low=1, high=1000, resume=True
    )
    unit_rows: int = key(
        0,
        "Steps of an episode that are fetched and cached as one unit; 0: chosen from what bytes and requests cost",
        unit="steps",
        low=0,
        high=POSITIONS,
        resume=True,
    )
    on_bad_value: str = key(
        "refuse",
        "What is done about values that cannot be learned from (NaN, infinite rewards, integers beyond the declared range): "
        "refuse them in `check` and end the training, so that no episode is left out without your consent; or quarantine "
        "their episodes, so that `check` only counts them and training draws other windows instead",
        choices=("refuse", "quarantine"),
        resume=True,
    )
    prefetch: str = key(
        "256MiB", "Memory for finished batches that wait for the trainer, for each loader", size=True, resume=True
    )


@dataclass(frozen=True)
class Relative:
    """Actions that are counted from the state of the observed step."""

    to: str = key(
        "", "Actions: count them from this field of the observed step; empty: they stay absolute", text="field"
    )
    columns: list[Any] = key(
        list,
        "The column of `to` that each entry of the action is counted from, one for each entry; null: it stays absolute",
    )


@dataclass(frozen=True)
class Augment:
    """How pictures are changed at random in training, all of a window and camera alike; never in validation or acting."""

    crop: float = key(
        1.0, "Share of each side that is cut out at a random place and enlarged again; 1: all", low=0.1, high=1
    )
    rotate: float = key(
        0.0, "Most degrees by which pictures are rotated, to either side", unit="degrees", low=0, high=180
    )
    brightness: float = key(0.0, "Largest change of the factor of the brightness", low=0, high=1)
    contrast: float = key(0.0, "Largest change of the factor of the contrast", low=0, high=1)
    saturation: float = key(0.0, "Largest change of the factor of the saturation", low=0, high=1)


@dataclass(frozen=True)
class Flow:
    """The head that draws chunks of actions by flow matching, with `head: flow`."""

    width: int = key(256, "Width of the head", low=8, high=2**14)
    depth: int = key(3, "Blocks of the head", unit="blocks", low=1, high=64)
    draws: int = key(
        4, "Noises and times that each chunk is learned at; more make the gradient less noisy", low=1, high=64
    )
    steps: int = key(10, "Euler steps in which a policy draws a chunk", unit="steps", low=1, high=1000)


@dataclass(frozen=True)
class FieldTokens:
    """How one field of a timestep becomes tokens. It takes precedence over the scheme of the objective."""

    encoding: str = key(
        "auto",
        "How the field becomes tokens; auto: as the scheme says",
        choices=("auto", "gato", "vector", "grid", "rows", "cells", "uniform", "quantile", "integer", "sign", "skip"),
    )
    bins: int = key(1024, "With `encoding: uniform` or `quantile`, bins of each dimension", low=2, high=2**16)
    resize: int = key(0, "Images: height and width after resizing; 0: as stored", unit="pixels", low=0, high=8192)
    crop: int = key(
        0, "Images: height and width of a centre crop before resizing; 0: none", unit="pixels", low=0, high=8192
    )
    augment: Augment = key(Augment, "Images: how they are changed at random in training")
    stride: int = key(1, "Keep this field's observation in every n-th step only", unit="steps", low=1, high=POSITIONS)
    chunk: int = key(1, "Actions: predict this many steps at once", unit="steps", low=1, high=2**16)
    relative: Relative = key(Relative, "Actions: count them from the state of the observed step")
    normalise: str = key(
        "auto",
        "Actions: what becomes -1 to 1: the range of the data, its quantiles .01 to .99, or one standard deviation around the "
        "mean; auto: quantile for chunks and relative actions, else the bounds of the space",
        choices=("auto", "bounds", "quantile", "standard"),
    )


@dataclass(frozen=True)
class Objective:
    """A paradigm with its options."""

    paradigm: str = key(
        "", "Paradigm to learn by; empty: the one that the key under `objectives` names", text="name of a paradigm"
    )
    context: int = key(
        1024,
        "Most tokens of one window; rows are as long as the largest context of the recipe",
        unit="tokens",
        low=1,
        high=POSITIONS,
    )
    window: int = key(0, "Most steps of one window; 0: as many as fit the context", unit="steps", low=0, high=POSITIONS)
    scheme: str = key(
        "auto",
        "How fields become tokens; auto: gato for paradigm gato, else compact",
        choices=("auto", "gato", "compact"),
    )
    softmax: str = key(
        "auto",
        "What a prediction is normalised over: the whole vocabulary or the range of its target; auto: as the paradigm does",
        choices=("auto", "vocabulary", "range"),
    )
    prompt: float = key(
        -1.0,
        "Share of rows that begin with a prompt of the same task; -1: as the paradigm does",
        low=0,
        high=1,
        also=(-1,),
    )
    prompt_steps: int = key(
        0, "Most steps of a prompt; 0: as many as fit half of the row", unit="steps", low=0, high=POSITIONS
    )
    discretise: str = key(
        "auto",
        "Continuous actions become tokens (yes) or are regressed as vectors (no); auto: as the paradigm does",
        choices=("auto", "yes", "no"),
    )
    target_return: str = key(
        "best",
        "Return of an episode that the policy asks for, if the objective shows returns; `best` is 1x",
        target=True,
        resume=True,
    )
    horizon: int = key(
        0, "Actions that are predicted at each observed step; 0: as many as `chunk`", unit="steps", low=0, high=2**12
    )
    chunk: int = key(
        0,
        "Steps from one observed step to the next, whose actions a policy executes without looking; 0: as `fields` says",
        unit="steps",
        low=0,
        high=2**12,
    )
    head: str = key(
        "auto",
        "How continuous actions are predicted: ids (bins), the mean (l2) or the median (l1) of the whole chunk, or chunks that "
        "are drawn by flow matching; auto: as `discretise` says",
        choices=("auto", "bins", "l2", "l1", "flow"),
    )
    flow: Flow = key(Flow, "The head that draws chunks by flow matching")
    insulate: int = key(
        0,
        "With `head: flow`, `l2` or `l1`: the trunk is not trained by the head but by so many bins of each number of the same "
        "chunk, for example 256; 0: by the head",
        unit="bins",
        low=2,
        high=2**16,
        also=(0,),
    )
    fields: dict[str, FieldTokens] = key(dict, "How single fields become tokens, by field name or glob")
    options: dict[str, Any] = key(dict, "Further options of one paradigm, by name")


@dataclass(frozen=True)
class Experts:
    """Layers that are a mixture of experts."""

    experts: int = key(0, "Experts of a layer; 0: no mixture of experts", low=0, high=2**14)
    experts_per_token: int = key(2, "Experts that each token passes through", low=1, high=2**14)
    every: int = key(
        2, "Every n-th layer, the last one of each n, is a mixture of experts", unit="layers", low=1, high=4096
    )
    first_dense: int = key(0, "The first layers that are dense whatever `every` says", unit="layers", low=0, high=4096)
    hidden: int = key(0, "Inner width of one expert; 0: that of a dense layer", low=0, high=2**20)
    shared: bool = key(False, "One more expert that every token passes through")
    balance: float = key(
        0.01,
        "Coefficient of the balance loss (shares of the previous step × probabilities of this one)",
        low=0,
        high=1e3,
    )
    z_loss: float = key(0.001, "Coefficient of the z-loss of the router", low=0, high=1e3)
    bias_rate: float = key(
        0.0,
        "Above 0: instead of a balance loss, a bias on the choice of experts moves by this much a step",
        low=0,
        high=1e3,
    )
    modality: bool = key(True, "The router sees the modality of the token")
    task: bool = key(False, "The router sees the task of the token")
    task_dropout: float = key(
        0.1, "With `task: true`, the share of rows whose task is hidden from the router", low=0, high=1
    )


@dataclass(frozen=True)
class Upcycle:
    """A mixture of experts that begins with a dense model: its experts are copies of the dense MLPs."""

    fresh: float = key(
        0.0,
        "Share of each expert's inner columns that is drawn instead of copied, so that experts differ from the beginning",
        low=0,
        high=1,
    )


@dataclass(frozen=True)
class Rope:
    """Rotary positions."""

    theta: float = key(0.0, "Base of the frequencies; 0: `model.rope_theta`", low=1, high=1e12, also=(0.0,))
    type: str = key(
        "default",
        "How frequencies are stretched for windows that are longer than those of an earlier training",
        choices=("default", "linear", "llama3", "yarn"),
    )
    factor: float = key(1.0, "How many times longer the windows are (`linear`, `llama3`, `yarn`)", low=1e-3, high=1e6)
    original_length: int = key(
        8192, "Length of the earlier windows (`llama3`, `yarn`)", unit="positions", low=1, high=10**9
    )
    low_frequency: float = key(
        1.0,
        "Frequencies with fewer turns over `original_length` are divided by `factor` (`llama3`)",
        low=1e-6,
        high=1e6,
    )
    high_frequency: float = key(
        4.0, "Frequencies with more turns over `original_length` are kept (`llama3`)", low=1e-6, high=1e6
    )
    beta_fast: float = key(
        32.0, "Frequencies with more turns over `original_length` are kept (`yarn`)", low=1e-6, high=1e6
    )
    beta_slow: float = key(
        1.0, "Frequencies with fewer turns over `original_length` are divided by `factor` (`yarn`)", low=1e-6, high=1e6
    )
    attention_factor: float = key(
        0.0, "Factor of queries and of keys (`yarn`); 0: 0.1 × ln(`factor`) + 1", low=0, high=1e3
    )


@dataclass(frozen=True)
class Model:
    """The size of the model and its text tokenizer."""

    init: str = key(
        "",
        "Begin with the weights of this policy, run or language model; parameters that it lacks are drawn. Empty: all are drawn",
        text="folder of a policy, run or model, URL, or hf://org/name",
        path=True,
    )
    init_revision: str = key(
        "", "With an `init` of hf://: which revision of it; empty: the newest one", text="commit, tag or branch"
    )
    init_map: dict[str, Any] = key(
        dict, "Fields and tasks that have another name in `init`: their name there, and their name here"
    )
    init_digest: str = key(
        "", "SHA-256 of `init`; filled in when a run begins, refused if it differs", text="hex digits"
    )
    init_commit: str = key(
        "", "Commit of an `init` of hf://; filled in when a run begins, and fetched from then on", text="hex digits"
    )
    upcycle: Upcycle = key(Upcycle, "With `moe` and a dense `init`: its experts are copies of the dense MLPs")
    freeze: list[str] = key(list, "Parameters that are not trained", text="globs of parameter names")
    layers: int = key(8, "Transformer layers", low=1, high=4096)
    hidden: int = key(
        512, "Width of the hidden states; a multiple of 2 × `heads` unless there is a `head_size`", low=1, high=2**17
    )
    heads: int = key(8, "Attention heads", low=1, high=2**12)
    kv_heads: int = key(
        0, "Heads of keys and values; `heads` must be a multiple of it; 0: as many as `heads`", low=0, high=2**12
    )
    head_size: int = key(
        0, "Size of a head's queries, keys and values, an even number; 0: `hidden` / `heads`", low=0, high=2**14
    )
    qk_norm: bool = key(False, "RMSNorm of each head's queries and keys")
    qkv_bias: bool = key(False, "Queries, keys and values have a bias")
    ffn: int = key(
        0, "Inner width of the gated MLP; 0: 8/3 × `hidden`, rounded up to a multiple of 64", low=0, high=2**20
    )
    dropout: float = key(0.0, "Dropout of single elements; above 0, the loss depends on the layout", low=0, below=1)
    norm_epsilon: float = key(1e-6, "Added to the mean square in RMSNorm", above=0, high=1)
    rope_theta: float = key(
        10000.0, "Base of the rotary positions; `rope.theta`, if it is not 0, takes its place", low=1, high=1e12
    )
    rope: Rope = key(Rope, "Rotary positions, stretched if an earlier model had them so")
    timesteps: int = key(
        0,
        "Size of a learned embedding of the step's number in its episode (Decision Transformer); 0: none",
        unit="steps",
        low=0,
        high=2**22,
    )
    init_std: float = key(
        0.0,
        "Standard deviation of the weights that are drawn; 0: 1 / √`hidden`",
        low=1e-4,
        high=1,
        also=(0.0,),
        resume=True,
    )
    tie: bool = key(False, "One matrix for token embedding and output")
    text_vocabulary: int = key(
        0,
        "Size of the range of text tokens; 0: as many as the tokenizer has, which learns at most 32000 from the texts",
        unit="tokens",
        low=256,
        high=2**22,
        also=(0,),
    )
    text_tokenizer: str = key(
        "",
        "Text tokenizer; empty: a byte-level BPE learned from the recipe's texts",
        text="tokenizer.json or SentencePiece .model",
        path=True,
    )
    checkpointing: bool = key(False, "Recompute activations in the backward pass, to save memory", resume=True)
    moe: Experts = key(Experts, "Layers that are a mixture of experts")


@dataclass(frozen=True)
class Parallel:
    """How the processes are divided. Those that `pipeline` and `expert` leave are data-parallel."""

    pipeline: int = key(1, "Pipeline stages", unit="stages", low=1, high=4096, resume=True)
    expert: int = key(
        1,
        "Data-parallel processes among which the experts of a layer are divided",
        unit="processes",
        low=1,
        high=2**14,
        resume=True,
    )
    measure: bool = key(
        True, "Cut the pipeline by the measured time of each layer; false: by its number of operations", resume=True
    )
    auto: bool = key(
        False,
        "Choose the keys that are set to `auto`: `parallel.pipeline`, `parallel.expert`, `model.checkpointing`, the micro-batch "
        "and the ZeRO stage of `deepspeed` (docs/layout.md)",
        resume=True,
    )


@dataclass(frozen=True)
class Average:
    """A moving average of the weights, beside those that are trained."""

    decay: float = key(
        0.0,
        "Share of the average that each step keeps, at most (1 + step) / (10 + step); 0: no average",
        low=0,
        below=1,
    )


@dataclass(frozen=True)
class Train:
    """How long to train."""

    steps: int = key(1000, "Training steps", unit="steps", low=1, high=STEPS, resume=True)
    seed: int = key(0, "Seed of the weights, the sampling plan and the random draws of a batch", low=0, high=SEEDS)
    log_every: int = key(
        1,
        "Training steps between two lines of metrics; 0: only at the last step",
        unit="steps",
        low=0,
        high=STEPS,
        resume=True,
    )
    rollbacks: int = key(
        3,
        "Times that a run goes back to a checkpoint from before a spike of the loss, until it is past it; 0: never",
        unit="times",
        low=0,
        high=1000,
        resume=True,
    )
    ema: Average = key(Average, "A moving average of the weights, in fp32, that policies are made from")
    compile: bool = key(False, "Compile the model with torch.compile", resume=True)


@dataclass(frozen=True)
class Checkpoints:
    """When checkpoints are saved. The last step is always saved."""

    every: int = key(
        1000, "Training steps between two checkpoints; 0: only at the end", unit="steps", low=0, high=STEPS, resume=True
    )
    minutes: float = key(
        10.0,
        "Minutes between two checkpoints, beside `every`: what comes first; 0: only `every`",
        unit="minutes",
        low=0,
        high=10**6,
        resume=True,
    )
    keep: int = key(3, "Newest checkpoints that are kept", unit="checkpoints", low=1, high=10**6, resume=True)
    asynchronous: bool = key(True, "Write checkpoints in the background while training goes on", resume=True)
    patience: float = key(
        30.0,
        "Minutes that training goes on while no checkpoint can be written, for example because the disk is full",
        unit="minutes",
        low=0,
        high=10**6,
        resume=True,
    )
    deadline: float = key(
        25.0,
        "Time from SIGTERM or Ctrl-C until the run must be saved; it is killed a little later",
        unit="seconds",
        above=0,
        high=86400,
        resume=True,
    )


@dataclass(frozen=True)
class Restart:
    """What happens when a process of the run is lost."""

    attempts: int = key(
        5,
        "How often the run is started again without a newer whole checkpoint; 0: never",
        unit="restarts",
        low=0,
        high=10**6,
        resume=True,
    )
    shrink: bool = key(
        False,
        "With a hostfile: if the same host fails twice without a newer checkpoint, go on without it, on a layout that fits and "
        "has the same batches",
        resume=True,
    )


@dataclass(frozen=True)
class Validation:
    """The loss and the errors of actions on held-out episodes."""

    every: int = key(
        0,
        "Training steps between two validations, if episodes are held out; 0: ten times a run; -1: only at the end",
        unit="steps",
        low=-1,
        high=STEPS,
        resume=True,
    )
    rows: int = key(
        0,
        "Held-out rows of one validation; 0: 64, but no more than 5 % of the rows that are trained between two",
        unit="rows",
        low=0,
        high=2**22,
        resume=True,
    )


@dataclass(frozen=True)
class Evaluation:
    """How well the policy acts in its environments."""

    every: int = key(
        0,
        "Training steps between two evaluations; 0: only at the end, if there are tasks",
        unit="steps",
        low=0,
        high=STEPS,
        resume=True,
    )
    tasks: list[str] = key(list, "Tasks to act in; empty: no evaluation", text="task names", resume=True)
    objectives: list[str] = key(
        list,
        "Objectives to act with, each in the tasks that it is learned from; empty: the first objective of each task",
        text="keys of `objectives`, or names of paradigms",
        resume=True,
    )
    target_return: dict[str, str] = key(
        dict,
        "By name of the task, or glob, the return to ask for; `*` stands for every task; otherwise "
        "`objectives.*.target_return` is asked for",
        target=True,
        resume=True,
    )
    target_returns: list[str] = key(
        list,
        "Further returns to ask for in turn, with as many episodes for each; the report draws the achieved returns over them",
        target=True,
        resume=True,
    )
    prompt: dict[str, str] = key(
        dict,
        "By name of the task, or glob, a demonstration that stands before each history; without an episode: the best one of "
        "the task",
        text="dataset, or dataset:episode",
        resume=True,
    )
    goal: dict[str, str] = key(
        dict,
        "By name of the task, or glob, the observation to reach, for objectives that act towards a goal",
        text="JSON, or dataset:episode (its last observation)",
        resume=True,
    )
    query: dict[str, str] = key(
        dict,
        "By name of the task, or glob, what objectives that fill in hidden parts are asked; otherwise their option `query`",
        text="bc, rc or goal",
        resume=True,
    )
    future: dict[str, str] = key(
        dict,
        "By name of the task, or glob, an episode whose histogram is to be matched, for objectives that show one (gdt)",
        text="dataset, or dataset:episode",
        resume=True,
    )
    modules: list[str] = key(
        list,
        "Python modules that environments named `module:EnvId` may import, beside those named in `tasks`",
        text="module names",
        resume=True,
    )
    episodes: int = key(20, "Episodes of each task", unit="episodes", low=1, high=10**7, resume=True)
    processes: int = key(0, "Processes that play; 0: as many as cores", unit="processes", low=0, high=4096, resume=True)
    seed: int = key(
        1_000_000, "First seed of the environments; demonstrations use seeds below it", low=0, high=SEEDS, resume=True
    )
    minutes: float = key(
        60.0,
        "Longest time of an evaluation, or of a publication, beside training; it is then ended",
        unit="minutes",
        above=0,
        high=1e6,
        resume=True,
    )
    devices: str = key(
        "",
        "GPUs for evaluations beside training; empty: none, because training needs them",
        text="GPU numbers, such as 6,7",
        resume=True,
    )
    sample: bool = key(
        False,
        "Draw actions instead of taking the most probable one; the policy that is made does so by default, too",
        resume=True,
    )
    videos: int = key(
        1, "Episodes of each task whose pictures go into the report", unit="episodes", low=0, high=10**7, resume=True
    )


@dataclass(frozen=True)
class Publish:
    """Where the policy goes."""

    to: str = key(
        "",
        "Where to publish; empty: only the folder `policy` of the run",
        text="folder, s3://bucket/path or hf://org/name",
        path=True,
        resume=True,
    )
    every: int = key(
        0, "Training steps between two publications; 0: only at the end", unit="steps", low=0, high=STEPS, resume=True
    )
    dtype: str = key(
        "bf16",
        "Type of the policy's weights; training keeps fp32 masters beside them",
        choices=("bf16", "fp32"),
        resume=True,
    )
    weights: str = key(
        "auto",
        "Weights of the policy: their moving average (`train.ema`), or those of the last step; auto: the average if there is one",
        choices=("auto", "ema", "raw"),
        resume=True,
    )
    keep: str = key(
        "last",
        "Publish every new policy, or only one that scores higher than the published one",
        choices=("last", "best"),
        resume=True,
    )
    rate: str = key(
        "0MiB",
        "Most bytes a second that are sent to a folder or a bucket; 0MiB: no limit",
        size=True,
        resume=True,
    )
    take_over: bool = key(
        False, "Publish to the place for the first time although another run publishes there", resume=True
    )
    grace: float = key(
        60.0,
        "How long a published step stays after a newer one does not need it, for those who still read it",
        unit="minutes",
        low=1,
        high=525600,
        resume=True,
    )
    private: bool = key(True, "Hubs: the repository is private; one that is public already is refused", resume=True)
    license: str = key("", "Licence of the policy; empty: none is stated", text="SPDX identifier", resume=True)


@dataclass(frozen=True)
class Track:
    """Experiment trackers that the lines of `metrics.jsonl` are sent to."""

    to: list[str] = key(
        list, "Trackers; each must be installed, and takes its key from its usual place", choices=TRACKERS, resume=True
    )
    project: str = key("", "Name of the project, in MLflow of the experiment; empty: `name`", text="name", resume=True)
    name: str = key("", "Name of the run; empty: the last part of `run.dir`", text="name", resume=True)


@dataclass(frozen=True)
class Run:
    """The run's folder."""

    dir: str = key(MISSING, "Where checkpoints, metrics, policy and report go", text="folder", path=True, resume=True)


@dataclass(frozen=True)
class Recipe:
    """A whole recipe."""

    name: str = key(MISSING, "Name of the run, for people", text="name", resume=True)
    data: Data = key(Data, "What is trained on, and how it is drawn and loaded")
    objectives: dict[str, Objective] = key(dict, "What is learned, by a name that entries of the mixture refer to")
    model: Model = key(Model, "The size of the model and its text tokenizer")
    parallel: Parallel = key(Parallel, "How the processes are divided")
    deepspeed: dict[str, Any] = key(dict, "DeepSpeed's own section, passed on as it is")
    train: Train = key(Train, "How long to train")
    checkpoint: Checkpoints = key(Checkpoints, "When checkpoints are saved")
    restart: Restart = key(Restart, "What happens when a process of the run is lost")
    validate: Validation = key(Validation, "The loss on held-out episodes")
    evaluate: Evaluation = key(Evaluation, "How well the policy acts in its environments")
    publish: Publish = key(Publish, "Where the policy goes")
    track: Track = key(Track, "Experiment trackers that metrics are sent to")
    run: Run = key(Run, "The run's folder")
