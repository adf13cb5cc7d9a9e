"""Folders with general names live beside other people's packages: `kernels` is also the name of a Hugging Face package."""

from __future__ import annotations

import subprocess
import sys

import moefold.kernels
from sources import ROOT


def test_kernels_has_no_version() -> None:
    assert not hasattr(moefold.kernels, "__version__"), "transformers would take our folder for the Hugging Face package"


def test_transformers_models_import_with_the_repository_first_on_the_path() -> None:
    code = "import kernels, transformers\nfrom transformers import MixtralForCausalLM\nprint(kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ROOT / "kernels" / "__init__.py"), "the test must see our folder first"
