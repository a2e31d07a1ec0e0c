"""The lists of sources and headers that the package's build goes by."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "mixtral_serve/kernels/csrc"


@pytest.mark.parametrize(("key", "pattern"), [("sources", "*.cpp"), ("depends", "*.h")])
def test_the_build_knows_every_file_of_the_kernels_and_no_other(key: str, pattern: str) -> None:
    """The extension is optional: with a wrong source the package would be installed without it, and say so only later;
    a header that is missing would not make it anew."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    assert sorted(extension[key]) == sorted(str(path.relative_to(ROOT)) for path in KERNELS.glob(pattern))
