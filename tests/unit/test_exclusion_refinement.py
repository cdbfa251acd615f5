"""Generate, validate, exclude: what is asked next, what is accepted, and what is never given."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch_ray.exclusion.refinement import Attempt, Refinement, Rules, any_right, expected


def played(rules: Rules, *attempts: tuple[str, float | None]) -> Refinement:
    """A refinement in which the model gives these answers and the validator these probabilities, until it is settled."""
    state = Refinement(rules)
    for answer, probability in attempts:
        if state.outcome is not None:
            break
        checked = state.check(answer)
        value = probability if checked == "judged" else None
        if checked == "judged" and probability is None:
            checked = "judge_failed"
        state = state.add(Attempt(answer=answer, temperature=state.temperature, checked=checked, probability=value))
    return state


def test_the_first_accepted_answer_is_given_with_its_probability() -> None:
    state = played(Rules(), ("a", 0.2), ("b", 0.49), ("c", 0.5), ("d", 1.0))
    assert state.outcome is not None
    assert (state.outcome.answer, state.outcome.confidence, state.outcome.reason) == ("c", 0.5, "accepted")
    assert (len(state.attempts), state.calls, state.repeats) == (3, 6, 0)


def test_all_answers_that_were_turned_down_are_excluded_once() -> None:
    state = played(Rules(max_attempts=9), ("a", 0.1), (" A.", 0.1), ("", 0.1), ("b ", 0.1))
    assert state.excluded == ("a", "b")
    assert [attempt.checked for attempt in state.attempts] == ["judged", "repeated", "empty", "judged"]
    assert state.calls == 4 + 2
    last = played(Rules(max_attempts=9, exclude="last"), ("a", 0.1), ("b", 0.1))
    assert last.excluded == ("b",)
    assert played(Rules(max_attempts=9, exclude="none"), ("a", 0.1)).excluded == ()


def test_an_answer_that_was_turned_down_is_not_accepted_later() -> None:
    state = played(Rules(max_attempts=3), ("a", 0.1), ("a", 1.0), ("a", 1.0))
    assert state.outcome is not None
    assert (state.outcome.answer, state.outcome.reason) == (None, "exhausted")
    assert state.repeats == 2


def test_a_cycle_may_end_it() -> None:
    state = played(Rules(on_cycle="stop"), ("a", 0.1), ("b", 0.1), ("a", 1.0), ("c", 1.0))
    assert state.outcome is not None
    assert (state.outcome.answer, state.outcome.reason, len(state.attempts)) == (None, "cycle", 3)


def test_the_last_attempt_is_judged_unless_asked_otherwise() -> None:
    answers: list[tuple[str, float | None]] = [("a", 0.1), ("b", 0.1)]
    judged = played(Rules(max_attempts=2), *answers).outcome
    assert judged is not None
    assert judged.answer is None
    published = played(Rules(max_attempts=2, last="accept"), *answers).outcome
    assert published is not None
    assert (published.answer, published.confidence, published.reason) == ("b", None, "unjudged")
    # With a single attempt there would be no validator at all.
    only = played(Rules(max_attempts=1, last="accept"), ("a", 0.1)).outcome
    assert only is not None
    assert only.answer is None


@pytest.mark.parametrize("answer", ["", " \n"])
def test_blank_answers_and_failed_judges_accept_nothing(answer: str) -> None:
    blank = played(Rules(max_attempts=1), (answer, 1.0)).outcome
    failed = played(Rules(max_attempts=1), ("a", None)).outcome
    assert blank is not None
    assert failed is not None
    assert (blank.answer, failed.answer) == (None, None)


def test_temperatures_follow_the_schedule_and_the_last_goes_on() -> None:
    state = played(Rules(max_attempts=5, temperatures=(0.0, 0.4)), *[(str(n), 0.0) for n in range(4)])
    assert [attempt.temperature for attempt in state.attempts] == [0.0, 0.4, 0.4, 0.4]


def test_nothing_comes_after_the_end() -> None:
    state = played(Rules(), ("a", 1.0))
    with pytest.raises(ValueError, match="settled"):
        state.add(state.attempts[0])


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "A", "b", "", "the"]), st.sampled_from([0.0, 0.4, 0.6, None])), max_size=9
    ),
    st.integers(1, 5),
    st.sampled_from(["all", "last", "none"]),
    st.sampled_from(["retry", "stop"]),
)
def test_what_is_given_was_judged_and_accepted(answers: Any, most: int, exclude: Any, on_cycle: Any) -> None:
    state = played(Rules(max_attempts=most, exclude=exclude, on_cycle=on_cycle), *answers)
    assert len(state.attempts) <= most
    outcome = state.outcome
    if outcome is not None and outcome.answer is not None:
        last = state.attempts[-1]
        assert (last.answer, last.checked) == (outcome.answer, "judged")
        assert outcome.confidence is not None
        assert outcome.confidence >= 0.5
        assert outcome.answer.strip()
    for excluded, other in itertools.combinations(state.excluded, 2):
        assert excluded.casefold() != other.casefold()


def test_independent_attempts_as_the_published_rates_would_have_them() -> None:
    # Rates solved from the published confusion matrices; accuracy and generations of five retries by the closed form.
    assert expected(0.6122, 1.0, 0.0417, 5) == pytest.approx((0.6223, 1.016), abs=5e-4)
    assert expected(0.58, 0.9634, 0.2525, 5) == pytest.approx((0.6403, 1.146), abs=5e-4)
    assert expected(0.23, 0.4576, 0.8540, 5) == pytest.approx((0.4092, 3.541), abs=5e-4)
    assert expected(0.3, 0.0, 1.0, 2) == (0.3, 3.0)


def test_the_closed_form_is_what_playing_it_gives() -> None:
    import numpy as np

    drawn = np.random.default_rng(0)
    right, attempts = [], []
    for _ in range(4000):
        state = Refinement(Rules(max_attempts=4, last="accept"))
        while state.outcome is None:
            answer = f"{'right' if drawn.random() < 0.4 else 'wrong'} {len(state.attempts)}"
            accepted = drawn.random() < (0.8 if answer.startswith("right") else 0.3)
            checked = state.check(answer)
            value = float(accepted) if checked == "judged" else None
            state = state.add(Attempt(answer=answer, temperature=0.0, checked=checked, probability=value))
        right.append(str(state.outcome.answer).startswith("right"))
        attempts.append(len(state.attempts))
    accuracy, mean = expected(0.4, 0.8, 0.7, 3)
    assert np.mean(right) == pytest.approx(accuracy, abs=0.025)
    assert np.mean(attempts) == pytest.approx(mean, abs=0.05)


def test_any_of_the_first_k() -> None:
    right = [[False, True], [True], [False, False, True]]
    assert [any_right(right, k) for k in (1, 2, 3, 9)] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, 1.0]
    with pytest.raises(ValueError, match="no question"):
        any_right([], 1)
