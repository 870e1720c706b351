"""The README's commands do what it says; a command that is not run here says so."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

from examples.demo import free_port, wait_until_healthy

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n)?```bash\n(?P<code>.*?)```", re.DOTALL)
README = (ROOT / "README.md").read_text()
BLOCKS = [(m["mark"], m["code"]) for m in BLOCK.finditer(README)]
HERE = "run by: tests/server/test_readme.py"


def command(start: str) -> str:
    """The one block run here whose command starts so, without comments."""
    (code,) = [code for mark, code in BLOCKS if mark == HERE and code.startswith(start)]
    return re.sub(r"\s+# .*", "", code)


def run(code: str, seconds: float = 600) -> str:
    """Output of a block that must succeed."""
    done = subprocess.run(
        ["bash", "-euc", code], cwd=ROOT, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_command_is_run_or_says_that_it_is_not() -> None:
    for mark, code in BLOCKS:
        assert mark, f"no mark above the block:\n{code}"
        by, not_here = mark.removeprefix("run by: "), mark.removeprefix("not run here: ")
        assert by != mark or not_here != mark, mark
        assert by == mark or (ROOT / by).is_file(), mark
    starts = [code.split()[0] for mark, code in BLOCKS if mark == HERE]
    assert starts == ["make", "examples/serve.sh", "curl", ".venv/bin/python"], "one test for each"


def test_what_is_to_be_installed_is_there_to_be_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = re.findall(r"pip install (\S+)", "".join(code for _, code in BLOCKS))
    assert installed
    for argument in installed:
        (extras,) = re.fullmatch(r"'\.\[([a-z,]+)\]'", argument).groups()
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()


def test_figures_are_the_measured_ones() -> None:
    path = ROOT / "examples/checkpoints/tiny-math/evaluation/accuracy.json"
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 1 + 4, "the AR model, four thresholds"
    for row in rows:
        name = "AR | -" if row["model"] == "AR" else f"converted | {row['threshold']}"
        figures = f"{row['accuracy']:.1%} | {row['tokens per forward']:.2f}"
        assert f"| {name} | {figures} |" in README


def test_demo() -> None:
    output = run(command("make demo"))
    assert output.count("tokens per forward") == 4
    assert output.count("   right;") >= 3, output
    assert "The server has stopped." in output


def test_offline() -> None:
    output = run(command(".venv/bin/python"))
    assert output.count("\nA: ") == output.count(" tokens per forward") == 2


def test_serve_and_curl() -> None:
    port = free_port()
    serve = command("examples/serve.sh").split()
    with subprocess.Popen([*serve, "--port", str(port)], cwd=ROOT) as server:
        try:
            wait_until_healthy(server, f"http://127.0.0.1:{port}")
            answer = json.loads(run(command("curl").replace(":8000", f":{port}")))
        finally:
            server.terminate()
    assert answer["usage"]["completion_tokens"] > 0
    assert answer["metrics"]["speculative_decoding"]["num_spec_steps"] > 0
