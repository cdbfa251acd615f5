"""The routes. Thin: a body is read, the service is asked, JSON goes back."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse

from serve_apps.web import streaming
from serve_apps.web.bodies import FeedbackBody, PredictBody, ScoreBody
from serve_apps.web.disconnect import ClientLeft, until_disconnect
from serve_apps.web.errors import ApiError, invalid, json_response
from serve_apps.web.openai_chat import ChatBody, chunks, completion, model_card, unknown_model
from serve_apps.web.policy_view import PolicyView
from serve_apps.web.service import Service, as_api_error, explain

_CLIENT_LEFT = 499  # seen by nobody; in the metrics it is told from answers


@dataclass(frozen=True, slots=True)
class Frame:
    """What surrounds the service. `health` gives (ready, JSON); `metrics` Prometheus text, or raises ApiError."""

    name: str
    longest_answer: int
    ui: bool
    health: Callable[[], Awaitable[tuple[bool, Mapping[str, Any]]]]
    metrics: Callable[[], Awaitable[str]]


def build_app(service: Service, frame: Frame) -> FastAPI:
    """The API as an ASGI application, without tokens and limits: those are the guard's."""
    app = FastAPI(title=frame.name, docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.include_router(_answers(service))
    app.include_router(_openai(service, frame))
    app.include_router(_policy(service))
    app.include_router(_operations(frame))
    app.add_exception_handler(RequestValidationError, _unreadable)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(ClientLeft, _client_left)
    app.add_exception_handler(Exception, _internal)
    return app


def _answers(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/predict", responses=_ERRORS | _STREAMED)
    async def predict(body: PredictBody, request: Request) -> Response:
        """Answer a question, or abstain. `stream`: server-sent events stage, turn, final and error."""
        request_id = request.state.request_id
        if not body.stream:
            return json_response(await until_disconnect(request, service.predict(body, request_id)))
        service.check(body)
        return streaming.stream(lambda emit: service.predict(body, request_id, emit))

    @routes.post("/v1/predict/batch", responses=_ERRORS)
    async def predict_batch(body: list[dict[str, Any]], request: Request) -> Response:
        """Answer many questions, in order; each item is a response or {error}."""
        work = service.predict_batch(body, request.state.request_id)
        return json_response(await until_disconnect(request, work))

    @routes.post("/v1/score", responses=_ERRORS)
    async def score(body: ScoreBody, request: Request) -> Response:
        """How far to trust an answer that somebody gave; null: it cannot be scored."""
        return json_response(await until_disconnect(request, service.score(body, request.state.request_id)))

    @routes.post("/v1/feedback", responses=_ERRORS | {409: _ERROR, 404: _ERROR})
    async def feedback(body: FeedbackBody) -> Response:
        """Say whether the answer with this id was right."""
        return json_response(await service.feedback(body))

    return routes


def _openai(service: Service, frame: Frame) -> APIRouter:
    routes = APIRouter(prefix="/v1")
    created = int(time.time())

    @routes.post("/chat/completions", responses=_ERRORS | _STREAMED | {404: _ERROR})
    async def chat(body: ChatBody, request: Request) -> Response:
        """As the OpenAI API; the last message is the question. An abstention is a refusal; see `selective`."""
        body.check(frame.name, frame.longest_answer)
        work = service.predict(body.as_predict(), request.state.request_id)
        response = await until_disconnect(request, work)
        if not body.stream:
            return json_response(completion(response, frame.name))
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        sent = chunks(response, frame.name, with_usage=with_usage)
        return StreamingResponse(sent, media_type="text/event-stream", headers=streaming.HEADERS)

    @routes.get("/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [model_card(frame.name, created)]})

    @routes.get("/models/{model}", responses={404: _ERROR})
    async def model(model: str) -> Response:
        if model != frame.name:
            raise unknown_model(model, frame.name)
        return json_response(model_card(frame.name, created))

    return routes


def _policy(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/policy")
    view = PolicyView()

    @routes.get("")
    async def policy() -> Response:
        """The promises of the policy in force, and the one that is made unless another is asked for."""
        return json_response(view.policy(service.active, service.predictor.model_version))

    @routes.get("/curve", responses={404: _ERROR})
    async def curve(task: str | None = None) -> Response:
        """What other thresholds would have done with the calibration questions."""
        return json_response(await view.curve(service.active, task))

    return routes


def _operations(frame: Frame) -> APIRouter:
    routes = APIRouter()

    @routes.get("/healthz", responses={503: {"description": "not ready"}})
    async def healthz() -> Response:
        """Whether questions can be answered, and by what."""
        ready, health = await frame.health()
        return json_response(health, 200 if ready else 503)

    @routes.get("/metrics", responses={503: _ERROR}, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus text, of all replicas."""
        return Response(await frame.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/", include_in_schema=False)
    async def root() -> Response:
        if not frame.ui:
            raise ApiError(404, "not_found", "there is no page here; the API is described at /openapi.json")
        return RedirectResponse("/ui/")

    @routes.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        """There is none; a browser that opens the page would report an error."""
        return Response(status_code=204)

    return routes


async def _unreadable(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = error.errors()
    param = ".".join(str(part) for part in problems[0]["loc"] if part != "body") or None if problems else None
    return invalid(explain(problems), param=param).response(request.url.path)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 400:  # FastAPI's own, for what is no UTF-8 or nested too deep
        return invalid("the body cannot be read as JSON").response(request.url.path)
    kind = "not_found" if error.status_code == 404 else "invalid_request"
    headers = list((error.headers or {}).items())
    return ApiError(error.status_code, kind, str(error.detail), headers=headers).response(request.url.path)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response(request.url.path)


async def _client_left(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)


async def _internal(request: Request, error: Exception) -> Response:
    return as_api_error(error, request.state.request_id).response(request.url.path)


_ERROR: dict[str, Any] = {
    "description": "error",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["type", "message"],
                        "properties": {"type": {"type": ["string", "null"]}, "message": {"type": "string"}},
                    }
                },
            }
        }
    },
}
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}
_ERRORS: dict[int | str, dict[str, Any]] = dict.fromkeys((401, 413, 422, 429, 503, 504), _ERROR)
