"""The list of sources that the package's build compiles."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_build_compiles_every_source_of_the_kernels_and_no_other() -> None:
    """The extension is optional: with a wrong list the package would be installed without it, and say so only later."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    (extension,) = project["tool"]["setuptools"]["ext-modules"]
    sources = [str(path.relative_to(ROOT)) for path in (ROOT / "mixtral_serve/kernels/csrc").glob("*.cpp")]
    assert sorted(extension["sources"]) == sorted(sources)
