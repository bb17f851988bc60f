"""Section `model`: the size of the model, its experts, positions and start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tiphys.recipes.keys import key


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
    film: bool = key(
        True,
        "A small grid that is one token is embedded in view of the text before it (FiLM): it shows what an instruction names",
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
