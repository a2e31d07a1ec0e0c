"""From the bytes of a body to a validated request.

Owns: ``parse_json`` and ``validated``. JSON is parsed here and not by the framework, because every odd body must
end in a 400 of ours: msgspec refuses NaN, infinities, overlong numbers, lone surrogates, invalid UTF-8 and deep
nesting without ever building them. Where it refuses a small body, the standard library's lenient parser looks
for the culprit, so that the answer can name the field.

Rejected: the framework's own body models. Their error handler echoes input (a bad field of 1 MB comes back as
1 MB) and itself fails on a NaN.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, Literal, NamedTuple, TypeAlias, TypeVar

import msgspec
from pydantic import BaseModel, ValidationError

from mixtral_serve.api.errors import InvalidRequest, clean_name

RequestT = TypeVar("RequestT", bound=BaseModel)
Location: TypeAlias = tuple[int | str, ...]
"""Where in a body something is: keys and indices."""

_MAX_DIAGNOSED_BYTES: Final = 65_536
_MAX_INT_DIGITS: Final = 20
_MAX_PARAM_CHARS: Final = 160
_NUL_TEXT: Final = rb"\u0000"
_NUL: Final = re.compile(rb"(?<!\\)(?:\\\\)*+\\u0000")
"""The character NUL as JSON spells it, and not a backslash before "u0000"."""

_CODES: Final[Mapping[str, str]] = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "finite_number": "invalid_value",
    "literal_error": "invalid_value",
    "too_long": "array_above_max_length",
    "too_short": "empty_array",
    "string_pattern_mismatch": "invalid_value",
    "string_too_long": "string_above_max_length",
    "string_too_short": "empty_string",
    # Raised by our own validators under the code they want.
    "invalid_type": "invalid_type",
    "invalid_value": "invalid_value",
    "empty_array": "empty_array",
    "array_above_max_length": "array_above_max_length",
    "unsupported_parameter": "unsupported_parameter",
}
_BOUNDS: Final[Mapping[str, str]] = {
    "greater_than": "below_min_value",
    "greater_than_equal": "below_min_value",
    "less_than": "above_max_value",
    "less_than_equal": "above_max_value",
}


@dataclass(frozen=True, slots=True)
class Validated(Generic[RequestT]):
    """A request, and the fields that were ignored because the operator allows unknown ones."""

    request: RequestT
    ignored: tuple[str, ...]


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object in a body.

    Raises:
        InvalidRequest: it is not JSON, not an object, or holds what JSON or this server does not allow.
    """
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise _diagnosed(body) from None
    # The plain search costs nothing and spares nearly every body the expression.
    if _NUL_TEXT in body and _NUL.search(body) and _holds_nul(value):
        # Which of the values of a large body has it is not worth a walk with places.
        _refuse(value if len(body) <= _MAX_DIAGNOSED_BYTES else "\0", _has_nul, "must not contain the character NUL")
    if not isinstance(value, dict):
        raise InvalidRequest("The body is a JSON object.", param=None, code="invalid_type")
    return value


def validated(
    model: type[RequestT],
    fields: dict[str, Any],
    *,
    unknown_fields: Literal["error", "warn"],
    located: Callable[[Location], Location] = lambda location: location,
) -> Validated[RequestT]:
    """``fields`` as a request. With ``unknown_fields="warn"`` unknown ones are dropped and reported.

    ``located`` makes of a place in ``model`` the place in ``fields``, where those differ.

    Raises:
        InvalidRequest: the first thing that is wrong, with the field's name.
    """
    try:
        return Validated(model.model_validate(fields), ())
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    unknown = [located(detail["loc"]) for detail in details if detail["type"] == "extra_forbidden"]
    if unknown_fields == "error" or not unknown:
        raise _invalid(details[0], located(details[0]["loc"]))
    for location in unknown:
        _drop(fields, location)
    try:
        request = model.model_validate(fields)
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        raise _invalid(detail, located(detail["loc"])) from None
    return Validated(request, tuple(_param(location) for location in unknown))


