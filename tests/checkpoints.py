"""Tiny random checkpoints on disk, in the shapes that released ones have.

The weights are scaled so that softmax confidences are spread: some thresholds reveal one
masked position per step, some a few, some all.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
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
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY_SIZE,
    "max_position_embeddings": 512,
}
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
    missing_tensor: str | None = None
    unknown_tensor: str | None = None


CheckpointFactory = Callable[[CheckpointSpec], Path]
"""The `checkpoint` fixture: from a specification to the folder that holds it."""


def write_checkpoint(path: Path, spec: CheckpointSpec) -> Path:
    """Write configuration, weights and tokenizer of `spec` into the new folder `path`."""
    path.mkdir(parents=True)
    _write_json(path / "config.json", configuration(spec))
    _write_json(path / "generation_config.json", {"eos_token_id": EOS_ID, "pad_token_id": 0})
    tensors = {_layout_name(name, spec.layout): t for name, t in random_weights(spec)}
    if spec.missing_tensor is not None:
        del tensors[spec.missing_tensor]
    if spec.unknown_tensor is not None:
        tensors[spec.unknown_tensor] = torch.zeros(4)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(path)
    return path


def configuration(spec: CheckpointSpec) -> dict[str, object]:
    """The config.json of `spec`: a Qwen3 configuration and, if diffusion, its extra keys."""
    config: dict[str, object] = {
        "architectures": [spec.architecture],
        "model_type": "qwen3",
        "attention_bias": spec.attention_bias,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": EOS_ID,
        **SIZES,
    }
    if spec.architecture == "EfficientDLM":
        config |= _diffusion_keys(spec)
    return config | spec.config_overrides


def _diffusion_keys(spec: CheckpointSpec) -> dict[str, object]:
    module = {"AutoConfig": "configuration_edlm.EfficientDLMConfig"}
    keys: dict[str, object] = {
        "auto_map": {**module, "AutoModel": "modeling_edlm.EfficientDLM"},
        "block_size": spec.block_length,
        "mask_token_id": MASK_ID,
        "dlm_paradigm": "bidirectional",
        "dlm_type": "llada",
        "tok_mask_half_life_ratio": None,
        "disable_qk_norm": False,
        **dict.fromkeys(("diff_loss_weight", "dlm_arch", "intl_mask", "prefix_ratio")),
        **dict.fromkeys(("adaptive_mask_rate", "enforce_mask", "multi_sampling"), False),
        **dict.fromkeys(("num_ar_layers", "num_diffusion_layers", "random_length_prob"), 0),
    }
    if spec.prompt_attention is not None:
        keys["prompt_attention"] = spec.prompt_attention
    return keys


def random_weights(spec: CheckpointSpec) -> Iterator[tuple[str, Tensor]]:
    """Bare names (no `encoder.` or `model.`) and seeded fp32 tensors of a whole model."""
    generator = torch.Generator().manual_seed(spec.seed)
    for name, shape in _shapes(spec.attention_bias):
        noise = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
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


def _shapes(attention_bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, vocabulary = SIZES["hidden_size"], SIZES["vocab_size"]
    yield "embed_tokens.weight", (vocabulary, hidden)
    for layer in range(SIZES["num_hidden_layers"]):
        for name, shape in _layer_shapes(attention_bias):
            yield f"layers.{layer}.{name}", shape
    yield "norm.weight", (hidden,)
    yield "head.weight", (vocabulary, hidden)


def _layer_shapes(attention_bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, head = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["head_dim"]
    queries, keys = SIZES["num_attention_heads"] * head, SIZES["num_key_value_heads"] * head
    projections = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    for name, shape in (projections | {"o_proj": (hidden, queries)}).items():
        yield f"self_attn.{name}.weight", shape
        if attention_bias:
            yield f"self_attn.{name}.bias", shape[:1]
    yield from ((f"self_attn.{name}.weight", (head,)) for name in ("q_norm", "k_norm"))
    yield from ((f"mlp.{name}.weight", (inner, hidden)) for name in ("gate_proj", "up_proj"))
    yield "mlp.down_proj.weight", (hidden, inner)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}.weight", (hidden,)


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
