"""vLLM's own architectures by name, transformers' classes as references, and the names that go between two models."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.runners import hugging_face, naming
from genmodel.runners.checkpoint import TINY_CONFIG, write_config
from genmodel.runners.evidence import ModuleRecord, Point
from genmodel.runners.protocol import Unusable
from genmodel.runners.session import Session, TargetOptions, UnusableTarget

DENSE = "genmodel.reference_models.dense:factory"
LLAMA = "transformers:LlamaForCausalLM"
DENSE_AS_LLAMA = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "layers.*.attn_norm.weight": "model.layers.*.input_layernorm.weight",
    "layers.*.attn.qkv.weight": [f"model.layers.*.self_attn.{name}_proj.weight" for name in "qkv"],
    "layers.*.attn.o_proj.weight": "model.layers.*.self_attn.o_proj.weight",
    "layers.*.mlp_norm.weight": "model.layers.*.post_attention_layernorm.weight",
    "layers.*.mlp.gate_up.weight": ["model.layers.*.mlp.gate_proj.weight", "model.layers.*.mlp.up_proj.weight"],
    "layers.*.mlp.down.weight": "model.layers.*.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
}
"""The head has the same name on both sides."""
MISNAMED = DENSE_AS_LLAMA | {
    "layers.*.attn.qkv.weight": [f"model.layers.*.self_attn.{name}_proj.weight" for name in "qvk"]
}
"""Keys and values the wrong way round, which no shape tells."""

# --- name maps -----------------------------------------------------------------------------------------------------

OWN = {"blocks.0.qkv": (8, 4), "blocks.1.qkv": (8, 4), "blocks.0.n": (4,), "blocks.1.n": (4,), "head": (5, 4)}
THEIRS = {
    **{f"layers.{i}.attn.{name}": (rows, 4) for i in range(2) for name, rows in {"q": 4, "k": 2, "v": 2}.items()},
    **{f"layers.{i}.norm": (4,) for i in range(2)},
    "head": (5, 4),
}
ENTRIES = {
    "blocks.*.qkv": ("layers.*.attn.q", "layers.*.attn.k", "layers.*.attn.v"),
    "blocks.*.n": ("layers.*.norm",),
}


def test_a_name_map_goes_both_ways() -> None:
    """Fused parameters are joined in the order given, and taken apart again; equal names need no entry."""
    translation = naming.translate(ENTRIES, OWN, THEIRS)
    theirs = {name: torch.randn(shape) for name, shape in THEIRS.items()}
    own = naming.to_own(translation, theirs)
    assert {name: tuple(tensor.shape) for name, tensor in own.items()} == OWN
    assert torch.equal(own["blocks.1.qkv"][4:6], theirs["layers.1.attn.k"])
    back = naming.to_theirs(translation, THEIRS, own)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("entries", "messages"),
    [
        (
            {"blocks.*.qkv": ENTRIES["blocks.*.qkv"]},
            [
                "2 of the model's parameters are not in the reference: blocks.0.n (closest: layers.0.norm), blocks.1.n",
                "2 of the reference's parameters have no counterpart: layers.0.norm (closest: blocks.0.n)",
            ],
        ),
        (ENTRIES | {"block.*.mlp": ("layers.*.mlp",)}, ["1 entries match none of the model's parameters: block.*.mlp"]),
        (
            ENTRIES | {"blocks.*.qkv": ("layers.*.attn.q", "layers.*.attn.k", "layers.*.attn.k")},
            ["2 of the reference's are used more than once: layers.0.attn.k", "have no counterpart: layers.0.attn.v"],
        ),
        (
            ENTRIES | {"blocks.*.n": ("layers.*.attn.v",), "blocks.*.qkv": ("layers.*.attn.q", "layers.*.attn.k")},
            ["blocks.0.qkv is [8, 4] and layers.0.attn.q + layers.0.attn.k [4, 4] + [2, 4]", "blocks.0.n is [4] and"],
        ),
    ],
    ids=["left over", "no such parameter", "twice", "shapes"],
)
def test_a_name_map_that_does_not_fit(entries: naming.Entries, messages: list[str]) -> None:
    """What is left over on either side is listed, with the closest names, in one line."""
    with pytest.raises(naming.Unmapped) as caught:
        naming.translate(entries, OWN, THEIRS)
    said = str(caught.value)
    assert all(message in said for message in messages), said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not TOML"),
        ("a.b = 'c'", "'a' must be the reference's name or a list of names (quote names that have dots)"),
        ("'a' = []", "'a' must be the reference's name or a list"),
        ("'a.*' = 'b'", "'a.*' and 'b' must have equally many *"),
        (None, "No such file"),
    ],
)
def test_a_name_map_that_cannot_be_read(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "names.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(naming.Unmapped) as caught:
        naming.load(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


# --- tiny configurations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LlamaForCausalLM", {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}),
        ("GPT2LMHeadModel", {"n_layer": 3, "n_embd": 128, "n_positions": 256}),
        ("MixtralForCausalLM", {"num_local_experts": 8, "num_experts_per_tok": 2}),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": 8.0, "sliding_window": 48}),
        ("GraniteForCausalLM", {"residual_multiplier": 0.75}),
        ("FalconForCausalLM", {"num_attention_heads": 4}),
        ("Gemma3ForCausalLM", {"num_hidden_layers": 6, "head_dim": 32}),
    ],
)
def test_a_tiny_configuration(name: str, expected: dict[str, Any]) -> None:
    """Small, awkward where that shows mistakes, and divisible by two ranks."""
    found = hugging_face.tiny_config(hugging_face.resolve(f"transformers:{name}", None, None))
    assert {key: found[key] for key in expected} == expected
    assert found["vocab_size"] == 331
    assert transformers.CONFIG_MAPPING[found["model_type"]](**found).vocab_size == 331
    assert all(0 <= found[key] < 331 for key in found if key.endswith("_token_id") and found[key] is not None)


def test_a_tiny_configuration_has_every_kind_of_layer() -> None:
    """Gemma 3 attends to everything in each sixth layer only."""
    found = hugging_face.tiny_config(transformers.Gemma3ForCausalLM)
    assert set(found["layer_types"]) == {"sliding_attention", "full_attention"}


class Unconfigured(transformers.PreTrainedModel):  # type: ignore[misc]
    """A class of transformers' kind without a configuration class."""

    config_class = None


