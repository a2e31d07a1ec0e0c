"""The text room's exception tree.

    TextError
    ├── TokenizerError        a file of the checkpoint is missing or is not a tokenizer this server can use
    ├── ChatTemplateError     a conversation that the checkpoint's chat template refuses
    ├── GrammarError          a constraint on the answer that cannot be compiled, or not within the limits
    └── MalformedCallError    an answer that began as a call and went on as none: it was not made under the grammar

``TokenizerError`` is for the operator and names the file. ``ChatTemplateError`` is for clients: its text comes
from the template that the operator chose, never from the conversation.
"""

from __future__ import annotations

from pathlib import Path


class TextError(Exception):
    """Root of what this room raises on purpose."""


class TokenizerError(TextError):
    """A file of the checkpoint is missing or unusable. ``path`` is the file."""

    def __init__(self, path: Path, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


class ChatTemplateError(TextError):
    """The template refused the conversation."""


class GrammarError(TextError):
    """What the answer should look like cannot be made sure of. The text is the reason, without the input."""


class MalformedCallError(TextError):
    """What began as a call of a function went on as something else."""
