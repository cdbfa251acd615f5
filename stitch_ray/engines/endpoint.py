"""A connection to a server that speaks the OpenAI API, with the token that the configuration names and no other."""

from __future__ import annotations

import asyncio
import os

from openai import APIConnectionError, APIStatusError, AsyncOpenAI, Omit, OpenAIError

from stitch_ray.config.reliability import EndpointConfig
from stitch_ray.errors import UserError
from stitch_ray.records import content_hash


def endpoint_fingerprint(config: EndpointConfig) -> str:
    """16 hex digits of URL and model name. What the server runs behind them cannot be told."""
    return content_hash(["endpoint", config.url.rstrip("/"), config.model])


def connect(config: EndpointConfig) -> AsyncOpenAI:
    """A client that does not retry. Every call on it needs `own_headers`."""
    return AsyncOpenAI(
        base_url=config.url, api_key=bearer_token(config) or "none", max_retries=0, timeout=config.timeout_s
    )


def own_headers(config: EndpointConfig) -> dict[str, str | Omit]:
    """Keeps what OPENAI_API_KEY, OPENAI_ORG_ID and OPENAI_PROJECT_ID hold from a server they were not meant for."""
    headers: dict[str, str | Omit] = {"OpenAI-Organization": Omit(), "OpenAI-Project": Omit()}
    return headers if config.api_key_env else {**headers, "Authorization": Omit()}


def check_endpoint(config: EndpointConfig, *, timeout_s: float = 10.0) -> None:
    """Raises UserError if the server cannot be reached or does not take the token. Asks for its list of models."""

    async def ask() -> None:
        async with connect(config) as client, asyncio.timeout(timeout_s):
            await client.models.list(extra_headers=own_headers(config))

    try:
        asyncio.run(ask())
    except APIStatusError as error:
        if error.status_code in (401, 403):
            variable = f"the token in {config.api_key_env}" if config.api_key_env else "requests without api_key_env"
            raise UserError(f"endpoint.url: {config.url} does not accept {variable}") from error
        # some servers have no list of models, and a busy one is there
    except (APIConnectionError, TimeoutError) as error:
        cause = error.__cause__ or error
        reason = str(cause) or type(cause).__name__
        raise UserError(
            f"endpoint.url: {config.url} cannot be reached ({reason}); start the server or correct it"
        ) from error
    except (OpenAIError, ValueError) as error:
        raise UserError(f"endpoint.url: {config.url} does not speak the OpenAI API ({error})") from error


def bearer_token(config: EndpointConfig) -> str | None:
    """Raises UserError if the variable that should hold it is not set or empty."""
    if config.api_key_env is None:
        return None
    token = os.environ.get(config.api_key_env, "").strip()
    if not token:
        raise UserError(
            f"endpoint.api_key_env: the environment variable {config.api_key_env} is not set; "
            f"put the token of {config.url} into it"
        )
    return token
