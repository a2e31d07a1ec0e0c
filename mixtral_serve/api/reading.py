"""From an HTTP request to a checked one, for endpoints that do not answer with generated text.

Owns: ``Fields`` (a body that is JSON, from somebody who may ask) and ``Received`` (a checked request). The order of
the checks is that of ``intake``: who asks, whether there is memory to read a body into, the body, the model's name
(where one is given), and whether a model is there at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from starlette.requests import Request

from mixtral_serve.api.auth import Caller
from mixtral_serve.api.body import parse_json, validated
from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.intake import require_info, require_model, warning_headers
from mixtral_serve.api.schemas.refused import Refused, Screen
from mixtral_serve.api.schemas.tokens import NamedRequest
from mixtral_serve.contract import ModelInfo

RequestT = TypeVar("RequestT", bound=NamedRequest)


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a body, unchecked, and who sent it when."""

    fields: dict[str, Any]
    caller: Caller
    arrival_s: float

    def split(self, names: Set[str]) -> tuple[dict[str, Any], Fields]:
        """The fields of these ``names``, and the others."""
        chosen = {name: value for name, value in self.fields.items() if name in names}
        others = {name: value for name, value in self.fields.items() if name not in names}
        return chosen, replace(self, fields=others)


@dataclass(frozen=True, slots=True)
class Received(Generic[RequestT]):
    """A checked request."""

    request: RequestT
    caller: Caller
    arrival_s: float
    info: ModelInfo
    model_name: str
    """The name that the answer carries."""
    ignored: tuple[str, ...]
    """Fields that were dropped."""

    @property
    def headers(self) -> dict[str, str]:
        """Of the answer."""
        return warning_headers(self.ignored)


async def read_fields(request: Request, deps: Dependencies) -> Fields:
    """Read the body of ``request``.

    Raises:
        ApiError: it is no JSON object, too large or too slow, or from somebody who may not ask.
        EngineUnavailable: memory is short.
    """
    arrival_s = deps.clock()
    caller = deps.authenticate(request.headers)
    deps.check_memory()
    return Fields(parse_json(await request.body()), caller, arrival_s)


def received(
    read: Fields, deps: Dependencies, model: type[RequestT], *, refused: Mapping[str, Refused]
) -> Received[RequestT]:
    """Check the fields of a body.

    Raises:
        ApiError: they are not what ``model`` describes, ask for what is ``refused``, or name no model that is served.
        EngineUnavailable: no model was loaded yet.
    """
    unknown_fields = deps.settings.unknown_fields
    screen = Screen(drops=unknown_fields == "warn")
    checked = validated(model, screen.fields(read.fields, refused), unknown_fields=unknown_fields)
    name = checked.request.model
    if name is not None:
        require_model(name, deps)
    return Received(
        request=checked.request,
        caller=read.caller,
        arrival_s=read.arrival_s,
        info=require_info(deps),
        model_name=name or deps.model_names[0],
        ignored=(*screen.dropped, *checked.ignored),
    )
