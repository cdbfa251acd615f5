"""How right an answer is, in [0, 1], from the references or by a judge; NaN where it could not be told."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from string import Template

import numpy as np
from numpy.typing import NDArray

from stitch_ray.config.sample_answers import LabelsConfig
from stitch_ray.engines.base import EngineError, Request, Sampling
from stitch_ray.evaluation.answers import exact_match, rouge_l, token_f1
from stitch_ray.records import Turn, content_hash
from stitch_ray.reliability.answers.distractors import Generate
from stitch_ray.reliability.answers.replies import ReplyError, parse_verdict

_JUDGE_MAX_TOKENS = 512  # a verdict takes ten; a judge may think first


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """An answer to be labelled, with all that is known to be right."""

    question: str
    answer: str
    references: tuple[str, ...]
    context: str | None = None


@dataclass(frozen=True, slots=True)
class Labels:
    """label: (n,) in [0, 1], NaN where there is none. correct: label >= threshold, None where there is none.

    reasons: row -> why it has no label. counts: labelled, unlabelled, and with a judge judge_asked (distinct answers),
    judge_repaired (verdicts in broken JSON), judge_unparsable, judge_failed (no reply).
    """

    label: NDArray[np.float64]
    correct: list[bool | None]
    reasons: Mapping[int, str]
    counts: Mapping[str, int]


def label_answers(items: Sequence[Labelled], config: LabelsConfig) -> Labels:
    """Labels of `items`; see `Labeller`, which is to be kept where there are several lots."""
    return Labeller(config).label(items)


class Labeller:
    """Labels answers as `config` says; the encoder or the connection to the judge is set up once.

    The label is the best over all references (BERTScore's F below 0 counts as 0); a judge sees all at once, and its
    label is 0 or 1. An answer without references gets none, nor does one whose judge gives no verdict.

    Raises UserError for an encoder that cannot be loaded, and a judge whose token is missing.
    """

    def __init__(self, config: LabelsConfig, *, judge: Generate | None = None, num_threads: int | None = None) -> None:
        self._config = config
        self._judge = judge
        self._scores: Callable[[Sequence[str], Sequence[str]], Sequence[float]] | None = None
        if config.metric == "bert_score":
            from stitch_ray.evaluation.bert_score import BertScorer

            scorer = BertScorer(str(config.encoder), num_threads=num_threads)
            self._scores = lambda ours, theirs: scorer.score(ours, theirs)[:, 2].clip(0, 1).tolist()
        elif config.metric == "judge" and judge is None:
            from stitch_ray.engines.openai_api import OpenAIEngine

            assert config.judge is not None
            self._judge = OpenAIEngine(config.judge).generate_many
        elif config.metric in ("exact_match", "token_f1", "rouge_l"):
            self._scores = lambda ours, theirs: [self._score(*pair) for pair in zip(ours, theirs, strict=True)]

    def label(self, items: Sequence[Labelled]) -> Labels:
        """Labels in the order of `items`; each depends on its own item alone."""
        label = np.full(len(items), np.nan)
        reasons: dict[int, str] = {}
        counts: Counter[str] = Counter()
        rows = []
        for row, item in enumerate(items):
            if self._config.metric == "none":
                reasons[row] = "labels.metric is none"
            elif not item.references:
                reasons[row] = "no reference answer"
            else:
                rows.append(row)
        if self._scores is not None:
            ours = [items[row].answer for row in rows for _ in items[row].references]
            theirs = [reference for row in rows for reference in items[row].references]
            owners = [row for row in rows for _ in items[row].references]
            for row, score in zip(owners, self._scores(ours, theirs), strict=True):
                label[row] = np.fmax(label[row], score)
        elif rows:
            self._ask_judge(items, rows, label, reasons, counts)
        known = ~np.isnan(label)
        counts["labelled"], counts["unlabelled"] = int(known.sum()), int((~known).sum())
        correct = [None if math.isnan(value) else bool(value >= self._config.threshold) for value in label]
        return Labels(label, correct, reasons, dict(counts))

    def _score(self, answer: str, reference: str) -> float:
        match self._config.metric:
            case "exact_match":
                return exact_match(answer, reference)
            case "token_f1":
                return token_f1(answer, reference)
            case _:
                return rouge_l(answer, reference, convention=self._config.convention)[2]

    def _ask_judge(
        self,
        items: Sequence[Labelled],
        rows: Sequence[int],
        label: NDArray[np.float64],
        reasons: dict[int, str],
        counts: Counter[str],
    ) -> None:
        """Equal answers to one question are judged once."""
        assert self._judge is not None
        alike: dict[Labelled, list[int]] = {}
        for row in rows:
            alike.setdefault(items[row], []).append(row)
        counts.update(judge_asked=len(alike), judge_repaired=0, judge_unparsable=0, judge_failed=0)
        replies = self._judge([judge_request(item) for item in alike])
        for own, generated in zip(alike.values(), replies, strict=True):
            try:
                if isinstance(generated, EngineError):
                    raise generated
                verdict, repaired = parse_verdict(generated[0].text)
            except (EngineError, ReplyError) as error:
                failed = isinstance(error, EngineError)
                counts["judge_failed" if failed else "judge_unparsable"] += 1
                reasons.update(dict.fromkeys(own, f"judge: {error.reason if failed else error}"))  # type: ignore[union-attr]
                continue
            counts["judge_repaired"] += repaired
            label[own] = float(verdict)


def judge_request(item: Labelled) -> Request:
    """The prompt that asks for a verdict, at temperature 0."""
    described = {"question": item.question, "context": item.context, "references": item.references}
    shown = {name: value for name, value in described.items() if value is not None} | {"answer": item.answer}
    text = judge_prompt().substitute(item=json.dumps(shown, ensure_ascii=False, indent=1))
    return Request(
        request_id=content_hash(shown),
        prompt=(Turn("user", text),),
        sampling=Sampling(max_tokens=_JUDGE_MAX_TOKENS, temperature=0.0),
    )


@cache
def judge_prompt() -> Template:
    return Template(resources.files("stitch_ray.prompts").joinpath("judge_answer.txt").read_text("utf-8").rstrip())
