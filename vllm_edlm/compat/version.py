"""The range of vLLM versions whose interfaces this plugin was written against."""

from importlib import import_module

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED_VLLM = SpecifierSet(">=0.32,<0.34")


def check_vllm_version(version: str | None = None) -> None:
    """Refuse a vLLM outside `SUPPORTED_VLLM` in one sentence.

    Args:
        version: version to check; by default that of the installed vLLM.

    Raises:
        RuntimeError: the version is outside the range.
    """
    found = version if version is not None else import_module("vllm").__version__
    if not SUPPORTED_VLLM.contains(Version(found).base_version):
        raise RuntimeError(
            f"vllm-edlm supports vLLM {SUPPORTED_VLLM}, but vLLM {found} is installed. "
            "Install a supported vLLM, or a vllm-edlm made for this one."
        )
