"""Tiny random checkpoints on disk, in the shapes that released ones have.

The weights are scaled so that softmax confidences are spread: some thresholds reveal one
masked position per step, some a few, some all.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from released_configs import Config, released_config
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MASK_TOKEN = "<|mask|>"
LETTERS = ["\n", *map(chr, range(ord(" "), ord("~") + 1)), *map(chr, range(0x410, 0x450))]
VOCABULARY = [*SPECIAL, *LETTERS, MASK_TOKEN]
VOCABULARY_SIZE = len(VOCABULARY)
EOS_ID = VOCABULARY.index("<|endoftext|>")
MASK_ID = VOCABULARY.index(MASK_TOKEN)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Biases of queries, keys and values; a norm of queries and keys.
QWEN2_TYPES = ("qwen2", "Fast_dLLM_Qwen")
QK_NORM_TYPES = ("qwen3", "sdar")
# Standard deviations chosen by looking at confidences, see the module's first lines.
EMBEDDING_STD = 1.0
HEAD_STD = 0.6
ATTENTION_GAIN = 2.0
QK_NORM_GAIN = 1.6
# Else the mask token would hardly ever be the likeliest, and nobody would see it chosen.
MASK_GAIN = 2.0


@dataclass(frozen=True)
class CheckpointSpec:
    """What to write; the defaults make a valid checkpoint in the released style."""

    architecture: str = "EfficientDLM"
    layout: str = "encoder"
    """`encoder` (`encoder.*`, `diffusion_head.weight`) or `plain` (`model.*`, `lm_head.weight`)."""
    block_length: int = 8
    prompt_attention: str | None = "block_causal"
    attention_bias: bool = False
    seed: int = 0
    config_overrides: dict[str, object] = field(default_factory=dict)
    generation: dict[str, object] = field(default_factory=dict)
    """What generation_config.json says besides the end and pad tokens."""
    missing_tensor: str | None = None
    unknown_tensor: str | None = None


CheckpointFactory = Callable[[CheckpointSpec], Path]
"""The `checkpoint` fixture: from a specification to the folder that holds it."""


def write_checkpoint(path: Path, spec: CheckpointSpec) -> Path:
    """Write configuration, weights and tokenizer of `spec` into the new folder `path`."""
    path.mkdir(parents=True)
    _write_json(path / "config.json", configuration(spec))
    tokens = {"eos_token_id": EOS_ID, "pad_token_id": 0}
    _write_json(path / "generation_config.json", tokens | spec.generation)
    tensors = {_layout_name(name, spec.layout): t for name, t in random_weights(spec)}
    if spec.missing_tensor is not None:
        del tensors[spec.missing_tensor]
    if spec.unknown_tensor is not None:
        tensors[spec.unknown_tensor] = torch.zeros(4)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(path)
    return path


def configuration(spec: CheckpointSpec) -> Config:
    """The config.json of `spec`."""
    keys = released_config(spec.architecture, spec.block_length, MASK_ID, spec.prompt_attention)
    own = {
        "attention_bias": spec.attention_bias,
        "vocab_size": VOCABULARY_SIZE,
        "eos_token_id": EOS_ID,
    }
    return keys | own | spec.config_overrides


def random_weights(spec: CheckpointSpec) -> Iterator[tuple[str, Tensor]]:
    """Bare names (no `encoder.` or `model.`) and seeded fp32 tensors of a whole model.

    A tied head is not among them.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    config = configuration(spec)
    for name, shape in _shapes(config):
        noise = torch.randn(shape, generator=generator)
        if name == "norm.weight" and config["tie_word_embeddings"]:
            yield name, HEAD_STD / EMBEDDING_STD + 0.1 * noise
        elif name.endswith("norm.weight"):
            yield name, (QK_NORM_GAIN if "self_attn" in name else 1.0) + 0.1 * noise
        else:
            tensor = noise * _std(name, shape)
            if name == "head.weight":
                tensor[MASK_ID] *= MASK_GAIN
            yield name, tensor


def _std(name: str, shape: tuple[int, ...]) -> float:
    fixed = {"embed_tokens.weight": EMBEDDING_STD, "head.weight": HEAD_STD}
    if name in fixed:
        return fixed[name]
    if name.endswith(".bias"):
        return 0.2
    return (ATTENTION_GAIN if "self_attn" in name else 1.0) * shape[-1] ** -0.5


def _shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "embed_tokens.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in _layer_shapes(config):
            yield f"layers.{layer}.{name}", shape
    yield "norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "head.weight", (vocabulary, hidden)


def _layer_shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    yield from _attention_shapes(config)
    yield from ((f"mlp.{name}.weight", (inner, hidden)) for name in ("gate_proj", "up_proj"))
    yield "mlp.down_proj.weight", (hidden, inner)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}.weight", (hidden,)


def _attention_shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim", hidden // heads)
    queries, keys = heads * head, config["num_key_value_heads"] * head
    projections = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    is_qwen2 = config["model_type"] in QWEN2_TYPES
    for name, shape in (projections | {"o_proj": (hidden, queries)}).items():
        yield f"self_attn.{name}.weight", shape
        if config["attention_bias"] or (is_qwen2 and name != "o_proj"):
            yield f"self_attn.{name}.bias", shape[:1]
    if config["model_type"] in QK_NORM_TYPES:
        yield from ((f"self_attn.{name}.weight", (head,)) for name in ("q_norm", "k_norm"))


def _layout_name(name: str, layout: str) -> str:
    head, backbone = {
        "encoder": ("diffusion_head.weight", "encoder."),
        "plain": ("lm_head.weight", "model."),
    }[layout]
    return head if name == "head.weight" else backbone + name


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single characters, with a mask token, an EOS and a chat template."""
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    fast = Tokenizer(models.WordLevel(ids, unk_token="<|pad|>"))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<|pad|>",
        eos_token="<|endoftext|>",
        mask_token=MASK_TOKEN,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
