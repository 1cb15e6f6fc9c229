"""What vLLM's layers of routed experts compute, by plain PyTorch: all of it, or a refusal in one line."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.modeling import _vllm
from genmodel.runners import checkpoint, hugging_face, native_experts, standalone
from genmodel.runners.evidence import Inspection
from genmodel.runners.session import Session, TargetOptions, UnusableTarget

TOKENS = torch.arange(60) * 5 % 331
WITHOUT_ENGINES: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": {},
    "GptOssForCausalLM": {},  # biases, and an activation of its own
    "Glm4MoeForCausalLM": {},  # groups, a shared expert, and scores that are corrected
    "Llama4ForCausalLM": {"attn_temperature_tuning": False},  # weighted before; vLLM's temperature is another
}
"""By architecture: settings on top of the tiny configuration's."""


def config_of(name: str) -> dict[str, Any]:
    return {**hugging_face.tiny_config(getattr(transformers, name)), **WITHOUT_ENGINES.get(name, {})}


def mixtral() -> dict[str, Any]:
    return config_of("MixtralForCausalLM")


def gpt_oss() -> dict[str, Any]:
    return config_of("GptOssForCausalLM")


def llama4() -> dict[str, Any]:
    return config_of("Llama4ForCausalLM")


def jamba() -> dict[str, Any]:
    return config_of("JambaForCausalLM")


def deepseek_v2() -> dict[str, Any]:
    return config_of("DeepseekV2ForCausalLM")


@pytest.mark.parametrize("name", WITHOUT_ENGINES)
def test_experts_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """From the same published checkpoint, in float64; vLLM's rotary tables and routers' weights are float32."""
    reference = getattr(transformers, name)
    checkpoint.write_config(tmp_path, config_of(name), name, "float32")
    weights = hugging_face.adversarial_checkpoint(reference, tmp_path, seed=0)
    theirs = hugging_face.build(reference, tmp_path, torch.float64)
    theirs.load_weights(weights.items())
    config = _vllm.model_config(str(tmp_path), "float32")
    with (
        torch.no_grad(),
        standalone.build(_vllm.architecture(name), config, torch.float64) as built,
    ):
        standalone.load(built, weights)
        ours = built.logits(TOKENS)
        expected = theirs.compute_logits(theirs(input_ids=TOKENS, positions=torch.arange(60)))
    torch.testing.assert_close(ours, expected, atol=5e-5, rtol=0)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "quantised": (
        {"routed_experts.quant_method": SimpleNamespace()},
        "its experts are quantised (SimpleNamespace)",
    ),
    "router": ({"router": SimpleNamespace()}, "its router is a SimpleNamespace of its own scores"),
    "scores": ({"router.scoring_func": "sqrtsoftplus"}, "its router is a CPURouter of sqrtsoftplus scores"),
    "activation": (
        {"routed_experts.activation": SimpleNamespace(value="situ")},
        "its experts have the activation situ",
    ),
    "clamped": ({"routed_experts.swiglu_limit": 7.0}, "its experts have swiglu_limit"),
    "padded": ({"routed_experts.moe_config.hidden_dim_unpadded": 120}, "its experts' weights are padded"),
    "elsewhere": ({"routed_experts._expert_map": torch.zeros(8)}, "its experts are not all on this rank"),
    "another": ({"router": None}, "a MoERunner is not the layer of experts that is known"),
}
"""By kind: what is changed of a right layer, and what must be said of it."""


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_known_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """And gives zeros, so that the rest of the model can be inspected."""
    changes, said = REFUSED[kind]
    name = "MixtralForCausalLM"
    checkpoint.write_config(tmp_path, mixtral(), name, "float32")
    evaluate = native_experts.evaluate

    def changed(model: Any) -> list[str]:
        layer = model.model.layers[1].block_sparse_moe.experts
        for path, value in changes.items():
            *parents, attribute = path.split(".")
            holder = layer
            for parent in parents:
                holder = getattr(holder, parent)
            object.__setattr__(holder, attribute, value)
            getattr(holder, "_modules", {}).pop(attribute, None)
        return evaluate(model)

    monkeypatch.setattr(native_experts, "evaluate", changed)
    config = _vllm.model_config(str(tmp_path), "float32")
    with standalone.build(_vllm.architecture(name), config, torch.float32) as built:
        assert built.refused == (f"model.layers.1.block_sparse_moe.experts: {said}",)
        experts: Any = built.model.get_submodule("model.layers.1.block_sparse_moe.experts")
        assert not experts(hidden_states=torch.ones(3, 128), router_logits=torch.ones(3, 8)).any()


# --- in hosts and engines ------------------------------------------------------------------------------------------

NOT_A_REFERENCE = "a reference cannot be made of this model, part of which plain PyTorch does not know: "
NO_WEIGHTS = "weights cannot be made for model.layers."


def named_as_a_class(module: str, name: str, config: str, weights: Path | None = None) -> TargetOptions:
    """As an author names a class of vLLM's, for which no other reference is known."""
    return TargetOptions(
        spec=f"vllm.model_executor.models.{module}:{name}",
        config=f"test_native_experts:{config}",
        weights=weights,
        tensor_parallel_sizes=(1,),
    )


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session([TargetOptions(spec="any", tensor_parallel_sizes=(1,))]) as running:
        yield running


@pytest.mark.parametrize(
    ("module", "name", "config", "said"),
    [
        ("mixtral", "MixtralForCausalLM", "mixtral", NO_WEIGHTS),
        ("gpt_oss", "GptOssForCausalLM", "gpt_oss", NO_WEIGHTS),
        ("llama4", "Llama4ForCausalLM", "llama4", NO_WEIGHTS),
        ("jamba", "JambaForCausalLM", "jamba", NOT_A_REFERENCE),
        ("deepseek_v2", "DeepseekV2ForCausalLM", "deepseek_v2", NOT_A_REFERENCE),
    ],
)
def test_without_another_reference_it_says_what_to_name(
    session: Session, module: str, name: str, config: str, said: str
) -> None:
    """Before any engine starts, in one line."""
    with pytest.raises(UnusableTarget) as raised:
        session.collect(named_as_a_class(module, name, config), {"inspection"})
    message = str(raised.value)
    assert message.startswith(said)
    assert "--genmodel-reference=" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("module", "name", "config"),
    [("mixtral", "MixtralForCausalLM", "mixtral"), ("gpt_oss", "GptOssForCausalLM", "gpt_oss")],
)
def test_with_a_published_checkpoint_it_is_its_own_reference(
    session: Session, tmp_path: Path, module: str, name: str, config: str
) -> None:
    """The engine's kernels agree with its layers in plain PyTorch, and the model's methods work outside an engine."""
    with tempfile.TemporaryDirectory() as made:
        checkpoint.write_config(Path(made), config_of(name), name, "float32")
        weights = hugging_face.adversarial_checkpoint(getattr(transformers, name), Path(made), seed=0)
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, tmp_path / "model.safetensors")
    evidence = session.collect(named_as_a_class(module, name, config, tmp_path), {"inspection", "reference", "plain"})
    assert isinstance(evidence.inspection, Inspection)
    for check in ("interface.forward", "interface.compute_logits", "logits.values"):
        verdict = catalogue.judge(catalogue.get(check), evidence)
        assert verdict.status is Status.PASSED, verdict
