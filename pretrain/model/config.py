"""`DecisionConfig`: everything that fixes the model's parameters and arithmetic, as a `transformers` config (JSON)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from tiphys.pretrain.model.size_errors import size_errors

if TYPE_CHECKING:
    from tiphys.pretrain.tokens.vocabulary import Vocabulary


class DecisionConfig(PretrainedConfig):
    """Sizes of a decision model. Raises ValueError, with all reasons, if they are impossible.

    vocab_size            ids of the vocabulary
    ranges                [name, low, high] of each range of ids, disjoint; softmax i normalises over ranges[i − 1]
    embedders             name -> {"kind": patch | vector | grid, "shape": […], "values": n}
    regressions           regression head -> its number of dimensions
    tasks                 names of the tasks; `TokenBatch.task` is an index into them
    moe_every             every n-th layer, the last one of each n, is a mixture of experts
    num_experts           0: every layer is dense
    balance, z_loss       coefficients of the two auxiliary losses; `bias_rate` > 0: a bias instead of the balance loss
    router_modality       whether the router sees the modality of a token
    router_task           whether the router sees the task of a token
    task_dropout          share of rows whose task is hidden from the router in training, so that unseen tasks have a route
    timesteps             size of the embedding of a step's number in its episode; 0: none
    locals                size of the embedding of the position within a timestep (Reed et al. 2022, app. C.3)
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
        self.dropout = dropout
        self.checkpointing = checkpointing
        kwargs.setdefault("auto_map", {"AutoConfig": "config.DecisionConfig", "AutoModel": "transformer.DecisionModel"})
        self.tie_word_embeddings = tie_word_embeddings
        super().__init__(**kwargs)
        self._check()

    def _check(self) -> None:
        errors = size_errors(
            layers=self.num_hidden_layers,
            hidden=self.hidden_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            experts=self.num_experts,
            experts_per_token=self.num_experts_per_tok,
            every=self.moe_every,
        )
        lines = [f"{key}: {reason}" for key, reason in errors]
        if lines:
            raise ValueError("\n".join(lines))
        for name, e in self.embedders.items():
            if e["kind"] not in ("patch", "vector", "grid"):
                raise ValueError(f"embedder {name!r}: kind {e['kind']!r} is not allowed; allowed: patch, vector, grid")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def has_experts(self, layer: int) -> bool:
        """Whether the layer of this number is a mixture of experts."""
        return bool(self.num_experts) and layer % self.moe_every == self.moe_every - 1

    @classmethod
    def from_recipe(cls, model: Any, vocabulary: Vocabulary) -> DecisionConfig:
        """From the recipe's `model:` section (`tiphys.recipes.schema.Model`) and the vocabulary of the objectives."""
        moe = model.moe
        return cls(
            vocab_size=vocabulary.size,
            ranges=vocabulary.ranges,
            embedders={
                name: {"kind": e.kind, "shape": list(e.shape), "values": e.values}
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
            theta=model.rope_theta,
            dropout=model.dropout,
            checkpointing=model.checkpointing,
            tie_word_embeddings=model.tie,
        )
