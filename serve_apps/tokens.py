"""Bearer tokens: read where the ensemble is deployed, and known to gateways by their digests only."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from serve_apps.web.guard import digest
from stitch_ray.config.serve import HttpConfig
from stitch_ray.errors import UserError

SHORTEST = 16


def read_tokens(http: HttpConfig) -> list[str]:
    """Raises UserError if the variable or the file is not there, or holds no usable token. [] where none is needed."""
    if http.token_env:
        where, text = f"http.token_env: {http.token_env}", os.environ.get(http.token_env, "")
    elif http.token_file:
        where = f"http.token_file: {http.token_file}"
        try:
            text = Path(http.token_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where} cannot be read ({type(error).__name__})") from error
    else:
        return []
    tokens = [line.strip() for line in text.splitlines() if line.strip()]
    if not tokens:
        raise UserError(
            f"{where} holds no token; put one there (python -c 'import secrets; print(secrets.token_hex(32))')"
        )
    if any(len(token) < SHORTEST or not token.isascii() or " " in token for token in tokens):
        raise UserError(f"{where}: a token has at least {SHORTEST} characters, all ASCII, and no blanks")
    return tokens


def page_token(tokens: Sequence[str]) -> str | None:
    """The page's own token, so that it holds none of those that people have; it changes when they do."""
    if not tokens:
        return None
    return hashlib.sha256("\n".join(["stitch-ray page", *tokens]).encode()).hexdigest()


def digests(tokens: Sequence[str]) -> list[str]:
    """Of all tokens that the API accepts, the page's among them."""
    own = page_token(tokens)
    return [digest(token.encode()) for token in (*tokens, *([own] if own else []))]
