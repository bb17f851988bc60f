"""DecisionConfig: everything that determines the model's parameters and arithmetic, as a `transformers` config (JSON)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from tiphys.dataio.episode import DataError
from tiphys.dataio.stored import number
from tiphys.pretrain.model.rope import Rope, recipe_rope
from tiphys.pretrain.model.size_errors import size_errors
from tiphys.pretrain.tokens.vocabulary import EMBEDDER_KINDS

if TYPE_CHECKING:
    from tiphys.pretrain.tokens.vocabulary import Vocabulary


_WHOLE = {  # the smallest and the largest value of each size
    "vocab_size": (0, 1 << 26),
    "hidden_size": (1, 1 << 17),
    "num_hidden_layers": (1, 1 << 12),
    "num_attention_heads": (1, 1 << 12),
    "num_key_value_heads": (1, 1 << 12),
    "intermediate_size": (1, 1 << 20),
    "num_experts": (0, 1 << 14),
    "num_experts_per_tok": (1, 1 << 14),
    "moe_every": (1, 1 << 12),
    "moe_intermediate_size": (1, 1 << 20),
    "head_size": (0, 1 << 14),
    "first_dense": (0, 1 << 12),
    "timesteps": (0, 1 << 26),
    "locals": (1, 1 << 20),
}
_CHUNK = {"steps": 1 << 12, "entries": 1 << 20}  # the largest value of what a head of chunks has
_FLOW = {"width": 1 << 14, "depth": 64, "draws": 64, "euler": 1000}
_REAL: dict[str, tuple[float, float]] = {
    "balance": (0.0, 1e6),
    "z_loss": (0, 1e6),
    "bias_rate": (0, 1e6),
    "task_dropout": (0, 1),
    "theta": (1e-6, 1e12),
    "norm_epsilon": (0, 1),
    "dropout": (0, 1),
    "initializer_range": (1e-4, 1),
}
# Keys of `transformers` that a config may have beside ours. Others could choose code: kernels, quantisation, other classes
_OTHERS = frozenset(
    """architectures auto_map chunk_size_feed_forward dtype id2label is_encoder_decoder label2id model_type name_or_path
    _name_or_path _commit_hash output_attentions output_hidden_states problem_type return_dict tiphys torch_dtype
    transformers_version""".split()
)


def _check_more(values: dict[str, Any]) -> None:
    """Raises DataError if a config has a key that is neither ours nor harmless."""
    for key, value in values.items():
        chosen = key.removeprefix("_") in ("attn_implementation", "experts_implementation")
        if not (key in _OTHERS or (chosen and value in (None, "eager", "sdpa"))):
            raise DataError(
                f"config.json: the key {key!r} with {str(value)[:60]!r} is not one of a tiphys policy; remove it"
            )


class DecisionConfig(PretrainedConfig):
    """Shape and arithmetic of a decision model.

    Parameters
    ----------
    vocab_size : int
        Number of token ids.
    ranges : sequence of (name, low, high)
        Disjoint ranges of ids, `high` excluded. Softmax 0 normalises over the whole vocabulary, softmax i over ranges[i − 1].
    embedders : mapping
        Name -> {"kind": one of `EMBEDDER_KINDS`, "shape": [...], "values": n}: values that become a vector without an id.
        `shape` is that of one value; `values` is the number of symbols in a channel of a grid or tile. A grid with
        "film": true is embedded in view of the text before it.
    regressions : mapping
        Regression head -> number of dimensions.
    chunks : mapping
        Head that predicts chunks of actions -> {"loss": "l2" | "l1" | "flow", "steps": n, "entries": n}, and for `flow` also
        its width, depth, draws and Euler steps. With "insulate": n, bins of each number, the head does not train the hidden
        states, and a map to the bins does.
    pairs : bool
        Whether windows and texts get unit vectors that tell how well they fit each other.
    tasks : sequence of str
        Names of the tasks. `TokenBatch.task` is an index into them.
    hidden_size, num_hidden_layers, num_attention_heads : int
        Width of the hidden states, number of blocks, number of query heads.
    num_key_value_heads : int
        Key and value heads (Ainslie et al. 2023); 0: as many as query heads.
    intermediate_size : int
        Width inside a dense MLP; 0: 8/3 · hidden_size, rounded up to a multiple of 64.
    num_experts, num_experts_per_tok : int
        Experts of a sparse layer, and how many of them a token uses. 0 experts: every layer is dense.
    moe_every : int
        Of each `moe_every` layers, the last one is a mixture of experts.
    moe_intermediate_size : int
        Width inside an expert; 0: `intermediate_size`.
    shared_expert : bool
        Add one expert that every token uses.
    balance, z_loss : float
        Coefficients of the auxiliary losses of the router (Fedus et al. 2022; Zoph et al. 2022).
    bias_rate : float
        If > 0, a bias on the choice of experts replaces the balance loss; it moves by this much in each step (Wang et al. 2024).
    router_modality, router_task : bool
        Whether the router sees a token's modality, and its task.
    task_dropout : float
        Share of the rows in which training hides the task from the router, so that unseen tasks have a route.
    timesteps : int
        Size of the embedding of an episode's step number; 0: none.
    locals : int
        Size of the embedding of the position within a timestep (Reed et al. 2022, app. C.3).
    theta : float
        Base of the rotary frequencies (Su et al. 2021).
    rope : mapping
        How the frequencies are stretched, as `Rope.values` gives it; empty: not at all.
    head_size : int
        Size of a head's queries, keys and values; 0: hidden_size / num_attention_heads.
    qk_norm : bool
        RMSNorm of each head's queries and keys, before they are rotated.
    qkv_bias : bool
        Add a bias to queries, keys and values.
    first_dense : int
        The first layers that are dense whatever `moe_every` says.
    norm_epsilon : float
        Added to the mean square in RMSNorm.
    initializer_range : float
        Standard deviation of the weights that are drawn (Radford et al. 2019). Matrices that write to the residual stream
        divide it by √(2 · layers). Embedders of values and heads by flow matching draw theirs by their own widths, and the
        vectors of embedders begin as large as those of the token table.
    dropout : float
        Share of the elements that training drops after attention and MLP.
    checkpointing : bool
        Recompute the activations of a block in the backward pass instead of keeping them.
    tie_word_embeddings : bool
        Input table and output matrix are one parameter.

    Raises
    ------
    ValueError
        If head sizes, key-value heads, experts per token or the kind of an embedder are impossible. DataError, which is a
        ValueError, if a value has another type or is out of range, or if there is an unknown key.
    """

    model_type = "tiphys"

    def __init__(
        self,
        vocab_size: int = 0,
        ranges: Any = (),
        embedders: Any = None,
        regressions: Any = None,
        tasks: Any = (),
        hidden_size: int = 64,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 0,
        intermediate_size: int = 0,
        num_experts: int = 0,
        num_experts_per_tok: int = 2,
        moe_every: int = 2,
        moe_intermediate_size: int = 0,
        shared_expert: bool = False,
        balance: float = 0.01,
        z_loss: float = 0.001,
        bias_rate: float = 0.0,
        router_modality: bool = True,
        router_task: bool = False,
        task_dropout: float = 0.1,
        timesteps: int = 0,
        locals: int = 512,
        theta: float = 10000.0,
        norm_epsilon: float = 1e-6,
        dropout: float = 0.0,
        checkpointing: bool = False,
        tie_word_embeddings: bool = False,
        pairs: bool = False,
        chunks: Any = None,
        initializer_range: float = 0.02,
        rope: Any = None,
        head_size: int = 0,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        first_dense: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.ranges = [list(r) for r in ranges]
        self.embedders = {name: dict(e) for name, e in (embedders or {}).items()}
        self.regressions = dict(regressions or {})
        self.tasks = list(tasks)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.intermediate_size = intermediate_size or 64 * -(-8 * hidden_size // (3 * 64))
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_every = moe_every
        self.moe_intermediate_size = moe_intermediate_size or self.intermediate_size
        self.shared_expert = shared_expert
        self.balance = balance
        self.z_loss = z_loss
        self.bias_rate = bias_rate
        self.router_modality = router_modality
        self.router_task = router_task
        self.task_dropout = task_dropout
        self.timesteps = timesteps
        self.locals = locals
        self.theta = theta
        self.norm_epsilon = norm_epsilon
        self.initializer_range = initializer_range
        self.dropout = dropout
        self.checkpointing = checkpointing
        self.pairs = pairs
        self.chunks = {name: dict(head) for name, head in (chunks or {}).items()}
        self.rope = dict(rope or {})
        self.head_size = head_size
        self.qk_norm = qk_norm
        self.qkv_bias = qkv_bias
        self.first_dense = first_dense
        _check_more(kwargs)
        # Never from a file: it names the code that is loaded
        kwargs["auto_map"] = {"AutoConfig": "config.DecisionConfig", "AutoModel": "transformer.DecisionModel"}
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `transformers` does it. Raises DataError if the values, which come from a file, are not valid."""
        try:
            return super().from_dict(config_dict, **kwargs)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise DataError(f"config.json is not valid: {error}") from None

    def _check(self) -> None:
        self._check_numbers()
        errors = size_errors(
            layers=self.num_hidden_layers,
            hidden=self.hidden_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            experts=self.num_experts,
            experts_per_token=self.num_experts_per_tok,
            every=self.moe_every,
            head_size=self.head_size,
            first_dense=self.first_dense,
        )
        Rope.of(self.theta, self.rope)
        lines = [f"{key}: {reason}" for key, reason in errors]
        if lines:
            raise ValueError("\n".join(lines))
        self.head_size = self.head_size or self.hidden_size // self.num_attention_heads
        for name, e in self.embedders.items():
            if e.keys() - {"film"} != {"kind", "shape", "values"}:
                raise DataError(f"embedder {name!r} has the keys {', '.join(e)}, not kind, shape and values")
            if "film" in e and (e["film"] is not True or e["kind"] != "grid"):
                raise DataError(f"embedder {name!r}: film is {e['film']!r}; only a grid has it, and then it is true")
            for n in (*e["shape"], e["values"] + 1):
                number(n, f"embedder {name!r}", 1, 1 << 24)
            if e["kind"] not in EMBEDDER_KINDS:
                raise ValueError(
                    f"embedder {name!r}: kind {e['kind']!r} is not allowed; allowed: {', '.join(EMBEDDER_KINDS)}"
                )

    def _check_numbers(self) -> None:
        bounds: dict[str, tuple[float, float]] = {**_WHOLE, **_REAL}
        for name in _WHOLE:
            if not isinstance(getattr(self, name), int):
                raise DataError(f"config: {name} is {getattr(self, name)!r}, not a whole number")
        for name, (least, most) in bounds.items():
            number(getattr(self, name), f"config: {name}", least, most)
        for name in (
            "shared_expert",
            "router_modality",
            "router_task",
            "checkpointing",
            "tie_word_embeddings",
            "pairs",
            "qk_norm",
            "qkv_bias",
        ):
            if not isinstance(getattr(self, name), bool):
                raise DataError(f"config: {name} is {getattr(self, name)!r}, neither true nor false")
        if not all(isinstance(task, str) for task in self.tasks):
            raise DataError("config: tasks is not a list of names")
        for name, n in self.regressions.items():
            number(n, f"config: regression {name!r}", 1, 1 << 24)
        for name, head in self.chunks.items():
            known = _CHUNK | (_FLOW if head.get("loss") == "flow" else {})
            known |= {"insulate": 1 << 16} if "insulate" in head else {}
            if head.get("loss") not in ("l2", "l1", "flow") or head.keys() != {"loss", *known}:
                raise DataError(
                    f"config: the head {name!r} of chunks has loss {head.get('loss')!r} and keys {', '.join(head)}"
                )
            for key, most in known.items():
                number(head[key], f"config: chunks {name!r}, {key}", 1, most)
        for one in self.ranges:
            if len(one) != 3:
                raise DataError(f"config: range {one!r} is not a name, a lowest and a highest id")
            number(
                one[2], f"config: range {one[0]!r}", number(one[1], f"config: range {one[0]!r}", 0, 1 << 26), 1 << 26
            )

    @property
    def residual_std(self) -> float:
        """Standard deviation of drawn matrices that write to the residual stream."""
        return self.initializer_range / (2 * self.num_hidden_layers) ** 0.5

    def has_experts(self, layer: int) -> bool:
        """Whether the layer of this number is a mixture of experts."""
        return bool(self.num_experts) and layer >= self.first_dense and (layer + 1) % self.moe_every == 0

    @classmethod
    def from_recipe(cls, model: Any, vocabulary: Vocabulary) -> DecisionConfig:
        """From the recipe's `model:` section (`tiphys.recipes.sections.model.Model`) and the vocabulary of the objectives."""
        moe, rope = model.moe, recipe_rope(model)
        return cls(
            vocab_size=vocabulary.size,
            ranges=vocabulary.ranges,
            embedders={
                name: {"kind": e.kind, "shape": list(e.shape), "values": e.values}
                | ({"film": True} if model.film and e.kind == "grid" else {})
                for name, e in vocabulary.embedders.items()
            },
            regressions=vocabulary.regressions,
            tasks=vocabulary.tasks,
            hidden_size=model.hidden,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            intermediate_size=model.ffn,
            num_experts=moe.experts,
            num_experts_per_tok=moe.experts_per_token,
            moe_every=moe.every,
            moe_intermediate_size=moe.hidden,
            shared_expert=moe.shared,
            balance=moe.balance,
            z_loss=moe.z_loss,
            bias_rate=moe.bias_rate,
            router_modality=moe.modality,
            router_task=moe.task,
            task_dropout=moe.task_dropout if moe.task else 0.0,
            timesteps=model.timesteps,
            initializer_range=model.init_std or model.hidden**-0.5,
            theta=rope.theta,
            rope=rope.values(),
            norm_epsilon=model.norm_epsilon,
            head_size=model.head_size,
            qk_norm=model.qk_norm,
            qkv_bias=model.qkv_bias,
            first_dense=moe.first_dense,
            dropout=model.dropout,
            checkpointing=model.checkpointing,
            tie_word_embeddings=model.tie,
            pairs=vocabulary.pairs,
            chunks=vocabulary.chunks,
        )
