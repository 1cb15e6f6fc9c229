"""What runs before an engine does not change it, every proof can fail, and an engine of ours is a user's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.runners import scenarios
from genmodel.runners.evidence import Evidence, Failure, Inspection, Scores, Trace
from genmodel.runners.scenarios import DEPLOYMENTS, ENGINE_SCENARIOS, Plan, engines
from genmodel.runners.session import Session, TargetOptions

REFERENCE_MODELS = ("dense", "gpt", "moe", "hybrid", "dtensor", "megatron", "vllm_layers")
ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Olmo2ForCausalLM",
    "PhiForCausalLM",
    "OPTForCausalLM",
    "GPT2LMHeadModel",
    "OlmoForCausalLM",
    "StableLmForCausalLM",
)
DEEPSEEK = "DeepseekV2ForCausalLM"
"""Its rotary kernel is wrong on CPU in eager engines, and only there: what a leak between processes hid."""


COMPILES = TargetOptions(spec="LlamaForCausalLM", tensor_parallel_sizes=(1,), timeout=400)
"""vLLM compiles what its own class decorates, and splits it into stages."""


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """One pool for all models, of two ranks."""
    with Session([TargetOptions(spec="dense", tensor_parallel_sizes=(1, 2))]) as running:
        yield running


def of_reference(name: str) -> TargetOptions:
    built_by = "VllmDense" if name == "vllm_layers" else "factory"
    return TargetOptions(spec=f"genmodel.reference_models.{name}:{built_by}", tensor_parallel_sizes=(1,), timeout=400)


# --- one engine does not change another ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*REFERENCE_MODELS, *ARCHITECTURES])
def test_a_scenario_gives_the_same_bits_alone_and_after_others(session: Session, name: str) -> None:
    """Alone in a fresh process, and in the usual order in an engine shared with others."""
    shared = max(engines(list(ENGINE_SCENARIOS), _some_plan()), key=len)

    def options() -> TargetOptions:
        if name in ARCHITECTURES:
            return TargetOptions(spec=name, tensor_parallel_sizes=(1,), timeout=400)
        return of_reference(name)

    together = session.collect(options(), {"inspection", *shared})
    one_by_one = options()
    for scenario in reversed(shared):
        apart = session.collect(one_by_one, {"inspection", scenario})
    assert together.traces.keys() == apart.traces.keys()
    for key, traces in together.traces.items():
        assert different(found(traces), found(apart.traces[key])) == [], key


def found(traces: tuple[Trace, ...] | Failure) -> Trace:
    assert not isinstance(traces, Failure), traces
    return traces[0]


def different(ours: Trace, theirs: Trace) -> list[str]:
    """Requests whose tokens or scores are not the same to the last bit."""
    return [
        one.request.name
        for one, other in zip(ours.continuations, theirs.continuations, strict=True)
        if one.generated != other.generated
        or not torch.equal(by_token(one.step_scores), by_token(other.step_scores))
        or not (one.prompt_scores is None or torch.equal(by_token(one.prompt_scores), by_token(other.prompt_scores)))
    ]


def by_token(scores: Scores | None) -> torch.Tensor:
    """[N, V], for models whose whole vocabulary was scored."""
    assert scores is not None
    return torch.zeros_like(scores.values).scatter(1, scores.ids, scores.values)


# --- every proof can fail ------------------------------------------------------------------------------------------


def _some_plan() -> Plan:
    return Plan(requests=(), vocab_size=2, max_model_len=256, kv_cache_bytes=0, deployed_kv_cache_bytes=0)


def _one_request(plan: Plan) -> Plan:
    return replace(plan, requests=tuple(r for r in plan.requests if r.name == "longest"))


def _short_prompts(plan: Plan) -> Plan:
    return replace(plan, requests=tuple(r for r in plan.requests if r.name == "one_token"))


WITHOUT_ITS_PATH: Mapping[str, tuple[Mapping[str, Any], Callable[[Plan], Plan] | None, str]] = {
    "plain": ({}, _one_request, "no two requests ever ran together"),
    "arrivals": ({}, _one_request, "no request joined others that were already running"),
    "chunked": ({"max_num_batched_tokens": 2048}, None, "no prompt was computed in more than one step"),
    "cached": ({"enable_prefix_caching": False}, None, "no prompt token was taken from the prefix cache"),
    "refit": ({"enable_prefix_caching": False}, None, "the prefix cache was never read, so nothing stale could show"),
    "preempted": ({}, _short_prompts, "no request was preempted"),
    "compiled": ({"enforce_eager": True}, None, "the engine ran eagerly"),
    "bfloat16": ({"dtype": "float32"}, None, "asked for bfloat16, ran in float32"),
}
"""By scenario: engine options, or a workload, that take its path away, and what the harness must say then."""


@pytest.mark.parametrize("name", WITHOUT_ITS_PATH)
def test_an_engine_that_does_not_take_the_path_is_an_error_of_the_harness(
    session: Session, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options, workload, said = WITHOUT_ITS_PATH[name]
    usual = ENGINE_SCENARIOS[name]
    scenario = replace(usual, options=lambda plan: {**usual.options(plan), **options})
    monkeypatch.setitem(scenarios.ENGINE_SCENARIOS, name, scenario)
    if workload is not None:
        drafted = scenarios.plan
        monkeypatch.setattr("genmodel.runners.session.plan", lambda *args: workload(drafted(*args)))
    evidence = session.collect(COMPILES if name == "compiled" else of_reference("dense"), {"inspection", name})
    assert unproven(evidence) == {f"{name} at TP=1 did not take its path: {said}"}


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="with AMX, vLLM leaves both on for latent attention")
def test_what_vllm_turns_off_for_a_model_does_not_apply_to_it(session: Session, tmp_path: Path) -> None:
    """With vLLM's own reason; refits take place without a prefix cache."""
    save_tiny(DEEPSEEK, tmp_path)
    options = TargetOptions(spec=DEEPSEEK, tensor_parallel_sizes=(1,), weights=tmp_path, timeout=400)
    evidence = session.collect(options, {"inspection", "reference", "chunked", "cached", "refit"})
    reason = "MLA is enabled on a non-GPU platform; forcing chunked prefill and prefix caching to be disabled"
    for name, what in {"chunked_prefill": "chunked prefill", "prefix_cache": "prefix caching"}.items():
        verdict = catalogue.judge(catalogue.get(f"scheduling.{name}"), evidence)
        assert verdict.status is Status.NOT_APPLICABLE
        assert verdict.reason == f"vLLM turns {what} off for this model: {reason}"
    refits = {key: found(traces) for key, traces in evidence.traces.items()}
    assert len(refits) == 5
    assert not any(c.cached_tokens for trace in refits.values() for c in trace.continuations)
    judged = [catalogue.judge(check, evidence) for check in catalogue.select(groups=["refit"])]
    assert {verdict.status for verdict in judged} <= {Status.PASSED, Status.FAILED}  # its kernel is wrong, see DEEPSEEK


