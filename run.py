#!/usr/bin/env python3
"""Do all set-up and run the project's commands, starting from nothing but Python.

    python3 run.py demo                  install what is needed, run the suite on a reference model
    python3 run.py test                  install what is needed, run the tests
    python3 run.py lint types            any environments of tox.ini, one after the other
    python3 run.py test -- -k layers -x  what follows -- goes to the command, here to pytest
    python3 run.py -r test               options before -- go to tox; -r installs afresh

tox is installed into a folder of its own, .venv-tox, and tox's environments live in .tox; nothing
else on the machine is touched. Deleting the two folders undoes everything.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

OLDEST_PYTHON = (3, 11)
if sys.version_info < OLDEST_PYTHON:  # before anything that an older Python would trip over
    sys.exit(f"error: Python 3.11 or newer is needed, and this is {sys.version.split()[0]} ({sys.executable})")

TOX = "tox>=4.30,<5"
ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv-tox"


def main(arguments: list[str]) -> None:
    """Replace this process by tox, which answers with the exit code of the command it ran."""
    ours, separator, theirs = partition(arguments, "--")
    environments = [word for word in ours if not word.startswith("-")]
    options = [word for word in ours if word.startswith("-")]
    if not environments or {"-h", "--help"} & {*options}:
        print(__doc__)
        sys.exit(0 if options else 2)
    if not is_ready():
        make_venv()
    tox = [str(VENV / "bin" / "tox"), "run", "-c", str(ROOT / "tox.ini"), *options, "-e", ",".join(environments)]
    os.execv(tox[0], [*tox, *separator, *theirs])


def partition(words: list[str], separator: str) -> tuple[list[str], list[str], list[str]]:
    """Split at the first `separator`, as str.partition does."""
    at = words.index(separator) if separator in words else len(words)
    return words[:at], words[at : at + 1], words[at + 1 :]


def signature() -> str:
    """What .venv-tox depends on; it is made again when any of this changes, or the folder moves."""
    return "\n".join([TOX, sys.version, sys.executable, str(VENV)])


def is_ready() -> bool:
    """Whether .venv-tox was made to its end, by this Python, for this version of the script."""
    stamp = VENV / "ready"
    return stamp.is_file() and stamp.read_text() == signature()


def make_venv() -> None:
    """Make .venv-tox and install tox into it."""
    if any(importlib.util.find_spec(module) is None for module in ("venv", "ensurepip")):
        sys.exit(
            f"error: {sys.executable} cannot make virtual environments; "
            "on Debian and Ubuntu: sudo apt install python3-venv"
        )
    print(f"run.py: installing {TOX} into {VENV.name}", flush=True)
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(VENV)],
        [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", TOX],
    ]
    for step in steps:
        done = subprocess.run(step, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            sys.exit(f"{done.stdout}\nerror: could not set up tox: {' '.join(step)}")
    (VENV / "ready").write_text(signature())


if __name__ == "__main__":
    main(sys.argv[1:])
