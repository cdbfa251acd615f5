"""From rating files to aligned logits and scores."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stitch_ray.config import SelectConfig
from stitch_ray.records import RATING_SCHEMA, content_hash
from stitch_ray.selection.scores import sentence_score, token_score
from stitch_ray.selection.table import Ratings, load_ratings, score

PROMPTS = ("p0", "p1", "p2")
HASHES = tuple(map(content_hash, PROMPTS))
RATINGS = 5

Row = dict[str, Any]


def row(example: str, turn: int, prompt: str, model: str = "m", *, logits: Sequence[float] | None = ()) -> Row:
    """A rating. The logits tell where they belong unless they are given."""
    if logits is not None and not len(logits):
        logits = expected(example, turn, prompt, model)
    return {
        "example_id": example,
        "content_id": f"c-{example}",
        "turn": turn,
        "model": model,
        "prompt": 99,  # its place in an earlier list of prompts; the hash decides
        "prompt_hash": content_hash(prompt),
        "logits": logits,
        "tokens": 100 + turn,
        "truncated": example == "b",
    }


def expected(example: str, turn: int, prompt: str, model: str = "m") -> list[float]:
    dice = np.random.default_rng(int(content_hash([example, turn, prompt, model]), 16))
    return [float(z) for z in dice.normal(size=RATINGS).astype(np.float32)]


def all_rows(turns: dict[str, int], prompts: Sequence[str] = PROMPTS, model: str = "m") -> list[Row]:
    return [row(e, t, p, model) for e, count in turns.items() for t in range(count) for p in prompts]


@pytest.fixture
def files(tmp_path: Path) -> Callable[..., list[Path]]:
    """Writes lists of rows as rating files."""

    def write(*parts: Sequence[Row]) -> list[Path]:
        written = []
        for part in parts:
            path = tmp_path / f"{len(list(tmp_path.iterdir())):03d}.parquet"
            pq.write_table(pa.Table.from_pylist(list(part), schema=RATING_SCHEMA), path)
            written.append(path)
        return written

    return write


TURNS = {"a": 1, "b": 2, "c": 1, "d": 3}
Files = Callable[..., list[Path]]


@pytest.mark.parametrize("seed", range(4))
def test_logits_are_aligned_by_example_turn_and_prompt_whatever_the_order_of_rows_and_files(
    files: Files, seed: int
) -> None:
    dice = random.Random(seed)
    rows = dice.sample(all_rows(TURNS), len(all_rows(TURNS)))
    cut = dice.randrange(1, len(rows))
    found = load_ratings([files(rows[:cut], [], rows[cut:])], HASHES, RATINGS)
    assert found.example_ids == ["a", "b", "c", "d"]
    assert found.first_turn.tolist() == [0, 1, 3, 4]
    wanted = [[expected(e, t, p) for p in PROMPTS] for e, count in TURNS.items() for t in range(count)]
    assert found.logits.shape == (1, 7, 3, 5)
    np.testing.assert_array_equal(found.logits[0], np.array(wanted, np.float32))
    assert found.tokens.tolist() == [100, 100, 101, 100, 100, 101, 102]
    assert found.truncated.tolist() == [False, True, True, False, False, False, False]
    assert found.bad == {}


def test_prompts_come_in_the_order_asked_for_and_others_are_left_out(files: Files) -> None:
    paths = files(all_rows(TURNS))
    found = load_ratings([paths], (HASHES[2], HASHES[0]), RATINGS)
    assert found.logits.shape == (1, 7, 2, 5)
    np.testing.assert_array_equal(found.logits[0, 0], np.float32([expected("a", 0, "p2"), expected("a", 0, "p0")]))


def test_prompts_rated_in_sets_of_their_own_are_put_together(files: Files) -> None:
    together = load_ratings([files(all_rows(TURNS))], HASHES, RATINGS)
    apart = load_ratings([files(all_rows(TURNS, ["p2"]), all_rows(TURNS, ["p0", "p1"]))], HASHES, RATINGS)
    np.testing.assert_array_equal(apart.logits, together.logits)


def test_two_models_stand_side_by_side_in_the_order_given(files: Files) -> None:
    m, n = files(all_rows(TURNS)), files(all_rows(TURNS, model="n")[::-1])
    found = load_ratings([n, m], HASHES, RATINGS)
    assert found.logits.shape == (2, 7, 3, 5)
    np.testing.assert_array_equal(found.logits[0, 6, 1], np.float32(expected("d", 2, "p1", "n")))
    np.testing.assert_array_equal(found.logits[1, 6, 1], np.float32(expected("d", 2, "p1", "m")))


@pytest.mark.parametrize("number", [0, 4, 20])
def test_a_missing_rating_is_an_error(files: Files, number: int) -> None:
    rows = all_rows(TURNS)
    del rows[number]
    with pytest.raises(RuntimeError, match="missing or twice"):
        load_ratings([files(rows)], HASHES, RATINGS)


@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("number", [0, 4, 6])
def test_a_rating_that_stands_twice_is_an_error(files: Files, prompts: int, number: int) -> None:
    rows = all_rows(TURNS, PROMPTS[:prompts])
    with pytest.raises(RuntimeError, match="missing or twice"):
        load_ratings([files([*rows, rows[number]])], HASHES[:prompts], RATINGS)


def test_a_whole_file_read_twice_is_an_error(files: Files) -> None:
    (path,) = files(all_rows(TURNS))
    with pytest.raises(RuntimeError, match="missing or twice"):
        load_ratings([[path, path]], HASHES, RATINGS)


def test_two_turns_that_lack_different_prompts_do_not_make_one_another_good(files: Files) -> None:
    """Sorted, the prompts of the two read 0, 1 as if one turn were complete."""
    rows = [row("a", 0, "p0"), row("b", 0, "p1")]
    with pytest.raises(RuntimeError, match="missing or twice"):
        load_ratings([files(rows)], HASHES[:2], RATINGS)


def test_models_that_rated_different_examples_are_never_mixed_up(files: Files) -> None:
    m = files(all_rows({"a": 1, "b": 1, "c": 1}))
    for other in ({"a": 1, "b": 1, "d": 1}, {"a": 1, "b": 2}, {"a": 1, "b": 1}, {"a": 1, "b": 1, "c": 1, "d": 1}):
        with pytest.raises(RuntimeError, match="not of the same turns"):
            load_ratings([m, files(all_rows(other, model="n"))], HASHES, RATINGS)


def test_an_example_without_finite_logits_is_bad_as_a_whole_and_the_others_stay_aligned(files: Files) -> None:
    rows = [
        row("b", 1, "p1", logits=None) if (r["example_id"], r["turn"], r["prompt_hash"]) == ("b", 1, HASHES[1]) else r
        for r in all_rows(TURNS)
    ]
    found = load_ratings([files(rows)], HASHES, RATINGS)
    assert found.bad == {"b": "model m gives logits that are not finite (prompt 1)"}
    assert found.example_ids == ["a", "c", "d"]
    assert found.first_turn.tolist() == [0, 1, 2]
    assert found.tokens.tolist() == [100, 100, 100, 101, 102]
    assert not found.truncated.any()
    np.testing.assert_array_equal(found.logits[0, 1, 2], np.float32(expected("c", 0, "p2")))
    assert np.isfinite(found.logits).all()


def test_one_model_that_fails_makes_the_example_bad_for_all_and_is_named(files: Files) -> None:
    n = [
        row("c", 0, p, "n", logits=None) if r["example_id"] == "c" else r
        for r in all_rows(TURNS, model="n")
        for p in [PROMPTS[HASHES.index(r["prompt_hash"])]]
    ]
    found = load_ratings([files(all_rows(TURNS)), files(n)], HASHES, RATINGS)
    assert list(found.bad) == ["c"]
    assert "model n" in found.bad["c"]
    assert found.logits.shape == (2, 6, 3, 5)


def test_null_logits_of_a_prompt_that_is_not_asked_for_do_no_harm(files: Files) -> None:
    rows = [*all_rows(TURNS, ["p0", "p1"]), *(row(e, t, "p2", logits=None) for e, n in TURNS.items() for t in range(n))]
    assert load_ratings([files(rows)], HASHES[:2], RATINGS).bad == {}


def test_if_every_example_is_bad_nothing_is_left_and_nothing_breaks(files: Files) -> None:
    found = load_ratings([files([row("a", 0, p, logits=None) for p in PROMPTS])], HASHES, RATINGS)
    assert (found.example_ids, list(found.bad)) == ([], ["a"])
    assert found.logits.shape == (1, 0, 3, 5)


def config(models: int = 1, **rating: Any) -> SelectConfig:
    return SelectConfig.model_validate(
        {"data": {"paths": ["x"]}, "models": [{"path": f"m{n}"} for n in range(models)], "rating": rating}
    )


def ratings(files: Files, models: int = 1) -> Ratings:
    return load_ratings([files(all_rows(TURNS, model=f"m{n}")) for n in range(models)], HASHES, RATINGS)


def test_the_score_of_a_conversation_is_the_mean_over_its_turns(files: Files) -> None:
    found = ratings(files)
    scores = score(found, config(), [1.0])
    token, sentence = token_score(found.logits[0]), sentence_score(found.logits[0])
    np.testing.assert_allclose(
        scores.sentence[:, 0], [sentence[0], sentence[1:3].mean(), sentence[3], sentence[4:].mean()]
    )
    np.testing.assert_allclose(scores.token[1, 0], token[1:3].mean(0))
    assert (scores.token.shape, scores.sentence.shape, scores.model.shape) == ((4, 1, 3), (4, 1), (4,))
    np.testing.assert_allclose(scores.model, scores.sentence[:, 0])


def test_models_are_combined_by_their_sizes_or_by_the_weights_given(files: Files) -> None:
    found = ratings(files, models=3)
    sentence = score(found, config(3), [1, 1, 1]).sentence
    np.testing.assert_allclose(score(found, config(3), [1, 2, 7]).model, sentence @ [0.1, 0.2, 0.7])
    np.testing.assert_allclose(score(found, config(3, weights=[1, 0, 2]), [1, 2, 7]).model, sentence @ [1, 0, 2])
    np.testing.assert_allclose(
        score(found, config(3, weights="repo"), [1, 1, 1]).model, sentence @ [7 / 20, 13 / 20, 70 / 90]
    )


def test_alpha_and_mode_reach_the_scores(files: Files) -> None:
    found = ratings(files)
    plain, costly = (score(found, config(alpha=alpha), [1.0]).sentence for alpha in (0.0, 5.0))
    assert (costly < plain).all()
    three = load_ratings(
        [files(all_rows(TURNS, [*PROMPTS, "p3", "p4"]))], [*HASHES, *map(content_hash, ("p3", "p4"))], 5
    )
    repo = score(three, config(mode="repo"), [1.0])
    np.testing.assert_allclose(repo.token[0, 0], token_score(three.logits[0, 0], "repo"))