def test_a_refit_need_not_read_a_cache_that_vllm_turns_off() -> None:
    """And must, for any other model."""
    import evidence_samples

    clean = evidence_samples.clean()
    traces = clean.traces["refit.before", 1]
    inspection = clean.inspection
    assert not isinstance(traces, Failure)
    assert inspection is not None
    assert not isinstance(inspection, Failure)
    unread = [replace(c, cached_tokens=0) for c in traces[0].continuations]
    asked = scenarios.Asked(inspection=inspection, dtype="float32", tensor_parallel_size=1)
    without = replace(asked, inspection=replace(inspection, no_prefix_caching="latent attention"))
    refit = [replace(traces[0], continuations=tuple(unread))]
    assert ENGINE_SCENARIOS["refit"].unproven(refit, asked) == WITHOUT_ITS_PATH["refit"][2]
    assert ENGINE_SCENARIOS["refit"].unproven(refit, without) == ""


def test_requests_that_run_together_are_not_alone(session: Session) -> None:
    """Its path is in its batches, which no option takes away: here its proof gets another scenario's trace."""
    plain = session.collect(of_reference("dense"), {"inspection", "plain"})
    traces = plain.traces["plain", 1]
    asked = scenarios.Asked(inspection=plain.inspection, dtype="float32", tensor_parallel_size=1)  # type: ignore[arg-type]
    assert ENGINE_SCENARIOS["alone"].unproven(traces, asked) == "11 requests ran together"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("deployed", {"enforce_eager": True}, "the engine ran eagerly"),
        ("deployed_eager", {"enforce_eager": False}, "the engine compiled the model"),
        ("deployed", {"dtype": "bfloat16"}, "asked for float32, ran in bfloat16"),
        ("pipeline", {"pipeline_parallel_size": 1}, "asked for 2 ranks in two stages, ran on 1"),
    ],
)
def test_a_deployment_that_is_another_is_an_error_of_the_harness(
    session: Session, monkeypatch: pytest.MonkeyPatch, name: str, options: Mapping[str, Any], said: str
) -> None:
    changed = replace(DEPLOYMENTS[name], options={**DEPLOYMENTS[name].options, **options})
    monkeypatch.setitem(scenarios.DEPLOYMENTS, name, changed)
    evidence = session.collect(replace(COMPILES), {"inspection", name})
    assert unproven(evidence) == {f"{name} at TP=1 did not take its path: {said}"}


