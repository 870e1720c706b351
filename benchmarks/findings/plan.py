"""What is trained and measured for each finding, and which way the paper says it comes out.

Figures of the paper (arXiv 2512.14067) are averages over its six generation tasks, in percent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from benchmarks.findings.conversions import BLOCK_LENGTH, LEARNING_RATE, STEPS, Conversion
from benchmarks.findings.design import (
    ATTENTION,
    FFN,
    SEEDS,
    Arm,
    Claim,
    Finding,
    Where,
    points,
    with_seed,
)
from benchmarks.findings.scores import Point

BLOCK_LENGTHS = (2, 4, 8, 16)
# (a) takes shorter blocks than the others, so that an answer has several: only then does it
# matter whether the context of a block is clean.
PATTERN_BLOCK_LENGTH = 4


def _beats(text: str, more: str, less: str, *where: Where) -> tuple[Claim, ...]:
    return tuple(Claim(f"{text}: {more} over {less}", ((more, w),), ((less, w),)) for w in where)


BASE = Conversion()
_SHORT = replace(BASE, block_length=PATTERN_BLOCK_LENGTH)
_CLEAN, _CLEAN_SHIFT = "block-wise, clean context", "block-wise, clean context, shift"
_NOISY, _NOISY_TWICE = "block-wise, noisy context", "block-wise, noisy context, twice the tokens"
_WHOLE, _WHOLE_SHIFT = "bidirectional", "bidirectional, shift"


def _patterns() -> Finding:
    at = points(PATTERN_BLOCK_LENGTH)
    noisy = replace(_SHORT, pattern="block_noisy")
    whole = replace(_SHORT, pattern="bidirectional")
    arms = (
        Arm(_WHOLE_SHIFT, replace(whole, token_shift=True), at, ("18.10",)),
        Arm(_WHOLE, whole, at, ("19.29",)),
        Arm(_NOISY, noisy, at, ("28.23",)),
        Arm(_NOISY_TWICE, replace(noisy, steps=2 * STEPS), at, ("27.73",)),
        Arm(_CLEAN_SHIFT, replace(_SHORT, token_shift=True), at, ("37.69",)),
        Arm(_CLEAN, _SHORT, at, ("38.41",)),
    )
    pairs = [
        ("block-wise attention", _NOISY, _WHOLE),
        ("clean context", _CLEAN, _NOISY),
        ("clean context at half the tokens", _CLEAN, _NOISY_TWICE),
        ("no token shift", _CLEAN, _CLEAN_SHIFT),
        ("no token shift", _WHOLE, _WHOLE_SHIFT),
    ]
    return Finding(
        "patterns",
        "Attention pattern, context and token shift (the paper's Table 1)",
        arms,
        tuple(claim for pair in pairs for claim in _beats(*pair, *at)),
        (
            "Paper: Qwen2.5-1.5B, block length 16, its AR parent 41.79.",
            "Bidirectional: trained on the whole noisy answer and served block by block, with a "
            "bidirectional prompt, as the export says.",
            "With token shift the first position of a block is always revealed in its first step, "
            "beside what the step asks for: tokens per forward are then more than 1.",
        ),
    )


def _noise_label(ratio: float | None) -> str:
    return "uniform" if ratio is None else f"half-life ratio {ratio:g}"


def _noise() -> Finding:
    at = points(BLOCK_LENGTH)
    paper = {
        None: ("60.27", "57.12", "51.11", "33.99"),
        0.5: (),
        0.25: ("60.41", "58.56", "50.97", "34.55"),
        0.1: ("62.02", "58.79", "53.75", "38.37"),
        0.05: ("60.51", "57.68", "53.06", "37.38"),
    }
    label = {ratio: _noise_label(ratio) for ratio in paper}
    gains = Claim(
        "a prior gains more at high parallelism: half-life ratio 0.1 over uniform, 8 over 1",
        ((label[0.1], at[-1]), (label[None], at[0])),
        ((label[None], at[-1]), (label[0.1], at[0])),
    )
    return Finding(
        "noise",
        "Uniform masking against position-dependent masking",
        tuple(
            Arm(label[ratio], replace(BASE, half_life_ratio=ratio), at, figures)
            for ratio, figures in paper.items()
        ),
        (
            *_beats("position prior", label[0.1], label[None], *at),
            *_beats("not too strong", label[0.1], label[0.05], *at),
            *_beats("not too weak", label[0.1], label[0.25], *at),
            gains,
        ),
        ("Paper: Qwen3-4B, block length 64, at 1, 2.8, 4 and 5.6 tokens per forward.",),
    )


def _block_label(block_length: int) -> str:
    return f"trained with {block_length}"


def _blocks() -> Finding:
    at = tuple(p for length in BLOCK_LENGTHS for p in points(length, (1, 2, 4)))
    middle, shortest, longest = (_block_label(n) for n in (8, 2, 16))
    own = {length: points(length, (2,))[0] for length in BLOCK_LENGTHS}
    longer = [
        Claim(
            f"longer evaluation blocks win at high parallelism: {label}, 16 over 4",
            ((label, Point(16, 4)),),
            ((label, Point(4, 4)),),
        )
        for label in (middle, longest)
    ]
    ends = [
        Claim(
            f"a middle training block length is best: {middle} over {end}, each at its own",
            ((middle, own[8]),),
            ((end, own[length]),),
        )
        for end, length in ((shortest, 2), (longest, 16))
    ]
    return Finding(
        "blocks",
        "Training block length by evaluation block length",
        tuple(
            Arm(_block_label(length), replace(BASE, block_length=length), at)
            for length in BLOCK_LENGTHS
        ),
        (*ends, *longer),
        (
            "Paper: the 1.5B model is best trained with 16, and then flat (37.5 to 38.4) for "
            "evaluation blocks 4 to 128; the 4B model is best with 64 (58.4 to 60.6). With few "
            "steps longer evaluation blocks win.",
        ),
    )


def _drift() -> Finding:
    patterns = {arm.label: arm for arm in _patterns().arms}
    blocks = {f"block length {arm.conversion.block_length}": arm for arm in _blocks().arms}
    arms = {label: patterns[label] for label in (_WHOLE, _NOISY, _CLEAN)} | blocks
    short, long = f"block length {BLOCK_LENGTHS[0]}", f"block length {BLOCK_LENGTHS[-1]}"
    return Finding(
        "drift",
        "Weight drift from the AR parent, by pattern and by block length",
        tuple(replace(arm, label=label) for label, arm in arms.items()),
        (
            *_beats("bidirectional attention drifts more", _WHOLE, _CLEAN, ATTENTION, FFN),
            *_beats("noisy context drifts more", _NOISY, _CLEAN, FFN),
            *_beats("drift grows with the block length", long, short, ATTENTION, FFN),
        ),
        (
            "Paper, in words: bidirectional drifts far more than block-wise; noisy context drifts "
            "more in the FFN; drift grows with the block length.",
            f"Patterns at block length {PATTERN_BLOCK_LENGTH}; block lengths with clean context.",
        ),
        drift=True,
    )


def _tokens() -> Finding:
    at = points(BLOCK_LENGTH)
    label = {steps: f"{steps} steps" for steps in (STEPS // 4, STEPS // 2, STEPS, 2 * STEPS)}
    doublings = [(label[steps], label[2 * steps]) for steps in (STEPS // 4, STEPS // 2, STEPS)]
    half, most = doublings[-1]
    low, high = at[0], at[2]
    return Finding(
        "tokens",
        "Accuracy against training tokens, at low and at high parallelism",
        tuple(Arm(name, replace(BASE, steps=steps), at) for steps, name in label.items()),
        (
            *_beats("more tokens", most, half, low, high),
            *(
                Claim(
                    f"a doubling gains more at high parallelism: {more} over {less}, 4 over 1",
                    ((more, high), (less, low)),
                    ((less, high), (more, low)),
                )
                for less, more in doublings
            ),
        ),
        (
            "Paper: 4B from 62.02 to 64.05 with 300B tokens; more tokens allow more parallelism.",
            "Each row is a conversion of its own, with its own schedule.",
        ),
    )


def _learning_rates() -> Finding:
    at = points(BLOCK_LENGTH)
    paper = {1 / 10: "54.56", 1 / 3: "60.11", 1: "60.63", 3: "56.59", 10: "50.95"}
    label = {factor: f"{factor * LEARNING_RATE:.1g}" for factor in paper}
    return Finding(
        "learning_rates",
        "Learning rate",
        tuple(
            Arm(
                label[factor],
                replace(BASE, learning_rate=float(label[factor])),
                at,
                (figure,),
            )
            for factor, figure in paper.items()
        ),
        (
            *_beats("far too low", label[1], label[1 / 10], *at[:3]),
            *_beats("far too high", label[1], label[10], *at[:3]),
            *_beats("too low", label[1], label[1 / 3], *at[:3]),
            *_beats("too high", label[1], label[3], *at[:3]),
        ),
        ("Paper: 4B, 1e-6 / 3e-6 / 1e-5 / 3e-5 / 1e-4; here by about the same factors.",),
    )


def _lora() -> Finding:
    at = points(BLOCK_LENGTH)
    small, large, full = "LoRA, rank 4", "LoRA, rank 16", "full"
    return Finding(
        "lora",
        "LoRA against full fine-tuning",
        (
            Arm(small, replace(BASE, lora_rank=4), at, ("27.93 (rank 16)",)),
            Arm(large, replace(BASE, lora_rank=16), at, ("30.78 (rank 64)",)),
            Arm(full, BASE, at, ("38.41",)),
        ),
        (
            *_beats("full", full, large, *at[:3]),
            *_beats("a higher rank", large, small, *at[:3]),
        ),
        (
            "Paper: 1.5B. Embeddings, norms and head train in full in every row, as there.",
            "One learning rate for all rows, and alpha / rank of 2 for every rank.",
        ),
    )


FINDINGS = (
    _patterns(),
    _noise(),
    _blocks(),
    _drift(),
    _tokens(),
    _learning_rates(),
    _lora(),
)


# A run that is stopped early lacks a seed of the last ones.
_ORDER = ("patterns", "noise", "learning_rates", "lora", "blocks", "drift", "tokens")


def work(seeds: tuple[int, ...] = SEEDS) -> Iterator[tuple[Conversion, tuple[Point, ...]]]:
    """Every conversion once, and all points where it is measured; seed by seed."""
    for seed in seeds:
        wanted: dict[Conversion, dict[Point, None]] = {}
        for finding in sorted(FINDINGS, key=lambda finding: _ORDER.index(finding.name)):
            for arm in finding.arms:
                found = wanted.setdefault(with_seed(arm.conversion, seed), {})
                if not finding.drift:
                    found |= dict.fromkeys(arm.points)
        yield from ((conversion, tuple(found)) for conversion, found in wanted.items())
