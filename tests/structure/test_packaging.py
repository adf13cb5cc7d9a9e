"""What is installed: every package of the rooms, its data files, and nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import moefold
from sources import ROOMS, ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel built from a copy of the sources, as building writes beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_packages_are_the_folders_with_init() -> None:
    inits = [init for room in ROOMS for init in (ROOT / room).rglob("__init__.py")]
    folders = {"moefold", *(".".join(("moefold", *init.parent.relative_to(ROOT).parts)) for init in inits)}
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == folders, "[tool.setuptools] packages in pyproject.toml must list every folder that has an __init__.py"


def test_every_folder_with_code_is_a_package() -> None:
    code = {file.parent for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    missing = sorted(str(folder.relative_to(ROOT)) for folder in code if not (folder / "__init__.py").exists())
    assert not missing, "a folder without __init__.py is not installed"


def test_wheel_has_all_code_and_data_and_no_tests(wheel: zipfile.ZipFile) -> None:
    names = {Path(name) for name in wheel.namelist() if ".dist-info/" not in name}
    code = {file for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    data = {file for pattern in ("launch/configs/*.toml", "launch/templates/*") for file in ROOT.glob(pattern) if file.is_file()}
    files = {ROOT / "__init__.py", ROOT / "py.typed", *code, *data}
    assert names == {"moefold" / file.relative_to(ROOT) for file in files}


def test_wheel_carries_version_and_licence(wheel: zipfile.ZipFile) -> None:
    metadata = next(wheel.read(name).decode() for name in wheel.namelist() if name.endswith("/METADATA"))
    assert re.search(rf"^Version: {re.escape(moefold.__version__)}$", metadata, re.M)
    assert re.search(r"^License-Expression: Apache-2.0$", metadata, re.M)
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


def test_console_script_is_the_command_line() -> None:
    script = next(point for point in entry_points(group="console_scripts") if point.name == "moefold")
    assert script.value == "moefold.launch.cli:main"
    assert callable(script.load())


def test_the_tests_extra_holds_the_optional_engines() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    names = {key: {re.split(r"[^\w-]", line)[0] for line in lines} for key, lines in extras.items()}
    assert names["deepspeed"] | names["megatron"] | names["tokenizers"] <= names["dev"], "the tests use every optional engine"
