"""The README's model is a model that passes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from genmodel import check_model
from genmodel.conformance.verdict import Status

README = Path(__file__).parents[1] / "README.md"


def test_the_model_in_the_readme_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copied into a file as it stands, at TP=1 and TP=2; all but the default engine, which others start."""
    found = re.search(r"```python\n(# my_pkg/model\.py\n.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    (tmp_path / "readme_model.py").write_text(found[1])
    monkeypatch.syspath_prepend(tmp_path)
    checks = [
        "gradients.numeric",
        "gradients.packed_sequences",
        "logits.values",
        "logits.tensor_parallel",
        "logits.batching",
    ]
    verdicts = check_model("readme_model:factory", checks=checks)
    assert [v.status for v in verdicts] == [Status.PASSED] * len(checks), verdicts
