"""`ask`: answers, abstentions and mistakes as a user sees them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.ask import ask
from tests.serving.fake_gateway import LAST, FakeGateway, Fault, serving

app = typer.Typer()
app.command()(ask)


@pytest.fixture(scope="module")
def running() -> Iterator[FakeGateway]:
    with serving() as gateway:
        yield gateway


@pytest.fixture
def gateway(running: FakeGateway) -> FakeGateway:
    running.seen.clear()
    running.faults.clear()
    running.token = None
    return running


def run(gateway: FakeGateway, *arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [*arguments, "--url", gateway.url], input=stdin)


def test_an_answer_comes_with_its_confidence_and_its_promise(gateway: FakeGateway) -> None:
    result = run(gateway, "Who designed it?")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == LAST
    assert "confidence 88 %, after refinement" in result.stdout
    assert (
        "at most 10 % of the answers given are wrong, with probability 90 % over the 400 calibration" in result.stdout
    )


def test_an_abstention_is_a_result_with_a_reason(gateway: FakeGateway) -> None:
    result = run(gateway, "Will it rain?")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "No answer: no answer was sure enough (confidence 55 %)."


def test_the_trace_shows_what_each_turn_changed(gateway: FakeGateway) -> None:
    lines = run(gateway, "Who designed it?", "--trace").stdout.splitlines()
    assert lines[0] == "draft of primary (unchecked)"
    assert lines[2:5] == [
        "turn 1 of first (unchecked, changed)",
        "  The [-bridge-] {+viaduct+} was designed by Gustave Eiffel in [-1884-] {+1880+}",
        "  # A viaduct, and earlier.",
    ]
    assert "turn 3 of first (unchecked, kept)" in lines
    assert gateway.seen[0]["body"]["include_trace"] is True


def test_json_is_the_reply_and_nothing_else(gateway: FakeGateway) -> None:
    result = run(gateway, "-", "--json", "--risk", "0.05", "--task", "art", stdin="Where is it?\n")
    assert json.loads(result.stdout)["decision"] == "answer"
    assert gateway.seen[0]["body"] == {"question": "Where is it?", "target_risk": 0.05, "task": "art"}


def test_context_may_be_a_file(gateway: FakeGateway, tmp_path: Path) -> None:
    page = tmp_path / "page.txt"
    page.write_text("It stands in Paris.\n", encoding="utf-8")
    run(gateway, "Where?", "--context", f"@{page}")
    assert gateway.seen[0]["body"]["context"] == "It stands in Paris."
    missing = run(gateway, "Where?", "--context", "@nowhere.txt")
    assert missing.exit_code == 2
    assert "error: --context @nowhere.txt: cannot be read" in missing.stderr


def test_stream_tells_the_steps_apart_from_the_answer(gateway: FakeGateway) -> None:
    result = run(gateway, "Who designed it?", "--stream")
    assert result.stdout.splitlines()[0] == LAST
    assert "turn 1: first changed the answer" in result.stderr
    assert LAST not in result.stderr


def test_nobody_there_says_how_to_start_a_server() -> None:
    result = CliRunner().invoke(app, ["Where?", "--url", "http://127.0.0.1:9", "--timeout", "1"])
    assert result.exit_code == 2
    assert "nobody answers at http://127.0.0.1:9" in result.stderr
    assert "stitch-ray serve CONFIG.yaml" in result.stderr


def test_mistakes_are_exit_code_2(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = run(gateway, "Where?", "--risk", "0.2")
    assert (unknown.exit_code, "calibrated are [0.1, 0.05, 0.01]" in unknown.stderr) == (2, True)
    empty = run(gateway, "-", stdin=" \n")
    assert (empty.exit_code, empty.stderr) == (2, "error: the question is empty\n")
    gateway.token = "s3cret"
    nameless = run(gateway, "Where?")
    assert (nameless.exit_code, "give --token-env" in nameless.stderr) == (2, True)
    monkeypatch.setenv("WRONG", "wr0ng")
    result = run(gateway, "Where?", "--token-env", "WRONG")
    assert (result.exit_code, "the token in WRONG" in result.stderr, "wr0ng" in result.stderr) == (2, True, False)


def test_a_failing_server_is_exit_code_1(gateway: FakeGateway) -> None:
    gateway.faults[:] = [Fault(status=504)]
    result = run(gateway, "Where?")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "HTTP 504" in result.stderr
