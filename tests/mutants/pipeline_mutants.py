"""Mistakes that only a model in several pipeline stages shows, made in the dense model of vLLM's own layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import make_empty_intermediate_tensors_factory
from vllm.sequence import IntermediateTensors

from genmodel.reference_models import dense
from genmodel.reference_models.vllm_layers import VllmDense
from mutants.dense_mutants import MUTANTS, Mutant


def mutant(model_class: type[VllmDense]) -> type[VllmDense]:
    """Register a class that is right in one stage."""
    factory: Any = model_class
    MUTANTS.append(
        Mutant(
            model_class.__name__,
            factory,
            "deployment.pipeline",
            "vllm-ascend#3091, #12038",
            (1,),
            f"{dense.__name__}:factory",
        )
    )
    return model_class


class Sending(VllmDense):
    """Changes what a stage sends to the next."""

    def sent(self, tensors: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | IntermediateTensors:
        out = super().forward(*args, **kwargs)
        return IntermediateTensors(self.sent(out.tensors)) if isinstance(out, IntermediateTensors) else out


@mutant
class NormOnEveryStage(Sending):
    """The last norm is that of each stage, not of the model."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def sent(self, tensors: dict[str, Any]) -> dict[str, Any]:
        hidden, residual = self.norm(tensors["hidden_states"], tensors["residual"])
        return {"hidden_states": hidden, "residual": residual}


@mutant
class EmbeddingOnEveryStage(VllmDense):
    """The second stage begins with the embedding, as if it were the first."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        if intermediate_tensors is not None:
            intermediate_tensors["hidden_states"] = self.embed_tokens(input_ids)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)


@mutant
class LayersNumberedByStage(VllmDense):
    """Each stage loads the checkpoint's first layers."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        held = self.end_layer - self.start_layer

        def renamed(name: str) -> str:
            first, _, rest = name.partition("layers.")
            number, dot, rest = rest.partition(".")
            if first or not dot or not number.isdecimal():
                return name
            layer = int(number)
            return f"layers.{layer + self.start_layer if layer < held else -1}.{rest}"

        named = [(renamed(name), tensor) for name, tensor in weights]
        return super().load_weights((name, tensor) for name, tensor in named if "layers.-1." not in name)


@mutant
class ResidualForgotten(Sending):
    """Neither sent nor expected: the second stage begins with none."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        hidden_size = vllm_config.model_config.hf_config.hidden_size
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(["hidden_states"], hidden_size)

    def sent(self, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"hidden_states": tensors["hidden_states"]}

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        if intermediate_tensors is not None and not get_pp_group().is_first_rank:
            hidden = intermediate_tensors["hidden_states"]
            intermediate_tensors = IntermediateTensors({"hidden_states": hidden, "residual": hidden * 0})
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)


# Those below do not get as far as numbers: the engine fails, and the harness says what was sent.


class ResidualNone(Sending):
    def sent(self, tensors: dict[str, Any]) -> dict[str, Any]:
        return {**tensors, "residual": None}


class ResidualMissing(Sending):
    """vLLM computes with zeros in its place."""

    def sent(self, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"hidden_states": tensors["hidden_states"]}


class ResidualNarrow(Sending):
    def sent(self, tensors: dict[str, Any]) -> dict[str, Any]:
        return {**tensors, "residual": tensors["residual"][:, :1]}


class BareTensor(VllmDense):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor | IntermediateTensors:
        out = super().forward(*args, **kwargs)
        return out["hidden_states"] if isinstance(out, IntermediateTensors) else out
