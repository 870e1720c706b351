"""`examples.ray_batch`: answers are those of `LLM`, and none is lost or doubled by a bad end."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner
from vllm import SamplingParams

from examples.batch.output import MANIFEST
from examples.convert.word_problems import problems
from examples.demo import TINY_MATH
from examples.ray_batch import app
from vllm_edlm.evaluate.engine import denoise_forwards, serving

ROOT = Path(__file__).parents[2]
ENGINE_ARGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2**26,
    "max_num_seqs": 4,
}
DEFAULTS = {"max_tokens": 48, "diffusion_threshold": 0.9}
LIMIT_SECONDS = 1200
# For what a killed driver or replica leaves behind.
END_SECONDS = 120
ENGINE = "VLLM::Engine"
Job = tuple[subprocess.Popen[bytes], list[psutil.Process]]
# Their place among the rows, and what their error says.
BAD = {
    3: ({}, "neither"),
    4: ({"prompt": 5}, "prompt must be a text"),
    5: ({"prompt": "a", "max_tokens": 10**400}, "max_tokens must be"),
    11: ({"prompt": "a " * 5000}, "maximum"),
    12: ({"prompt": ""}, "empty"),
    13: ({"prompt": "a", "n": 2}, "n is not supported"),
    17: ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    18: ({"prompt": "a", "temperature": -1}, "temperature"),
    23: ({"prompt": "a", "diffusion_threshold": 2}, "diffusion_threshold"),
    24: ({"prompt": "a", "diffusion_steps": 2}, "diffusion_steps"),
    25: ({"prompt": "a", "stop_token_ids": [2**62]}, "stop_token_ids"),
    29: ({"messages": [{"role": "user"}]}, "messages[0]"),
}
OPTIONS = {"stop": ["="], "min_tokens": 2, "presence_penalty": 0.5}
# No error: an answer ends with the model's length in any case.
LONG = 30


def command(source: Path, output: Path, *options: str) -> list[str]:
    words = [sys.executable, "-m", "examples.ray_batch", str(TINY_MATH), str(source), str(output)]
    words += ["--defaults", json.dumps(DEFAULTS), "--engine-args", json.dumps(ENGINE_ARGS)]
    return [*words, *options]


def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    # Ray lets its workers run after everything else, which may be never on a busy machine.
    own = {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=LIMIT_SECONDS
    )


def files(output: Path) -> dict[str, tuple[int, int]]:
    """Finished shards; a file that was written again is another one."""
    stats = {path.name: path.stat() for path in output.glob("rows-*.jsonl")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


@contextmanager
def working(words: list[str], output: Path, log: Path) -> Iterator[Job]:
    """A job that has written something, with all its processes."""
    before = files(output)
    with (
        log.open("w") as file,
        subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=file, stderr=file) as job,
    ):
        try:
            deadline = time.monotonic() + LIMIT_SECONDS
            while files(output) == before:
                assert job.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.02)
            yield job, psutil.Process(job.pid).children(recursive=True)
        finally:
            job.kill()


def engine_of(family: list[psutil.Process]) -> psutil.Process:
    (engine,) = (
        process for process in family if process.is_running() and process.name().startswith(ENGINE)
    )
    return engine


def assert_they_end(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=END_SECONDS)
    assert not alive


def questions(count: int) -> list[dict[str, Any]]:
    """Rows that can be answered: chats and prompts, with options and without."""
    rows: list[dict[str, Any]] = []
    for i, problem in enumerate(problems("heldout", 11, count)):
        text = problem.question
        asked = (
            {"prompt": text} if i % 4 == 1 else {"messages": [{"role": "user", "content": text}]}
        )
        rows.append({"id": i, **asked})
        rows[-1] |= {"max_tokens": 20} if i % 5 == 2 else {}
        rows[-1] |= {"diffusion_threshold": 0.6, "note": "ä"} if i % 5 == 3 else {}
        rows[-1] |= OPTIONS if i % 5 == 4 else {}
    return rows


def answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What vLLM's `LLM` says to rows, and what it takes."""
    found = []
    with serving(str(TINY_MATH), **ENGINE_ARGS) as llm:
        for row in rows:
            options = DEFAULTS | {key: value for key, value in row.items() if value is not None}
            threshold = {"diffusion_threshold": options["diffusion_threshold"]}
            given = {key: options[key] for key in ("max_tokens", *OPTIONS) if key in options}
            params = SamplingParams(temperature=0, extra_args=threshold, **given)
            (output,) = (
                llm.chat(options["messages"], params, use_tqdm=False)
                if "messages" in options
                else llm.generate(options["prompt"], params, use_tqdm=False)
            )
            (answer,) = output.outputs
            found.append(
                {
                    "answer": answer.text,
                    "finish_reason": answer.finish_reason,
                    "tokens": len(answer.token_ids),
                    "forwards": denoise_forwards(output),
                    "error": None,
                }
            )
    return found


@pytest.fixture(scope="module")
def good() -> list[dict[str, Any]]:
    return questions(40)


