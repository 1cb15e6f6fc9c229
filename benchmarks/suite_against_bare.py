"""The whole suite against the least anybody pays for two engines, in one run on one machine.

(a) one script with `LLM(tensor_parallel_size=1)` and one with 2, all of vLLM's defaults, one generate each;
(b) `pytest --genmodel=genmodel.reference_models.dense:factory`: every scenario, every check;
(c) the same with one model more in the same run, for each of two.

Prints b / a, and what a further model adds, c - b, against one bare LLM(tensor_parallel_size=1).
Run it on an idle machine:

    python benchmarks/suite_against_bare.py [--repeat 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGET = "genmodel.reference_models.dense:factory"
FURTHER = {
    "gpt": "genmodel.reference_models.gpt:factory",
    "vllm": "genmodel.reference_models.vllm_layers:VllmDense",  # which vLLM compiles, and runs in a pipeline too
}

BARE = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], tensor_parallel_size=int(sys.argv[2]), skip_tokenizer_init=True, {memory})
    prompts = [{{"prompt_token_ids": [5, 17, 100, 3]}}]
    output = llm.generate(prompts, SamplingParams(max_tokens=16, temperature=0, detokenize=False))
    assert len(output[0].outputs[0].token_ids) == 16
"""
# The one option that is not a default: without it vLLM wants most of the machine's memory for its cache.
MEMORY = "kv_cache_memory_bytes=1 << 26"

CHECKPOINT = """
import sys
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from genmodel.runners.checkpoint import TINY_CONFIG
names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
         "intermediate_size", "vocab_size", "max_position_embeddings")
model = LlamaForCausalLM(LlamaConfig(**{n: TINY_CONFIG[n] for n in names}, dtype="float32"))
model.save_pretrained(sys.argv[1])
"""


def timed(command: list[str]) -> float:
    """Wall seconds of a command that must succeed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return time.perf_counter() - start


def main() -> None:
    """Measure, and print a table and the cost of the suite by phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each, in turn; medians are compared")
    repeat = parser.parse_args().repeat
    python = sys.executable
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        script = directory / "bare.py"
        script.write_text(BARE.format(memory=MEMORY))
        timed([python, "-c", CHECKPOINT, str(directory / "llama")])
        report = directory / "report.json"
        suite = [python, "-m", "pytest", f"--genmodel={TARGET}", f"--genmodel-report={report}", "-q"]
        runs: dict[str, list[float]] = {name: [] for name in ("LLM(tp=1)", "LLM(tp=2)", "suite", *FURTHER)}
        for _ in range(repeat):
            runs["LLM(tp=1)"].append(timed([python, str(script), str(directory / "llama"), "1"]))
            runs["LLM(tp=2)"].append(timed([python, str(script), str(directory / "llama"), "2"]))
            runs["suite"].append(timed(suite))
            for name, further in FURTHER.items():
                both = [python, "-m", "pytest", f"--genmodel={TARGET}", f"--genmodel={further}", "-q"]
                runs[name].append(timed(both))
        phases = json.loads(report.read_text())["targets"][0]["seconds"]
    for what, seconds in runs.items():
        print(f"{what:10} {statistics.median(seconds):6.1f} s   ({', '.join(f'{s:.1f}' for s in seconds)})")
    bare = statistics.median(runs["LLM(tp=1)"]) + statistics.median(runs["LLM(tp=2)"])
    print(f"suite / bare pair: {statistics.median(runs['suite']) / bare:.2f}")
    for name in FURTHER:
        more = statistics.median(runs[name]) - statistics.median(runs["suite"])
        print(f"further model {name}: {more:.1f} s, {more / statistics.median(runs['LLM(tp=1)']):.2f} of LLM(tp=1)")
    for phase, seconds in phases.items():
        print(f"  {phase:34} {seconds:6.2f} s")


if __name__ == "__main__":
    main()
