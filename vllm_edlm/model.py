"""The served models: vLLM's own decoders with block-diffusion decoding, one class a backbone."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vllm_edlm.async_model_state import AsyncModelState
from vllm_edlm.compat.cpu_kernels import install as install_cpu_kernels
from vllm_edlm.compat.vllm_api import (
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    WeightsMapper,
    get_pp_group,
    is_pp_missing_parameter,
)
from vllm_edlm.model_state import BlockDiffusionModelState
from vllm_edlm.options import served_options
from vllm_edlm.stage_model_state import StageModelState

# Some releases name the decoder `encoder` and its head `diffusion_head`.
RELEASED_NAMES = WeightsMapper(
    orig_to_new_prefix={"encoder.": "model.", "diffusion_head.": "lm_head."}
)

# A quantised checkpoint may hold scales for the KV cache; the model has defaults.
KV_SCALES = {f"{part}_{kind}" for part in "qkv" for kind in ("scale", "zero_point")}

# The decoder that stands behind the mixin: no common type of vLLM's has all that it needs.
_Decoder: Any = Any if TYPE_CHECKING else object


class BlockDiffusionMixin(_Decoder):
    """Makes a decoder of vLLM a block-diffusion model; stands before it among the bases.

    Causality and denoising are not in the model: they lie in the attention rows and in the
    sampler of its `ModelState` (vLLM: `get_model_state_cls`).
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.hf_to_vllm_mapper = RELEASED_NAMES | cls.hf_to_vllm_mapper

    def get_model_state_cls(self) -> type[BlockDiffusionModelState]:
        """State class of Model Runner V2 for this model."""
        install_cpu_kernels()
        if not get_pp_group().is_last_rank:
            return StageModelState
        is_async = served_options(self.config).async_scheduling
        return AsyncModelState if is_async else BlockDiffusionModelState

    # Set for a step whose sampler computes the logits itself.
    defers_logits = False

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [T, V] for hidden states [T, D], or these themselves for the sampler.

        A step that only prefills has no row; the collective that gathers the vocabulary over
        tensor-parallel ranks does not take an empty tensor on every backend.
        """
        if hidden_states.shape[0] == 0:
            return hidden_states.new_empty(0, self.config.vocab_size)
        return hidden_states if self.defers_logits else self.head(hidden_states)

    def head(self, hidden_states: Tensor) -> Tensor:
        """Logits [T, V] for hidden states [T, D], T > 0."""
        return super().compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load either layout of names, the released one or the backbone's own.

        Raises:
            ValueError: a tensor of the checkpoint that the model does not have, or one that
                the checkpoint lacks, named in the message.
        """
        if self._has_names_of_its_own():
            return super().load_weights(RELEASED_NAMES.apply(weights))
        missing = self._checkpoint_names()
        loaded = super().load_weights(self._take_named(weights, missing))
        if missing:
            raise ValueError(f"the checkpoint lacks {', '.join(sorted(missing))}")
        return loaded

    def _has_names_of_its_own(self) -> bool:
        """Whether a quantisation scheme names its tensors other than vLLM its parameters."""
        return self.quant_config is not None and (
            self.quant_config.get_name() != "compressed-tensors"
        )

    def _checkpoint_names(self) -> set[str]:
        """The backbone's own names of every tensor, vLLM's fused ones taken apart."""
        names = set()
        for name, _ in self.named_parameters():
            *module, layer, kind = name.split(".")
            if kind in KV_SCALES:
                continue
            for part in self.packed_modules_mapping.get(layer, [layer]):
                names.add(".".join([*module, part, kind]))
        return names

    def _take_named(
        self, weights: Iterable[tuple[str, Tensor]], missing: set[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors under plain names and take these out of `missing`; refuse others."""
        for name, tensor in weights:
            plain_name = RELEASED_NAMES.map_name(name)
            assert plain_name is not None, "no released name stands for nothing"
            if plain_name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if plain_name.rsplit(".", 1)[-1] in KV_SCALES:
                yield plain_name, tensor
                continue
            if is_pp_missing_parameter(plain_name, self):
                continue  # It belongs to another stage of the pipeline.
            if plain_name not in missing:
                raise ValueError(f"the checkpoint's tensor {name} is not part of the model")
            missing.remove(plain_name)
            yield plain_name, tensor


class EfficientDLMForCausalLM(BlockDiffusionMixin, Qwen3ForCausalLM):
    """Qwen3 backbone."""


class EfficientDLMQwen2ForCausalLM(BlockDiffusionMixin, Qwen2ForCausalLM):
    """Qwen2 and Qwen2.5 backbone: no norm of queries and keys, biases on their projections."""


class EfficientDLMLlamaForCausalLM(BlockDiffusionMixin, LlamaForCausalLM):
    """Llama backbone."""


class NemotronLabsDiffusionForCausalLM(BlockDiffusionMixin, MistralForCausalLM):
    """Ministral 3 backbone: Llama with YaRN, queries scaled by position."""
