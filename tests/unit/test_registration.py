"""Registration: versions, laziness, and that other models are left as they are."""

import subprocess
import sys

import pytest

import vllm_edlm
from vllm_edlm.compat import environment
from vllm_edlm.compat.version import check_vllm_version


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.4", "0.32.0rc1"])
def test_supported_versions(version: str) -> None:
    check_vllm_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0"])
def test_other_versions_get_one_readable_error(version: str) -> None:
    with pytest.raises(RuntimeError, match=rf"supports vLLM .*, but vLLM {version} is installed"):
        check_vllm_version(version)


def test_plugin_module_imports_no_torch() -> None:
    code = "import sys, vllm_edlm, vllm_edlm.family; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_registering_imports_no_model_code_and_can_be_repeated() -> None:
    code = (
        "import sys, vllm_edlm; vllm_edlm.register(); vllm_edlm.register()\n"
        "lazy = {'vllm_edlm.model', 'vllm_edlm.config', 'vllm_edlm.scheduler'}\n"
        "from vllm import ModelRegistry\n"
        "from vllm_edlm.family import FAMILIES\n"
        "assert vllm_edlm.ARCHITECTURE in FAMILIES\n"
        "assert set(FAMILIES) <= set(ModelRegistry.get_supported_archs())\n"
        "sys.exit(bool(lazy & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_model_classes_are_those_of_the_families() -> None:
    from vllm_edlm import model
    from vllm_edlm.family import FAMILIES

    for family in FAMILIES.values():
        cls = getattr(model, family.model_class)
        assert issubclass(cls, model.BlockDiffusionMixin)
        assert cls.hf_to_vllm_mapper.map_name("encoder.norm.weight") == "model.norm.weight"


def test_other_models_keep_their_request_checks() -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    from vllm_edlm.compat.request_checks import install_request_checks

    class OtherDiffusionModel:
        architectures = ("SomeOtherDiffusionModel",)
        is_diffusion = True

    install_request_checks()
    install_request_checks()
    with pytest.raises(VLLMValidationError, match="not yet supported with diffusion models"):
        SamplingParams(temperature=0)._validate_diffusion(OtherDiffusionModel())  # type: ignore[arg-type]
    SamplingParams(temperature=1)._validate_diffusion(OtherDiffusionModel())  # type: ignore[arg-type]


def test_architecture_name_is_the_released_one() -> None:
    assert vllm_edlm.ARCHITECTURE == "EfficientDLM"


def test_environment_repair_removes_only_what_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        is_import = command[1] == "-c"
        broken = is_import and command[-1] == "import torchvision"
        return subprocess.CompletedProcess(command, returncode=int(broken))

    monkeypatch.setattr(environment, "installed_version", lambda _: "1.0")
    monkeypatch.setattr(environment.subprocess, "run", run)
    assert environment.remove_broken_torch_family() == ["torchvision"]
    assert commands[-1][-3:] == ["-q", "-y", "torchvision"]


def test_the_vllm_command_works_here() -> None:
    from pathlib import Path

    vllm = Path(sys.executable).with_name("vllm")
    done = subprocess.run([vllm, "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