class Refusing(transformers.PretrainedConfig):  # type: ignore[misc]
    """A configuration class that does not like what is small."""

    model_type = "refusing"

    def __init__(self, hidden_size: int = 4096, **others: Any) -> None:
        if hidden_size < 1024:
            raise ValueError(f"hidden_size {hidden_size} is too small")
        self.hidden_size = hidden_size
        super().__init__(**others)


class Refused(transformers.PreTrainedModel):  # type: ignore[misc]
    """A class with that one."""

    config_class = Refusing


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (Unconfigured, "--genmodel-config=tiny: Unconfigured names no config_class to make a small configuration from"),
        (Refused, "Refusing refuses a small configuration (ValueError: hidden_size 128 is too small); give one with"),
    ],
)
def test_no_tiny_configuration(model_class: Any, message: str) -> None:
    with pytest.raises(Unusable) as caught:
        hugging_face.tiny_config(model_class)
    assert message in str(caught.value)


def test_a_configuration_that_the_class_refuses(tmp_path: Path) -> None:
    """The class's reason, in one line."""
    write_config(tmp_path, TINY_CONFIG | {"hidden_size": 100}, "Any", "float32")
    with pytest.raises(Unusable, match="--genmodel-config: Refusing refuses it: ValueError: hidden_size 100 is too"):
        hugging_face.load_config(Refused, tmp_path)


# --- transformers' classes as references ---------------------------------------------------------------------------


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    write_config(tmp_path, hugging_face.tiny_config(transformers.MixtralForCausalLM), "MixtralForCausalLM", "float32")
    return tmp_path