PROVEN = {
    "ranks": ({"world_size": 1}, "asked for 2 ranks, ran on 1"),
    "rank": ({"rank": 1}, "rank 0 ran as rank 1"),
    "dtype": ({"dtype": "float16"}, "asked for float32, ran in float16"),
    "no attention": ({"attention_backend": ""}, "no attention layer of vLLM's ran, so nothing used the KV cache"),
    "backend": (
        {"attention_backend": "OTHER"},
        "attention ran on OTHER, and on CPU_ATTN in other engines of this model",
    ),
    "compiled": ({"compiled_models": 1}, "the engine compiled the model"),
    "captured": ({"captured_graphs": 1}, "the engine compiled the model"),
    "not eager": ({"eager": False}, "the engine compiled the model"),
}


@pytest.mark.parametrize("field", PROVEN)
@pytest.mark.parametrize("name", [name for name in ENGINE_SCENARIOS if name not in ("compiled", "bfloat16")])
def test_every_engine_proves_its_ranks_dtype_and_backend(name: str, field: str) -> None:
    import evidence_samples

    clean = evidence_samples.clean()
    key = ENGINE_SCENARIOS[name].passes[0].name
    traces = clean.traces[key, 2]
    assert not isinstance(traces, Failure)
    asked = scenarios.Asked(
        inspection=clean.inspection,  # type: ignore[arg-type]
        dtype="float32",
        tensor_parallel_size=2,
        backend="CPU_ATTN",
    )
    right = [traces[0]]
    assert ENGINE_SCENARIOS[name].unproven(right, asked) == ""
    fields, said = PROVEN[field]
    wrong = [replace(traces[0], proof=replace(traces[0].proof, **fields))]
    assert ENGINE_SCENARIOS[name].unproven(wrong, asked) == said


@pytest.mark.parametrize(
    ("compiles", "captures", "counted", "said"),
    [
        (True, False, {"compiled_models": 1, "compiled_graphs": 1}, ""),
        (True, False, {"compiled_graphs": 1}, "vLLM saw no model that it compiles"),
        (True, False, {"compiled_models": 1}, "vLLM compiled no graph on some rank"),
        (True, True, {"compiled_models": 1, "compiled_graphs": 1}, "vLLM captured no CUDA graph on some rank"),
        (True, True, {"compiled_models": 1, "compiled_graphs": 1, "captured_graphs": 1}, ""),
        (False, True, {}, "vLLM captured no CUDA graph on some rank"),
        (False, True, {"captured_graphs": 1}, ""),
    ],
)
def test_a_compiled_engine_proves_what_its_platform_makes_of_the_model(
    compiles: bool, captures: bool, counted: Mapping[str, int], said: str
) -> None:
    """On CUDA, graphs are captured of every model, so that no default engine is an eager one."""
    import evidence_samples

    clean = evidence_samples.clean()
    assert isinstance(clean.inspection, Inspection)
    inspection = replace(clean.inspection, compiles=compiles, captures=captures)
    asked = scenarios.Asked(inspection=inspection, dtype="float32", tensor_parallel_size=2)
    assert scenarios.compiles_nothing(inspection) == ""
    for name, judge in (("compiled", ENGINE_SCENARIOS["compiled"]), ("deployed", DEPLOYMENTS["deployed"])):
        traces = clean.traces[name, 2]
        assert not isinstance(traces, Failure)
        right = replace(traces[0], proof=replace(traces[0].proof, **counted))
        assert judge.unproven([right], asked) == said


def unproven(evidence: Evidence) -> set[str]:
    """What the harness says of the scenarios it could not prove; those that failed for other reasons are shown."""
    failures = [found for found in evidence.traces.values() if isinstance(found, Failure)]
    assert failures, "every scenario took its path"
    assert {failure.kind for failure in failures} == {"proof"}, failures
    return {failure.message for failure in failures}


# --- an engine of ours is one of a user's --------------------------------------------------------------------------

