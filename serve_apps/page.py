"""The web page: ask, see the answer and how it came about, and what another threshold would have cost.

It talks to the HTTP API like any client, so it can do nothing that a client cannot. Made of Gradio, of the extra `ui`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI

from serve_apps.page_curve import numbers, plot, point_at, points_of
from serve_apps.page_style import CODE_FONTS, CSS, TEXT_FONTS
from serve_apps.page_views import (
    answer_card,
    commands,
    dialogue,
    error_card,
    promise_line,
    steps_table,
    waiting_card,
)
from stitch_ray.client import ApiError, AsyncClient, ClientError, Reply
from stitch_ray.client.protocol import question_body
from stitch_ray.client.words import find_target, percent
from stitch_ray.errors import UserError

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported: nobody is told that this page exists
try:
    import gradio as gr
except ImportError as error:
    raise UserError(
        "ui: the page needs Gradio; install it with: pip install 'stitch-ray[ui]', or write ui: false"
    ) from error

_QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
_EMPTY = '<section class="sr-card empty"><span class="sr-badge">ready</span><p>Ask a question.</p></section>'
_MOST_AT_ONCE = 64
_TIMEOUT_S = 120.0


def mount_page(app: FastAPI, url: str, token: str | None, title: str, *, path: str = "/ui") -> FastAPI:
    """`app` with the page under `path`. See `build_page`."""
    theme = gr.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=list(TEXT_FONTS), font_mono=list(CODE_FONTS)
    ).set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400")
    return gr.mount_gradio_app(
        app, build_page(url, token, title), path=path, theme=theme, css=CSS, ssr_mode=False, show_error=False,
        footer_links=[], run_history=False, pwa=False, enable_monitoring=False, mcp_server=False,
    )  # fmt: skip


def build_page(url: str, token: str | None, title: str) -> gr.Blocks:
    """The page for the API at `url`.

    token: what the page asks with, for whoever opens it, and what no reader of it gets to see.
    """
    page = _Page(url, token, title)
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        page.draw(blocks)
    return blocks


class _Page:
    def __init__(self, url: str, token: str | None, title: str) -> None:
        self._url, self._token, self._title = url, token, title

    def draw(self, blocks: gr.Blocks) -> None:
        """Components and what happens on them."""
        known = gr.State({})
        gr.Markdown(f"# {self._title}")
        promised = _html()
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                question = gr.Textbox(label="Question", lines=1, max_lines=8, autofocus=True, elem_id="question",
                                      placeholder="Enter asks, Shift+Enter starts a new line")  # fmt: skip
                context = gr.Textbox(label="Context (optional)", lines=2, max_lines=12, elem_id="context",
                                     placeholder="A text that the answer is to be taken from")  # fmt: skip
                with gr.Row():
                    task = gr.Dropdown(label="Task", choices=[], visible=False, min_width=140, elem_id="task")
                    risk = gr.Dropdown(label="Wrong answers allowed", choices=[], min_width=180, elem_id="risk")
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
            with gr.Column(scale=6, min_width=320):
                answer = _html(_EMPTY, elem_id="answer")
                turns = _html(elem_id="dialogue")
        with gr.Accordion("Steps and signals", open=False, elem_id="steps"):
            table = _html(steps_table([]))
        with gr.Accordion("The same from a terminal", open=False, elem_id="commands"):
            curl = gr.Code(label="curl", language="shell", interactive=False, wrap_lines=True, lines=1, elem_id="curl")
            command = gr.Code(
                label="stitch-ray", language="shell", interactive=False, wrap_lines=True, lines=1, elem_id="cli"
            )
        gr.Markdown("## What another threshold would do")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                slider = gr.Slider(0, 1, step=0.001, label="Answer from this confidence on", elem_id="threshold")
                tiles = _html(elem_id="tiles")
            with gr.Column(scale=6, min_width=320):
                drawing = _html(elem_id="plot")

        chosen = [known, task, risk, slider]
        loaded = [known, promised, task, risk, slider, tiles, drawing, answer]
        blocks.load(self._load, None, loaded, **_QUIET)
        risk.input(self._choose, chosen, [promised, slider, tiles, drawing], **_QUIET)
        task.input(self._switch, chosen, [known, promised, risk, slider, tiles, drawing], **_QUIET)
        slider.change(self._slide, chosen, [tiles, drawing], queue=False, trigger_mode="always_last", **_QUIET)
        asking = gr.on([ask.click, question.submit], self._ask, [question, context, task, risk],
                       [answer, turns, table, curl, command], concurrency_limit=_MOST_AT_ONCE, **_QUIET)  # fmt: skip
        stop.click(lambda: _EMPTY, None, [answer], cancels=[asking], **_QUIET)

    async def _load(self) -> list[Any]:
        """What the server promises."""
        try:
            async with self._client(max_retries=2) as client:
                policy = await client.policy()
                known = {"policy": policy, "curve": await _curve(client, None)}
        except ClientError as error:
            return [{}, *[gr.skip()] * 6, error_card(error)]
        tasks = [(task or "any", task or "") for task in sorted({target["task"] or "" for target in policy["targets"]})]
        first = tasks[0][1]
        promised = promise_line(find_target(policy, first or None, _active(policy)))
        choice = gr.update(choices=tasks, value=first, visible=len(tasks) > 1)
        return [known, promised, choice, _risks(policy, first or None), *_panel(known, first, None, None), _EMPTY]

    def _choose(self, known: dict[str, Any], task: str | None, risk: float | None, _: float) -> list[Any]:
        """Another promise: the slider goes to its threshold."""
        target = find_target(known.get("policy", {}), task or None, risk)
        return [promise_line(target), *_panel(known, task, risk, None)]

    async def _switch(self, known: dict[str, Any], task: str | None, _: Any, __: float) -> list[Any]:
        """Another task, with promises and calibration answers of its own."""
        try:
            async with self._client() as client:
                known = {**known, "curve": await _curve(client, task or None)}
        except ClientError as error:
            return [gr.skip(), error_card(error), *[gr.skip()] * 4]
        policy = known.get("policy", {})
        target = find_target(policy, task or None, None)
        return [known, promise_line(target), _risks(policy, task or None), *_panel(known, task, None, None)]

    def _slide(self, known: dict[str, Any], task: str | None, risk: float | None, threshold: float) -> list[str]:
        _, tiles, drawing = _panel(known, task, risk, threshold)
        return [tiles, drawing]

    async def _ask(
        self, question: str, context: str, task: str | None, risk: float | None, request: gr.Request
    ) -> AsyncIterator[list[Any]]:
        """Cards as the work goes on, then the decided answer."""
        if not question.strip():
            yield [
                '<section class="sr-card empty" role="alert"><p>Write a question first.</p></section>',
                *[gr.skip()] * 4,
            ]
            return
        options: dict[str, Any] = {"context": context.strip() or None, "task": task or None, "target_risk": risk}
        assert request.request is not None
        public = str(request.request.base_url.replace(path="")).rstrip("/")
        lines = commands(public, question_body(question.strip(), **options), self._token is not None)
        events: list[tuple[str, dict[str, Any]]] = []
        yield [waiting_card(events), "", steps_table([]), *lines]
        try:
            async with self._client() as client:
                async for event, data in client.stream(question.strip(), include_trace=True, **options):
                    if event == "final":
                        reply = Reply.of(data)
                        yield [answer_card(reply), dialogue(reply.trace), steps_table(reply.trace), *lines]
                        return
                    events = [] if event == "restart" else [*events, (event, data)]
                    trace = [values for _, values in events]
                    yield [waiting_card(events), dialogue(trace), steps_table(trace), *lines]
        except ClientError as error:
            yield [error_card(error), "", steps_table([]), *lines]

    def _client(self, max_retries: int = 4) -> AsyncClient:
        return AsyncClient(self._url, token=self._token, timeout_s=_TIMEOUT_S, max_retries=max_retries)


def _html(value: str = "", **options: Any) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, **options)


async def _curve(client: AsyncClient, task: str | None) -> dict[str, Any] | None:
    """None where the policy's run kept no calibration answers."""
    try:
        return await client.curve(task)
    except ApiError as error:
        if error.status != 404:
            raise
        return None


