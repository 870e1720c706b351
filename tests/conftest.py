"""Fixtures for every test: random checkpoints, each written once a session."""

from pathlib import Path

import pytest
from checkpoints import CheckpointFactory, CheckpointSpec, write_checkpoint
from hypothesis import settings

# No test asserts a time.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """Returns a function from a specification to the folder that holds it."""
    folder, written = tmp_path_factory.mktemp("checkpoints"), {}

    def path_of(spec: CheckpointSpec) -> Path:
        if repr(spec) not in written:
            written[repr(spec)] = write_checkpoint(folder / str(len(written)), spec)
        return written[repr(spec)]

    return path_of
