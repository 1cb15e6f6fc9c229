"""What the project began with: attention that trains, models that run in vLLM, registration of anything."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import six_targets
from genmodel import ParallelContext, TrainableFlashAttention, as_model_class, register_model
from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.modeling.registration import CHANNEL, InterfaceError
from genmodel.reference_models import dense, gpt
from genmodel.runners.checkpoint import TINY_CONFIG
from genmodel.runners.session import Session, TargetOptions


def naive_block(block: TrainableFlashAttention, x_TC: Tensor) -> Tensor:
    """The attention block written out for one sequence [T, C]: softmax(q k^T / sqrt(d)) v, causal, grouped."""
    heads, kv_heads, dim = block.attn.num_heads, block.attn.num_kv_heads, block.attn.head_dim
    q, k, v = (x_TC @ block.qkv.weight.T).split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
    q_THD = q.unflatten(-1, (heads, dim))
    k_THD = k.unflatten(-1, (kv_heads, dim)).repeat_interleave(heads // kv_heads, 1)
    v_THD = v.unflatten(-1, (kv_heads, dim)).repeat_interleave(heads // kv_heads, 1)
    scores_HTT = torch.einsum("ihd,jhd->hij", q_THD, k_THD) / dim**0.5
    later_TT = torch.ones(len(x_TC), len(x_TC), dtype=torch.bool).triu(1)
    weights_HTT = scores_HTT.masked_fill(later_TT, float("-inf")).softmax(-1)
    mixed = torch.einsum("hij,jhd->ihd", weights_HTT, v_THD).flatten(-2)
    return mixed @ block.o_proj.weight.T


@pytest.fixture
def block() -> TrainableFlashAttention:
    torch.manual_seed(0)
    return TrainableFlashAttention(48, 6, 2, head_dim=8).double()


def test_flash_attention_forward(block: TrainableFlashAttention) -> None:
    """The block computes the published formula, flattened and batched."""
    x_BTC = torch.randn(3, 11, 48, dtype=torch.float64)
    expected = torch.stack([naive_block(block, row) for row in x_BTC])
    torch.testing.assert_close(block(x_BTC), expected)
    torch.testing.assert_close(block(x_BTC[0]), expected[0])


def test_flash_attention_backward(block: TrainableFlashAttention) -> None:
    """Gradients of the input and of every parameter are those of the formula."""
    x_TC = torch.randn(9, 48, dtype=torch.float64, requires_grad=True)
    wanted = [x_TC, *block.parameters()]
    weights = torch.randn(9, 48, dtype=torch.float64)
    ours = torch.autograd.grad((block(x_TC) * weights).sum(), wanted)
    theirs = torch.autograd.grad((naive_block(block, x_TC) * weights).sum(), wanted)
    for mine, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(mine, other)


def tiny(module: Any, **changes: Any) -> Any:
    hf_config = SimpleNamespace(**(TINY_CONFIG | changes))
    return module.factory(SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config)), ParallelContext())


@pytest.mark.parametrize("module", [dense, gpt], ids=["dense", "gpt"])
def test_model_forward(module: Any) -> None:
    """Flattened tokens in, hidden states and logits out; the past decides, the future does not."""
    torch.manual_seed(0)
    model = tiny(module).eval()
    ids, positions = torch.randint(331, (14,)), torch.arange(14)
    with torch.no_grad():
        hidden = model(input_ids=ids, positions=positions)
        logits = model.compute_logits(hidden)
        shorter = model.compute_logits(model(input_ids=ids[:9], positions=positions[:9]))
        embedded = model(input_ids=None, positions=positions, inputs_embeds=model.embed_input_ids(ids))
    assert hidden.shape == (14, 128)
    assert logits.shape == (14, 331)
    torch.testing.assert_close(logits[:9], shorter)
    torch.testing.assert_close(embedded, hidden)
    assert (logits[3] - logits[4]).abs().max() > 0


@pytest.mark.parametrize("module", [dense, gpt], ids=["dense", "gpt"])
def test_model_training(module: Any) -> None:
    """A model learns to continue a pattern it could not before."""
    torch.manual_seed(0)
    model = tiny(module, num_hidden_layers=2, vocab_size=37)
    ids = torch.arange(32).remainder(5).expand(4, -1)  # [batch, tokens]
    positions = torch.arange(31).expand(4, -1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        logits = model.compute_logits(model(input_ids=ids[:, :-1], positions=positions))
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 2.0
    assert losses[-1] < 0.1


class OldStyle(nn.Module):
    """The embedding method's older name, and a forward that takes only what it must."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.answer = 42

    def get_input_embeddings(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.table(input_ids)
        return embedded

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        return self.get_input_embeddings(input_ids) * positions[:, None]

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return hidden_states @ self.table.weight.T


def test_vllm_wrapper() -> None:
    """The wrapper is a text-generation model to vLLM, passes on what fits, and lists all that is missing."""
    from vllm.model_executor.models.interfaces_base import is_text_generation_model

    config = SimpleNamespace(parallel_config=SimpleNamespace())
    wrapped_class: Any = as_model_class(lambda cfg: OldStyle())
    assert is_text_generation_model(wrapped_class)
    with pytest.warns(UserWarning, match="has no load_weights"):
        model = wrapped_class(vllm_config=config, prefix="")
    assert is_text_generation_model(model)
    ids, positions = torch.tensor([1, 2, 3]), torch.tensor([1, 1, 2])
    hidden = model(ids, positions, intermediate_tensors=None, inputs_embeds=None)
    torch.testing.assert_close(hidden, model.embed_input_ids(ids) * positions[:, None])
    assert model.compute_logits(hidden).shape == (3, 7)
    assert model.answer == 42
    loaded = model.load_weights([("table.weight", torch.ones(7, 4))])
    assert loaded == {"model.table.weight"}
    assert bool((model.model.table.weight == 1).all())
    with pytest.raises(InterfaceError, match="passes inputs_embeds"):
        model(ids, positions, inputs_embeds=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"no tabel.weight \(did you mean table.weight\?\).*nothing for table.weight"):
        model.load_weights([("tabel.weight", torch.ones(7, 4))])

    bare: Any = as_model_class(lambda: nn.Linear(2, 2))
    with pytest.raises(InterfaceError) as caught:
        bare(vllm_config=config)
    message = str(caught.value)
    assert all(part in message for part in ("embed_input_ids", "forward", "positions", "compute_logits"))
    assert "\n" not in message


def architectures_known_here(names: list[str]) -> list[str]:
    """Run in a spawned process: which architectures vLLM knows once it has loaded its plugins."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    known = set(ModelRegistry.get_supported_archs())
    return [f"{name} {ModelRegistry.models[name].load_model_cls().__name__}" for name in names if name in known]


@pytest.fixture
def _channel() -> Iterator[None]:
    """Leave no registration behind for other tests' processes."""
    before = os.environ.pop(CHANNEL, None)
    yield
    os.environ.pop(CHANNEL, None)
    if before is not None:
        os.environ[CHANNEL] = before


@pytest.mark.usefixtures("_channel")
def test_callback_registration() -> None:
    """A closure registered here is known, by value, to a process spawned later; a bad target is refused here."""
    config = six_targets.FIXED

    def callback(parallel_context: ParallelContext) -> nn.Module:
        return dense.Dense(config, parallel_context)

    register_model("FromClosure", callback)
    register_model("FromLambda", lambda cfg, ctx: dense.Dense(config, ctx))
    register_model("FromName", "six_targets:builder")
    with get_context("spawn").Pool(1) as pool:
        found = pool.apply(architectures_known_here, (["FromClosure", "FromLambda", "FromName", "NeverMade"],))
    assert found == ["FromClosure FromClosure", "FromLambda FromLambda", "FromName FromName"]

    with pytest.raises(InterfaceError, match="needs tokenizer, which nobody can supply"):
        register_model("Greedy", lambda vllm_config, parallel_context, tokenizer: None)
    with pytest.raises(InterfaceError, match="should look like"):
        register_model("Nameless", "six_targets")
    with pytest.raises(InterfaceError, match="did you mean builder"):
        register_model("Misspelt", "six_targets:bilder")
    megabytes = torch.randn(200_000)
    with pytest.raises(InterfaceError, match="make it importable"):
        register_model("Heavy", lambda cfg: megabytes)


SIX = {
    "class": TargetOptions(spec="six_targets:PlainClass", tensor_parallel_sizes=(1,)),
    "function": TargetOptions(spec="genmodel.reference_models.dense:factory", tensor_parallel_sizes=(1,)),
    "lambda": TargetOptions(spec="a lambda", target=six_targets.lambda_, tensor_parallel_sizes=(1,)),
    "closure": TargetOptions(
        spec="a closure", target=six_targets.make_closure(six_targets.FIXED), tensor_parallel_sizes=(1,)
    ),
    "callable object": TargetOptions(spec="an object", target=six_targets.Builder(2), tensor_parallel_sizes=(1,)),
    "vLLM-style class": TargetOptions(spec="six_targets:StyledForVllm", tensor_parallel_sizes=(1,)),
}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    with Session(SIX.values()) as running:
        yield running


@pytest.mark.parametrize("kind", SIX)
def test_model_registration(session: Session, kind: str) -> None:
    """Every kind of target is built by vLLM's own spawned worker and gives the reference's answers there."""
    evidence = session.collect(SIX[kind], {"inspection", "deployed", "reference"})
    inspection: Any = evidence.inspection
    assert inspection.kind == ("function" if kind == "closure" else kind)
    for check in ("interface.reaches_workers", "deployment.multiprocess"):
        verdict = catalogue.judge(catalogue.get(check), evidence)
        assert verdict.status is Status.PASSED, verdict


SCRIPT = """
    import sys

    import torch
    from safetensors.torch import save_file
    from vllm import LLM, SamplingParams

    from genmodel import ParallelContext, register_model
    from genmodel.reference_models.dense import Config, Dense
    from genmodel.runners.checkpoint import TINY_CONFIG, write_config
    from pathlib import Path

    config = Config(**{k: TINY_CONFIG[k] for k in Config.__dataclass_fields__})

    def my_factory(vllm_config, parallel_context):
        return Dense(config, parallel_context)

    if __name__ == "__main__":
        directory = Path(sys.argv[1])
        torch.manual_seed(7)
        trained = Dense(config, ParallelContext()).eval()
        save_file({name: p.detach().clone() for name, p in trained.named_parameters()}, directory / "model.safetensors")
        write_config(directory, TINY_CONFIG, "MyArchitecture", "float32")
        register_model("MyArchitecture", my_factory)

        prompt = list(range(3, 40, 2))
        llm = LLM(str(directory), skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 26)
        (output,) = llm.generate(
            [{"prompt_token_ids": prompt}], SamplingParams(max_tokens=8, temperature=0, detokenize=False)
        )
        generated = list(output.outputs[0].token_ids)
        tokens = torch.tensor(prompt + generated)
        with torch.no_grad():
            logits = trained.compute_logits(trained(input_ids=tokens, positions=torch.arange(len(tokens))))
        print("agree:", logits[len(prompt) - 1 : -1].argmax(-1).tolist() == generated, generated)
"""


def test_llm_api_integration(tmp_path: Path) -> None:
    """A user's script, as they would write it: train, save, register, `LLM()`, generate; PyTorch agrees."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    done = subprocess.run(
        [sys.executable, str(script), str(checkpoint)], capture_output=True, text=True, timeout=240, check=False
    )
    assert "agree: True" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]
