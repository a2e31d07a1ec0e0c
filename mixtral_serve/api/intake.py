"""From an HTTP request to a checked order: the first half of the endpoints that generate.

Owns: ``Intake`` and ``Order``, and what ``reading`` shares with it: the checks of the model, and the warning header.
The order of the checks is fixed: who asks, whether there is memory to read a body into, then the body, then the
model's name, then whether the engine is there at all. So a bad request is told what is wrong with it at any time, also
while the model loads.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from starlette.requests import Request

from mixtral_serve.api.body import Location, parse_json, validated
from mixtral_serve.api.convert import Origin
from mixtral_serve.api.deps import Dependencies
from mixtral_serve.api.errors import ModelNotFound
from mixtral_serve.api.formats import AnswerHead
from mixtral_serve.api.schemas.common import GenerationRequest
from mixtral_serve.api.schemas.refused import Screen
from mixtral_serve.contract import ModelInfo
from mixtral_serve.engine.errors import EngineUnavailable

RequestT = TypeVar("RequestT", bound=GenerationRequest)

WARNING_HEADER: Final = "x-mixtral-serve-warning"
_LOADING_RETRY_AFTER_S: Final = 5.0
_MAX_WARNED_FIELDS: Final = 64


@dataclass(frozen=True, slots=True)
class Order(Generic[RequestT]):
    """A checked request and what its answer needs."""

    request: RequestT
    info: ModelInfo
    origin: Origin
    head: AnswerHead
    headers: dict[str, str]


class Intake(Generic[RequestT]):
    """Reads and checks the requests of one endpoint."""

    def __init__(
        self,
        deps: Dependencies,
        model: type[RequestT],
        *,
        screen: Callable[[Mapping[str, Any], Screen], dict[str, Any]],
        located: Callable[[Location], Location] = lambda location: location,
    ) -> None:
        """``screen`` drops nulls and refuses unsupported fields before ``model`` validates; ``located`` as there."""
        self._deps = deps
        self._model = model
        self._screen = screen
        self._located = located

    async def read(self, request: Request, *, id_prefix: str, prompt_param: str) -> Order[RequestT]:
        """The order in a request.

        Raises:
            ApiError: it is not well formed, too large or too slow, or names no model that is served.
            EngineUnavailable: memory is short, or no model was loaded yet.
        """
        deps = self._deps
        arrival_s = deps.clock()
        caller = deps.authenticate(request.headers)
        deps.check_memory()
        unknown_fields = deps.settings.unknown_fields
        screen = Screen(drops=unknown_fields == "warn")
        fields = self._screen(parse_json(await request.body()), screen)
        checked = validated(self._model, fields, unknown_fields=unknown_fields, located=self._located)
        asked = checked.request
        asked.check_fields(max_n=deps.settings.max_n)
        require_model(asked.model, deps)
        info = require_info(deps)
        answer_id = f"{id_prefix}-{secrets.token_hex(16)}"
        return Order(
            request=asked,
            info=info,
            origin=Origin(answer_id, caller, arrival_s, prompt_param),
            head=AnswerHead(answer_id, int(deps.wall_clock()), asked.model, info.fingerprint),
            headers=warning_headers([*screen.dropped, *checked.ignored]),
        )


def require_info(deps: Dependencies) -> ModelInfo:
    """What is known of the model; raises ``EngineUnavailable`` while none was loaded yet."""
    info = deps.engine.info
    if info is None:
        raise EngineUnavailable(deps.engine.state.value, _LOADING_RETRY_AFTER_S)
    return info


def warning_headers(ignored: Sequence[str]) -> dict[str, str]:
    """The header that names the fields that were ignored, the first of them at least; empty where none was."""
    return {WARNING_HEADER: "ignored: " + ", ".join(ignored[:_MAX_WARNED_FIELDS])} if ignored else {}


def require_model(name: str, deps: Dependencies) -> None:
    """Raises ``ModelNotFound`` unless the model is served under ``name``."""
    if name not in deps.model_names:
        raise ModelNotFound("The model does not exist or you do not have access to it. GET /v1/models lists what is.")
