"""The model card names what was done, and claims nothing that is not known."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard

from vllm_edlm.train.model_card import model_card
from vllm_edlm.train.objective import Objective

OBJECTIVE = Objective(block_length=16, mask_token_id=5, half_life_ratio=0.25, seed=7)
FACTS = {
    "parent": "somebody/Some-1B",
    "data": "train.jsonl",
    "learning rate": 1e-5,
    "tokens": 1_000_000,
    "LoRA": {"rank": 16, "alpha": 32.0},
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def parsed(card: ModelCard, tmp_path: Path) -> ModelCard:
    """The card as the hub's own library reads it from disk."""
    path = tmp_path / "README.md"
    card.save(path)
    return ModelCard.load(path)


def rows(card: ModelCard) -> dict[str, str]:
    """The table of facts."""
    lines = [line for line in card.text.splitlines() if line.startswith("| ")]
    return dict(line.strip("| ").split(" | ", maxsplit=1) for line in lines)


def test_the_front_matter_is_the_hubs(tmp_path: Path) -> None:
    data = parsed(model_card("my-dlm", OBJECTIVE, FACTS), tmp_path).data.to_dict()
    assert data["base_model"] == "somebody/Some-1B"
    assert data["library_name"] == "vllm"
    assert data["pipeline_tag"] == "text-generation"
    assert "block-diffusion" in data["tags"]
    assert "license" not in data, "nobody said under which"


def test_every_fact_stands_in_the_table(tmp_path: Path) -> None:
    table = rows(parsed(model_card("my-dlm", OBJECTIVE, FACTS), tmp_path))
    assert table["parent"] == "somebody/Some-1B"
    assert table["learning rate"] == "1e-05"
    assert table["tokens"] == "1000000"
    assert table["LoRA"] == "rank 16, alpha 32"
    assert f"torch {torch.__version__}" in table["versions"]
    assert (table["block length"], table["seed"]) == ("16", "7")
    assert table["noise"] == "position, half-life ratio 0.25"
    assert (table["pattern"], table["token shift"]) == ("block_clean", "no")


def test_only_what_was_used_is_named(tmp_path: Path) -> None:
    objective = Objective(16, 5, noise="uniform", growth=(4, 16))
    table = rows(parsed(model_card("my-dlm", objective, FACTS), tmp_path))
    assert (table["noise"], table["block length"]) == ("uniform", "4, 16")


def test_text_that_would_break_the_table_is_escaped(tmp_path: Path) -> None:
    card = model_card("my-dlm", OBJECTIVE, FACTS | {"data": "a|b\nc"})
    assert rows(parsed(card, tmp_path))["data"] == r"a\|b c"


@pytest.mark.parametrize(
    "licence",
    [
        {"license": "apache-2.0"},
        {"license": "other", "license_name": "own", "license_link": "https://example.org/l"},
    ],
)
def test_the_parents_licence_is_taken_over(tmp_path: Path, licence: dict[str, str]) -> None:
    parent = tmp_path / "parent"
    lines = [f"{key}: {value}" for key, value in licence.items()]
    ModelCard("\n".join(["---", *lines, "language: en", "---", "# Parent"])).save(
        parent / "README.md"
    )
    data = parsed(model_card("my-dlm", OBJECTIVE, {"parent": str(parent)}), tmp_path).data
    assert {k: v for k, v in data.to_dict().items() if k.startswith("license")} == licence


@pytest.mark.parametrize("text", [None, "no front matter", "---\nlicense: [\n---\n"])
def test_a_parent_without_a_readable_licence_costs_nothing(
    tmp_path: Path, text: str | None
) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    if text is not None:
        (parent / "README.md").write_text(text)
    data = parsed(model_card("my-dlm", OBJECTIVE, {"parent": str(parent)}), tmp_path).data
    assert "license" not in data.to_dict()


def test_files_and_folders_are_shown_without_their_paths(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    (secret / "parent").mkdir(parents=True)
    (secret / "train.jsonl").touch()
    facts = {"parent": str(secret / "parent"), "data": str(secret / "train.jsonl")}
    card = parsed(model_card("my-dlm", OBJECTIVE, facts), tmp_path)
    assert "base_model" not in card.data.to_dict()
    assert (rows(card)["parent"], rows(card)["data"]) == ("parent", "train.jsonl")
    assert "Converted from parent with" in card.text
    assert "secret" not in str(card)


def test_it_says_how_to_serve_and_claims_no_figure(tmp_path: Path) -> None:
    text = parsed(model_card("my-dlm", OBJECTIVE, {}), tmp_path).text
    assert "# my-dlm" in text
    assert "vllm serve DIR" in text
    assert "measures neither the accuracy nor the speed" in text
