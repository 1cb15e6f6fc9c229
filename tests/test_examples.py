"""The examples, run as they are, end well and print what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS_MEGATRON = pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed")


def run(name: str, *arguments: str) -> str:
    """What an example prints; it has to end well."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=840, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@NEEDS_MEGATRON
def test_custom_model_with_megatron() -> None:
    """Each of vLLM's tokens is the ground truth's first choice, at TP=1 and TP=2, to float32's rounding."""
    said = run("custom_model_with_megatron.py", "--tokens=4")
    greedy = re.search(r"greedy token  (\d+)", said)
    steps = re.findall(r"^ +(\d) +(\d+) +(\d+) +(yes|NO) +(\S+)$", said, re.MULTILINE)
    assert greedy is not None
    assert [int(step) for step, *_ in steps] == [0, 1, 2, 3] * 2, said
    assert steps[0][1] == steps[4][1] == greedy[1]
    assert len({token for _, token, *_ in steps}) > 1, "a model that repeats itself shows nothing"
    assert all(rank == "1" and same == "yes" and float(error) < 1e-4 for *_, rank, same, error in steps), said


@NEEDS_MEGATRON
def test_generic_model_parallelism() -> None:
    """A row for each library and each mixture, half the elements on each of two ranks, and the same logits."""
    said = run("generic_model_parallelism.py")
    rows = re.findall(r"^(\S.*?) +([\d,]+) +([\d,]+) +(\S+) +(\S+) +(\S+|no training) +(yes|NO)$", said, re.MULTILINE)
    assert len(rows) == 6, said
    for name, whole, half, one, two, gradients, same in rows:
        assert 0.5 <= int(half.replace(",", "")) / int(whole.replace(",", "")) < 0.51, name
        assert 0 < max(float(one), float(two)) < 1e-4, name
        assert gradients == "no training" if "vLLM" in name or "all" in name else float(gradients) < 1e-12, name
        assert same == "yes", name


def test_training_to_inference(tmp_path: Path) -> None:
    """The loss falls and is drawn; trainer and engine agree before and after the weights change, and not in between."""
    said = run("training_to_inference.py", f"--output={tmp_path}")
    losses = [float(loss) for loss in re.findall(r"step +\d+  loss (\S+)", said)]
    assert losses[-1] < 0.1 * losses[0], said
    assert (tmp_path / "loss.svg").read_text().count("<path") > 2
    assert {p.name for p in tmp_path.iterdir()} == {"loss.svg", "trained", "reinforced"}
    *agreed, stale, last = (float(error) for error in re.findall(r" (\d\.\de-\d\d)$", said, re.MULTILINE))
    assert len(agreed) == 3
    assert max(*agreed, last) < 1e-4 < stale, said
    sorted_right = [int(right) / int(of) for right, of in re.findall(r"(\d+) of +(\d+)", said)]
    assert sorted_right[0] == sorted_right[1] > 0.5, said


def test_the_readme_lists_every_example() -> None:
    """With a heading that is the file's name."""
    headings = re.findall(r"^## (\S+\.py)$", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(path.name for path in EXAMPLES.glob("*.py"))
