"""Schemathesis reads ``/openapi.json`` and sends what it allows and what not: no 5xx, and answers as described."""

from __future__ import annotations

from typing import Any, Final

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks
from schemathesis.generation import GenerationMode

from mixtral_serve.api.openapi import OPERATIONS, Operation

_CHECKS: Final = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
]
_WITH_BODY: Final = [each for each in OPERATIONS if each.body]
_WITHOUT: Final = [each for each in OPERATIONS if not each.body]


def name_of(value: object) -> str | None:
    return value.path if isinstance(value, Operation) else None


def fuzz(api: Any, operation: Operation, mode: GenerationMode, max_examples: int) -> None:
    document = schemathesis.openapi.from_asgi("/openapi.json", api.app)
    described = document[operation.path][operation.method.upper()]

    @given(case=described.as_strategy(generation_mode=mode))
    @settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: Any) -> None:
        case.call_and_validate(checks=_CHECKS)

    send()
    api.assert_alive()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", _WITH_BODY, ids=name_of)
def test_whatever_is_sent_the_answer_is_as_described(api: Any, operation: Operation, mode: GenerationMode) -> None:
    fuzz(api, operation, mode, max_examples=40)


@pytest.mark.slow
@pytest.mark.parametrize("operation", _WITHOUT, ids=name_of)
def test_what_takes_no_body_answers_as_described(api: Any, operation: Operation) -> None:
    fuzz(api, operation, GenerationMode.POSITIVE, max_examples=20 if operation.parameter else 1)
