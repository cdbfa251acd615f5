"""What a Hugging Face causal language model says about text that is already there: one forward, nothing generated.

Both functions take `token_budget`, the tokens (padding included) of one forward, and `max_context`, the longest
sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from stitch_ray.engines.base import EngineError, Ids, Request, TokenStatistics
from stitch_ray.engines.hf_inputs import batches, check_adapter, check_ids, padded, split_ids

# Numbers in one tensor of logits (1 GiB as float32): a whole forward's tokens times a large vocabulary is far more.
_MAX_LOGITS = 2**28
_LOG_SOFTMAX_ROWS = 256

Value = TypeVar("Value")


def loglikelihood(
    model: Any, tokenizer: Any, requests: Sequence[Request], *, token_budget: int, max_context: int
) -> list[tuple[float, bool] | EngineError]:
    """Sum of the continuation's log-probabilities (nats) and whether its every token is the model's first choice.

    Prompt and continuation that are text are tokenised as one, as lm-evaluation-harness does: the prompt's part is the
    first `len(ids of the prompt alone)` tokens. Where those are not the prompt's ids (a token spans the border), and
    where either comes as ids, both are tokenised alone and put one behind the other; a prompt's trailing space thus
    stays in the prompt.

    Continuations that differ in their last token only, such as the one-token choices of a question, share a forward.
    """

    def values(scores: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        chosen = scores.gather(-1, targets[:, None])[:, 0]
        return chosen - scores.logsumexp(-1), chosen == scores.amax(-1)

    def read(logprobs: Tensor, greedy: Tensor) -> tuple[float, bool]:
        return logprobs.double().sum().item(), bool(greedy.all())

    return _forced(model, tokenizer, requests, values, read, token_budget, max_context)


def token_statistics(
    model: Any, tokenizer: Any, requests: Sequence[Request], *, token_budget: int, max_context: int
) -> list[TokenStatistics | EngineError]:
    """Statistics of every token of the continuation: for the ids of an answer, what `generate` recorded with it.

    Prompt and continuation meet as in `loglikelihood`. The end-of-sequence token behind an answer has no part in it.
    """

    def read(logprobs: Tensor, entropies: Tensor, margins: Tensor) -> TokenStatistics:
        return TokenStatistics(
            logprobs=tuple(logprobs.tolist()), entropies=tuple(entropies.tolist()), margins=tuple(margins.tolist())
        )

    return _forced(model, tokenizer, requests, token_values, read, token_budget, max_context)


def token_values(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of the target, entropy, and margin of the two likeliest; (rows,) each.

    `scores`: float32 logits (rows, vocabulary); `targets`: (rows,).
    """
    logprobs = scores.log_softmax(-1)
    probabilities = logprobs.exp()
    entropies = torch.special.entr(probabilities).sum(-1)
    best = probabilities.topk(2, dim=-1).values
    return logprobs.gather(-1, targets[:, None])[:, 0], entropies, best[:, 0] - best[:, 1]


def _forced(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    values: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    read: Callable[..., Value],
    token_budget: int,
    max_context: int,
) -> list[Value | EngineError]:
    """`read` of a continuation's `values`; the first of these tells a NaN.

    `values` gets float32 logits (tokens, vocabulary) and the tokens that came; it returns tensors of (tokens,).
    """
    answers: list[Value | EngineError | None] = [None] * len(requests)
    wanted: dict[Ids, list[tuple[int, Ids]]] = {}  # what the model reads -> slots and continuations
    for slot, request in enumerate(requests):
        try:
            prompt, continuation = _parts(model, tokenizer, request, max_context)
            wanted.setdefault((prompt + continuation)[:-1], []).append((slot, continuation))
        except ValueError as error:
            answers[slot] = EngineError(request.request_id, str(error))
    most_logits = max(1, _MAX_LOGITS // model.get_output_embeddings().weight.shape[0])
    # rows x this at most `token_budget` also means rows x continuations at most `most_logits`
    sequences = list(wanted)
    costs = [max(len(ids), -(-sum(len(c) for _, c in wanted[ids]) * token_budget // most_logits)) for ids in sequences]
    with torch.inference_mode():
        for indices in batches(costs, token_budget):
            some = [sequences[i] for i in indices]
            asked = [(row, slot, continuation) for row, ids in enumerate(some) for slot, continuation in wanted[ids]]
            found = _forward(model, some, [(row, continuation) for row, _, continuation in asked], values)
            for (_, slot, _), parts in zip(asked, found, strict=True):
                failed = EngineError(requests[slot].request_id, "the log-probability is NaN")
                answers[slot] = failed if parts[0].isnan().any() else read(*parts)
    assert None not in answers
    return answers  # type: ignore[return-value]


def _parts(model: Any, tokenizer: Any, request: Request, max_context: int) -> tuple[Ids, Ids]:
    check_adapter(request)
    prompt, continuation = split_ids(tokenizer, request)
    check_ids(model, prompt + continuation)
    if len(prompt) + len(continuation) > max_context:
        raise ValueError(
            f"{len(prompt)} prompt and {len(continuation)} continuation tokens exceed the context of {max_context}"
        )
    return prompt, continuation


def _forward(
    model: Any,
    sequences: Sequence[Ids],
    continuations: Sequence[tuple[int, Ids]],
    values: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
) -> list[tuple[Tensor, ...]]:
    """`values` of every (row, continuation), on the CPU. A continuation ends one token behind its sequence."""
    device = model.device
    spans = [(row, len(sequences[row]) - len(c) + j) for row, c in continuations for j in range(len(c))]
    rows, positions = torch.tensor(spans, device=device).T
    targets = torch.tensor([one for _, continuation in continuations for one in continuation], device=device)
    with _logits_only_at(model, rows, positions):
        logits = model(**padded(sequences, device, left=False), use_cache=False).logits[0]
    assert len(logits) == len(targets), "the output head does not work position by position"
    blocks = [
        values(scores.float(), chosen)
        for scores, chosen in zip(logits.split(_LOG_SOFTMAX_ROWS), targets.split(_LOG_SOFTMAX_ROWS), strict=True)
    ]
    lengths = [len(continuation) for _, continuation in continuations]
    columns = [torch.cat(column).cpu().split(lengths) for column in zip(*blocks, strict=True)]
    return list(zip(*columns, strict=True))


@contextmanager
def _logits_only_at(model: Any, rows: Tensor, positions: Tensor) -> Iterator[None]:
    """Inside, the model's logits have shape (1, positions, vocabulary).

    The output head sees the wanted positions only, inside the model's own forward, so that soft-capping and logit
    scales still apply; `logits_to_keep` can only drop positions that no row of the batch wants.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _head, inputs: (inputs[0][rows, positions][None], *inputs[1:])
    )
    try:
        yield
    finally:
        hook.remove()
