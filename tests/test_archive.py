"""Evidence on disk: what is read is what was written, and nothing but evidence can be read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evidence_samples import FAILING, change_traces, clean
from genmodel import check_model
from genmodel.conformance.catalogue import all_checks, judge
from genmodel.conformance.diagnosis import Finding
from genmodel.conformance.replay import Replay, save_run
from genmodel.conformance.verdict import Verdict
from genmodel.runners import archive, plain
from genmodel.runners.archive import DOCUMENT, TENSORS, ArchiveError, index, save
from genmodel.runners.evidence import Evidence, Failure, Span
from genmodel.runners.scenarios import SCENARIOS
from genmodel.runners.session import TargetOptions, UnusableTarget

CLEAN = clean()
SPEC = CLEAN.target.spec


def same(ours: Any, theirs: Any) -> bool:
    """Equality to the last bit, of tensors too; NaN equals NaN."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, torch.Tensor):
        raw = (x.contiguous().reshape(-1).view(torch.uint8) for x in (ours, theirs))
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(*raw)
    if is_dataclass(ours):
        return all(same(getattr(ours, f.name), getattr(theirs, f.name)) for f in fields(ours))
    if isinstance(ours, tuple | list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    return repr(ours) == repr(theirs)


def saved_and_read(folder: Path, evidence: Evidence) -> Evidence:
    save(folder, evidence, SCENARIOS)
    return index(folder)[evidence.target.spec].evidence()


def judged(evidence: Evidence) -> list[Verdict]:
    return [replace(judge(check, evidence), seconds=0.0) for check in all_checks()]


# --- what is read is what was written ----------------------------------------------------------------------------


BROKEN = {f"{check}-{name}": change for check, ways in FAILING.items() for name, change in ways.items()}


@pytest.mark.parametrize("name", BROKEN)
def test_every_sample_survives(tmp_path: Path, name: str) -> None:
    """NaN, infinities, missing ranks, empty tensors and tensors of odd shapes among them."""
    evidence = BROKEN[name](CLEAN)

    assert same(saved_and_read(tmp_path, evidence), evidence)


def test_verdicts_are_the_same(tmp_path: Path) -> None:
    found = saved_and_read(tmp_path, CLEAN)

    assert repr(judged(found)) == repr(judged(CLEAN))


TEXT = st.text(max_size=40)
FAILURES = st.builds(
    Failure,
    kind=st.sampled_from(["raised", "died", "timeout", "abandoned", "unusable", "proof"]),
    scenario=TEXT,
    message=TEXT,
    rank=st.none() | st.integers(0, 9),
    phase=TEXT,
    details=TEXT,
)
SPANS = st.builds(
    Span,
    what=TEXT,
    rank=st.integers(0, 9),
    begin=st.floats(),
    phases=st.dictionaries(TEXT, st.floats(), max_size=3),
)


@given(
    failures=st.dictionaries(st.tuples(TEXT, st.integers(1, 9)), FAILURES, max_size=4),
    gradients=st.none() | FAILURES,
    seconds=st.dictionaries(TEXT, st.floats(), max_size=4),
    spans=st.lists(SPANS, max_size=3).map(tuple),
    environment=st.dictionaries(TEXT, TEXT, max_size=4),
    values=st.lists(st.floats(width=32), min_size=1, max_size=9),
    first=st.integers(0, 2**40),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_evidence_survives(
    tmp_path: Path,
    failures: dict[Any, Failure],
    gradients: Failure | None,
    seconds: dict[str, float],
    spans: tuple[Span, ...],
    environment: dict[str, str],
    values: list[float],
    first: int,
) -> None:
    """Text of any kind, all floats, evidence mixed with failures; and it can be written twice to the same bytes."""

    def scores(trace: Any) -> Any:
        first_one = trace.continuations[0]
        told = replace(first_one.step_scores, first=first, ids=torch.tensor([[2**40] * len(values)]))
        told = replace(told, values=torch.tensor([values]))
        return replace(trace, continuations=(replace(first_one, step_scores=told),))

    evidence = replace(
        change_traces(CLEAN, scores),
        gradients=gradients,
        seconds=seconds,
        timeline=spans,
        environment=environment,
    )
    evidence.traces.update(failures)
    assert same(saved_and_read(tmp_path, evidence), evidence)

    before = contents(tmp_path)
    save(tmp_path, evidence, SCENARIOS)
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_tied_parameters_stay_tied_and_equal_ones_apart(tmp_path: Path) -> None:
    """Checks ask whether two names are one tensor."""
    audit = CLEAN.weights[1]
    assert isinstance(audit, tuple)
    one, other = torch.zeros(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    codes = {"a": one, "tied to a": one, "equal to a": other}
    found = saved_and_read(tmp_path, replace(CLEAN, weights={1: (replace(audit[0], codes=codes),)})).weights[1]
    assert isinstance(found, tuple)
    read = found[0].codes

    assert read["a"] is read["tied to a"]
    assert read["a"] is not read["equal to a"]
    assert torch.equal(read["a"], read["equal to a"])


def test_equal_tensors_are_stored_once(tmp_path: Path) -> None:
    """All ranks have the same logits, and token ids take as few bytes as they need."""
    save(tmp_path, CLEAN, SCENARIOS)
    (path,) = tmp_path.glob(f"*/{TENSORS}")
    traces = [t for found in CLEAN.traces.values() if isinstance(found, tuple) for t in found]
    scores = [s for t in traces for c in t.continuations for s in (c.prompt_scores, c.step_scores) if s is not None]
    assert path.stat().st_size < sum(s.ids.nbytes + s.values.nbytes for s in scores) / 2


def test_an_archive_holds_several_targets(tmp_path: Path) -> None:
    others = [SPEC, "a:b", "a_b:c", "a.b:c", "../../x:y", "x:<lambda>", "ä:ö"]
    for spec in others:
        save(tmp_path, replace(CLEAN, target=replace(CLEAN.target, name=spec, spec=spec)), ["plain"])

    assert sorted(index(tmp_path)) == sorted(others)
    assert all(path.parent == tmp_path for path in tmp_path.iterdir())


def test_a_field_that_did_not_exist_yet_takes_its_default(tmp_path: Path) -> None:
    tampered(tmp_path, lambda document: document["evidence"].pop("timeline"))

    assert index(tmp_path)[SPEC].evidence().timeline == ()


# --- nothing but evidence can be read ----------------------------------------------------------------------------


def tampered(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A saved archive with its JSON changed by hand."""
    path = save(folder, CLEAN, SCENARIOS) / DOCUMENT
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def first_trace(document: dict[str, Any]) -> dict[str, Any]:
    return document["evidence"]["traces"][0][1]["tuple"][0]


def set_in(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = to

    return change


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another format": (set_in("format", to="zip"), "it is not saved evidence of genmodel"),
    "a later version": (set_in("version", to=2), "it has version 2 of the format, written by genmodel '0.1.0'"),
    "a version of any type": (set_in("version", to=[1] * 99), "it has version "),
    "an unknown field": (set_in("run", to=1), "it has a field that this genmodel does not know: 'run'"),
    "an unknown scenario": (set_in("scenarios", to=["x" * 999]), "it has a scenario that this genmodel does not"),
    "no evidence": (set_in("evidence", to=None), "it holds no evidence"),
    "an unknown field deep inside": (
        lambda d: first_trace(d)["proof"].update({"__class__": "os.system"}),
        "evidence.traces[0].proof has a field that a Proof does not: '__class__'".replace(
            "traces[0].proof", "traces[0][0].proof"
        ),
    ),
    "a field missing": (lambda d: first_trace(d).pop("rank"), "evidence.traces[0][0] lacks rank"),
    "text for a number": (lambda d: first_trace(d).update(rank="0"), "evidence.traces[0][0].rank is '0', which is no"),
    "true for a number": (lambda d: first_trace(d).update(rank=True), "rank is True, which is no int"),
    "a number without end": (lambda d: first_trace(d).update(rank=2**70), "rank is a number of more than 63 bits"),
    "another class": (
        lambda d: d["evidence"].update(inspection={"Trace": {}}),
        "evidence.inspection is none of Inspection, Failure",
    ),
    "a word that is none": (
        lambda d: d["evidence"].update(gradients={"Failure": {"kind": "x", "scenario": "", "message": ""}}),
        "evidence.gradients.kind is 'x', which is no one of raised, died",
    ),
    "a key twice": (lambda d: d["evidence"]["seconds"].extend([["x", 1.0]] * 2), "repeats a key"),
    "a path for a tensor": (
        lambda d: first_trace(d)["continuations"][0]["step_scores"].update(ids="../../etc/passwd"),
        "ids is '../../etc/passwd', which refers to no tensor",
    ),
    "a tensor that is not there": (
        lambda d: first_trace(d)["continuations"][0]["step_scores"].update(ids=f"{'0' * 32}#0 int64"),
        f"{TENSORS} lacks tensor {'0' * 32}",
    ),
    "a dtype that is none": (
        lambda d: first_trace(d)["continuations"][0]["step_scores"].update(ids=f"{'0' * 32}#0 load"),
        "there is no dtype 'load'",
    ),
    "a tensor of another kind": (
        lambda d: (s := first_trace(d)["continuations"][0]["step_scores"]).update(ids=s["values"]),
        "it holds what no run gives: ids is a 2-dimensional tensor of torch.float32",
    ),
    "a million ranks": (
        lambda d: d["evidence"]["target"].update(tensor_parallel_sizes=[10**6]),
        "it holds what no run gives: tensor-parallel sizes (1000000,)",
    ),
    "a checkpoint larger than memory": (
        lambda d: d["evidence"]["coded_checkpoint"][0][1].update(shape=[10**9, 10**9]),
        "it holds what no run gives: a coded tensor up to number 1,000,000,000,",
    ),
    "a request without end": (
        lambda d: d["evidence"]["requests"][0].update(max_tokens=2**62),
        "it holds what no run gives: request one_token generates",
    ),
    "a name that breaks node ids": (
        lambda d: d["evidence"]["target"].update(spec="a[b]:c\n", name="a[b]:c\n"),
        "it holds what no run gives: no target's name",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_evidence_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    change, message = HOSTILE[name]
    tampered(tmp_path, change)

    with pytest.raises(ArchiveError) as refused:
        index(tmp_path)[SPEC].evidence()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("[]", "it is not a JSON object"),
        ("{" * 3, "Expecting property name"),
        ("[" * 200_000, "it is nested too deeply"),
        ('{"version": NaN}', "it holds NaN, which is not JSON"),
        ('{"version": 1, "version": 2}', "an object in it repeats a name"),
        ("1" * 5000, "limit"),
        ("\udcff", "codec"),
    ],
)
def test_what_is_not_json_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = save(tmp_path, CLEAN, SCENARIOS) / DOCUMENT
    path.write_bytes(text.encode(errors="surrogateescape"))

    with pytest.raises(ArchiveError, match=message) as refused:
        index(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [DOCUMENT, TENSORS])
def test_links_are_not_followed(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "a", CLEAN, SCENARIOS) / name
    path.rename(tmp_path / name)
    path.symlink_to(tmp_path / name)

    with pytest.raises(ArchiveError, match=f"{name} is not a plain file"):
        index(tmp_path / "a")[SPEC].evidence()


def test_a_linked_folder_is_not_followed(tmp_path: Path) -> None:
    folder = save(tmp_path / "elsewhere", CLEAN, SCENARIOS)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / folder.name).symlink_to(folder)

    with pytest.raises(ArchiveError, match="is not a plain file"):
        index(tmp_path / "a")


def test_a_device_is_not_read(tmp_path: Path) -> None:
    path = save(tmp_path, CLEAN, SCENARIOS) / DOCUMENT
    path.unlink()
    os.mkfifo(path)

    with pytest.raises(ArchiveError, match="is not a plain file"):
        index(tmp_path)


@pytest.mark.parametrize(("limit", "name"), [("LARGEST_DOCUMENT", DOCUMENT), ("LARGEST_TENSORS", TENSORS)])
def test_what_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, name: str) -> None:
    save(tmp_path, CLEAN, SCENARIOS)
    monkeypatch.setattr(archive, limit, 1000)

    with pytest.raises(ArchiveError, match=rf"{name} has [\d,]+ bytes, more than 1,000"):
        index(tmp_path)[SPEC].evidence()


@pytest.mark.parametrize("damage", ["a byte", "the end", "all"])
def test_damaged_tensors_are_noticed(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, CLEAN, SCENARIOS) / TENSORS
    content = bytearray(path.read_bytes())
    if damage == "a byte":
        content[-5] ^= 1
    path.write_bytes({"a byte": content, "the end": content[:-100], "all": b"no"}[damage])

    with pytest.raises(ArchiveError, match=r"cannot use .*evidence\.json: "):
        index(tmp_path)[SPEC].evidence()


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """What would run code if it were a pickle is refused as no tensors."""
    path = save(tmp_path, CLEAN, SCENARIOS) / TENSORS
    torch.save({"x": torch.zeros(1)}, path)

    with pytest.raises(ArchiveError, match="cannot use"):
        index(tmp_path)[SPEC].evidence()


def test_an_empty_folder_is_no_archive(tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"no saved evidence in .*: no \*/evidence.json"):
        index(tmp_path)


def test_a_value_that_is_not_what_it_is_declared_to_be_is_not_written() -> None:
    with pytest.raises(TypeError, match="'1' is no"):
        plain.encode(replace(CLEAN.target, seed="1"), type(CLEAN.target))  # type: ignore[arg-type]


# --- in place of a run -------------------------------------------------------------------------------------------


FINDING = Finding(
    module="layers.0.mlp.down",
    module_class="RowParallelLinear",
    between=None,
    tensor="its output",
    own_code=False,
    tensor_parallel_size=2,
    ranks=(0, 1),
    phase="prompt",
    how="",
    request="short",
    position=3,
    error=0.5,
    allowed=1e-6,
    input_good=True,
    share="",
    candidates=(),
    hint="",
    agreeing=17,
)


def test_check_model_replays(tmp_path: Path) -> None:
    """The verdicts are those of the saved evidence, and a failure begins where it was found to begin."""
    evidence = FAILING["logits.values"]["shifted"](CLEAN)
    save_run(tmp_path, evidence, SCENARIOS, {("plain", 1): FINDING, ("alone", 1): "why", ("cached", 2): None})
    verdicts = check_model(SPEC, replay=tmp_path)

    assert [v.status for v in verdicts] == [judge(check, evidence).status for check in all_checks()]
    (values,) = (v for v in verdicts if v.check == "logits.values")
    assert "First to differ: layers.0.mlp.down (RowParallelLinear) on every rank" in values.diagnosis


def test_a_failure_that_was_not_diagnosed_says_so(tmp_path: Path) -> None:
    save_run(tmp_path, FAILING["logits.values"]["shifted"](CLEAN), SCENARIOS, {})
    (values,) = check_model(SPEC, replay=tmp_path, checks=["logits.values"])

    assert values.diagnosis == "No diagnosis: the saved run did not record the modules of plain at TP=1"


def test_check_model_replays_only_what_was_saved(tmp_path: Path) -> None:
    save_run(tmp_path, CLEAN, SCENARIOS, {})

    with pytest.raises(UnusableTarget, match="no saved run of a:b; there are my_pkg:factory"):
        check_model("a:b", replay=tmp_path)


@pytest.mark.parametrize("findings", [None, [[["plain", 1], {"Finding": {}}]], [[["plain", 1], {"eval": "1"}]]])
def test_findings_that_are_none_are_refused(tmp_path: Path, findings: Any) -> None:
    save(tmp_path, CLEAN, SCENARIOS, findings)

    with pytest.raises(UnusableTarget, match=r"cannot use .*evidence\.json: findings"):
        Replay(index(tmp_path)).findings(TargetOptions(spec=SPEC))


def test_text_of_a_subclass_is_text(tmp_path: Path) -> None:
    """torch's version is one, and hosts may report others."""

    class Version(str):
        __slots__ = ()

    found = saved_and_read(tmp_path, replace(CLEAN, environment={"torch": Version("2.13.0")}))

    assert type(found.environment["torch"]) is str
