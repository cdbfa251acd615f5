"""`stitch-ray ask`: one question to a served ensemble."""

if not __package__:
    raise SystemExit("run: python -m jobs.ask")

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from stitch_ray.client import ApiError, Client, Reply, Unreachable
from stitch_ray.client.steps import dialogue_lines, progress_line
from stitch_ray.client.words import abstention, find_target, percent, promise
from stitch_ray.console import exits
from stitch_ray.errors import UserError

_MISTAKES = {401, 404, 413, 422}


@exits
def ask(
    question: Annotated[
        str, typer.Argument(help="the question; - reads it from standard input", metavar="QUESTION", show_default=False)
    ],
    context: Annotated[
        str | None, typer.Option("--context", metavar="TEXT|@FILE", help="what the answer is to be taken from")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="task of the question, where the promise differs by task")
    ] = None,
    url: Annotated[str, typer.Option("--url", help="where the ensemble is served")] = "http://127.0.0.1:8000",
    token_env: Annotated[
        str | None, typer.Option("--token-env", metavar="VAR", help="environment variable with the bearer token")
    ] = None,
    risk: Annotated[
        float | None, typer.Option("--risk", metavar="R", help="share of wrong answers to allow, one of the calibrated")
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace", help="show the draft and the dialogue, which nobody checked, turn by turn")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the server's reply as JSON")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="say on standard error what is being done")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="longest wait", min=0.1)] = 120.0,
) -> None:
    """Ask a served ensemble one question, and print its answer with how sure it is, or that it abstains and why.

    Both are exit code 0: an abstention is a result.

        stitch-ray ask "Where is the Louvre?"

        stitch-ray ask "Who built it?" --context @page.txt --risk 0.05 --trace

        cat question.txt | stitch-ray ask - --json | jq .confidence
    """
    asked = _text(question if question != "-" else sys.stdin.read(), "the question")
    options: dict[str, Any] = {"context": _context(context), "task": task, "target_risk": risk, "include_trace": trace}
    with Client(url, token_env=token_env, timeout_s=timeout_s) as client:
        try:
            reply = _streamed(client, asked, options) if stream else client.predict(asked, **options)
            promised = None if as_json else find_target(client.policy(), task, reply.target_risk)
        except Unreachable as error:
            raise UserError(
                f"nobody answers at {url} ({error}); start a server with: stitch-ray serve CONFIG.yaml"
            ) from error
        except ApiError as error:
            if error.status in _MISTAKES:
                raise UserError(_advice(error, token_env)) from error
            raise
    if as_json:
        print(json.dumps(reply.raw, ensure_ascii=False, indent=2))
        return
    if trace:
        print("\n".join([*dialogue_lines(reply.trace), ""]))
    print(_shown(reply, promise(promised) if promised else None))


def _streamed(client: Client, question: str, options: dict[str, Any]) -> Reply:
    data: dict[str, Any] = {}
    for event, data in client.stream(question, **options):
        if event != "final":
            print(progress_line(event, data), file=sys.stderr, flush=True)
    return Reply.of(data)


def _shown(reply: Reply, promised: str | None) -> str:
    cost = f"{reply.calls} calls, {reply.tokens} tokens, {reply.seconds:.2f} s; request {reply.id}"
    if reply.answer is None:
        sure = "" if reply.confidence is None else f" (confidence {percent(reply.confidence)})"
        return f"No answer: {abstention(reply.reason)}{sure}.\n{cost}"
    how = "after refinement" if reply.reason == "refined" else "at once"
    says = f"confidence {percent(reply.confidence or 0.0)}, {how}" + (f"; {promised}" if promised else "")
    return f"{reply.answer}\n\n{says}\n{cost}"


def _context(given: str | None) -> str | None:
    if given is None or not given.startswith("@"):
        return given
    try:
        return _text(Path(given[1:]).read_text(encoding="utf-8"), f"--context {given}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--context {given}: cannot be read ({error})") from error


def _text(value: str, name: str) -> str:
    if not value.strip():
        raise UserError(f"{name} is empty")
    return value.strip()


def _advice(error: ApiError, token_env: str | None) -> str:
    if error.status == 401:
        held = (
            f"the token in {token_env} is not the server's"
            if token_env
            else "the server wants a token; give --token-env"
        )
        return f"{error.message}: {held}"
    return error.message


if __name__ == "__main__":
    typer.run(ask)
