"""ParallelContext's answers; those that need several ranks are in test_modeling_layers.py."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from genmodel.modeling import _vllm
from genmodel.modeling.parallel_context import GroupMember, ParallelContext


def answers(context: ParallelContext) -> list[Any]:
    return [
        context.get_tensor_parallel_rank(),
        context.get_tensor_parallel_world_size(),
        context.get_tensor_parallel_group(),
        context.get_pipeline_parallel_rank(),
        context.get_pipeline_parallel_world_size(),
        context.get_pipeline_parallel_group(),
        context.get_data_parallel_rank(),
        context.get_data_parallel_size(),
        context.world_size,
        context.device_mesh,
        context.in_engine,
    ]


ALONE = [0, 1, None, 0, 1, None, 0, 1, 1, None, False]


def test_a_process_on_its_own() -> None:
    assert answers(ParallelContext()) == ALONE
    assert answers(ParallelContext.from_group(None)) == ALONE


def config(tp: int, pp: int = 1, dp: int = 1) -> SimpleNamespace:
    return SimpleNamespace(tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp)


def test_uninitialised_vllm_answers_like_a_process_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_vllm, "engine_config", object)
    monkeypatch.setattr(_vllm, "parallel_group", lambda kind: (0, 1, None))
    assert answers(ParallelContext.from_config(config(tp=2))) == ALONE


@pytest.fixture
def vllm_groups(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int, Any]]:
    groups: dict[str, tuple[int, int, Any]] = {"tp": (1, 2, "TP"), "pp": (2, 3, "PP"), "dp": (0, 1, "DP")}
    monkeypatch.setattr(_vllm, "parallel_group", groups.__getitem__)
    return groups


@pytest.mark.parametrize("engine", [True, False])
def test_vllm_groups_are_read(
    vllm_groups: dict[str, tuple[int, int, Any]], monkeypatch: pytest.MonkeyPatch, engine: bool
) -> None:
    monkeypatch.setattr(_vllm, "engine_config", lambda: object() if engine else None)
    context = ParallelContext.from_config(config(tp=2, pp=3))
    assert context == ParallelContext(
        tensor_parallel=GroupMember(*vllm_groups["tp"]),
        pipeline_parallel=GroupMember(*vllm_groups["pp"]),
        data_parallel=GroupMember(*vllm_groups["dp"]),
        in_engine=engine,
    )
    assert context.world_size == 6
    assert [context.get_tensor_parallel_rank(), context.get_tensor_parallel_group()] == [1, "TP"]
    assert [context.get_pipeline_parallel_rank(), context.get_pipeline_parallel_group()] == [2, "PP"]


@pytest.mark.usefixtures("vllm_groups")
@pytest.mark.parametrize(
    ("sizes", "line"),
    [
        (config(tp=4, pp=3), "parallel_config.tensor_parallel_size is 4 but vLLM's group has 2 ranks"),
        (config(tp=2, pp=1), "parallel_config.pipeline_parallel_size is 1 but vLLM's group has 3 ranks"),
        (config(tp=2, pp=3, dp=2), "parallel_config.data_parallel_size is 2 but vLLM's group has 1 ranks"),
    ],
)
def test_another_config_than_this_workers_is_refused(sizes: SimpleNamespace, line: str) -> None:
    with pytest.raises(ValueError, match=line) as caught:
        ParallelContext.from_config(sizes)
    assert "\n" not in str(caught.value)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ParallelContext().in_engine = True  # type: ignore[misc]


def test_building_and_running_a_model_imports_no_vllm() -> None:
    code = (
        "import sys, torch\n"
        "from genmodel import ParallelContext, TrainableFlashAttention\n"
        "ParallelContext.from_config(None)\n"
        "TrainableFlashAttention(8, 2)(torch.zeros(3, 8)).sum().backward()\n"
        "assert 'vllm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
