"""The tokenizer of tiny-math: byte-level BPE in which every digit is a token of its own.

Digits keep numbers digit-wise; words of the task become one token each, so answers stay short.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

USER, ASSISTANT, END, MASK, PAD = "<|user|>", "<|assistant|>", "<|im_end|>", "<|mask|>", "<|pad|>"
_SPECIAL = [PAD, END, MASK, USER, ASSISTANT]

# A number's first digit takes the space before it; every later digit stands alone.
_PIECES = r" ?\d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'user' %}" + USER + "{{ message.content }}"
    "{% elif message.role == 'assistant' %}" + ASSISTANT + "{{ message.content }}" + END + ""
    "{% else %}{{ raise_exception('only the roles user and assistant exist here') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer on `texts`; same texts, same tokenizer.

    Raises:
        ValueError: `vocab_size` leaves no room for the 256 bytes and the special tokens.
    """
    if vocab_size < 256 + len(_SPECIAL):
        raise ValueError(f"vocab_size must be at least {256 + len(_SPECIAL)}, got {vocab_size}")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        mask_token=MASK,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
