"""The whole run: every step is skipped where its result is there."""

from __future__ import annotations

from pathlib import Path

from benchmarks.findings.conversions import run_conversion
from benchmarks.findings.parent import train_parent
from benchmarks.findings.plan import FINDINGS, work
from benchmarks.findings.served import Engines, score_model, score_parent
from benchmarks.findings.tables import Measured, directions_table, finding_table, layer_drift
from benchmarks.findings.task import items, write_jsonl
from vllm_edlm.bench.machine import commit, facts
from vllm_edlm.bench.report import write
from vllm_edlm.train.trainer import TrainingDivergedError

COMMAND = "python -m benchmarks.findings"
TRAINING_ITEMS, QUESTIONS = 30000, 400
DATA_SEED = 0
_TRAINED_AT = "commit"


def train_all(runs: Path) -> None:
    """The AR parent, then every conversion of the plan, seed by seed."""
    _remember_commit(runs)
    data = runs / "train.jsonl"
    if not data.exists():
        aside = data.with_suffix(".part")
        write_jsonl(aside, "train", DATA_SEED, TRAINING_ITEMS)
        aside.replace(data)
    train_parent(data, runs / "parent")
    conversions = [conversion for conversion, _ in work()]
    for number, conversion in enumerate(conversions, start=1):
        print(f"conversion {number} of {len(conversions)}: {conversion.name}", flush=True)
        try:
            run_conversion(conversion, runs / "parent", data, runs / "models" / conversion.name)
        except TrainingDivergedError as error:  # a result too: its rows lack a seed
            print(error, flush=True)


def measure_all(runs: Path) -> Measured:
    """What every trained conversion answers, and how far its weights moved."""
    questions = list(items("heldout", DATA_SEED, QUESTIONS))
    parent, answers = runs / "parent", runs / f"answers-{QUESTIONS}"
    parent_score = score_parent(parent, questions, answers / "parent.json")
    engines, scores, drifts = Engines(), {}, {}
    for conversion, points in work():
        model = runs / "models" / conversion.name
        if not (model / "config.json").exists():
            print(f"not trained: {conversion.name}", flush=True)
            continue
        cache = answers / f"{conversion.name}.json"
        scores[conversion] = score_model(engines, model, conversion, points, questions, cache)
        drifts[conversion] = layer_drift(parent, model)
        print(f"measured: {conversion.name}", flush=True)
    return Measured(scores, drifts, parent_score, len(questions))


def _remember_commit(runs: Path) -> None:
    """Of the code that the first model is trained by: later runs go on with what it left."""
    place = runs / _TRAINED_AT
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(commit())


def write_tables(measured: Measured, runs: Path, output: Path) -> None:
    """One table a finding, and one of all directions."""
    head = facts(COMMAND) | {"training begun at commit": (runs / _TRAINED_AT).read_text()}
    tables = [finding_table(finding, measured) for finding in FINDINGS]
    for table in (*tables, directions_table(FINDINGS, measured)):
        for path in write(table, head, output):
            print(path, flush=True)