def test_a_checkpoint_has_the_published_names(mixtral: Path) -> None:
    """Experts are saved one by one, as on the Hub, and loading them gives the logits of transformers' own loading."""
    weights = hugging_face.adversarial_checkpoint(transformers.MixtralForCausalLM, mixtral, seed=3)
    assert "model.layers.2.block_sparse_moe.experts.7.w1.weight" in weights
    assert not (weights["model.norm.weight"] == 1).any()
    again = hugging_face.adversarial_checkpoint(transformers.MixtralForCausalLM, mixtral, seed=3)
    assert all(torch.equal(again[name], weights[name]) for name in weights)

    tokens = torch.arange(60) * 5 % 331
    ours = hugging_face.build(transformers.MixtralForCausalLM, mixtral, torch.float32)
    ours.load_weights(weights.items())
    config = transformers.MixtralConfig.from_pretrained(mixtral)
    theirs = transformers.MixtralForCausalLM.from_pretrained(
        None, config=config, state_dict=weights, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        hidden = ours(input_ids=tokens, positions=torch.arange(60))
        logits = ours.compute_logits(hidden)
        expected = theirs.eval()(input_ids=tokens[None]).logits[0]
    assert hidden.shape == (60, 128)
    torch.testing.assert_close(logits, expected)
    assert logits.std() > 1
    with pytest.raises(ValueError, match="only of what its forward returned last"):
        ours.compute_logits(hidden.clone())


def test_experts_matter(mixtral: Path) -> None:
    """Experts that lie side by side in one tensor are as large as any other matrix: without them the logits move."""
    weights = hugging_face.adversarial_checkpoint(transformers.MixtralForCausalLM, mixtral, seed=0)
    without = {name: torch.zeros_like(t) if ".w2." in name else t for name, t in weights.items()}
    logits = []
    for loaded in (weights, without):
        model = hugging_face.build(transformers.MixtralForCausalLM, mixtral, torch.float32)
        model.load_weights(loaded.items())
        with torch.no_grad():
            logits.append(model.compute_logits(model(input_ids=torch.arange(40), positions=torch.arange(40))))
    assert (logits[0] - logits[1]).square().mean().sqrt() > 0.3 * logits[0].std()


def test_a_checkpoint_that_does_not_fit(mixtral: Path) -> None:
    """Nothing is left at random values."""
    weights = hugging_face.adversarial_checkpoint(transformers.MixtralForCausalLM, mixtral, seed=0)
    model = hugging_face.build(transformers.MixtralForCausalLM, mixtral, torch.float32)
    fewer = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    with pytest.raises(Unusable, match=r"does not fit transformers:MixtralForCausalLM: model\.norm\.weight is missing"):
        model.load_weights(fewer.items())
    with pytest.raises(Unusable, match=r"model\.extra is unknown to it"):
        model.load_weights({**weights, "model.extra": torch.zeros(2)}.items())


def test_nothing_is_narrow_in_the_higher_precision(tmp_path: Path) -> None:
    """transformers' norms and softmax compute in float32 even in a float64 model, which would hide their noise."""
    write_config(tmp_path, hugging_face.tiny_config(transformers.LlamaForCausalLM), "LlamaForCausalLM", "float32")
    weights = hugging_face.adversarial_checkpoint(transformers.LlamaForCausalLM, tmp_path, seed=0)
    model = hugging_face.build(transformers.LlamaForCausalLM, tmp_path, torch.float64)
    model.load_weights(weights.items())
    seen: list[torch.Tensor] = []
    norm: Any = model.model.norm
    norm.register_forward_hook(lambda _, given, output: seen.extend((given[0], output)))
    with torch.no_grad():
        model(input_ids=torch.arange(20), positions=torch.arange(20))
    x, y = seen
    expected = x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight
    assert (y - expected).abs().max() < 1e-13


def test_the_reference_is_no_class_that_vllm_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's Transformers backend replaces methods of the very classes it runs."""
    write_config(tmp_path, hugging_face.tiny_config(transformers.LlamaForCausalLM), "LlamaForCausalLM", "float32")

    def changed(*_: Any, **__: Any) -> None:
        raise AssertionError("the changed class was used")

    monkeypatch.setattr(sys.modules[transformers.LlamaForCausalLM.__module__].LlamaMLP, "forward", changed)
    model = hugging_face.build(transformers.LlamaForCausalLM, tmp_path, torch.float32)
    assert isinstance(model, nn.Module)
    model(input_ids=torch.arange(3), positions=torch.arange(3))


def test_what_can_be_compared_with_vllm_s_modules() -> None:
    """Outputs of modules that mean the same on both sides: no whole layers or attention, no inputs, nothing gated."""
    classes = {
        "": "LlamaForCausalLM",
        "model": "LlamaModel",
        "model.layers.0": "LlamaDecoderLayer",
        "model.layers.0.self_attn": "LlamaAttention",
        "model.layers.0.self_attn.o_proj": "Linear",
        "model.layers.0.mlp": "LlamaMLP",
        "model.layers.0.mlp.gate_proj": "Linear",
        "model.layers.0.mlp.act_fn": "SiLU",
        "model.layers.0.mlp.experts": "Experts",
    }
    values = torch.zeros(1, 4)
    points = tuple(
        Point(
            module=name, kind=kind, part="0", call=0, caller=None, rows=torch.zeros(1, dtype=torch.int64), values=values
        )
        for name in classes
        for kind in ("input", "output")
    )
    record = ModuleRecord(
        rank=0, classes=classes, sequences=(), rows=torch.zeros(1, 4, dtype=torch.int64), points=points
    )
    assert [point.module.removeprefix("model.layers.0.") for point in hugging_face.comparable(record).points] == [
        "self_attn.o_proj",
        "mlp",
        "mlp.gate_proj",
    ]


@pytest.mark.parametrize(
    ("spec", "config", "message"),
    [
        ("transformers:LamaForCausalLM", None, "has no class 'LamaForCausalLM'; did you mean LlamaForCausalLM"),
        ("transformers:AutoConfig", None, "transformers:AutoConfig is not a model class"),
        ("transformers:auto", {"model_type": "genmodel"}, "needs a config whose model_type .* this one is 'genmodel'"),
        ("transformers:auto", None, "and there is none"),
    ],
)
def test_a_class_that_transformers_does_not_have(spec: str, config: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(Unusable, match=message) as caught:
        hugging_face.resolve(spec, None, config)
    assert "\n" not in str(caught.value)


def test_the_class_that_goes_with_a_config() -> None:
    assert hugging_face.resolve("transformers:auto", None, {"model_type": "gpt2"}) is transformers.GPT2LMHeadModel
    assert hugging_face.resolve("transformers:auto", "MixtralForCausalLM", None) is transformers.MixtralForCausalLM


# --- in hosts and engines ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """Hosts for two ranks, shared by the tests below."""
    with Session([TargetOptions(spec=DENSE)]) as running:
        yield running


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"spec": "LamaForCausalLM"}, r"vLLM \S+ has no architecture LamaForCausalLM: did you mean LlamaForCausalLM"),
        ({"spec": "OrionForCausalLM"}, r"transformers \S+ has no OrionForCausalLM to compare with: name another"),
        (
            {"spec": "LlamaForCausalLM", "reference": DENSE},
            "--genmodel-config=tiny: a small LlamaForCausalLM is made from the configuration class",
        ),
        ({"spec": DENSE, "reference": "transformers:LamaForCausalLM"}, "has no class 'LamaForCausalLM'"),
        (
            {"spec": DENSE, "reference": LLAMA},
            r"--genmodel-names is needed: .*not in the reference: embed_tokens\.weight \(closest: model\.embed_tokens",
        ),
        (
            {"spec": DENSE, "reference": LLAMA, "names": {"norm.weight": "model.norm.weight"}},
            r"--genmodel-names: .*no counterpart: model\.embed_tokens\.weight \(closest: embed_tokens\.weight\)",
        ),
        ({"spec": DENSE, "reference": LLAMA, "names": "bad_targets:names"}, "no attribute 'names'"),
    ],
)
def test_bad_input(session: Session, options: dict[str, Any], message: str) -> None:
    """One line each, before any engine starts."""
    with pytest.raises(UnusableTarget, match=message) as caught:
        session.collect(TargetOptions(**options), {"inspection"})
    assert "\n" not in str(caught.value)


