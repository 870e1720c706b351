"""The CPU twins of biases, penalties, grammars and log-probabilities.

Each reference takes the arguments of its kernel and goes token by token, as the Triton source
says. Tests of the runner go through vLLM's own states and functions.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.unit.kernel_comparison import assert_same, install_twins
from vllm_edlm.compat.cpu_kernels import logits, logprobs, penalties

SEEDS = range(20)
DTYPES = [torch.float32, torch.bfloat16]
ROWS, SLOTS, VOCABULARY, LISTED, MAX_LEN = 7, 4, 70, 6, 30
WORDS = -(-VOCABULARY // 32)
BANNED = -torch.inf


@pytest.fixture(scope="module")
def installed() -> None:
    install_twins()


def draw_logits(rng: np.random.Generator, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    wide = torch.tensor(3 * rng.standard_normal((ROWS, VOCABULARY + 5)), dtype=dtype)
    wide[torch.tensor(rng.random(wide.shape) < 0.1)] = BANNED
    return wide[:, :VOCABULARY]


def ints(rng: np.random.Generator, high: int, *shape: int) -> torch.Tensor:
    return torch.tensor(rng.integers(0, high, shape), dtype=torch.int32)


def listed(rng: np.random.Generator) -> torch.Tensor:
    """[SLOTS, LISTED] distinct token ids a slot."""
    ids = [rng.permutation(VOCABULARY)[:LISTED] for _ in range(SLOTS)]
    return torch.tensor(np.array(ids), dtype=torch.int32)


def counts(rng: np.random.Generator) -> torch.Tensor:
    """[SLOTS] lengths of lists, of which many are empty."""
    return ints(rng, LISTED + 1, SLOTS) * ints(rng, 2, SLOTS)


def words(rng: np.random.Generator, rows: int) -> torch.Tensor:
    """[rows, WORDS] random sets of token ids, their sign bits too."""
    return torch.tensor(rng.integers(-(2**31), 2**31, (rows, WORDS)), dtype=torch.int32)


def is_set(words: torch.Tensor, token: int) -> bool:
    return bool((int(words[token // 32]) >> (token % 32)) & 1)


def apply_bias(scores, _1, vocab_size, slots, *rest, CHECK_ALL_MASKED_ROWS, **_):
    num_allowed, allowed, _2, num_bias, biased, _3, biases, _4, *rest = rest
    pos, min_lens, num_stop, restore, stops, _5 = rest
    for row, s in enumerate(slots.tolist()):
        if num_allowed[s] > 0:
            kept = set(allowed[s, : num_allowed[s]].tolist())
            for i in set(range(vocab_size)) - kept:
                scores[row, i] = BANNED
        for n in range(int(num_bias[s])):
            scores[row, biased[s, n]] += biases[s, n]
        if pos[row] + 1 >= min_lens[s]:
            continue
        ends = stops[s, : num_stop[s]].long()
        before = scores[row, ends].clone()
        scores[row, ends] = BANNED
        if CHECK_ALL_MASKED_ROWS and restore[s] and bool((scores[row] == BANNED).all()):
            scores[row, ends] = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_bias(seed: int, check: bool, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    allowed = listed(rng)
    # Some slots allow nothing but their stop tokens, so that a row can lose them all.
    stops = torch.where(ints(rng, 2, SLOTS, 1).bool(), allowed, listed(rng))
    args = (
        *(draw_logits(rng, dtype), VOCABULARY + 5, VOCABULARY, ints(rng, SLOTS, ROWS)),
        *(counts(rng), allowed, LISTED, counts(rng), listed(rng), LISTED),
        *(torch.tensor(rng.standard_normal((SLOTS, LISTED)), dtype=torch.float32), LISTED),
        *(ints(rng, 5, ROWS), ints(rng, 9, SLOTS), counts(rng), ints(rng, 2, SLOTS)),
        *(stops, LISTED),
    )
    tiles = {"BLOCK_SIZE": 8, "LOGITS_BLOCK_SIZE": 8192}
    assert_same(logits.bias, apply_bias, *args, CHECK_ALL_MASKED_ROWS=check, **tiles)


def ban_by_grammar(scores, _1, mapping, borders, masks, _2, vocab_size, MASK_STRIDE, **_):
    for n, place in enumerate(mapping.tolist()):
        request, offset = divmod(place, MASK_STRIDE)
        if offset >= borders[request + 1] - borders[request]:
            continue
        for i in range(vocab_size):
            if not is_set(masks[n], i):
                scores[borders[request] + offset, i] = BANNED


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_apply_grammar_bitmask(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    borders = torch.tensor([0, 3, 3, 5, ROWS], dtype=torch.int32)
    mapping = torch.tensor(rng.permutation(4 * 3)[: rng.integers(0, 13)], dtype=torch.int32)
    masks = words(rng, len(mapping))
    args = (draw_logits(rng, dtype), VOCABULARY + 5, mapping, borders, masks, WORDS, VOCABULARY)
    twin = logits.apply_grammar_bitmask
    assert_same(twin, ban_by_grammar, *args, MASK_STRIDE=3, BLOCK_SIZE=8192)


def penalise(scores, _1, slots, tokens, local, rep, freq, pres, prompt, _2, seen, _3, size, **_):
    for row, s in enumerate(slots.tolist()):
        first = row - int(local[row])
        drafts = tokens[first + 1 : row + 1].tolist()
        for i in range(size):
            n = int(seen[s, i]) + drafts.count(i)
            value = scores[row, i].float()
            if n > 0 or is_set(prompt[s], i):
                value = value * (1 / rep[s]) if value > 0 else value * rep[s]
            scores[row, i] = value - freq[s] * n - pres[s] * (n > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_penalties(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    strengths = [
        torch.tensor(rng.choice([none, 0.3, 1.4], SLOTS), dtype=torch.float32)
        for none in (1.0, 0.0, 0.0)
    ]
    args = (
        *(draw_logits(rng, dtype), VOCABULARY + 5, ints(rng, SLOTS, ROWS)),
        ints(rng, 2, ROWS) * (ints(rng, VOCABULARY + 3, ROWS) + 1) - 1,  # half padding: -1
        torch.minimum(ints(rng, 3, ROWS), torch.arange(ROWS, dtype=torch.int32)),
        *strengths,
        words(rng, SLOTS),
        *(WORDS, ints(rng, 3, SLOTS, VOCABULARY), VOCABULARY, VOCABULARY),
    )
    assert_same(penalties.penalties, penalise, *args, BLOCK_SIZE=8192)


def count(slots, tokens, _1, prompt_len, prefill_len, prompt, _2, output, _3, **_):
    for s in slots.tolist():
        for token in tokens[s, : prompt_len[s]].tolist():
            if not is_set(prompt[s], token):
                prompt[s, token // 32] ^= int(np.uint32(1 << token % 32).view(np.int32))
        for token in tokens[s, prompt_len[s] : prefill_len[s]].tolist():
            output[s, token] += 1


@pytest.mark.parametrize("seed", SEEDS)
def test_bincount(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prompt = ints(rng, MAX_LEN // 2, SLOTS)
    args = (
        torch.tensor(rng.permutation(SLOTS)[: rng.integers(0, SLOTS + 1)]),
        *(ints(rng, VOCABULARY, SLOTS, MAX_LEN), MAX_LEN),
        *(prompt, prompt + ints(rng, MAX_LEN // 2, SLOTS)),
        *(words(rng, SLOTS), WORDS, ints(rng, 3, SLOTS, VOCABULARY), VOCABULARY),
    )
    assert_same(penalties.bincount, count, *args, BLOCK_SIZE=1024)


def log_softmax_at(output, scores, _1, ids, _2, topk, _3, **_):
    for row in range(len(scores)):
        total = scores[row].double().exp().sum().log()
        for k in range(topk):
            output[row, k] = scores[row, ids[row, k]].double() - total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_topk_log_softmax(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    ids = ints(rng, VOCABULARY, ROWS, LISTED).long()
    args = (torch.zeros(ROWS, LISTED), draw_logits(rng, dtype), 75, ids, LISTED, LISTED, VOCABULARY)
    assert_same(logprobs.topk_log_softmax, log_softmax_at, *args, tolerance=1e-5, BLOCK_SIZE=1024)


def rank(output, scores, _1, ids, _2, **_):
    for row, token in enumerate(ids.tolist()):
        output[row] = sum(bool(other >= scores[row, token]) for other in scores[row])


@pytest.mark.parametrize("seed", SEEDS)
def test_ranks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = draw_logits(rng).round()  # ties
    args = (torch.zeros(ROWS, dtype=torch.int64), scores, 75, ints(rng, VOCABULARY, ROWS))
    assert_same(logprobs.ranks, rank, *args, VOCABULARY, BLOCK_SIZE=8192)


def fill(ids, _1, valid, _2, sampled, topk, _3, slots, num_own, own, _4, NUM_TOPK, **_):
    for row, s in enumerate(slots.tolist()):
        n = int(num_own[s])
        rest = own[s, :n] if n > 0 else topk[row, :NUM_TOPK]
        for column, token in enumerate([int(sampled[row]), *rest.tolist()]):
            ids[row, column], valid[row, column] = token, True


@pytest.mark.parametrize("topk", [0, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_fill_logprob_token_ids(seed: int, topk: int) -> None:
    rng = np.random.default_rng(seed)
    width = LISTED + 1
    args = (
        *(torch.full((ROWS, width), -9), width, torch.zeros(ROWS, width, dtype=torch.bool), width),
        *(ints(rng, VOCABULARY, ROWS).long(), ints(rng, VOCABULARY, ROWS, 3), 3),
        *(ints(rng, SLOTS, ROWS), counts(rng), listed(rng), LISTED),
    )
    twin = logprobs.fill_logprob_token_ids
    assert_same(twin, fill, *args, NUM_TOPK=topk, PADDED_COLS=8)


@pytest.mark.usefixtures("installed")
def test_runner_bias_and_penalties() -> None:
    """From sampling parameters to logits, through the runner's own request states."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
    from vllm.v1.worker.gpu.sample.logits_processor.interface import (
        LogitsContext,
        LogitsProcRequestState,
    )
    from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
    from vllm.v1.worker.gpu.states import RequestState

    requests = RequestState(SLOTS, MAX_LEN, 64, 2, 5, torch.device("cpu"))
    state = LogitsProcRequestState.from_request_state(requests)
    processors = [LogitBiasState(None, state), PenaltiesState(None, state)]
    params = SamplingParams(
        allowed_token_ids=[0, 1, 2, 3],
        logit_bias={2: 5.0},
        min_tokens=2,
        stop_token_ids=[3],
        repetition_penalty=2.0,
        frequency_penalty=0.25,
    )
    requests.add_request("r", 2, [0, 0, 1, 1], num_computed_tokens=0, max_tokens=4)
    requests.apply_staged_writes()
    slot = requests.req_id_to_index["r"]
    for processor in processors:
        assert processor.add_request(slot, params)
        processor.apply_staged_writes()
    slots = torch.tensor([slot, slot])
    context = LogitsContext(
        expanded_idx_mapping=slots,
        idx_mapping=slots[:1],
        idx_mapping_np=slots[:1].numpy(),
        expanded_local_pos=torch.tensor([0, 0]),
        input_ids=torch.tensor([1, 1]),
        pos=torch.tensor([2, 3]),  # of the input tokens: the outputs sit at 3 and 4
        seq_lens_upper_bound_np=np.array([4]),
    )
    rows = torch.ones(2, 5)
    for processor in processors:
        assert processor.apply(rows, context) is rows
    # Token 0 is in the prompt, token 1 twice in the output.
    assert rows.tolist() == [[0.5, 0.0, 6.0, BANNED, BANNED], [0.5, 0.0, 6.0, 1.0, BANNED]]


