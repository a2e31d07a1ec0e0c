"""mixtral-serve: a dependable home for Mixtral-8x7B on one CPU machine, behind the OpenAI API."""

from importlib.metadata import version
from typing import Final

__version__: Final = version("mixtral-serve")