def verdicts(session: Session, options: TargetOptions) -> dict[str, Status]:
    """The checks on logits, of engines of both sizes on the plain batch of prompts."""
    evidence = session.collect(options, {"reference", "plain"})
    chosen = [c for c in catalogue.all_checks() if c.group == "logits" and c.needs <= {"reference", "plain"}]
    return {check.id: catalogue.judge(check, evidence).status for check in chosen}


def test_an_author_s_model_against_transformers(session: Session, tmp_path: Path) -> None:
    """Another implementation of the architecture, under other names, gives the same logits at both sizes."""
    lines = [f"{json.dumps(own)} = {json.dumps(theirs)}" for own, theirs in DENSE_AS_LLAMA.items()]
    names = tmp_path / "names.toml"
    names.write_text("\n".join(lines))
    options = TargetOptions(spec=DENSE, reference=LLAMA, names=str(names))
    assert set(verdicts(session, options).values()) == {Status.PASSED}
    evidence = session.collect(options, set())
    reference: Any = evidence.reference
    assert reference.independent
    assert reference.description.startswith(f"independent: {LLAMA} (transformers ")


def test_a_name_map_that_is_wrong_shows(session: Session) -> None:
    """Keys taken for values fit in shape and in nothing else."""
    options = TargetOptions(spec=DENSE, reference=LLAMA, names=MISNAMED, tensor_parallel_sizes=(1,))
    assert verdicts(session, options)["logits.values"] is Status.FAILED


