"""DecisionModel: one list of layers as a `transformers` model. `pipeline.py` divides the same list into stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from tiphys.dataio.episode import DataError
from tiphys.pretrain.model.attention import Attention
from tiphys.pretrain.model.config import DecisionConfig
from tiphys.pretrain.model.embedding import Embedding, TokenTable
from tiphys.pretrain.model.heads import Head, Output
from tiphys.pretrain.model.inputs import scalars
from tiphys.pretrain.model.layers import Mlp, Module, Norm, Source, initialise
from tiphys.pretrain.model.moe import MixtureOfExperts
from tiphys.pretrain.model.token_layout import TokenLayout

if TYPE_CHECKING:
    from tiphys.pretrain.acting.policy import Policy
    from tiphys.pretrain.model.key_value_cache import Extension


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). The mlp is dense or a mixture of experts."""

    def __init__(self, config: DecisionConfig, number: int) -> None:
        super().__init__()
        self.number, self.dropout = number, config.dropout
        self.norm1 = Norm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config, number)
        self.norm2 = Norm(config.hidden_size, config.norm_epsilon)
        self.sparse = config.has_experts(number)
        self.mlp: nn.Module = MixtureOfExperts(config, number) if self.sparse else Mlp(config, config.intermediate_size)

    def forward(self, x: Tensor, layout: TokenLayout, cache: Extension | None = None) -> Tensor:
        """x [T, D] -> [T, D]."""
        x = x + self._drop(self.attention(self.norm1(x), layout, cache))
        y = self.norm2(x)
        return x + self._drop(self.mlp(y, layout) if self.sparse else self.mlp(y))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def build_layers(config: DecisionConfig) -> list[tuple[str, type[Module], tuple[Any, ...]]]:
    """The layers in order, as (name, class, arguments). The plain model and the pipeline stages are built from this list."""
    layers: list[tuple[str, type[Module], tuple[Any, ...]]] = [
        ("token", TokenTable, (config,)),
        ("embedding", Embedding, (config,)),
    ]
    layers += [(f"layers.{i}", Block, (config, i)) for i in range(config.num_hidden_layers)]
    return [*layers, ("head", Head, (config,)), ("output", Output, (config,))]


class DecisionOutput(NamedTuple):
    """Result of a forward pass. It is a tuple so that ZeRO-3's hooks find the tensors in it.

    loss          scalar: Σ weight · loss over the targets ÷ normaliser, without auxiliary terms
    auxiliary     float32 [2]: balance loss and z-loss; they are already part of the gradient, but not of `loss`
    loss_by_task  float32 [tasks, SUMS]: see `heads.add_by_task`
    hidden        [T, D] after the last norm, in compact order (`inputs.unpack` restores rows and positions)
    """

    loss: Tensor
    auxiliary: Tensor
    loss_by_task: Tensor
    hidden: Tensor


