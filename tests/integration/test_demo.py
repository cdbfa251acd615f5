"""The demo, from a corpus to a served answer: all its stages at their smallest size, and once as users run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from jobs import demo
from serve_apps import deploying

pytestmark = [pytest.mark.ray, pytest.mark.demo]

STAGES = ("select", "finetune", "sample-answers", "train-scorer", "predict", "calibrate")
# Few rows, and training enough to answer with a digit: of those every seventh is right by chance, all that is asked.
SMALLEST = {"_ROWS": 40, "_QUESTIONS": 480, "_STEPS": 20, "_ASKED": 2}


def check(out: Path, printed: str, asked: int) -> None:
    """What a finished demo leaves in its folder and shows to a newcomer."""
    for stage in STAGES:
        assert json.loads((out / stage / "manifest.json").read_text())["status"] == "done", stage
        assert (out / stage / "report.html").is_file(), stage
        assert f"{out / stage / 'report.html'}" in printed.splitlines()[-1], stage
    assert re.search(r"served at http://\S+:", printed), printed
    replies = re.findall(r"^  (.+?): (.+); right is (\S+)$", printed, re.M)
    assert len(replies) == asked
    questions = {row["question"]: row["answer"] for row in json.loads((out / "questions.json").read_text())}
    assert {question: right for question, _, right in replies}.items() <= questions.items()


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")
def test_every_stage_of_the_demo_hands_on_to_the_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A profile of Serve can only be chosen before Ray starts: the slow test has the one of the demo.
    with patch.multiple(demo, **SMALLEST), patch.object(deploying, "choose_profile", lambda profile: None):
        demo.demo(tmp_path)
    check(tmp_path, capsys.readouterr().out, asked=2)
    answers = json.loads((tmp_path / "sample-answers" / "manifest.json").read_text())
    trained = json.loads((tmp_path / "finetune" / "manifest.json").read_text())
    assert trained["tasks"]["instructions"]["rows_in"] == 20  # what select kept of 40
    assert answers["rows_in"] == 480
    assert answers["trained_on"], "the answers say nothing of questions that the model was trained on"
    policy = json.loads((tmp_path / "calibrate" / "policy.json").read_text())
    assert policy["fingerprints"]["route"].startswith("dialogue:")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_demo_ends_with_a_served_ensemble(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "jobs.demo", "--out", str(out)]
    root = Path(__file__).parents[2]
    found = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    check(out, found.stdout, asked=6)
