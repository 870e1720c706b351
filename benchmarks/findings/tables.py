"""The table of each finding, and one of all directions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.findings.conversions import BATCH, ROW_LENGTH, Conversion
from benchmarks.findings.design import ATTENTION, FFN, SEEDS, Arm, Finding, Where, with_seed
from benchmarks.findings.scores import Point, Score
from benchmarks.findings.verdicts import Values, Verdict, judge
from vllm_edlm.bench.report import Plot, Row, Table
from vllm_edlm.evaluate.drift import weight_drift
from vllm_edlm.evaluate.weights import Weights

# Of 400 questions four.
ACCURACY_MARGIN = 0.01
# A hundredth of what weights move here.
DRIFT_MARGIN = 1.5e-4


@dataclass(frozen=True)
class Measured:
    """Everything the tables are made of.

    Attributes:
        scores: of each conversion at its points.
        drifts: of each conversion, average over layers of the mean change of a weight, by part.
        parent: the AR parent's answers.
        questions: held-out ones that every model was asked.
    """

    scores: Mapping[Conversion, Mapping[Point, Score]]
    drifts: Mapping[Conversion, Mapping[str, float]]
    parent: Score
    questions: int


def layer_drift(parent: Path, model: Path) -> dict[str, float]:
    """Mean |dW| by part, averaged over the layers."""
    drifts = weight_drift(Weights(parent), Weights(model))
    return {
        part: mean(drift.mean_change for drift in drifts if drift.part == part)
        for part in (ATTENTION, FFN)
    }


def verdicts(finding: Finding, measured: Measured) -> list[Verdict]:
    """What became of each of a finding's directions."""
    margin = DRIFT_MARGIN if finding.drift else ACCURACY_MARGIN
    values = _values(finding, measured)
    return [judge(claim, values, margin) for claim in finding.claims]


def finding_table(finding: Finding, measured: Measured) -> Table:
    """One row for each arm and place, over the seeds; what became of the directions below."""
    rows = [
        row
        for arm in finding.arms
        for row in (_drift_rows(arm, measured) if finding.drift else _rows(arm, measured))
    ]
    return Table(finding.name, finding.title, rows, _notes(finding, measured), _plot(finding))


def directions_table(findings: Sequence[Finding], measured: Measured) -> Table:
    """Every direction of every finding and what became of it."""
    judged = [(finding, v) for finding in findings for v in verdicts(finding, measured)]
    counts = Counter(verdict.word for _, verdict in judged)
    summary = ", ".join(f"{word}: {count}" for word, count in counts.most_common())
    return Table(
        "directions",
        "Directions of the paper's findings, in miniature",
        [_direction_row(finding, verdict) for finding, verdict in judged],
        [f"Of {len(judged)} directions, {summary}.", *_general_notes(measured)],
    )


def _rows(arm: Arm, measured: Measured) -> list[Row]:
    rows: list[Row] = []
    for point, paper in zip_longest(arm.points, arm.paper):
        scores = _by_seed(arm, measured.scores, point)
        if scores:
            rows.append(_row(arm, point, scores) | {"paper (%)": paper})
    return rows


def _row(arm: Arm, point: Point, scores: Mapping[int, Score]) -> Row:
    return {
        "model": arm.label,
        "training tokens": arm.conversion.steps * BATCH * ROW_LENGTH,
        "block length": point.block_length,
        "tokens per step": point.parallel,
        "tokens per forward": mean(score.tokens_per_forward for score in scores.values()),
        **_of_seeds("right answers", {seed: score.exact for seed, score in scores.items()}),
        **_of_seeds("right states", {seed: score.states for seed, score in scores.items()}),
    }


def _drift_rows(arm: Arm, measured: Measured) -> list[Row]:
    rows: list[Row] = []
    for part in (ATTENTION, FFN):
        drifts = _by_seed(arm, measured.drifts, part)
        if drifts:
            axes: Row = {
                "pattern": arm.conversion.pattern,
                "block length": arm.conversion.block_length,
                "part": part,
            }
            rows.append({"model": arm.label} | axes | _of_seeds("mean |dW|", drifts))
    return rows


def _of_seeds(name: str, values: Mapping[int, float]) -> Row:
    """The mean, then every seed's own figure; None for a seed whose training diverged."""
    by_seed: Row = {f"{name}, seed {seed}": values.get(seed) for seed in SEEDS}
    return {name: mean(values.values()), **by_seed}


def _by_seed(
    arm: Arm, figures: Mapping[Conversion, Mapping[Any, Any]], where: Where
) -> dict[int, Any]:
    """The figures of an arm at a place, of the seeds that have one."""
    found = {seed: figures.get(with_seed(arm.conversion, seed), {}) for seed in SEEDS}
    return {seed: at[where] for seed, at in found.items() if where in at}


def _values(finding: Finding, measured: Measured) -> Values:
    if finding.drift:
        return {
            (arm.label, part): _by_seed(arm, measured.drifts, part)
            for arm in finding.arms
            for part in (ATTENTION, FFN)
        }
    return {
        (arm.label, point): {
            seed: score.exact for seed, score in _by_seed(arm, measured.scores, point).items()
        }
        for arm in finding.arms
        for point in arm.points
    }


def _direction_row(finding: Finding, verdict: Verdict) -> Row:
    differences = verdict.differences
    return {
        "finding": finding.name,
        "direction of the paper": verdict.claim.text,
        "at": _place(verdict.claim.more[0][1]),
        "here": verdict.word,
        "mean difference": mean(differences) if differences else None,
        "min": min(differences, default=None),
        "max": max(differences, default=None),
        "seeds": len(differences),
    }


def _place(where: Where) -> str:
    if isinstance(where, Point):
        return f"block length {where.block_length}, tokens per step {where.parallel}"
    return where


def _plot(finding: Finding) -> Plot:
    answers = "right answers"
    if finding.drift:
        lines = ("pattern", "part")
        return Plot("block length", "mean |dW|", lines, log_x=True, from_zero=False)
    if finding.name == "blocks":
        return Plot("block length", answers, ("model",), ("tokens per step",), log_x=True)
    if finding.name == "tokens":
        return Plot("training tokens", answers, ("tokens per step",), log_x=True)
    return Plot("tokens per step", answers, ("model",), log_x=True)


def _notes(finding: Finding, measured: Measured) -> list[str]:
    said = [
        f"{verdict.word.upper()}: {verdict.claim.text}; {_place(verdict.claim.more[0][1])}; "
        f"differences by seed: {_numbers(verdict.differences)}."
        for verdict in verdicts(finding, measured)
    ]
    return [*finding.notes, *_general_notes(measured), *said]


def _numbers(differences: Sequence[float]) -> str:
    return ", ".join(f"{difference:+.3g}" for difference in differences) or "none"


def _general_notes(measured: Measured) -> list[str]:
    parent = measured.parent
    return [
        f"{measured.questions} held-out questions, answered greedily by the served model; its AR "
        f"parent answers {parent.exact:.1%} of them right. All conversions have the same parent; "
        "seeds differ in noise and in the order of the data.",
        f"A step of training has {BATCH} rows of {ROW_LENGTH} tokens. Tokens per step are set, by "
        "the reveal rule `steps`; tokens per forward are counted.",
        "Directions are judged seed by seed. One holds (does not hold) where every seed has the "
        f"paper's sign (the other one) by more than {ACCURACY_MARGIN:g} of right answers or "
        f"{DRIFT_MARGIN:g} of mean |dW|; there is no difference where no seed has one beyond that; "
        "else seeds disagree. By chance three seeds agree one time in four.",
    ]
