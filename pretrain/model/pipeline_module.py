"""The pipeline under DeepSpeed: a PipelineModule with the stages of `pipeline.partition`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec

from tiphys.pretrain.model.pipeline import canonical_name, pipeline_layers

if TYPE_CHECKING:
    from tiphys.pretrain.model.config import DecisionConfig


class DecisionPipeline(PipelineModule):
    """One rank's stage of a decision model, with parameters that the caller fills.

    bounds    first layer of each stage, then the number of layers (from `pipeline.partition`)
    topology  DeepSpeed's topology of the launch (axes pipe, data); None: DeepSpeed makes it
    """

    def __init__(
        self,
        config: DecisionConfig,
        bounds: Sequence[int],
        *,
        topology: Any = None,
    ) -> None:
        self.config, self._bounds = config, list(bounds)
        super().__init__(
            layer_specs(config),
            num_stages=len(bounds) - 1,
            topology=topology,
            dynamic_shape=True,  # micro-batches differ in their number of tokens
        )

    def canonical_name(self, name: str) -> str:
        """Name in the plain model of a parameter or buffer of this stage."""
        return canonical_name(name, self.config)

    def _partition_layers(self, method: str = "uniform") -> None:
        stage = self._topo.get_coord(self.global_rank).pipe
        self.parts = self._bounds
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


def layer_specs(config: DecisionConfig) -> list[LayerSpec]:
    """The layers for DeepSpeed. With tied embeddings, the first and the last layer share their `weight` under the key `token`."""
    specs = [LayerSpec(kind, *arguments) for kind, arguments in pipeline_layers(config)]
    if config.tie_word_embeddings:
        for place in (0, -1):
            kind, arguments = pipeline_layers(config)[place]
            specs[place] = TiedLayerSpec("token", kind, *arguments, tied_weight_attr="weight")
    return specs