SCRIPT = """
import json, sys
asked = json.load(open(sys.argv[1]))
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(asked["model"], skip_tokenizer_init=True, logprobs_mode="raw_logits", max_logprobs=-1, **asked["options"])
    found = []
    for request in asked["requests"]:
        settings = {"temperature": 0, "logprobs": asked["vocabulary"], "detokenize": False, "ignore_eos": True}
        sampling = SamplingParams(max_tokens=request["max_tokens"], **settings)
        (output,) = llm.generate([{"prompt_token_ids": request["prompt"]}], sampling, use_tqdm=False)
        rows = [{token: scored.logprob for token, scored in row.items()} for row in output.outputs[0].logprobs]
        found.append([[row[token] for token in range(asked["vocabulary"])] for row in rows])
    json.dump(found, open(sys.argv[2], "w"))
"""
"""What somebody writes who has vLLM and not this project."""


@pytest.mark.parametrize(
    ("name", "size", "ways"),
    [
        ("LlamaForCausalLM", 1, ("plain", "deployed_eager")),
        ("LlamaForCausalLM", 1, ("compiled", "deployed")),
        ("LlamaForCausalLM", 2, ("plain", "deployed_eager")),
        ("LlamaForCausalLM", 2, ("compiled", "deployed")),
    ],
)
def test_a_script_without_this_project_gives_the_same_logits(
    session: Session, tmp_path: Path, name: str, size: int, ways: tuple[str, ...]
) -> None:
    """Up to the order of additions."""
    weights = tmp_path / "model"
    save_tiny(name, weights)
    options = TargetOptions(spec=name, tensor_parallel_sizes=(size,), weights=weights, timeout=400)
    evidence = session.collect(options, {"inspection", *ways})
    ours = [[c for c in found(evidence.traces[way, size]).continuations if c.request.name in ASKED] for way in ways]
    theirs = run_script(tmp_path, weights, size, eager="plain" in ways, requests=[c.request for c in ours[0]])
    for continuations in ours:
        for continuation, logits in zip(continuations, theirs, strict=True):
            assert float((by_token(continuation.step_scores) - torch.tensor(logits)).abs().max()) < 2e-5


def test_a_kernel_that_is_wrong_in_a_users_eager_engine_is_wrong_in_ours(session: Session, tmp_path: Path) -> None:
    """Its logits are not the same from engine to engine, and all far from right; compiled engines do without it."""
    save_tiny(DEEPSEEK, tmp_path)
    options = TargetOptions(spec=DEEPSEEK, tensor_parallel_sizes=(1,), weights=tmp_path, timeout=400)
    evidence = session.collect(options, {"inspection", "reference", "plain", "compiled"})
    eager, compiled = (
        catalogue.judge(catalogue.get(check), evidence) for check in ("logits.values", "deployment.compiled")
    )
    assert eager.status is Status.FAILED
    assert max(measurement.measured for measurement in eager.measurements) > 1e-2
    assert compiled.status is Status.PASSED, compiled


ASKED = ("short", "block_crossing")
"""Requests that the script makes, one by one."""


def save_tiny(name: str, directory: Path) -> None:
    """A small random checkpoint as transformers saves it."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 331, "hidden_size": 128, "intermediate_size": 208, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    }  # fmt: skip
    if name == DEEPSEEK:
        sizes |= {
            "moe_intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "n_shared_experts": 1,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 512, "q_lora_rank": None,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 2,
            "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
        }  # fmt: skip
        del sizes["head_dim"]
    torch.manual_seed(0)
    config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**sizes)
    model = getattr(transformers, name)(config).float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.08)
    model.save_pretrained(directory)


def run_script(tmp_path: Path, model: Path, size: int, *, eager: bool, requests: list[Any]) -> Any:
    """Logits [G, V] of each request."""
    asked = {
        "model": str(model),
        "options": {"tensor_parallel_size": size, "dtype": "float32", "max_model_len": 256, "enforce_eager": eager},
        "requests": [{"prompt": r.prompt, "max_tokens": r.max_tokens} for r in requests],
        "vocabulary": 331,
    }
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    (tmp_path / "script.py").write_text(SCRIPT)
    own = {name: value for name, value in os.environ.items() if not name.startswith(("GENMODEL", "VLLM", "PYTHONPATH"))}
    settings = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_PLUGINS": "",
        "HF_HUB_OFFLINE": "1",
    }
    subprocess.run(
        [sys.executable, "script.py", "asked.json", "answers.json"],
        cwd=tmp_path,
        env={**own, **settings},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    return json.loads((tmp_path / "answers.json").read_text())