def _active(policy: dict[str, Any]) -> float | None:
    """The target risk of requests that name none."""
    risk: float | None = (policy.get("active") or {}).get("target_risk")
    return risk


def _risks(policy: dict[str, Any], task: str | None) -> Any:
    first = find_target(policy, task, None)
    of_task = first["task"] if first else None
    mine = [target["target_risk"] for target in policy.get("targets", []) if target["task"] == of_task]
    active = _active(policy)
    value = active if active in mine else mine[0] if mine else None
    return gr.update(choices=[(f"at most {percent(value)}", value) for value in mine], value=value)


def _panel(known: dict[str, Any], task: str | None, risk: float | None, threshold: float | None) -> list[Any]:
    """Slider, tiles and plot; threshold None: the slider goes where the server is."""
    curve, policy = known.get("curve"), known.get("policy", {})
    if curve is None:
        return [
            gr.update(interactive=False),
            '<p class="sr-soft">The policy came without its calibration answers.</p>',
            "",
        ]
    risk = _active(policy) if risk is None else risk
    target = find_target(policy, task or None, risk) or find_target(policy, task or None, None)
    active = target["threshold"] if target else None
    points = points_of(curve)
    place = threshold if threshold is not None else active if active is not None else 1.0
    now = None if active is None else point_at(points, active)
    point = point_at(points, place)
    return [
        gr.update(value=place, interactive=True),
        numbers(point, active, curve["num"]),
        plot(points, point, now, target["target_risk"] if target else None),
    ]
