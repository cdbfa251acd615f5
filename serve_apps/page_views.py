"""What the page shows of a reply, as HTML. Every text of a model or a user is escaped here."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from stitch_ray.client import ApiError, ClientError, Reply, TimedOut
from stitch_ray.client.steps import Version, is_turn, progress_line, versions
from stitch_ray.client.words import abstention, percent, promise, word_diff

TOKEN_VARIABLE = "STITCH_RAY_TOKEN"
_MARKS = {"same": "{}", "removed": "<del>{}</del>", "added": "<ins>{}</ins>"}
_TURN_KEYS = ("text", "comment", "unchecked", "number", "speaker", "stage", "signals", "seconds", "confidence")


def answer_card(reply: Reply) -> str:
    """The answer with its badge, or the abstention in words."""
    rated = "" if reply.confidence is None else f"confidence {percent(reply.confidence)}"
    if reply.answer is None:
        badge, told = "abstained", f"<p>No answer: {escape(abstention(reply.reason))}.</p>"
        how = "Nothing that was not checked is shown as an answer."
    else:
        badge, told = rated, f'<p class="text">{escape(reply.answer)}</p>'
        how = "Given after refinement." if reply.reason == "refined" else "The first draft was sure enough."
    extra = f" · {rated}" if reply.answer is None and rated else ""
    cost = f"{how} {_count(reply.calls, 'call')}, {_count(reply.tokens, 'token')}, {reply.seconds:.2f} s{extra}"
    return (
        f'<section class="sr-card {reply.decision}" role="status"><span class="sr-badge">{escape(badge)}</span>{told}'
        f'<p class="sr-soft">{escape(cost)}<br>policy {escape(str(reply.policy_version))} · request {escape(reply.id)}</p></section>'
    )


def waiting_card(events: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """What is being done, while nothing is decided."""
    last = [progress_line(event, data) for event, data in events][-1:] or ["the primary drafts an answer"]
    return f'<section class="sr-card waiting" role="status"><span class="sr-badge">working</span><p>{escape(last[0])} …</p></section>'


def error_card(error: ClientError) -> str:
    return f'<section class="sr-card error" role="alert"><span class="sr-badge">no result</span><p>{escape(error_words(error))}</p></section>'


def error_words(error: ClientError) -> str:
    """What went wrong, and what to do about it."""
    match error:
        case ApiError(status=401):
            words = "The server does not accept this page's token. Deploy the page again."
        case ApiError(status=413 | 422):
            words = f"The server does not take this question: {error.message}"
        case ApiError(status=429 | 503):
            words = "The server is busy or not ready. Try again in a moment."
        case ApiError(status=504) | TimedOut():
            words = "There was no answer in time. Try again, or ask for less."
        case ApiError():
            words = f"The server failed ({error.type}). Its log has more under request {error.request_id}."
        case _:
            words = "The server cannot be reached. Is it running?"
    return words


def promise_line(target: Mapping[str, Any] | None) -> str:
    if target is None:
        return ""
    if target["threshold"] is None:
        return f'<p class="sr-promise">Abstains on everything: {escape(str(target["reason"] or "no threshold could promise this"))}.</p>'
    return f'<p class="sr-promise">Promise: {escape(promise(target))}.</p>'


def dialogue(trace: Iterable[Mapping[str, Any]]) -> str:
    """The draft and every turn, with what each changed."""
    found = [_version(version) for version in versions(trace)]
    if len(found) < 2:
        return ""
    return f'<section class="sr-section"><h2>Dialogue</h2><ol class="sr-turns">{"".join(found)}</ol></section>'


def steps_table(trace: Iterable[Mapping[str, Any]]) -> str:
    """Every step with its confidence, signals, cost and time."""
    rows = []
    for step in trace:
        confidence = step.get("confidence")
        name = f"turn {step['number']}: {step['speaker']}" if is_turn(step) else str(step.get("stage", ""))
        facts = ", ".join(
            f"{key.replace('_', ' ')} {_value(value)}"
            for key, value in step.items()
            if key not in _TURN_KEYS and _plain(value)
        )
        signals = "".join(
            f"<dt>{escape(key)}</dt><dd>{_value(value)}</dd>" for key, value in (step.get("signals") or {}).items()
        )
        cells = [escape(name), "" if confidence is None else percent(confidence), escape(facts),
                 f"<dl>{signals}</dl>" if signals else "", f"{1000 * (step.get('seconds') or 0.0):.0f} ms"]  # fmt: skip
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    if not rows:
        return '<p class="sr-soft">Nothing asked yet.</p>'
    heads = "".join(f'<th scope="col">{head}</th>' for head in ("step", "confidence", "details", "signals", "time"))
    return f'<div class="sr-scroll" tabindex="0"><table class="sr-table"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def commands(url: str, body: Mapping[str, Any], with_token: bool) -> tuple[str, str]:
    """The same question for curl and for `stitch-ray ask`; a token stands in a variable."""
    data = shlex.quote(
        json.dumps({**body, "include_trace": False} if "include_trace" in body else dict(body), ensure_ascii=False)
    )
    authorization = f' \\\n  -H "authorization: Bearer ${TOKEN_VARIABLE}"' if with_token else ""
    curl = f"curl -sS {shlex.quote(url + '/v1/predict')} \\\n  -H 'content-type: application/json'{authorization} \\\n  -d {data}"
    options = {"--context": body.get("context"), "--task": body.get("task"), "--risk": body.get("target_risk")}
    given = "".join(f" {name} {shlex.quote(str(value))}" for name, value in options.items() if value is not None)
    ask = f"stitch-ray ask {shlex.quote(body['question'])}{given} --url {shlex.quote(url)}"
    return curl, ask + (f" --token-env {TOKEN_VARIABLE}" if with_token else "")


def _version(version: Version) -> str:
    kept = "changed" if version.changed else "kept"
    title = "draft" if version.number == 0 else f"turn {version.number}"
    chips = "" if version.number == 0 else f'<span class="sr-chip {kept}">{kept} the answer</span>'
    tries = f'<span class="sr-chip">{version.attempts} attempts</span>' if version.attempts > 1 else ""
    comment = f'<p class="comment">{escape(version.comment)}</p>' if version.comment else ""
    return (
        f'<li><header><b>{title}</b> <span class="who">{escape(version.speaker)}</span> '
        f'<span class="sr-chip unchecked">unchecked</span>{chips}{tries}</header>{_text(version)}{comment}</li>'
    )


def _text(version: Version) -> str:
    if version.text is None:
        return ""
    if version.before is None or not version.changed:
        return f'<p class="text">{escape(version.text)}</p>'
    runs = word_diff(version.before, version.text)
    return f'<p class="text">{" ".join(_MARKS[kind].format(escape(text.rstrip())) for kind, text in runs)}</p>'


def _plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and value != ""


def _value(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "not had"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
