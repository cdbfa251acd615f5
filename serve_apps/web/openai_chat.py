"""The OpenAI chat API: any of its clients gets the decided answer, and what it is worth under `selective`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve_apps.web.bodies import MOST_TURNS, Body, PredictBody, TurnBody
from serve_apps.web.errors import ApiError, invalid

REFUSAL = {
    "unsure": "I am not sure enough of an answer to give one.",
    "scorer_unavailable": "I cannot tell how far to trust an answer, so I give none.",
    "route_failed": "I am not sure enough of my answer, and could not have it checked.",
    "deadline": "I found no answer that I am sure enough of in the time there was.",
    "budget": "I found no answer that I am sure enough of within what it may cost.",
}
"""Reason of an abstention -> what a chat shows in place of an answer."""

_REST = ("answer", "id")


class Part(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)


class StreamOptions(Body):
    include_usage: bool = False


class Selective(Body):
    """Our own options."""

    task: str | None = Field(None, min_length=1, max_length=256)
    target_risk: float | None = Field(None, gt=0, lt=1)
    include_trace: bool = False
    deadline_s: float | None = Field(None, gt=0)


class ChatBody(BaseModel):
    """Of the API's many options those that can be kept, and those that change nothing here.

    Without effect: temperature, top_p, seed, penalties (an answer is the one that the confidence was calibrated for), user,
    metadata, store. Refused: n other than 1, tools, logprobs, stop, response formats other than text, a max_tokens below
    what an answer may have (cut short, it would not be the answer that was checked), and everything unknown.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MOST_TURNS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    selective: Selective = Selective()  # type: ignore[call-arg]
    n: Literal[1] | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    def as_predict(self) -> PredictBody:
        """The last message is the question. Raises ApiError if it is not the user's, or blank."""
        *before, last = self.messages
        if last.role != "user":
            raise invalid(f"messages: the last one must be the user's question, not {last.role}'s", param="messages")
        history = [
            TurnBody(role="system" if turn.role == "developer" else turn.role, content=turn.text) for turn in before
        ]
        own = self.selective
        try:
            return PredictBody(
                question=last.text,
                history=history,
                task=own.task,
                target_risk=own.target_risk,
                include_trace=own.include_trace,
                deadline_s=own.deadline_s,
                context=None,
                max_calls=None,
                max_tokens=None,
            )
        except ValidationError as error:
            raise invalid("messages: the last one holds no question", param="messages") from error

    def check(self, name: str, longest_answer: int) -> None:
        """Raises ApiError for another model, and for a limit that would cut an answer."""
        if self.model != name:
            raise unknown_model(self.model, name)
        for key in ("max_tokens", "max_completion_tokens"):
            wanted = getattr(self, key)
            if wanted is not None and wanted < longest_answer:
                raise invalid(
                    f"{key}: an answer may have {longest_answer} tokens, and one that was cut short would not be the one "
                    "that was checked; leave it out, or give more",
                    param=key,
                )


def unknown_model(model: str, name: str) -> ApiError:
    message = f"there is no model {model[:200]!r} here, only {name!r}"
    return ApiError(404, "not_found", message, param="model", code="model_not_found")


def model_card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "stitch-ray"}


def selective(response: Mapping[str, Any]) -> dict[str, Any]:
    """What `POST /v1/predict` says of the answer beside its text."""
    return {key: value for key, value in response.items() if key not in _REST}


def usage(response: Mapping[str, Any]) -> dict[str, int]:
    """Tokens that all models read and wrote for the answer. They are not told apart: all stand under prompt_tokens."""
    tokens = int(response["tokens"])
    return {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}


def completion(response: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The chat completion. An abstention has no content, and a refusal in words."""
    message = {"role": "assistant", "content": response["answer"] or "", "refusal": _refusal(response)}
    return {
        "id": response["id"],
        "object": "chat.completion",
        "created": int(time.time()),
        "model": name,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": usage(response),
        "selective": selective(response),
    }


def chunks(response: Mapping[str, Any], name: str, *, with_usage: bool) -> Iterator[bytes]:
    """The decided answer as the chunks of a streamed completion. The last choice has the `selective` object."""
    base = {"id": response["id"], "object": "chat.completion.chunk", "created": int(time.time()), "model": name}

    def chunk(delta: Mapping[str, Any], finish: str | None = None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _data({**base, "choices": [choice], **more})

    yield chunk({"role": "assistant", "content": ""})
    if response["answer"] is None:
        yield chunk({"refusal": _refusal(response)})
    else:
        for piece in re.findall(r"\s*\S+\s*\Z|\s*\S+|\s+", response["answer"]):
            yield chunk({"content": piece})
    yield chunk({}, "stop", selective=selective(response))
    if with_usage:
        yield _data({**base, "choices": [], "usage": usage(response)})
    yield b"data: [DONE]\n\n"


def _refusal(response: Mapping[str, Any]) -> str | None:
    return None if response["decision"] == "answer" else REFUSAL.get(str(response["reason"]), REFUSAL["unsure"])


def _data(value: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(value, allow_nan=False, separators=(',', ':'))}\n\n".encode()
