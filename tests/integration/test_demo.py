"""The demo, from a corpus to a served answer: all its stages at their smallest size, and once as users run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

STAGES = ("select", "finetune", "sample-answers", "train-scorer", "predict", "calibrate")
# Few rows, and training enough to answer with a digit: of those every seventh is right by chance, all that is asked.
SMALLEST = """
import sys
from pathlib import Path
import jobs.demo as demo
from tests.forking import forked_workers
demo._ROWS, demo._QUESTIONS, demo._STEPS, demo._ASKED = 40, 480, 20, 2
with forked_workers():
    demo.demo(Path(sys.argv[1]))
"""


def run_demo(command: list[str], asked: int) -> Path:
    """The folder of a finished demo; its output is checked for what a newcomer is shown."""
    out = Path(command[-1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["RAY_AUTH_MODE"] = "disabled"
    root = Path(__file__).parents[2]
    found = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=1500, check=False
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    for stage in STAGES:
        assert json.loads((out / stage / "manifest.json").read_text())["status"] == "done", stage
        assert (out / stage / "report.html").is_file(), stage
    url = re.search(r"served at (http://\S+):", found.stdout)
    assert url, found.stdout
    replies = re.findall(r"^  (.+?): (.+); right is (\S+)$", found.stdout, re.M)
    assert len(replies) == asked
    questions = {row["question"]: row["answer"] for row in json.loads((out / "questions.json").read_text())}
    assert {question: right for question, _, right in replies}.items() <= questions.items()
    return out


def test_every_stage_of_the_demo_hands_on_to_the_next(tmp_path: Path) -> None:
    out = run_demo([sys.executable, "-c", SMALLEST, str(tmp_path / "demo")], asked=2)
    answers = json.loads((out / "sample-answers" / "manifest.json").read_text())
    trained = json.loads((out / "finetune" / "manifest.json").read_text())
    assert trained["tasks"]["instructions"]["rows_in"] == 20  # what select kept of 40
    assert answers["rows_in"] == 480
    assert answers["trained_on"], "the answers say nothing of questions that the model was trained on"
    policy = json.loads((out / "calibrate" / "policy.json").read_text())
    assert policy["fingerprints"]["route"].startswith("dialogue:")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_demo_ends_with_a_served_ensemble(tmp_path: Path) -> None:
    out = run_demo([sys.executable, "-m", "stitch_ray.cli", "demo", "--out", str(tmp_path / "demo")], asked=6)
    assert json.loads((out / "predict" / "manifest.json").read_text())["rows_quarantined"] == 0
