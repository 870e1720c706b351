"""The exact likelihood of a text by the left-to-right chain of a served model.

log p(c | context) = sum over i of log p(c_i | context, c_<i, everything from i on masked): what the
`prefix` rule samples from when it reveals one token a step. Each factor is one forward: a request
for one token, whose open block holds the known tokens before it. Prefixes are shared in the KV
cache. Where blocks begin at a prompt's end (`bidirectional`, `causal`) every token is the first
of a block of its own, since what is known is then the prompt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vllm import RequestOutput, SamplingParams
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS

Tokens = tuple[int, ...]
Pair = tuple[Sequence[int], Sequence[int]]
"""Context and continuation, token ids."""


@dataclass(frozen=True)
class Next:
    """What a model says about the token after a text.

    Attributes:
        greedy: the likeliest one, never the mask token.
        logprobs: of the tokens that were asked about, over the whole vocabulary.
    """

    greedy: int
    logprobs: Mapping[int, float]


@dataclass(frozen=True)
class Query:
    """What a model is asked: about which tokens after which text."""

    text: Tokens
    tokens: Tokens

    def params(self) -> SamplingParams:
        """Of a request that answers it."""
        return SamplingParams(
            temperature=0,
            max_tokens=1,
            detokenize=False,
            logprob_token_ids=list(self.tokens),
            extra_args={"diffusion_reveal": "prefix"},
        )

    def answer(self, output: RequestOutput) -> Next:
        """Read the answer out of the finished request."""
        (completion,) = output.outputs
        assert completion.logprobs is not None
        (entries,) = completion.logprobs
        assert entries is not None
        logprobs = {token: entries[token].logprob for token in self.tokens}
        return Next(completion.token_ids[0], logprobs)


def chain_likelihoods(
    pairs: Sequence[Pair], ask: Callable[[list[Query]], list[Next]]
) -> list[tuple[float, bool]]:
    """Log-likelihood, in nats, of each continuation, and whether greedy decoding one token at a
    time would produce it.

    Continuations that begin alike share their forwards.
    """
    queries = list(_queries(pairs))
    found: dict[Tokens, dict[int, float]] = {}
    greedy: dict[Tokens, int] = {}
    for query, answer in zip(queries, ask(queries), strict=True):
        found.setdefault(query.text, {}).update(answer.logprobs)
        greedy[query.text] = answer.greedy
    likelihoods = []
    for pair in pairs:
        steps = list(_steps(*pair))
        logprob = sum(found[text][token] for text, token in steps)
        likelihoods.append((logprob, all(greedy[text] == token for text, token in steps)))
    return likelihoods


def _queries(pairs: Sequence[Pair]) -> Iterator[Query]:
    asked: dict[Tokens, dict[int, None]] = {}
    for pair in pairs:
        for text, token in _steps(*pair):
            asked.setdefault(text, {})[token] = None
    for text, tokens in asked.items():
        ids = tuple(tokens)
        for start in range(0, len(ids), MAX_LOGPROB_TOKEN_IDS):
            yield Query(text, ids[start : start + MAX_LOGPROB_TOKEN_IDS])


def _steps(context: Sequence[int], continuation: Sequence[int]) -> Iterator[tuple[Tokens, int]]:
    """Every token of a continuation, and the text before it."""
    text = (*context, *continuation)
    for end in range(len(context), len(text)):
        yield text[:end], text[end]
