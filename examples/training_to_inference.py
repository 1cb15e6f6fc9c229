"""Train a model in plain PyTorch, serve it in vLLM, improve it there by reinforcement learning: one model all the way.

    python examples/training_to_inference.py [--output FOLDER] [--steps 150]

1. Train: a small decoder, built on TrainableFlashAttention, learns to sort digits. The loss goes into FOLDER/loss.svg.
2. Save: config.json and safetensors.
3. Serve: the model's factory is registered, and `LLM()` generates at TP=1 and TP=2. The trainer, looking at the same
   text, has to agree about the probability of each token.
4. One round of reinforcement learning, in the engine that runs: vLLM samples answers, the trainer takes a
   policy-gradient step towards those that are sorted, the engine gets the new weights. They have to agree again.

Needs `pytest-genmodel[cpu]` and matplotlib, or a GPU and `[cuda]`.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # two ranks on a machine with one NUMA node
# no process of its own for the scheduler: quicker
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from genmodel import (
    ColumnParallelLinear,
    ParallelContext,
    ParallelLMHead,
    RowParallelLinear,
    TrainableFlashAttention,
    VocabParallelEmbedding,
    register_model,
)

DIGITS = 6
EQUALS = 10
"""The token between the digits and their sorted order."""
CONFIG = {
    "architectures": ["Sorter"],
    "model_type": "genmodel",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": 11,
    "max_position_embeddings": 32,
    "torch_dtype": "float32",
}


class Block(nn.Module):
    """Attention and MLP."""

    def __init__(self, context: ParallelContext, prefix: str) -> None:
        super().__init__()
        size, heads, inner = CONFIG["hidden_size"], CONFIG["num_attention_heads"], CONFIG["intermediate_size"]
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attention = TrainableFlashAttention(size, heads, parallel_context=context, prefix=prefix)
        self.up = ColumnParallelLinear(size, inner, parallel_context=context)
        self.down = RowParallelLinear(inner, size, parallel_context=context)

    def forward(self, x: Tensor) -> Tensor:
        """[.., tokens, hidden] -> the same."""
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Sorter(nn.Module):
    """The decoder: what is trained, and what vLLM runs."""

    def __init__(self, context: ParallelContext) -> None:
        super().__init__()
        size, vocab = CONFIG["hidden_size"], CONFIG["vocab_size"]
        self.tokens = VocabParallelEmbedding(vocab, size, parallel_context=context)
        self.places = nn.Embedding(CONFIG["max_position_embeddings"], size)
        self.blocks = nn.ModuleList(Block(context, f"blocks.{i}") for i in range(CONFIG["num_hidden_layers"]))
        self.norm = nn.LayerNorm(size)
        self.head = ParallelLMHead(vocab, size, parallel_context=context)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[.., tokens] -> [.., tokens, hidden]."""
        return self.tokens(input_ids)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """[.., tokens] -> [.., tokens, hidden]."""
        x = self.embed_input_ids(input_ids) + self.places(positions)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[.., hidden] -> [.., vocab]."""
        return self.head(hidden_states)


def factory(parallel_context: ParallelContext) -> Sorter:
    """What vLLM is given; in training the same class is called."""
    return Sorter(parallel_context)


def questions(count: int) -> Tensor:
    """[count, DIGITS + 1]: random digits and EQUALS."""
    return F.pad(torch.randint(10, (count, DIGITS)), (0, 1), value=EQUALS)


def logprobs_of_answers(model: Sorter, texts: Tensor) -> Tensor:
    """[batch, DIGITS]: the trainer's logprob of each token after EQUALS, of texts [batch, 2 DIGITS + 1]."""
    ids = texts[:, :-1]
    logits = model.compute_logits(model(ids, torch.arange(ids.shape[1]).expand_as(ids)))
    answers = texts[:, DIGITS + 1 :]
    return logits[:, DIGITS:].log_softmax(-1).gather(-1, answers[..., None])[..., 0]


def is_sorted(texts: Tensor) -> Tensor:
    """bool [batch]: whether the answer is the sorted question."""
    return (texts[:, DIGITS + 1 :] == texts[:, :DIGITS].sort(-1).values).all(-1)


