"""The HTTP API against its own OpenAPI: requests that fit it and requests that do not, made by schemathesis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode, checks

from tests.serving.hostile import check_hostile
from tests.serving.local import local_gateway

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")

EXAMPLES = 20
OPERATIONS = (
    ("/v1/predict", "POST"),
    ("/v1/predict/batch", "POST"),
    ("/v1/score", "POST"),
    ("/v1/feedback", "POST"),
    ("/v1/chat/completions", "POST"),
    ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"),
    ("/v1/policy", "GET"),
    ("/v1/policy/curve", "GET"),
    ("/healthz", "GET"),
    ("/metrics", "GET"),
)
TAKES_NOTHING = {(path, "GET") for path in ("/v1/models", "/v1/models/{model}", "/v1/policy", "/healthz", "/metrics")}
"""Operations to which nothing wrong can be sent."""

CASES = [
    (*operation, mode)
    for operation in OPERATIONS
    for mode in GenerationMode
    if mode is GenerationMode.POSITIVE or operation not in TAKES_NOTHING
]
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with local_gateway(tmp_path_factory.mktemp("gateway")) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_no_operation_is_left_out(api: Any) -> None:
    found = {(made.ok().path, made.ok().method.upper()) for made in api.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_every_request_is_answered_as_the_schema_says(api: Any, path: str, method: str, mode: GenerationMode) -> None:
    operation = api[path][method]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=60)

    ask()


def test_what_no_client_should_send_is_refused_and_the_next_request_is_answered(tmp_path: Path) -> None:
    with local_gateway(tmp_path, max_body_bytes=1_000_000) as url:
        assert check_hostile(url) > 40