def test_a_mixture_of_experts_of_vllm_s_own(session: Session) -> None:
    """Weights that transformers keeps fused reach vLLM under their published names; the config is made up."""
    options = TargetOptions(spec="MixtralForCausalLM", tensor_parallel_sizes=(1,), config="tiny")
    found = verdicts(session, options)
    assert found.pop("logits.tensor_parallel", Status.NOT_APPLICABLE) is Status.NOT_APPLICABLE
    assert found["logits.values"] is Status.PASSED
    evidence = session.collect(options, set())
    assert evidence.target.config == "tiny, from MixtralConfig"
    traces: Any = evidence.traces["plain", 1]
    assert traces[0].proof.model_class == "vllm.model_executor.models.mixtral.MixtralForCausalLM"


def test_an_architecture_through_the_plugin(tmp_path: Path) -> None:
    """`pytest --genmodel=LlamaForCausalLM`: the in-tree model against transformers' class, TP=1 and TP=2."""
    config = hugging_face.tiny_config(transformers.LlamaForCausalLM)
    (tmp_path / "tiny.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--genmodel=LlamaForCausalLM"]
    checks = "logits and not batching and not bfloat16"
    done = subprocess.run(
        [*command, "--genmodel-config=tiny.json", "-k", checks, "--genmodel-report=report.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "reference: independent: transformers:LlamaForCausalLM (transformers" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert "LlamaForCausalLM" in json.dumps(report)


def test_the_table_of_architectures() -> None:
    """What the sweep found, by tensor-parallel size, and with which versions."""
    path = Path(__file__).parents[1] / "benchmarks" / "sweep_architectures.py"
    spec = importlib.util.spec_from_file_location("sweep_architectures", path)
    assert spec is not None
    assert spec.loader is not None
    sweep = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sweep)
    environment = {"vllm": "0.1", "transformers": "5.0", "torch": "2.0"}
    right = {"result": "agrees", "measured": 1e-5, "allowed": 3e-5, "seconds": 2.0, "environment": environment}
    wrong = right | {"result": "disagrees", "measured": 1.0, "why": "First | to\ndiffer"}
    absent = {"result": "cannot run here", "why": "no kernel", "seconds": 0.1}
    results = {"A": {"1": right, "2": wrong}, "B": {"1": absent}}
    lines = list(sweep._lines(results, {"A": "vllm", "B": "transformers", "C": "vllm"}, 2))
    assert "with vLLM 0.1, transformers 5.0, torch 2.0. Of the 3 architectures" in lines[2]
    assert lines.index("## TP=1") < lines.index("## TP=2")
    assert "Of 2 tried, 1 agree, 0 disagree, 1 cannot run here; median 2.0 s each." in lines
    assert "| A | vllm | agrees | 1.0e-05 | 3.0e-05 |  |" in lines
    assert "| B | transformers | cannot run here |  |  | no kernel |" in lines
    assert "| A | vllm | disagrees | 1.0e+00 | 3.0e-05 | First / to differ |" in lines
