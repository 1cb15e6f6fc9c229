"""Imported by the fork server, and only there: everything a host needs, so that hosts start in milliseconds."""

from __future__ import annotations

import time

from genmodel.runners.forked import fork_instead_of_spawn
from genmodel.runners.leftovers import die_with_parent

die_with_parent()
fork_instead_of_spawn()
_start = time.perf_counter()
try:
    from genmodel.modeling import _vllm
    from genmodel.runners import commands  # noqa: F401

    _vllm.import_engine()
except Exception:  # noqa: BLE001 - whatever it is, every host meets it again and can tell the pool
    pass
SECONDS = time.perf_counter() - _start
"""What importing torch and vLLM took."""
