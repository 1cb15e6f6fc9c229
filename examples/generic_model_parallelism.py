"""One model, four ways to make it tensor parallel, one checkpoint: side by side, and mixed in one model.

    python examples/generic_model_parallelism.py

Every model is built as plain PyTorch, trained for a step, and loaded by real vLLM engines, on one rank and on two. What
comes out is compared with one ordinary decoder in float64, and the gradients of two ranks with those of one. They all
run in the same two host processes, as they do in `pytest --genmodel=A --genmodel=B ...`.

`Mixed` below is a model whose layers are of different libraries. Needs `pytest-genmodel[cpu,megatron]`, or a GPU and
`[cuda,megatron]`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, cat, nn
from torch.distributed.tensor.parallel import parallelize_module

from genmodel import ParallelContext
from genmodel.modeling.loading import load_weights
from genmodel.reference_models import dense, dtensor
from genmodel.runners.checkpoint import TINY_CONFIG

THIS = Path(__file__).stem
CONFIG = {**TINY_CONFIG, "num_hidden_layers": 4}
MODELS = {
    "genmodel's layers": "genmodel.reference_models.dense:factory",
    "Megatron-core's layers": "genmodel.reference_models.megatron:factory",
    "torch's DTensor": "genmodel.reference_models.dtensor:factory",
    "vLLM's layers": "genmodel.reference_models.vllm_layers:VllmDense",
    "mixed: the first three": f"{THIS}:mixed",
    "mixed: all four": f"{THIS}:mixed_with_vllm",
}
CHECKS = ("weights.every_element", "logits.values", "gradients.parallel")


class Mixed(dense.Dense):
    """A decoder whose layers are of the libraries named; embedding and head are genmodel's."""

    def __init__(self, vllm_config: Any, context: ParallelContext, libraries: tuple[str, ...]) -> None:
        config = dense.Config.from_hf(vllm_config.model_config.hf_config)
        super().__init__(replace(config, num_hidden_layers=0), context)
        self.config, self.context, self.libraries = config, context, libraries
        for i, library in enumerate(libraries):
            self.layers.append(self.layer(library, f"layers.{i}", vllm_config))

    def layer(self, library: str, prefix: str, vllm_config: Any) -> nn.Module:
        """One layer, as its library makes it."""
        ranks = self.context.get_tensor_parallel_world_size()
        if library == "genmodel":
            return dense.Layer(self.config, self.context, prefix)
        if library == "megatron":
            from genmodel.reference_models import megatron

            return megatron.Layer(self.config, megatron.Megatron(self.context), prefix)
        if library == "vllm":
            from genmodel.reference_models import vllm_layers

            return vllm_layers.Layer(vllm_config, prefix)
        made = dtensor.Layer(self.config, ranks, prefix)
        if ranks > 1:
            of_layers = "layers.*."
            plan = {name.removeprefix(of_layers): how for name, how in dtensor.PLAN.items() if of_layers in name}
            parallelize_module(made, self.context.device_mesh, plan)
        return made

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,  # noqa: ARG002 - pipeline parallelism, which this model does not have
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Token ids and positions, int [tokens], to hidden states [tokens, hidden]."""
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        dim, theta = self.config.head_dim, self.config.rope_theta
        cos, sin = dense.rotary_table(positions, dim, theta, x.dtype)
        for library, layer in zip(self.libraries, self.layers, strict=True):
            if library == "genmodel":
                x = layer(x, cos, sin)
            elif library == "dtensor":
                x = layer(x, cat([cos, cos], -1), cat([sin, sin], -1))
            elif library == "megatron":
                from genmodel.reference_models.megatron import Rotary

                x = layer(x, Rotary(positions, dim, theta))
            else:  # vLLM's norms add to the residual stream themselves
                x, residual = layer(positions, x, None)
                x = x + residual
        return self.norm(x)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """One checkpoint for all; only DTensors want its fused projections apart."""

        def apart() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                _, number, *_ = (*name.split("."), "")
                of_dtensors = number.isdigit() and self.libraries[int(number)] == "dtensor"
                yield from dtensor.unfused(self.config, [(name, tensor)]) if of_dtensors else [(name, tensor)]

        return load_weights(self, apart(), self.context)


def mixed(vllm_config: Any, parallel_context: ParallelContext) -> Mixed:
    """Trains at any size: the backward of all three does the reductions."""
    return Mixed(vllm_config, parallel_context, ("genmodel", "megatron", "dtensor", "megatron"))


def mixed_with_vllm(vllm_config: Any, parallel_context: ParallelContext) -> Mixed:
    """For inference: vLLM's layers have no gradients, and let none through to the layers below."""
    return Mixed(vllm_config, parallel_context, ("genmodel", "megatron", "dtensor", "vllm"))


def row(name: str, spec: str, evidence: Any, verdicts: dict[str, Any]) -> tuple[str, bool]:
    """What was measured of one model, and whether it is what it should be."""
    trains = "vllm" not in spec
    held = [sum(codes.numel() for codes in evidence.weights[size][0].codes.values()) for size in (1, 2)]
    logits = [
        max(m.measured for m in verdicts["logits.values"].measurements if m.where == f"TP={size}") for size in (1, 2)
    ]
    slices = [m.measured for m in verdicts["gradients.parallel"].measurements if m.what.startswith("|gradient")]
    good = all(v.status == "passed" for check, v in verdicts.items() if trains or check != "gradients.parallel")
    cells = [f"{count:,}" for count in held] + [f"{error:.1e}" for error in logits]
    cells += [f"{max(slices):.0e}" if trains and slices else "no training", "yes" if good else "NO"]
    return f"{name:24}" + "".join(f"{cell:>14}" for cell in cells), good


def main() -> None:
    """Run all of them in one session and print the table; exits with 1 if one is not the same model."""
    from genmodel.conformance import catalogue
    from genmodel.runners.session import Session, TargetOptions

    checks = catalogue.select(ids=CHECKS)
    needed = frozenset({"inspection"}).union(*(check.needs for check in checks))
    options = {
        name: TargetOptions(spec=spec, config=f"{THIS}:CONFIG", reference=MODELS["genmodel's layers"])
        for name, spec in MODELS.items()
    }
    print(f"{'':24}{'elements held by a rank':>28}{'largest |logit difference|':>28}{'gradients':>14}{'same':>14}")
    columns = ("TP=1", "TP=2", "vLLM, TP=1", "vLLM, TP=2", "TP=2 - TP=1", "model")
    print(f"{'':24}" + "".join(f"{column:>14}" for column in columns))
    good = []
    with Session(options.values()) as session:
        for name, chosen in options.items():
            evidence = session.collect(chosen, needed)
            line, same = row(name, chosen.spec, evidence, {c.id: catalogue.judge(c, evidence) for c in checks})
            print(line, flush=True)
            good.append(same)
    largest = max(float(logits.abs().max()) for logits in evidence.reference.logits.values())
    rounding = max(float(noise.max()) for noise in evidence.reference.noise_max.values())
    print(
        f"\nThe largest logit is {largest:.1f}, and float32 alone moves the ordinary decoder's by up to {rounding:.1e}."
    )
    raise SystemExit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
