"""What must not change tokens: cached prefixes, chunked prompts, preemption."""

from harness import KV_PAGE, Ask, Engine, prompt


def ask_twice(engine: Engine, first: Ask, second: Ask) -> int:
    """Serve two requests in turn, both exactly; tokens of the second found in the cache."""
    engine.assert_exact([first])
    expected = engine.expected(second)
    (output,) = engine.generate([second])
    assert list(output.outputs[0].token_ids) == expected.token_ids
    return output.num_cached_tokens


def test_repeated_prompt_hits_the_cache(compiled: Engine) -> None:
    ask = Ask(prompt(3 * KV_PAGE + 5, seed=20))
    assert ask_twice(compiled, ask, ask) == 3 * KV_PAGE


def test_repeated_prompt_of_whole_pages(compiled: Engine) -> None:
    """The prompt's last page may or may not be reused, its tokens stay the same."""
    ask = Ask(prompt(2 * KV_PAGE, seed=21))
    assert ask_twice(compiled, ask, ask) >= KV_PAGE


def test_shared_beginning(compiled: Engine) -> None:
    other = prompt(2 * KV_PAGE, seed=22) + prompt(40, seed=23)
    assert ask_twice(compiled, Ask(prompt(100, seed=22)), Ask(other)) == 2 * KV_PAGE


def test_answer_is_reused_in_the_next_turn(compiled: Engine) -> None:
    first = Ask(prompt(KV_PAGE + 8, seed=24), max_tokens=3 * KV_PAGE)
    turn = first.prompt + tuple(compiled.expected(first).token_ids) + prompt(9, seed=25)
    assert ask_twice(compiled, first, Ask(turn)) >= 3 * KV_PAGE


def test_an_uncommitted_last_block_is_not_shared(compiled: Engine) -> None:
    """The answer ends with a page and a block, whose keys and values saw masks."""
    first = Ask(prompt(KV_PAGE - 2, seed=26), max_tokens=KV_PAGE + 2)
    turn = first.prompt + tuple(compiled.expected(first).token_ids) + prompt(9, seed=27)
    assert ask_twice(compiled, first, Ask(turn)) == KV_PAGE


def test_equal_prompts_at_once(compiled: Engine) -> None:
    compiled.assert_exact([Ask(prompt(70, seed=28), max_tokens=20 + i) for i in range(8)])


def prefills(engine: Engine) -> dict[str, list[int]]:
    """Query lengths of each request's forwards that left a part of its prompt to the next."""
    chunks: dict[str, list[int]] = {}
    for step in engine.forwards:
        for request, num_tokens in step.num_tokens.items():
            if not step.num_drafts.get(request):
                chunks.setdefault(request, []).append(num_tokens)
    return chunks


def test_chunked_prompts(crowded: Engine) -> None:
    """Prompts longer than the budget; every chunk but a prompt's last holds whole blocks.

    The last one runs beside the open block, if both fit.
    """
    block = crowded.served.block_length
    asks = [Ask(prompt(length, seed=30), max_tokens=20) for length in (75, 50, 41)]
    crowded.assert_exact(asks)
    chunks = prefills(crowded)
    assert len(chunks) == 3
    assert all(length % block == 0 for lengths in chunks.values() for length in lengths)


def test_budget_too_small_for_all_open_blocks(crowded: Engine) -> None:
    """Four open blocks, each beside its commit, exceed the budget: some wait, whole."""
    budget = crowded.config.scheduler_config.max_num_batched_tokens
    asks = [Ask(prompt(9 + i, seed=40 + i), max_tokens=40, threshold=1e-6) for i in range(4)]
    crowded.assert_exact(asks)
    totals = [sum(step.num_tokens.values()) for step in crowded.forwards]
    assert max(totals) <= budget
    assert any(len(step.num_tokens) < 4 for step in crowded.forwards[4:-4])


def test_preemption(crowded: Engine) -> None:
    """Too few pages for all; a preempted block keeps its reveals and its step count."""
    asks = [
        Ask(prompt(40 + 3 * i, seed=50 + i), max_tokens=60, threshold=threshold, max_steps=steps)
        for i, (threshold, steps) in enumerate([(1.0, None), (0.6, None), (1.0, 5), (0.6, 6)])
    ]
    expected = crowded.assert_exact(asks)
    assert sum(len(step.preempted) for step in crowded.forwards) > 1
    denoised = sum(len(step.num_drafts) for step in crowded.forwards)
    assert denoised == sum(sum(oracle.denoise_steps) for oracle in expected)


def test_crowded_mixed_requests(crowded: Engine) -> None:
    asks = [
        Ask(prompt(5 + 17 * i, seed=60 + i), max_tokens=70 - 7 * i, threshold=(0.6, 1.0)[i % 2])
        for i in range(8)
    ]
    crowded.assert_exact(asks)
    assert any(step.preempted for step in crowded.forwards)
    assert prefills(crowded)
