"""The server shared by the tests of a session."""

from collections.abc import Iterator

import pytest
import torch
from checkpoints import CheckpointFactory, CheckpointSpec
from serving import Server, serve


@pytest.fixture(scope="session")
def server(
    checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A checkpoint as released, served block-causally by the server's options."""
    torch.set_num_threads(1)
    spec = CheckpointSpec(prompt_attention=None, seed=7)
    with serve(checkpoint(spec), spec, tmp_path_factory.mktemp("server") / "log") as running:
        yield running
