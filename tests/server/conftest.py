"""The servers shared by the tests of a session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import CheckpointFactory, CheckpointSpec
from oracle_model import OracleModel
from serving import (
    NAME,
    RANDOM_FLAGS,
    TINY_FLAGS,
    TINY_NAME,
    RandomServer,
    Server,
    random_tokenizer,
    serve,
    tiny_tokenizer,
)

from examples.demo import TINY_MATH


@pytest.fixture(scope="session")
def server(
    checkpoint: CheckpointFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RandomServer]:
    """A checkpoint as released, served block-causally by the server's options."""
    torch.set_num_threads(1)
    spec = CheckpointSpec(prompt_attention=None, seed=7)
    path, folder = checkpoint(spec), tmp_path_factory.mktemp("server")
    random_tokenizer().save_pretrained(tokenizer := folder / "tokenizer")
    flags = (*RANDOM_FLAGS, "--tokenizer", str(tokenizer))
    with serve(path, NAME, folder / "log", *flags) as address:
        yield RandomServer(address, NAME, tokenizer, spec, OracleModel.load(path))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Log and tokenizer of the server of tiny-math."""
    folder = tmp_path_factory.mktemp("tiny-math")
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def tiny_math(tiny_folder: Path) -> Iterator[Server]:
    """The committed real model, with tokens for tool calls and reasoning."""
    flags = (*TINY_FLAGS, "--tokenizer", str(tokenizer := tiny_folder / "tokenizer"))
    with serve(TINY_MATH, TINY_NAME, tiny_folder / "log", *flags) as address:
        yield Server(address, TINY_NAME, tokenizer)