def _invalid(detail: Mapping[str, Any], location: Location) -> InvalidRequest:
    param = _param(location)
    kind = detail["type"]
    if kind in _BOUNDS:
        limit = next(iter(detail["ctx"].values()))
        code = f"{'integer' if isinstance(limit, int) else 'decimal'}_{_BOUNDS[kind]}"
    else:
        code = _CODES.get(kind, "invalid_type")
    if code == "unknown_parameter":
        message = f"Unrecognized request argument: '{param}'."
    elif code == "missing_required_parameter":
        message = f"Missing required parameter: '{param}'."
    else:
        # Our models compare with constants of their own only, so no text of pydantic's repeats the input.
        message = f"Invalid value for '{param}': {detail['msg']}."
    return InvalidRequest(message, param=param, code=code)


def _param(location: Location) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "[key]":  # pydantic's mark for the key of a mapping rather than its value
            path += f".{clean_name(part)}" if path else clean_name(part)
    return path[:_MAX_PARAM_CHARS]


def _drop(fields: dict[str, Any], location: Location) -> None:
    parent: Any = fields
    for part in location[:-1]:
        parent = parent[part]
    del parent[location[-1]]


def _diagnosed(body: bytes) -> InvalidRequest:
    """What to say of a body that is no JSON: the field, if a lenient parser finds one to blame."""
    if len(body) <= _MAX_DIAGNOSED_BYTES:
        try:
            value = json.loads(body, parse_int=_bounded_int)
        except (ValueError, RecursionError):
            value = None
        try:
            _refuse(value, _is_unreal, "must be a finite number that fits 64 bits")
            _refuse(value, _has_surrogate, "must be valid Unicode, without lone surrogates")
        except InvalidRequest as error:
            return error
    return InvalidRequest("We could not parse the JSON body of your request.", param=None, code="invalid_json")


def _refuse(value: object, is_bad: Callable[[object], bool], message: str) -> None:
    for place, leaf in _leaves(value):
        if is_bad(leaf):
            param = _param(_location(place)) or None
            what = "The body" if param is None else f"'{param}'"
            raise InvalidRequest(f"{what} {message}.", param=param, code="invalid_value")


class _Place(NamedTuple):
    """Where a value is: a link to the place of what holds it. Whole paths would cost depth times width."""

    parent: _Place | None
    part: int | str


def _location(place: _Place | None) -> Location:
    parts: list[int | str] = []
    while place is not None:
        parts.append(place.part)
        place = place.parent
    return tuple(reversed(parts))


def _leaves(value: object) -> Iterator[tuple[_Place | None, object]]:
    """Keys and scalar values with their places, but none of what was merely sent back.

    Iterative: the value may be nested deeply.
    """
    pending: list[tuple[_Place | None, object]] = [(None, value)]
    while pending:
        place, item = pending.pop()
        if isinstance(item, dict):
            for key, child in item.items():
                yield _Place(place, key), key
                if not _is_sent_back(key, child):
                    pending.append((_Place(place, key), child))
        elif isinstance(item, list):
            pending.extend((_Place(place, index), child) for index, child in enumerate(item))
        else:
            yield place, item


def _holds_nul(value: object) -> bool:
    """As ``_leaves`` and ``_has_nul``, in a tenth of the time."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            if any("\0" in key for key in item):
                return True
            pending += [child for key, child in item.items() if not _is_sent_back(key, child)]
        elif isinstance(item, list):
            pending += [child for child in item if not isinstance(child, int | float)]
        elif _has_nul(item):
            return True
    return False


def _is_sent_back(key: str, value: object) -> bool:
    """Log-probabilities of an earlier answer, which nobody looks at: they name tokens, and one token is NUL."""
    return key == "logprobs" and isinstance(value, list)


def _bounded_int(digits: str) -> float:
    return int(digits) if len(digits) <= _MAX_INT_DIGITS else math.inf


def _is_unreal(leaf: object) -> bool:
    return isinstance(leaf, float) and not math.isfinite(leaf)


def _has_surrogate(leaf: object) -> bool:
    return isinstance(leaf, str) and any("\ud800" <= character <= "\udfff" for character in leaf)


def _has_nul(leaf: object) -> bool:
    return isinstance(leaf, str) and "\0" in leaf
