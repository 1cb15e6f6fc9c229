"""Is a model of Megatron-core's layers the same model in vLLM? Ground truth validation, step by step.

    python examples/custom_model_with_megatron.py [--tokens 6]

1. A checkpoint: seeded weights, under the names that an ordinary Llama in PyTorch gives them.
2. Ground truth: that ordinary Llama, in float64, without Megatron and without vLLM. Its logits, its greedy token, its
   ten best tokens.
3. The model of Megatron's layers, registered with vLLM, loads the same checkpoint and generates, at TP=1 and TP=2:
   `LLM(tensor_parallel_size=...)`. Each of its tokens is looked up in the ground truth of the same text.

Needs `pytest-genmodel[cpu,megatron]`, or a GPU and `[cuda,megatron]`.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # two ranks on a machine with one NUMA node
os.environ.setdefault(
    "VLLM_ENABLE_V1_MULTIPROCESSING", "0"
)  # the scheduler in this process, ranks in their own: quicker

import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from genmodel import register_model
from genmodel.reference_models.dense import Config, Dense

CONFIG = {
    "architectures": ["MyMegatronModel"],
    "model_type": "genmodel",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": 1003,  # no number of ranks divides it: Megatron pads it
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
PROMPT = [11, 402, 77, 930, 5, 5, 611, 248, 19, 760]
TOP = 10


def make_checkpoint(directory: Path) -> Dense:
    """Write config.json and model.safetensors; returns the model that they are of, in float64."""
    torch.manual_seed(20)
    model = Dense(Config(**{name: CONFIG[name] for name in Config.__dataclass_fields__ if name in CONFIG}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As made, norms are one and logits are flat: a model that drops a norm would look right.
            parameter.mul_(3 if parameter.dim() == 2 else 1).add_(0.3 * torch.randn_like(parameter) * ("norm" in name))
    save_file(
        {name: parameter.detach() for name, parameter in model.named_parameters()}, directory / "model.safetensors"
    )
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
    return model.double()


@torch.no_grad()
def true_logprobs(model: Dense, tokens: list[int]) -> Tensor:
    """float64 [vocab]: what comes after `tokens`, by plain PyTorch."""
    ids = torch.tensor(tokens)
    return model.compute_logits(model(ids, torch.arange(len(ids))))[-1].log_softmax(-1)


def generate(directory: Path, ranks: int, count: int) -> Any:
    """Tokens, and the logprobs of the ten best at each step, of vLLM with so many ranks."""
    llm = LLM(
        str(directory),
        tensor_parallel_size=ranks,
        dtype="float32",  # left to itself, vLLM makes bfloat16 of float32: right too, but to two digits only
        skip_tokenizer_init=True,
        use_tqdm_on_load=False,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 26,
    )
    sampling = SamplingParams(temperature=0, max_tokens=count, logprobs=TOP, detokenize=False, ignore_eos=True)
    (answer,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    return answer.outputs[0]


def compare(model: Dense, output: Any, ranks: int) -> bool:
    """Print vLLM's tokens, each with its rank in the ground truth; whether all is as it should be."""
    print(f"\nvLLM, TP={ranks}\n  step  token  rank in the truth  same ten  largest logprob difference")
    worst, right = 0.0, True
    text = list(PROMPT)
    for step, (token, scores) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        truth = true_logprobs(model, text)
        rank = int((truth > truth[token]).sum()) + 1
        same = set(truth.topk(TOP).indices.tolist()) <= set(scores)
        difference = max(abs(score.logprob - float(truth[candidate])) for candidate, score in scores.items())
        print(f"  {step:4}  {token:5}  {rank:17}  {'yes' if same else 'NO':>8}  {difference:.1e}")
        worst, right = max(worst, difference), right and same and rank == 1
        text.append(token)
    print(f"  every token is the truth's first choice and every ten best are its ten best: {'yes' if right else 'NO'}")
    return right and worst < 1e-4


def main() -> None:
    """The story; exits with 1 if vLLM and the ground truth part ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6, help="how many to generate")
    count = parser.parse_args().tokens
    register_model("MyMegatronModel", "genmodel.reference_models.megatron:factory")
    with tempfile.TemporaryDirectory(prefix="genmodel-example-") as folder:
        directory = Path(folder)
        model = make_checkpoint(directory)
        truth = true_logprobs(model, PROMPT)
        best = truth.topk(TOP)
        print(f"ground truth: plain PyTorch in float64, {sum(p.numel() for p in model.parameters()):,} parameters")
        print(f"  prompt        {PROMPT}")
        print(f"  greedy token  {int(best.indices[0])}")
        print("  ten best      " + "  ".join(f"{i}:{truth[i]:.3f}" for i in best.indices.tolist()))
        agree = [compare(model, generate(directory, ranks, count), ranks) for ranks in (1, 2)]
    print(f"\nThe Megatron model in vLLM is the model of the ground truth: {'yes' if all(agree) else 'NO'}")
    raise SystemExit(0 if all(agree) else 1)


if __name__ == "__main__":
    main()
