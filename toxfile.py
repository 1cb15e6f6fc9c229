"""Let several tox environments share one folder: `runner = shared` in tox.ini.

tox records in a folder which environment made it and empties the folder for any other. Torch and
vLLM are 3.5 GB, so the environments that need the same ones use the same folder; all their other
settings that tox compares (Python, dependencies) must agree, and do, since they come from [testenv].
"""

from contextlib import AbstractContextManager
from typing import Any

from tox.plugin import impl
from tox.tox_env.api import ToxEnv
from tox.tox_env.info import Info
from tox.tox_env.python.virtual_env.runner import VirtualEnvRunner
from tox.tox_env.register import ToxEnvRegister


class AnyName(Info):
    """tox's notes about a folder, in which the name of the environment does not count."""

    def compare(
        self, value: Any, section: str, sub_section: str | None = None
    ) -> AbstractContextManager[tuple[bool, Any | None]]:
        if section == ToxEnv.__name__:
            value = {**value, "name": "shared"}
        return super().compare(value, section, sub_section)


class SharedVirtualEnv(VirtualEnvRunner):
    """A virtual environment whose folder other environments may use too."""

    @staticmethod
    def id() -> str:
        return "shared"

    @property
    def cache(self) -> Info:
        return AnyName(self.env_dir)


@impl
def tox_register_tox_env(register: ToxEnvRegister) -> None:
    register.add_run_env(SharedVirtualEnv)
