"""Requests and replies of the OpenAI chat API: what is sent, and what is read from it."""

from __future__ import annotations

import json
import math
from typing import Any

from stitch_ray.engines.base import EngineError, Generation, Request, Sampling
from stitch_ray.records import Turn, content_hash


def chat_body(model: str, request: Request) -> dict[str, Any]:
    """What is sent, but for seed and n. Raises EngineError for a request that an endpoint cannot serve."""
    sampling = request.sampling
    try:
        body: dict[str, Any] = {
            "model": model,
            "messages": _messages(request),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.top_p != 1:
            body["top_p"] = sampling.top_p
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.token_stats:
            body |= {"logprobs": True, "top_logprobs": 2}
        if sampling.json_schema is not None:
            schema = {"name": "answer", "schema": json.loads(sampling.json_schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
    except ValueError as error:  # no JSON, or lone surrogates
        raise EngineError(request.request_id, str(error)) from error
    return body


def sample_seed(sampling: Sampling, number: int) -> dict[str, int]:
    """31 bits, which every server takes, unrelated for neighbouring seeds and samples."""
    return {} if sampling.seed is None else {"seed": int(content_hash([sampling.seed, number])[:8], 16) >> 1}


def read_completion(request: Request, completion: Any) -> list[Generation]:
    """Raises ValueError or AttributeError if it is no completion, and EngineError for an answer that was withheld."""
    if not completion.choices:
        raise ValueError("it has no choices")
    usage = completion.usage
    details = usage.prompt_tokens_details if usage else None
    answers = []
    for choice in completion.choices:
        message, reason = choice.message, choice.finish_reason
        if message.refusal or reason == "content_filter":
            raise EngineError(request.request_id, f"the server withheld the answer ({message.refusal or reason})")
        if reason not in ("stop", "length"):
            raise ValueError(f"finish_reason {reason!r}")
        text = message.content or ""
        if not isinstance(text, str):
            raise ValueError(f"content of type {type(text).__name__}")
        end = min((at for stop in request.sampling.stop if (at := text.find(stop)) >= 0), default=None)
        text = text if end is None else text[:end]
        logprobs, margins = _token_values(choice, text) if request.sampling.token_stats else (None, None)
        answers.append(
            Generation(
                text=text,
                token_ids=(),
                finish_reason=reason if end is None else "stop",
                prompt_tokens=usage.prompt_tokens if usage else 0,
                cached_tokens=(details.cached_tokens or 0) if details else 0,
                # the server counts all choices together
                completion_tokens=usage.completion_tokens if usage and len(completion.choices) == 1 else None,
                logprobs=logprobs,
                margins=margins,
            )
        )
    return answers


def _token_values(choice: Any, text: str) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Log-probabilities and margins, p of the first less p of the second choice, of the tokens of `text`."""
    tokens = choice.logprobs.content if choice.logprobs else None
    if tokens is None or (text and not tokens):
        return None, None
    if "".join(token.token for token in tokens).startswith(text):
        # servers also list the end-of-sequence token, and those of a stop string
        length, count = 0, 0
        while length < len(text):
            length, count = length + len(tokens[count].token), count + 1
        tokens = tokens[:count]
    logprobs = tuple(float(token.logprob) for token in tokens)
    if any(math.isnan(value) for value in logprobs):
        raise ValueError("a log-probability is NaN")
    best = [sorted((one.logprob for one in token.top_logprobs or ()), reverse=True)[:2] for token in tokens]
    if any(len(two) < 2 for two in best):
        return logprobs, None
    return logprobs, tuple(math.exp(first) - math.exp(second) for first, second in best)


def read_piece(chunk: Any) -> str:
    """Text of one chunk of a stream. Raises as `read_completion`."""
    if not chunk.choices:
        return ""
    choice = chunk.choices[0]
    if choice.finish_reason == "content_filter":
        raise ValueError("the server withheld the answer")
    return choice.delta.content or ""


def _messages(request: Request) -> list[dict[str, str]]:
    if request.adapter is not None:
        raise ValueError(f"an endpoint has no adapters, and the request names {request.adapter!r}")
    if not request.prompt or not isinstance(request.prompt[0], Turn):
        raise ValueError("an endpoint takes conversations only, no text or token ids")
    messages = [{"role": turn.role, "content": turn.content} for turn in request.prompt]  # type: ignore[union-attr]
    for message in messages:
        message["content"].encode()
    return messages
