"""Every diff in patches/ still fits the installed vLLM, and every replacement has one."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import vllm

ROOT = Path(__file__).parents[2]
PATCHES = sorted((ROOT / "patches").glob("*.patch"))
SITE_PACKAGES = Path(vllm.__file__).parents[1]


def dry_run(patch: Path) -> subprocess.CompletedProcess[str]:
    """`git apply --check` on the installed vLLM, outside of any repository."""
    return subprocess.run(
        ["git", "apply", "--check", "-p1", str(patch)],
        cwd=SITE_PACKAGES,
        env=os.environ | {"GIT_DIR": os.devnull},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_patch_applies_to_the_installed_vllm(patch: Path) -> None:
    result = dry_run(patch)
    assert result.returncode == 0, f"{patch.name} no longer fits vLLM:\n{result.stderr}"


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_patch_says_why_how_and_until_when(patch: Path) -> None:
    text = patch.read_text()
    for heading in ("Replaced by: vllm_edlm/compat/", "Why: ", "How: ", "Remove when: "):
        assert f"\n{heading}" in text
    replaced_by = re.findall(r"^Replaced by: (\S+)", text, re.MULTILINE)
    assert all((ROOT / path).is_file() for path in replaced_by)


def test_a_patch_that_does_not_fit_is_found(tmp_path: Path) -> None:
    broken = tmp_path / "broken.patch"
    broken.write_text(PATCHES[0].read_text().replace("if not HAS_TRITON", "if not HAD_TRITON"))
    assert dry_run(broken).returncode != 0


def test_every_module_that_replaces_something_has_a_patch() -> None:
    named = "".join(patch.read_text() for patch in PATCHES)
    replacing = [
        path.relative_to(ROOT)
        for path in (ROOT / "vllm_edlm" / "compat").rglob("*.py")
        if re.search(
            r"^ *(replace_method\(|setattr\(|\w+\.__class__ = |vllm_\w+\.\w+ = )",
            path.read_text(),
            re.M,
        )
    ]
    assert replacing, "the pattern finds nothing: it tests nothing"
    assert all(str(path) in named for path in replacing)