@pytest.fixture(scope="module")
def expected(good: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return answers(good)


def test_killed_and_started_again(
    good: list[dict[str, Any]], expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = list(good)
    for place, (row, _) in BAD.items():
        rows.insert(place, {"id": -place, **row})
    rows.insert(LONG, {**good[0], "id": "long", "max_tokens": 2**40})
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (source := tmp_path / "in.jsonl").write_text("\n".join([*lines, "no JSON"]))
    words = command(source, output := tmp_path / "out", "--rows-per-shard", "2")
    with working(words, output, tmp_path / "log") as (job, family):
        replica = engine_of(family).parent()
        job.kill()
        # Until it has ended, it may write more.
        assert_they_end([replica])
    done = files(output)
    assert 0 < len(done) < (len(rows) + 1) // 2, "it was not killed in the middle"

    with working(words, output, tmp_path / "log") as (job, again):
        engine = engine_of(again)
        # The replica; another takes its place.
        engine.parent().kill()
        assert_they_end([engine])
        status = job.wait(LIMIT_SECONDS)
    text = (tmp_path / "log").read_text()
    assert status == 0, text[-3000:]
    assert f"holds all {len(rows) + 1} rows" in text
    assert f"{len(rows) + 1}/{len(rows) + 1}" in text, "progress is shown"
    assert "only passed through: 'id'" in text
    assert done.items() <= files(output).items(), "finished shards are not written again"
    paths = sorted(output.glob("rows-*"))
    written = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    *written, no_row = written
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    assert no_row["line"] == "no JSON"
    assert "not valid JSON" in no_row["error"]
    for place, (row, text) in BAD.items():
        assert row.items() <= written[place].items()
        assert written[place]["answer"] is None
        assert text in written[place]["error"], written[place]
    assert written[LONG]["error"] is None
    answered = [row for row in written if row["error"] is None and row["id"] != "long"]
    assert answered == [row | more for row, more in zip(good, expected, strict=True)]
    # Some of Ray's take a minute to see that they are alone.
    assert_they_end(family)


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of a few pages in a folder, where this process may mount one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", str(folder)]
    is_small = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield is_small
    finally:
        if is_small:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_parquet_on_a_full_disk(
    good: list[dict[str, Any]], expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    keys = ("id", "prompt", "messages", "max_tokens", "diffusion_threshold", "note", *OPTIONS)
    rows = [{key: row.get(key) for key in keys} for row in good]
    rows.append({**rows[0], "prompt": "a"})
    table = pa.Table.from_pylist(rows)
    table = table.set_column(0, "id", table["id"].cast(pa.int16()))
    # Later than any date of Python's.
    table = table.append_column("when", pa.array([2**62] * len(rows), pa.timestamp("us")))
    pq.write_table(table, source := tmp_path / "in.parquet", row_group_size=7)
    options = ("--rows-per-shard", "4", "--prefix", "my_")
    with small_disk(disk := tmp_path / "disk") as is_small:
        words = command(source, output := disk / "out", *options)
        if is_small:
            failed = run(*words)
            assert failed.returncode == 1, failed.stderr[-3000:]
            (error,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
            assert "No space left on device" in error
            assert "start again to go on" in error
            assert 0 < len(list(output.glob("rows-*.parquet"))) < 11
            subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        done = run(*words)
        assert done.returncode == 0, done.stderr[-3000:]
        whole = pa.concat_tables(map(pq.read_table, sorted(output.glob("rows-*.parquet"))))
    assert whole.select(table.column_names).equals(table)
    *written, both = whole.drop_columns("when").to_pylist()
    for row, more in zip(written, expected, strict=True):
        assert {name: row["my_" + name] for name in more} == more
    assert both["my_answer"] is None
    assert "both" in both["my_error"]
    if not is_small:
        pytest.skip("no right to mount a small disk: all but the disk's end was tested")


def test_folders_and_options_are_refused(tmp_path: Path) -> None:
    (source := tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    (named := tmp_path / "named.jsonl").write_text('{"prompt": "a", "error": 5}\n')
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MANIFEST).write_text('{"rows": 7}')
    words = command(source, tmp_path / "foreign")[3:]
    refused = {
        "neither empty nor the output of a batch": words,
        "rows is 7 there, 1 here": [*words[:2], str(tmp_path / "other"), *words[3:]],
        "cannot load the model": [str(TINY_MATH.parent), *words[1:]],
        "input nothing.jsonl does not exist": [words[0], "nothing.jsonl", *words[2:]],
        "must end with .jsonl or .parquet": [words[0], str(ROOT / "README.md"), *words[2:]],
        "unknown option 'max_token'": [*words, "--defaults", '{"max_token": 3}'],
        "--defaults: max_tokens must be": [*words, "--defaults", f'{{"max_tokens": {10**400}}}'],
        "min_tokens must be less than": [*words, "--defaults", '{"min_tokens": 600}'],
        "--defaults must be a JSON object": [*words, "--defaults", "[" * 100_000],
        "'error' is a name of the output's": [words[0], str(named), *words[2:]],
        "diffusion_max_steps must be": [*words, "--defaults", '{"diffusion_max_steps": 99}'],
        "--engine-args must be a JSON object": [*words, "--engine-args", "[]"],
        "no engine argument 'tpu'": [*words, "--engine-args", '{"tpu": 1}'],
    }
    for text, arguments in refused.items():
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1, text
        assert text in result.output
    assert list((tmp_path / "foreign").iterdir()) == [tmp_path / "foreign" / "thesis.tex"]
