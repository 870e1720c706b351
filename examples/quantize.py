"""int8 weights and activations (W8A8) for a checkpoint: a copy in the compressed-tensors format.

Weights of linear layers get a scale for each output channel; activations are quantised per token
while serving. Embeddings, head and norms are left alone, so no data is needed.

Usage: python -m examples.quantize SRC DST && vllm serve DST
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
LINEAR = re.compile(r"\.layers\.\d+\..*_proj\.weight$")
# Released checkpoints name the decoder `encoder` and its head `diffusion_head`.
PLAIN_PREFIXES = {"encoder.": "model.", "diffusion_head.": "lm_head."}


def quantize_checkpoint(source: Path, target: Path) -> None:
    """Write the int8 copy of `source` into the new folder `target`, shard by shard.

    Names of tensors become the plain ones (`model.*`, `lm_head.weight`).

    Raises:
        ValueError: `source` is quantised already, or holds no safetensors file.
        FileExistsError: `target` exists.
    """
    config = json.loads((source / "config.json").read_text())
    if "quantization_config" in config:
        raise ValueError(f"{source} is quantised already: config.json has quantization_config")
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{source} holds no *.safetensors file")
    target.mkdir(parents=True)
    _copy_other_files(source, target)
    scheme = preset_name_to_scheme("W8A8", ["Linear"])
    config["quantization_config"] = quantization_config(scheme)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    sizes = {shard.name: _quantize_shard(shard, target / shard.name, scheme) for shard in shards}
    if (source / INDEX).is_file():
        _write_index(target / INDEX, sizes)


def quantization_config(scheme: QuantizationScheme) -> dict[str, object]:
    """What config.json says of the quantisation, as vLLM and transformers read it."""
    return QuantizationConfig(
        config_groups={"group_0": scheme},
        format="int-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=["lm_head"],
    ).model_dump(mode="json", exclude_none=True)


def quantize_weight(weight: Tensor, scheme: QuantizationScheme) -> tuple[Tensor, Tensor]:
    """int8 weight [out, in] and fp32 scale [out, 1] of `weight` [out, in]."""
    weight = weight.float()
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale, zero = calculate_qparams(low, high, scheme.weights)
    return quantize(weight, scale, zero, scheme.weights, dtype=torch.int8), scale


def plain_name(name: str) -> str:
    """Name of a tensor in the plain layout, whatever its layout."""
    for prefix, plain in PLAIN_PREFIXES.items():
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return name


def _quantize_shard(source: Path, target: Path, scheme: QuantizationScheme) -> dict[str, int]:
    """Write one file; bytes of each of its tensors, by name."""
    tensors = dict(_quantized(source, scheme))
    save_file(tensors, target, metadata={"format": "pt"})
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _quantized(source: Path, scheme: QuantizationScheme) -> Iterator[tuple[str, Tensor]]:
    with safe_open(source, framework="pt") as file:
        for stored_name in file.keys():  # noqa: SIM118 (not a dict)
            name, tensor = plain_name(stored_name), file.get_tensor(stored_name)
            if LINEAR.search(name):
                tensor, scale = quantize_weight(tensor, scheme)
                yield f"{name}_scale", scale
            yield name, tensor


def _write_index(path: Path, sizes: dict[str, dict[str, int]]) -> None:
    total = sum(size for shard in sizes.values() for size in shard.values())
    files = {name: shard for shard, tensors in sizes.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": files}
    path.write_text(json.dumps(index, indent=2) + "\n")


def _copy_other_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copy2(path, target)


def main() -> None:
    """Quantise the checkpoint of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of a served checkpoint")
    parser.add_argument("target", type=Path, help="new folder for the int8 copy")
    args = parser.parse_args()
    quantize_checkpoint(args.source, args.target)


if __name__ == "__main__":
    main()
