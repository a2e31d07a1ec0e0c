"""Functions that a request offers to the model: definitions and the choice among them.

Owns: ``Tool``, ``ToolChoice`` and ``check_tools``. A definition's ``parameters`` are a JSON schema; what of JSON
Schema can be kept is decided where the grammar is made, not here. ``strict`` promises nothing more than any definition
gets: arguments always validate against the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from mixtral_serve.api.errors import InvalidRequest
from mixtral_serve.api.schemas.common import StrictModel

MAX_TOOLS: Final = 128
_WORDS: Final = ("none", "auto", "required")

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class FunctionDefinition(StrictModel):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    """What it does, for the model to read."""
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments, an object; without it there are none."""
    strict: bool = False
    """Calls are constrained to ``parameters`` either way."""

    def described(self) -> dict[str, object]:
        """What the model reads: the fields that were given, in the order of the documentation."""
        function: dict[str, object] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.parameters is not None:
            function["parameters"] = self.parameters
        return {"type": "function", "function": function}

    def schema_of_arguments(self) -> dict[str, Any]:
        """The schema that calls are constrained to."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return self.parameters


class Tool(StrictModel):
    """A tool. Only functions are supported."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(StrictModel):
    """A function, by its name."""

    name: FunctionName


class NamedTool(StrictModel):
    """A tool, by its name."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(StrictModel):
    """Some of the tools."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class ToolChoice(StrictModel):
    """Which tools the model may or must call. The words are objects with that type here."""

    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None


class _NamedChoice(StrictModel):
    """This function, once."""

    type: Literal["function"]
    function: NamedFunction


class _AllowedChoice(StrictModel):
    """Some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice(value: object) -> object:
    """A word as an object; an object must have the field of its type."""
    if isinstance(value, str) and value in _WORDS:
        return {"type": value}
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(value, dict) or kind not in ("function", "allowed_tools"):
        raise PydanticCustomError("invalid_value", "It is 'none', 'auto', 'required', a function or allowed tools")
    if set(value) != {"type", kind}:
        raise PydanticCustomError("invalid_value", "It has a type and the field of that name, and nothing else")
    return value


_WrittenChoice = Literal["none", "auto", "required"] | _NamedChoice | _AllowedChoice
AnyToolChoice = Annotated[ToolChoice, BeforeValidator(_choice, json_schema_input_type=_WrittenChoice)]


def check_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Rules that span definitions and the choice.

    Raises:
        InvalidRequest: naming the field.
    """
    names: set[str] = set()
    for index, tool in enumerate(tools):
        path = f"tools[{index}].function"
        if tool.function.name in names:
            raise _invalid(f"{path}.name", "is the name of an earlier function")
        names.add(tool.function.name)
        kind = (tool.function.parameters or {}).get("type", "object")
        if kind != "object":
            raise _invalid(f"{path}.parameters", "is a JSON schema of the type 'object'")
    if choice is None or choice.type in ("none", "auto"):
        return
    if not tools:
        raise _invalid("tool_choice", "is only allowed when 'tools' are given")
    if choice.function is not None and choice.function.name not in names:
        raise _invalid("tool_choice.function.name", "is not the name of a function in 'tools'")
    for index, allowed in enumerate(choice.allowed_tools.tools if choice.allowed_tools else []):
        if allowed.function.name not in names:
            path = f"tool_choice.allowed_tools.tools[{index}].function.name"
            raise _invalid(path, "is not the name of a function in 'tools'")


def _invalid(param: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"'{param}' {reason}.", param=param, code="invalid_value")