def train(model: Sorter, steps: int) -> list[float]:
    """Losses in nats per digit of the answer."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    losses = []
    for step in range(steps):
        asked = questions(64)
        loss = -logprobs_of_answers(model, torch.cat([asked, asked[:, :DIGITS].sort(-1).values], -1)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, steps // 6) == 0 or step == steps - 1:
            print(f"  step {step:4}  loss {losses[-1]:.3f}")
    return losses


def plot(losses: list[float], path: Path) -> None:
    """Draw the loss over the steps, with what guessing would give."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.plot(losses)
    axes.axhline(torch.tensor(10.0).log(), linestyle=":", color="grey", label="guessing")
    axes.set(xlabel="step", ylabel="loss (nats per digit)", title="Learning to sort")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def save(model: Sorter, directory: Path) -> None:
    """Write what vLLM loads."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))


def start(directory: Path, ranks: int) -> Any:
    """A vLLM engine of so many ranks."""
    return LLM(
        str(directory),
        tensor_parallel_size=ranks,
        dtype="float32",  # what the trainer computes in
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 26,
        use_tqdm_on_load=False,
    )


def generate(llm: Any, asked: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """vLLM's answers: texts [batch, 2 DIGITS + 1], and its logprobs [batch, DIGITS] of the answers' tokens."""
    sampling = SamplingParams(temperature=temperature, max_tokens=DIGITS, logprobs=0, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": row} for row in asked.tolist()], sampling, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    tokens = [list(answer.token_ids) for answer in answers]
    scores = [[step[t].logprob for t, step in zip(a.token_ids, a.logprobs, strict=True)] for a in answers]
    return torch.cat([asked, torch.tensor(tokens)], -1), torch.tensor(scores)


@torch.no_grad()
def disagreement(model: Sorter, texts: Tensor, theirs: Tensor) -> float:
    """Largest |trainer's logprob - vLLM's| of a token that vLLM generated."""
    return float((logprobs_of_answers(model, texts) - theirs).abs().max())


def reinforce(model: Sorter, texts: Tensor) -> None:
    """One policy-gradient step: answers that are sorted become likelier, others less."""
    rewards = is_sorted(texts).float()
    advantages = rewards - rewards.mean()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    loss = -(advantages[:, None] * logprobs_of_answers(model, texts)).mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


def report(what: str, texts: Tensor, difference: float) -> None:
    """Print how many of the answers are right, and how far trainer and engine are apart."""
    print(f"  {what:29}{int(is_sorted(texts).sum()):3} of {len(texts):3}   {difference:.1e}")


def stop(llm: Any) -> None:
    """End the engine and leave nothing behind."""
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def main() -> None:
    """The whole way; exits with 1 if trainer and engine disagree anywhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder for loss.svg and the checkpoints; none are kept without it")
    parser.add_argument("--steps", type=int, default=150, help="of training")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="genmodel-example-") as scratch:
        good = run(options.output or Path(scratch), options.steps)
    raise SystemExit(0 if good else 1)


def run(output: Path, steps: int) -> bool:
    """Returns whether trainer and engine agreed everywhere, and the round changed something."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # matrices this small gain nothing from more
    print(f"training {DIGITS} digits to be sorted")
    model = Sorter(ParallelContext())
    losses = train(model, steps)
    output.mkdir(parents=True, exist_ok=True)
    plot(losses, output / "loss.svg")
    save(model.eval(), output / "trained")
    register_model("Sorter", factory)

    found = []
    asked, llm = questions(64), None
    print("\nserving                     sorted right   largest |trainer's logprob - vLLM's|")
    for ranks in (1, 2):
        if llm is not None:
            stop(llm)
        llm = start(output / "trained", ranks)
        texts, theirs = generate(llm, asked, temperature=0)
        found.append(disagreement(model, texts, theirs))
        report(f"vLLM, TP={ranks}, greedy", texts, found[-1])

    print("\none round of reinforcement learning in the running engine, TP=2")
    texts, theirs = generate(llm, questions(256), temperature=1)
    found.append(disagreement(model, texts, theirs))
    report("sampled, trained weights", texts, found[-1])
    reinforce(model, texts)
    stale = disagreement(model, texts, theirs)
    print(f"  the step taken, the engine not yet told     {stale:.1e}")
    save(model, output / "reinforced")
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(output / "reinforced")})
    llm.reset_prefix_cache()  # what it holds was computed with the old weights
    texts, theirs = generate(llm, asked, temperature=1)
    found.append(disagreement(model, texts, theirs))
    report("sampled, new weights", texts, found[-1])
    stop(llm)

    good = max(found) < 1e-4 < stale and losses[-1] < 0.5 * losses[0]
    print(f"\ntrainer and engine agree, before and after: {'yes' if good else 'NO'}")
    return good


if __name__ == "__main__":
    main()