class DecisionModel(PreTrainedModel):
    """A decision Transformer over packed windows of many tasks and modalities (Chen et al. 2021; Reed et al. 2022).

    Parameters
    ----------
    config : DecisionConfig
        Shape and arithmetic.
    seed : int
        Each parameter is drawn from this seed and its own name (`layers.initialise`).
    source : Source, optional
        Values that parameters begin with instead; what it lacks is drawn. It is kept as `source`, for parts of this model that
        are made later.
    drawn : bool
        False: the parameters keep whatever is in their memory, and the caller fills them.
    """

    config_class = DecisionConfig
    base_model_prefix = ""
    main_input_name = "tokens"
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"output.weight": "token.weight"}

    def __init__(
        self, config: DecisionConfig, seed: int = 0, source: Source | None = None, *, drawn: bool = True
    ) -> None:
        super().__init__(config)
        self.source = source
        made: dict[str, Any] = {name: kind(*arguments) for name, kind, arguments in build_layers(config)}
        self.token: TokenTable = made["token"]
        self.embedding: Embedding = made["embedding"]
        self.layers = nn.ModuleList(made[f"layers.{i}"] for i in range(config.num_hidden_layers))
        self.head: Head = made["head"]
        self.output: Output = made["output"]
        self.post_init()
        if config.tie_word_embeddings:
            self.output.weight = self.token.weight
        if drawn:
            initialise(self, seed, source=source)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model from a folder or a hub. Weights are only read from safetensors: other formats can run code.

        Raises DataError if the config is not valid, or if the weights are not those of its model.
        """
        report = kwargs.pop("output_loading_info", False)
        options = {**kwargs, "use_safetensors": True, "output_loading_info": True}
        try:
            loaded: Any = super().from_pretrained(*args, **options)
        except (OSError, ImportError, DataError):
            raise
        except Exception as error:  # the libraries below raise errors of many classes
            raise DataError(f"{args[0] if args else 'model'}: the policy cannot be loaded: {error}") from error
        model, found = loaded
        lost = sorted(map(str, found["missing_keys"])) + sorted(map(str, found["mismatched_keys"]))
        if lost:
            raise DataError(
                f"{args[0]}: the weights do not fit config.json: {', '.join(lost[:5])} missing or of another shape"
            )
        return loaded if report else model

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: `initialise` draws all parameters."""

    def get_input_embeddings(self) -> nn.Module:
        return self.token

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def forward(
        self,
        batch: Mapping[str, Tensor],
        normaliser: Tensor | float = 1.0,
        tokens_global: Tensor | float = 1.0,
        auxiliary_scale: Tensor | float = 1.0,
        cache: Extension | None = None,
    ) -> DecisionOutput:
        """Forward pass over T tokens, and their loss.

        Parameters
        ----------
        batch : mapping of str to Tensor
            From `inputs.to_tensors`.
        normaliser : float
            Divisor of the loss: the number of targets of the *global* batch.
        tokens_global : float
            Divisor of the auxiliary losses: the number of real tokens of the global batch.
        auxiliary_scale : float
            Factor by which the loss is multiplied before its backward pass. The auxiliary gradients, which do not pass
            through the loss, are multiplied by the same factor.
        cache : Extension, optional
            From `KeyValueCache.extend`, for acting: the batch holds only the new tokens of the cache's rows.

        Returns
        -------
        DecisionOutput

        Raises
        ------
        ValueError
            If there is a cache and the batch's windows are not those that it was extended by.
        """
        numbers = scalars(normaliser, tokens_global, auxiliary_scale, batch["attributes"].device)
        layout = TokenLayout(batch["windows"], batch["attributes"], numbers)
        earlier = self.token(batch["texts/earlier"]) if len(batch.get("texts/earlier", ())) else None
        x = self.embedding(self.token(batch["tokens"]), batch, earlier)
        recompute = self.config.checkpointing and self.training and torch.is_grad_enabled() and cache is None
        for layer in self.layers:
            x = checkpoint(layer, x, layout, use_reentrant=False) if recompute else layer(x, layout, cache)
        hidden, loss, sums = self.head(x, batch, layout)
        loss, sums = self.output(hidden, loss, sums, batch, layout)
        auxiliary = sum(layout.auxiliary.values(), torch.zeros(2, device=layout.device))
        return DecisionOutput(loss, auxiliary, sums, hidden)

    def logits(self, hidden: Tensor, softmax: int = 0) -> Tensor:
        """Normed hidden states [n, D] -> float32 [n, ids of that softmax]. Column c is the id c + low of the softmax's range."""
        low, high = self.output.bounds[softmax]
        return F.linear(hidden, self.output.weight[low:high]).float()

    def regress(self, hidden: Tensor, name: str) -> Tensor:
        """Normed hidden states [n, D] -> float32 [n, d], the prediction of one regression head."""
        return self.head.predict(hidden, name)

    def draw_chunk(self, hidden: Tensor, name: str, noise: Tensor | None = None) -> Tensor:
        """Normed hidden states [n, D] -> chunks of actions, float32 [n, steps · entries], of one head; `flow` draws."""
        return self.head.chunk_head(name).predict(hidden, noise)

    def policy(self, task: str = "", environments: int = 1, **options: Any) -> Policy:
        """A policy that acts in a task, or continues texts (`say`).

        Parameters
        ----------
        task : str
            Name of the task; "": `reset` says it later, and `say` needs none.
        environments : int
            Number of environments that are played at the same time.
        **options
            Those of `Policy.of`.

        Returns
        -------
        Policy
            At the beginning of an episode. The model must come from `from_pretrained`, out of a policy's folder or a hub.
        """
        from tiphys.pretrain.acting.policy import Policy

        policy = Policy.of(self, **options)
        if task:
            policy.reset(task, environments)
        return policy
