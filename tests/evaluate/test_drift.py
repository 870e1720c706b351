"""Weight drift: figures against those made by hand, and models that do not fit each other."""

import json
from math import sqrt
from pathlib import Path

import pytest
import torch
from checkpoints import CheckpointFactory, CheckpointSpec
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_edlm.evaluate.drift import drift_table, layer_of, part_of, weight_drift
from vllm_edlm.evaluate.weights import Weights

ATTENTION, MLP = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.mlp.up_proj.weight"


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = [ATTENTION.format(0), MLP.format(0), ATTENTION.format(1), MLP.format(1)]
    tensors = {name: torch.randn(3, 2, generator=generator) for name in names}
    return tensors | {
        "model.embed_tokens.weight": torch.ones(5, 2),
        "model.norm.weight": torch.ones(2),
    }


def test_figures() -> None:
    before, after = weights(), weights()
    after[ATTENTION.format(1)] = before[ATTENTION.format(1)] + torch.tensor([[1.0, -3.0]])
    drifts = {(d.layer, d.part): d for d in weight_drift(before, after)}
    moved = drifts[1, "attention"]
    assert moved.count == 6
    assert moved.mean_change == pytest.approx(2.0)
    norm = before[ATTENTION.format(1)].norm().item()
    assert moved.relative == pytest.approx(sqrt(3 * (1 + 9)) / norm)
    still = [d for key, d in drifts.items() if key != (1, "attention")]
    assert len(still) == 5
    assert all(d.mean_change == 0 for d in still)


def test_order_is_layers_then_the_rest() -> None:
    keys = [(d.layer, d.part) for d in weight_drift(weights(), weights())]
    layers = [(i, part) for i in (0, 1) for part in ("attention", "FFN")]
    assert keys == [*layers, (None, "norms"), (None, "embeddings")]


def test_tensors_of_one_part_are_one_figure() -> None:
    before, after = weights(), weights()
    name = "model.layers.0.self_attn.o_proj.weight"
    before[name], after[name] = torch.zeros(2, 2), torch.full((2, 2), 0.5)
    first = weight_drift(before, after)[0]
    assert (first.part, first.count) == ("attention", 10)
    assert first.mean_change == pytest.approx(0.2)


def test_a_head_that_was_shared_is_compared_with_the_embeddings() -> None:
    after = weights() | {"lm_head.weight": torch.ones(5, 2) * 1.5}
    head = weight_drift(weights(), after)[-1]
    assert (head.part, head.mean_change, head.relative) == ("head", 0.5, pytest.approx(0.5))


def test_added_vocabulary_is_left_out() -> None:
    after = weights() | {
        "model.embed_tokens.weight": torch.cat([torch.ones(5, 2), torch.full((1, 2), 9.0)])
    }
    assert weight_drift(weights(), after)[-1].mean_change == 0


@pytest.mark.parametrize("missing", ["AR parent", "converted model"])
def test_missing_tensors_are_named(missing: str) -> None:
    models = {"AR parent": weights(), "converted model": weights()}
    del models[missing][MLP.format(1)]
    with pytest.raises(ValueError, match=rf"{missing} has no tensor {MLP.format(1)}"):
        weight_drift(*models.values())


def test_other_shapes_are_named() -> None:
    after = weights() | {MLP.format(0): torch.ones(4, 2)}
    with pytest.raises(ValueError, match=r"up_proj\.weight has the shape \[3, 2\] .* \[4, 2\]"):
        weight_drift(weights(), after)


@pytest.mark.parametrize(
    ("name", "layer", "part"),
    [
        ("model.layers.11.self_attn.k_proj.bias", 11, "attention"),
        ("model.layers.3.self_attn.q_norm.weight", 3, "norms"),
        ("model.layers.3.input_layernorm.weight", 3, "norms"),
        ("model.layers.0.mlp.down_proj.weight", 0, "FFN"),
        ("model.norm.weight", None, "norms"),
        ("model.embed_tokens.weight", None, "embeddings"),
        ("lm_head.weight", None, "head"),
    ],
)
def test_places(name: str, layer: int | None, part: str) -> None:
    assert (layer_of(name), part_of(name)) == (layer, part)


def test_unknown_parts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.conv\.weight"):
        part_of("model.layers.0.conv.weight")


def test_checkpoints_in_either_layout(checkpoint: CheckpointFactory) -> None:
    encoder, plain = (checkpoint(CheckpointSpec(layout=kind)) for kind in ("encoder", "plain"))
    same = Weights(encoder)
    assert set(same) == set(Weights(plain)) == set(load_file(plain / "model.safetensors"))
    table = drift_table(encoder, plain)
    assert {row["mean |dW|"] for row in table.rows} == {0.0}
    other = drift_table(checkpoint(CheckpointSpec(seed=1)), plain)
    assert all(row["mean |dW|"] > 0 for row in other.rows)


def test_sharded_checkpoints(tmp_path: Path) -> None:
    tensors = weights()
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file(
            {name: tensors[name] for name in tensors if places[name] == file}, tmp_path / file
        )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    found = Weights(tmp_path)
    assert len(found) == len(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no weights"):
        Weights(tmp_path)
