"""The scorer in this process: calls that come while it reads share the next forward, and keep their own answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from stitch_ray.ensemble.asking import asked
from stitch_ray.ensemble.scoring import GatheredScoring, LocalScorer
from stitch_ray.ensemble.types import Question
from stitch_ray.records import Turn
from stitch_ray.reliability.probability import Isotonic
from stitch_ray.reliability.scorer.combined import ReliabilityScorer
from stitch_ray.reliability.scorer.file import ScorerFile
from stitch_ray.reliability.scorer.inputs import ScoreInput
from stitch_ray.reliability.scorer.logistic import LogisticStack

pytestmark = pytest.mark.numeric

FILE = ScorerFile(
    encoder_fingerprint=None,
    loss=None,
    max_length=None,
    stack=LogisticStack(("perplexity",), (0.0,), (1.0,), (-1.0,), 0.0),
    isotonic=Isotonic((-10.0, 10.0), (0.0, 1.0)),
    answers_from=None,
)


class Watched(ReliabilityScorer):
    """Keeps what it was shown, and reads its first batch when it is let."""

    def __init__(self) -> None:
        super().__init__(FILE, None)
        object.__setattr__(self, "batches", [])
        object.__setattr__(self, "go", threading.Event())

    def score(self, inputs: Sequence[ScoreInput], signals: Any) -> Any:
        self.batches.append(list(inputs))  # type: ignore[attr-defined]
        assert self.go.wait(10)  # type: ignore[attr-defined]
        return super().score(inputs, signals)


def request(number: int) -> dict[str, Any]:
    return {"question": "who?", "answer": f"a{number}", "signals": {"perplexity": float(number)}}


def expected(number: int) -> float:
    values: NDArray[np.float64] = FILE.isotonic.apply(np.array([-float(number)]))
    return float(values[0])


def test_calls_that_come_while_it_reads_share_the_next_forward() -> None:
    scorer: Any = Watched()

    async def run() -> list[dict[str, Any]]:
        scoring = GatheredScoring(scorer, largest_batch=4)
        tasks = [asyncio.create_task(scoring.score(request(0)))]
        while not scorer.batches:
            await asyncio.sleep(0)
        tasks += [asyncio.create_task(scoring.score(request(number))) for number in range(1, 7)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.sleep(0)
        scorer.go.set()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found.pop(2), asyncio.CancelledError)
        return found  # type: ignore[return-value]

    found = asyncio.run(run())
    assert [one["confidence"] for one in found] == [expected(n) for n in (0, 1, 3, 4, 5, 6)]
    assert [[one.answer for one in batch] for batch in scorer.batches] == [["a0"], ["a1", "a3", "a4"], ["a5", "a6"]]


def test_what_is_no_request_is_refused_alone_and_a_failure_is_told_to_all_of_the_batch() -> None:
    class Broken(Watched):
        def score(self, inputs: Sequence[ScoreInput], signals: Any) -> Any:
            raise RuntimeError("no memory")

    async def run() -> None:
        with pytest.raises(ValueError, match="answer must be a text"):
            await GatheredScoring(ReliabilityScorer(FILE, None)).score({"question": "who?", "answer": 1})
        scoring = GatheredScoring(Broken())
        for _ in range(2):
            found = await asyncio.gather(*(scoring.score(request(n)) for n in range(2)), return_exceptions=True)
            assert [str(one) for one in found] == ["no memory"] * 2

    asyncio.run(run())


def test_it_is_shown_what_it_was_trained_on() -> None:
    scorer: Any = Watched()
    scorer.go.set()
    history = (Turn("user", "Who?"), Turn("assistant", "Homer."))
    question = Question(example_id="q", question="When?", context="Iliad", history=history)
    confidence = asyncio.run(LocalScorer(scorer).score(question, "Long ago", {"perplexity": 2.0}))
    assert confidence == expected(2)
    shown = asked(question)
    assert scorer.batches == [[ScoreInput("When?", "Long ago", shown.context)]]
    assert asyncio.run(LocalScorer(scorer).score(question, "Long ago", {"perplexity": None})) is None