@pytest.mark.usefixtures("installed")
def test_runner_scores() -> None:
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.sample import logprob

    rows = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 4.0, 1.0, 3.0]])
    sampled, expected = torch.tensor([2, 1]), rows.log_softmax(-1)
    scores = logprob.compute_topk_scores(rows, 2, sampled)
    assert scores.logprob_token_ids.tolist() == [[2, 0, 2], [1, 1, 3]]
    assert scores.selected_token_ranks.tolist() == [2, 1]
    torch.testing.assert_close(scores.logprobs, expected.gather(-1, scores.logprob_token_ids))
    state = logprob.LogprobTokenIdsState(SLOTS, torch.device("cpu"))
    state.add_request(3, SamplingParams(logprobs=3, logprob_token_ids=[3, 0, 1]))
    state.apply_staged_writes()
    own = logprob.compute_topk_scores(
        rows, 2, sampled, None, state, torch.tensor([3, 0]), max_per_req_token_ids=3
    )
    assert own.logprob_token_ids.tolist() == [[2, 3, 0, 1], [1, 1, 3, 0]]
    torch.testing.assert_close(own.logprobs[0], expected[0, [2, 3, 0, 1]])
    assert own.logprobs[1].tolist() == [*expected[1, [1, 1, 3]].tolist(), BANNED]


@pytest.mark.usefixtures("installed")
def test_runner_grammar() -> None:
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

    worker = StructuredOutputsWorker(8, VOCABULARY, torch.device("cpu"), 2, num_bonus_tokens=1)
    batch = SimpleNamespace(
        req_ids=["a", "b"],
        cu_num_logits_np=np.array([0, 2, 4]),
        cu_num_logits=torch.tensor([0, 2, 4], dtype=torch.int32),
        num_draft_tokens_per_req=None,
    )
    rows = torch.zeros(4, VOCABULARY)
    masks = np.array([[1 << 5, 0, 0], [0, 0, 1 << 3]], dtype=np.int32)
    worker.apply_grammar_bitmask(rows, batch, ["b"], masks)
    assert torch.equal(rows[:2], torch.zeros(2, VOCABULARY))
    assert (rows[2:] > BANNED).nonzero().tolist() == [[0, 5], [1, 67]]
