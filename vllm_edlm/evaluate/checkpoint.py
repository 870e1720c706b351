"""What a checkpoint says about itself, read before an engine starts."""

from transformers import AutoConfig, PretrainedConfig

from vllm_edlm.compat.checkpoint_configs import register_checkpoint_configs
from vllm_edlm.family import FAMILIES, architecture_of, normalise
from vllm_edlm.options import PROMPT_ATTENTIONS, Options, check_choice, check_count, resolve_rule


def checkpoint_options(
    model: str, block_length: int | None = None, prompt_attention: str | None = None
) -> Options:
    """Options that a checkpoint is served with, by its config.json.

    Args:
        model: a folder or a hub name.
        block_length: served block length; None: the checkpoint's own.
        prompt_attention: the server option; None: the checkpoint's own.

    Raises:
        ValueError: there is no such model, it is not a block-diffusion model, or an option is out
            of range.
    """
    config = _config(model)
    if architecture_of(config) is None:
        raise ValueError(
            f"{model} is not a block-diffusion model: its config.json names the architectures "
            f"{config.architectures}; known are {', '.join(FAMILIES)}"
        )
    normalise(config)
    length = check_count(
        "block length", config.block_size if block_length is None else block_length
    )
    attention = prompt_attention or config.prompt_attention
    rule, threshold = resolve_rule("confidence", None)
    return Options(
        block_length=length,
        max_steps=length,
        rule=rule,
        threshold=threshold,
        mask_token_id=config.mask_token_id,
        prompt_attention=check_choice("prompt_attention", attention, PROMPT_ATTENTIONS),
        token_shift=config.token_shift,
    )


def check_autoregressive(model: str) -> None:
    """Refuse a model that cannot stand beside a block-diffusion model as its AR parent.

    Raises:
        ValueError: there is no such model, or it is a block-diffusion model itself.
    """
    if (architecture := architecture_of(_config(model))) is not None:
        raise ValueError(f"the AR parent {model} is a block-diffusion model ({architecture})")


def _config(model: str) -> PretrainedConfig:
    register_checkpoint_configs()
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {model}: {error}") from error
