"""The reference models: the published formulas, training, and what vLLM wants of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genmodel.modeling.attention import packed_sequences
from genmodel.modeling.parallel_context import GroupMember, ParallelContext
from genmodel.reference_models import dense, dtensor, gpt, hybrid, moe
from genmodel.runners import standalone

HF: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 40,
    "vocab_size": 51,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    # a mixture's
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    # a hybrid's
    "sliding_window": 4,
    "partial_rotary_factor": 0.5,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 8.0,
}
OURS = {"dense": dense.factory, "gpt": gpt.factory, "moe": moe.factory, "hybrid": hybrid.factory}
FACTORIES = {**OURS, "dtensor": dtensor.factory}
with contextlib.suppress(ImportError):  # megatron-core is optional
    from genmodel.reference_models import megatron

    FACTORIES["megatron"] = megatron.factory


def build(name: str, context: ParallelContext | None = None, **changes: Any) -> Any:
    hf_config = SimpleNamespace(**(HF | changes))
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config))
    return FACTORIES[name](vllm_config, context or ParallelContext.from_group(torch.distributed.group.WORLD))


@pytest.fixture(autouse=True)
def _float64_on_one_rank() -> Iterator[None]:
    torch.manual_seed(0)
    with standalone.default_dtype(torch.float64), standalone.alone():
        yield


def shake(model: nn.Module) -> None:
    """Weights that hide nothing: norms away from 1, biases away from 0, logits with a spread."""
    for param in model.parameters():
        nn.init.normal_(param, 0.2, 0.3)


# Each model once more, as its paper writes it: complex numbers for the rotation, explicit softmax.


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[T, H, D], k and v with as many heads."""
    scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
    later = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(later, -torch.inf).softmax(-1), v).flatten(1)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / ((x**2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """[T, H, D], the pairs (i, i + D / 2)."""
    dim = x.shape[-1]
    turn = torch.exp(1j * positions[:, None, None] * 500.0 ** (-torch.arange(0, dim, 2) / dim))
    turned = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def swiglu(h: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    g = h @ gate.T
    return (g / (1 + torch.exp(-g)) * (h @ up.T)) @ down.T


def qkv_of(w: dict[str, Tensor], i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads, two key and value heads of 12."""
    h = norm(x, w[f"layers.{i}.attn_norm.weight"]) @ w[f"layers.{i}.attn.qkv.weight"].T
    q, k, v = h.view(len(x), 8, 12).split([4, 2, 2], 1)
    return q, k, v


def theirs_dense(w: dict[str, Tensor], ids: Tensor, positions: Tensor) -> Tensor:
    def mlp(i: int, h: Tensor) -> Tensor:
        gate, up = w[f"layers.{i}.mlp.gate_up.weight"].chunk(2)
        return swiglu(h, gate, up, w[f"layers.{i}.mlp.down.weight"])

    return theirs_decoder(w, ids, positions, mlp)


def theirs_moe(w: dict[str, Tensor], ids: Tensor, positions: Tensor) -> Tensor:
    """Token by token and expert by expert."""

    def mlp(i: int, h: Tensor) -> Tensor:
        at = f"layers.{i}.mlp"
        gates, ups = w[f"{at}.experts.gate_up.weight"].view(2, 6, 20, -1)
        downs = w[f"{at}.experts.down.weight"].view(-1, 6, 20).transpose(0, 1)
        shares = (h @ w[f"{at}.router.weight"].T).softmax(-1)
        rows = []
        for row, share in zip(h, shares, strict=True):
            chosen = sorted(range(6), key=lambda e: -float(share[e]))[:2]
            total = sum(float(share[e]) for e in chosen)
            parts = [float(share[e]) / total * swiglu(row, gates[e], ups[e], downs[e]) for e in chosen]
            rows.append(parts[0] + parts[1])
        gate, up = w[f"{at}.shared.gate_up.weight"].chunk(2)
        return torch.stack(rows) + swiglu(h, gate, up, w[f"{at}.shared.down.weight"])

    return theirs_decoder(w, ids, positions, mlp)


def theirs_decoder(w: dict[str, Tensor], ids: Tensor, positions: Tensor, mlp: Any) -> Tensor:
    x = w["embed_tokens.weight"][ids]
    for i in range(2):
        q, k, v = qkv_of(w, i, x)
        k, v = (t[:, [0, 0, 1, 1]] for t in (rotate(k, positions), v))
        x = x + attend(rotate(q, positions), k, v) @ w[f"layers.{i}.attn.o_proj.weight"].T
        x = x + mlp(i, norm(x, w[f"layers.{i}.mlp_norm.weight"]))
    return norm(x, w["norm.weight"]) @ w["lm_head.weight"].T


def theirs_gpt(w: dict[str, Tensor], ids: Tensor, positions: Tensor) -> Tensor:
    heads = 4

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embed_tokens.weight"][ids] + w["embed_positions.weight"][positions]
    for i in range(2):
        h = linear(norm(x, f"layers.{i}.attn_norm"), f"layers.{i}.attn.qkv")
        q, k, v = h.view(len(ids), 3, heads, -1).unbind(1)
        x = x + linear(attend(q, k, v), f"layers.{i}.attn.o_proj")
        h = linear(norm(x, f"layers.{i}.mlp_norm"), f"layers.{i}.mlp.up")
        h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + linear(h, f"layers.{i}.mlp.down")
    return norm(x, "norm") @ w["embed_tokens.weight"].T


@pytest.mark.parametrize(("name", "theirs"), [("dense", theirs_dense), ("gpt", theirs_gpt), ("moe", theirs_moe)])
def test_equals_the_published_formula(name: str, theirs: Any) -> None:
    model = build(name)
    shake(model)
    ids, positions = torch.randint(0, 51, (9,)), torch.arange(3, 12)
    ours = model.compute_logits(model(ids, positions))
    torch.testing.assert_close(ours, theirs(model.state_dict(), ids, positions), rtol=1e-11, atol=1e-11)


class HuggingFaceAttention:
    """What transformers' models of each kind make of one layer's hidden states, put together from their functions."""

    def __init__(self, weights: dict[str, Tensor], layer: int, window: int | None, *, alibi: bool) -> None:
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

        self.w, self.layer, self.window, self.alibi = weights, layer, window, alibi
        self.norms = {}
        for name in ("q_norm", "k_norm"):
            self.norms[name] = Qwen3RMSNorm(12, eps=1e-5)
            self.norms[name].load_state_dict({"weight": weights[f"layers.{layer}.attn.{name}.weight"]})

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        from transformers.models.bloom.modeling_bloom import build_alibi_tensor
        from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward
        from transformers.models.stablelm.modeling_stablelm import apply_rotary_pos_emb

        q, k, v = (t.transpose(0, 1)[None] for t in qkv_of(self.w, self.layer, x))  # [1, heads, T, 12]
        q, k = self.norms["q_norm"](q), self.norms["k_norm"](k)
        if not self.alibi:
            angles = positions[:, None] * 500.0 ** (-torch.arange(0, 6, 2) / 6)
            table = torch.cat([angles, angles], -1)[None]
            (q, q_kept), (k, k_kept) = q.split(6, -1), k.split(6, -1)
            q, k = apply_rotary_pos_emb(q, k, table.cos(), table.sin())
            q, k = torch.cat([q, q_kept], -1), torch.cat([k, k_kept], -1)
        distance = positions[:, None] - positions
        visible = (distance >= 0) & (distance < (self.window or len(x)))
        mask = torch.zeros(1, 1, len(x), len(x)).masked_fill(~visible, -torch.inf)
        if self.alibi:
            mask = mask + build_alibi_tensor(torch.ones(1, len(x)), 4, x.dtype).view(1, 4, 1, -1)
        heads = SimpleNamespace(num_key_value_groups=2, training=False, head_dim=12)
        out, _ = eager_attention_forward(heads, q, k, v, mask, scaling=12**-0.5, softcap=2.0)  # type: ignore[arg-type]
        return out.flatten(2)[0] @ self.w[f"layers.{self.layer}.attn.o_proj.weight"].T


@pytest.mark.parametrize("alibi", [False, True])
def test_hybrid_attention_is_hugging_face_s(alibi: bool) -> None:
    """Gemma 2's soft cap and windows, Qwen 3's norms, StableLM's partial rotation, Bloom's slopes."""
    model = build("hybrid", alibi=alibi)
    shake(model)
    positions = torch.arange(9)
    x = torch.randn(9, 32)
    for index, window in enumerate((4, None)):
        layer = model.layers[index]
        ours = layer.attn(layer.attn_norm(x), *model.rotary_table(positions, x.dtype))
        theirs = HuggingFaceAttention(model.state_dict(), index, window, alibi=alibi)
        torch.testing.assert_close(ours, theirs(x, positions), rtol=0, atol=1e-6)  # some of theirs is float32 inside


def test_hybrid_logits_are_capped() -> None:
    """The last soft cap is on what the head gives."""
    model = build("hybrid")
    shake(model)
    hidden = 50 * torch.randn(3, 32)
    plain = model.lm_head(hidden)
    assert plain.abs().max() > 8
    torch.testing.assert_close(model.compute_logits(hidden), 8 * torch.tanh(plain / 8))


def test_alibi_slopes_of_any_number_of_heads() -> None:
    """Those of the paper, and of Bloom's code where the number is no power of two."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in (1, 2, 4, 6, 7, 12, 16):
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float64)[:, 0, 1]
        torch.testing.assert_close(torch.tensor(hybrid.alibi_slopes(heads)), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", FACTORIES)
def test_every_layout_is_the_same_function(name: str) -> None:
    model = build(name)
    shake(model)
    ids, positions = torch.randint(0, 51, (2, 6)), torch.arange(6).expand(2, 6)
    batched = model(ids, positions)
    assert batched.shape == (2, 6, 32)
    assert model.compute_logits(batched).shape == (2, 6, 51)
    for row in range(2):
        flat = model(ids[row], positions[row])
        assert flat.shape == (6, 32)
        torch.testing.assert_close(flat, batched[row], rtol=1e-12, atol=1e-12)
        embedded = model(None, positions[row], inputs_embeds=model.embed_input_ids(ids[row]))
        assert torch.equal(embedded, flat)
    with packed_sequences(torch.tensor([0, 6, 12])):
        packed = model(ids.flatten(), positions.flatten())
    torch.testing.assert_close(packed, batched.flatten(0, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_trains(name: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    model = build(name)
    ids = torch.randint(0, 51, (4, 17))
    positions = torch.arange(16).expand(4, 16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        logits = model.compute_logits(model(ids[:, :-1], positions))
        assert logits.dtype == dtype
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        for key, param in model.named_parameters():
            assert param.grad is not None, key
            assert param.grad.isfinite().all(), key
            assert param.grad.any(), key
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(51.0).log().item(), abs=0.3), "starts at the uniform guess"
    assert losses[-1] < 0.5 * losses[0], losses


@pytest.mark.parametrize("name", [*OURS, "dtensor"])  # Megatron's layers hold a process group, which cannot be copied
def test_state_is_parameters_only_and_copies(name: str) -> None:
    model = build(name)
    assert not list(model.buffers())
    assert set(model.state_dict()) == {key for key, _ in model.named_parameters(remove_duplicate=False)}
    ids, positions = torch.arange(5), torch.arange(5)
    assert torch.equal(copy.deepcopy(model)(ids, positions), model(ids, positions))
    through_half = model.to(torch.bfloat16).to(torch.float64)
    fresh = build(name)
    fresh.load_state_dict(through_half.state_dict())
    # nothing but the weights has gone through bfloat16, the rotary table least of all
    assert torch.equal(through_half(ids, positions), fresh(ids, positions))


def test_dropout_of_the_config_reaches_training_only() -> None:
    model = build("gpt", attention_dropout=0.5)
    shake(model)
    ids, positions = torch.arange(9), torch.arange(9)
    assert not torch.equal(model(ids, positions), model(ids, positions))
    model.eval()
    assert torch.equal(model(ids, positions), model(ids, positions))


def test_rotary_table_is_exact_far_out() -> None:
    position = 100_003
    cos, sin = dense.rotary_table(torch.tensor([position]), 8, 10_000.0, torch.bfloat16)
    assert (cos.dtype, cos.shape) == (torch.float32, (1, 1, 4))
    angles = torch.tensor([position * 10_000.0 ** (-i / 4) for i in range(4)])
    torch.testing.assert_close(cos[0, 0].double(), angles.cos(), rtol=0, atol=6e-8)  # float32's rounding, once
    torch.testing.assert_close(sin[0, 0].double(), angles.sin(), rtol=0, atol=6e-8)
    assert dense.rotary_table(torch.tensor([1]), 8, 1e4, torch.float64)[0].dtype == torch.float64


def test_tied_head_is_one_parameter() -> None:
    for model in (build("gpt"), build("dense", tie_word_embeddings=True), build("dtensor", tie_word_embeddings=True)):
        assert model.lm_head.weight is model.embed_tokens.weight
        assert "lm_head.weight" not in dict(model.named_parameters())
        assert copy.deepcopy(model).lm_head.weight.shape == (51, 32)
    assert build("dense").lm_head.weight is not build("dense").embed_tokens.weight


def test_names_vllm_keys_its_cache_by() -> None:
    for name in FACTORIES:
        prefixes = [m.prefix for m in build(name).modules() if hasattr(m, "soft_cap")]
        assert len(set(prefixes)) == len(prefixes) == 2
        assert all(f"layers.{i}." in prefix for i, prefix in enumerate(prefixes))


def test_config_reads_what_is_there() -> None:
    sparse = SimpleNamespace(**{k: HF[k] for k in HF if k not in ("num_key_value_heads", "head_dim", "rope_theta")})
    config = dense.Config.from_hf(sparse)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 8, 10_000.0)
    # transformers 5 keeps theta in rope_parameters
    config = dense.Config.from_hf(SimpleNamespace(**HF, rope_parameters={"rope_theta": 7.0, "rope_type": "default"}))
    assert config.rope_theta == 7.0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dense", {"rope_scaling": {"rope_type": "yarn"}}, r"^dense has plain rotary positions only, .* 'yarn'$"),
        ("dense", {"num_key_value_heads": 3}, r"^num_heads \(4\) is not divisible by num_kv_heads \(3\)$"),
        ("moe", {"num_experts_per_tok": 7}, r"^num_experts_per_tok \(7\) has to be from 1 to num_experts \(6\)$"),
        ("hybrid", {"layer_types": ["full_attention"]}, r"^layer_types names 1 layers, num_hidden_layers is 2$"),
        ("hybrid", {"partial_rotary_factor": 0.25}, r"^the rotated part of a head is 3 of 12: it must be even$"),
        ("gpt", {"hidden_size": 30}, r"^hidden_size \(30\) is not divisible by num_heads \(4\)"),
    ],
)
def test_bad_configs_are_one_clear_line(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(name, **changes)
    assert "\n" not in str(caught.value)


def test_missing_attributes_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"^the config has no num_hidden_layers, vocab_size; dense needs hidden_size,"):
        dense.Config.from_hf(SimpleNamespace(hidden_size=8, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(ValueError, match=r"^the config has no hidden_size, .*max_position_embeddings; gpt needs"):
        gpt.Config.from_hf(SimpleNamespace())


def test_heads_that_ranks_do_not_divide_are_one_clear_line() -> None:
    for name in OURS:
        with pytest.raises(ValueError, match=r"^num_heads \(4\) is not divisible by the tensor parallel size \(3\)$"):
            build(name, ParallelContext(tensor_parallel=GroupMember(0, 3)), vocab_size=51, intermediate_size=42)
