"""What the sampling parameters mean at one masked position, one plain step after another.

Shapes: V vocabulary. A `sequence` holds the tokens up to the end of the open block, None where
masked: its own index is the position.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from oracle_noise import gumbel
from torch import Tensor

Tokens = Sequence[int | None]


@dataclass(frozen=True)
class Sampling:
    """The standard sampling parameters, with vLLM's names; the defaults change nothing."""

    temperature: float = 0.0
    seed: int | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token ids of each word."""


GREEDY = Sampling()


def process(
    raw: Tensor,
    position: int,
    sequence: Tokens,
    prompt_length: int,
    sampling: Sampling,
    stop_ids: Collection[int],
) -> Tensor:
    """Processed logits [V] from raw ones [V]: what the statistics and the choice are made of."""
    logits = raw.clone()
    if sampling.allowed_token_ids:
        logits = only(logits, sampling.allowed_token_ids)
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    if position < prompt_length + sampling.min_tokens:
        ban(logits, stop_ids)
    logits = penalised(logits, sequence, prompt_length, sampling)
    output = sequence[prompt_length:]
    ban(logits, banned_by_words(sampling.bad_words, output, position - prompt_length))
    return logits


def ban(logits: Tensor, tokens: Collection[int]) -> None:
    """Set the logits [V] of `tokens` to minus infinity, in place."""
    for token in tokens:
        logits[token] = -math.inf


def only(logits: Tensor, tokens: Collection[int]) -> Tensor:
    """Logits [V] with all but `tokens` at minus infinity."""
    kept = torch.full_like(logits, -math.inf)
    for token in tokens:
        kept[token] = logits[token]
    return kept


def penalised(logits: Tensor, sequence: Tokens, prompt_length: int, sampling: Sampling) -> Tensor:
    """Repetition, frequency and presence penalties; output is whatever stands after the prompt."""
    prompt = {token for token in sequence[:prompt_length] if token is not None}
    output = Counter(token for token in sequence[prompt_length:] if token is not None)
    logits = logits.clone()
    for token in prompt | output.keys():
        logit = logits[token]
        factor = 1 / sampling.repetition_penalty if logit > 0 else sampling.repetition_penalty
        logits[token] = logit * factor
    for token, count in output.items():
        logits[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    return logits


def banned_by_words(words: Collection[Sequence[int]], output: Tokens, position: int) -> set[int]:
    """Tokens that, at this index of the output, would complete a word within it."""
    banned = set()
    for word in words:
        for offset, token in enumerate(word):
            place = {position - offset + i: t for i, t in enumerate(word) if i != offset}
            inside = position >= offset and position - offset + len(word) <= len(output)
            if inside and all(output[i] == t for i, t in place.items()):
                banned.add(token)
    return banned


def completed(words: Collection[Sequence[int]], output: Tokens, position: int) -> bool:
    """Whether a word stands in the output, this index a part of it."""
    return output[position] in banned_by_words(words, output, position)


def candidates(processed: Tensor, mask_token_id: int, sampling: Sampling) -> Tensor:
    """Logits [V] among which the token is chosen: no mask token, temperature and filters."""
    logits = processed.clone()
    logits[mask_token_id] = -math.inf
    if sampling.temperature == 0:
        return logits
    logits = logits / sampling.temperature
    if sampling.min_p > 0:
        logits[logits < logits.max() + math.log(sampling.min_p)] = -math.inf
    if sampling.top_k > 0:
        least = sorted(logits.tolist(), reverse=True)[: sampling.top_k][-1]
        logits[logits < least] = -math.inf
    return nucleus(logits, sampling.top_p)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Keep the likeliest tokens [V] until their mass reaches `top_p`: one at least."""
    if top_p == 1:
        return logits
    probability = logits.double().softmax(-1).tolist()
    mass, kept = 0.0, []
    for token in sorted(range(len(probability)), key=lambda i: -probability[i]):
        if kept and mass >= top_p:
            break
        kept.append(token)
        mass += probability[token]
    return only(logits, kept)


def choose(logits: Tensor, temperature: float, seed: int | None, counter: int) -> int:
    """The token: the likeliest, lowest id on ties, of logits [V] with noise if any."""
    scores = logits.tolist()
    if temperature > 0:
        assert seed is not None, "only a seeded request has one answer"
        scores = [s + gumbel(seed, counter, token) for token, s in enumerate(scores)]
    return max(range(len(scores)), key=scores.__getitem__)


@dataclass(frozen=True)
class Logprob:
    """One entry of a request's log-probabilities."""

    logprob: float
    rank: int


def logprobs(scores: Tensor, token: int, top: int) -> dict[int, Logprob]:
    """Of `token` and of the `top` best ones, from log-probabilities [V]; ranks begin at 1."""
    values = scores.tolist()
    order = sorted(range(len(values)), key=lambda i: -values[i])
    entries = {i: Logprob(values[i], rank) for rank, i in enumerate(order[:top], start=1)}
    return {token: Logprob(values[token], sum(v >= values[token] for v in values))} | entries
