"""Bad words on a canvas: sequences of tokens that a request must never produce.

Positions are revealed out of order, so a word is prevented wherever it may still arise: at
each place in the text where all its positions but one hold its tokens and that one is masked,
its token there is banned. A word may begin before the open block and must end inside it.

A place is described by its faults: a masked position counts one, a wrong token two. So one
fault is a ban, none is a word that stands.

Nothing here synchronises with the device: shapes follow from numbers on the CPU. The work is
the words' tokens times B, whatever the words are.

Legend for shapes: S slots of the runner, N requests of a batch, B block length, C positions
before the block that a word may reach into, J tokens of the batch's words in turn, W words,
K = W * B places, R rows of logits, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_edlm.virtual_rows import Ints

# What a window holds instead of a token id.
MASKED = -1
NOTHING = -2
# Places are examined for at most so many (token, end) pairs at once.
MAX_PAIRS = 2**22


class BadWords:
    """The bad words of every request in the runner, kept on the CPU.

    vLLM's limits (`VLLM_MAX_NUM_BAD_WORDS`, `VLLM_MAX_BAD_WORDS_TOTAL_TOKENS`) are the
    caller's to check.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.device = device
        self.has_words = np.zeros(num_slots, dtype=bool)
        self.words: dict[int, Sequence[Sequence[int]]] = {}
        self._batch: tuple[bytes, WordIndex] | None = None

    def add(self, slot: int, words: Sequence[Sequence[int]] | None) -> None:
        """Take the words of the request that now has `slot`, each of one token at least."""
        if words or self.has_words[slot]:
            self._batch = None
        self.has_words[slot] = bool(words)
        self.words.pop(slot, None)
        if words:
            self.words[slot] = words

    def any(self, slots: Ints) -> bool:
        """Whether a request of the batch has bad words."""
        return bool(self.words) and bool(self.has_words[slots].any())

    def index(self, slots: Ints) -> "WordIndex":
        """The words of a batch, some request of which has words.

        Kept on the device until the batch or a request's words change.
        """
        key = slots.tobytes()
        if self._batch is None or self._batch[0] != key:
            owners = np.flatnonzero(self.has_words[slots])
            words = [(int(owner), word) for owner in owners for word in self.words[slots[owner]]]
            self._batch = (key, WordIndex.of(words, len(slots), self.device))
        return self._batch[1]


@dataclass(frozen=True)
class WordIndex:
    """The bad words of a batch, flat; tensors on the device.

    Attributes:
        token: [J] token ids.
        back: [J] positions from each token to its word's last.
        word: [J] each token's word.
        last: [W] index into J of each word's last token.
        request: [W] each word's request in the batch.
        num_requests: N.
        context: C, one less than the longest word.
    """

    token: Tensor
    back: Tensor
    word: Tensor
    last: Tensor
    request: Tensor
    num_requests: int
    context: int

    @staticmethod
    def of(
        words: Sequence[tuple[int, Sequence[int]]], num_requests: int, device: torch.device
    ) -> "WordIndex":
        """Index pairs of a request and one of its words."""
        length = np.array([len(tokens) for _, tokens in words])
        word_J = np.repeat(np.arange(len(words)), length)
        last_W = np.cumsum(length) - 1
        token_J = np.concatenate([tokens for _, tokens in words])
        back_J = last_W[word_J] - np.arange(len(word_J))
        request_W = np.array([request for request, _ in words])
        arrays = (token_J, back_J, word_J, last_W, request_W)
        # One copy for all, from pinned memory: it waits for nothing.
        flat = torch.from_numpy(np.concatenate(arrays).astype(np.int64))
        flat = flat.pin_memory() if device.type == "cuda" else flat
        parts = flat.to(device, non_blocking=True).split([len(array) for array in arrays])
        token, back, word, last, request = parts
        context = int(length.max()) - 1
        return WordIndex(token, back, word, last, request, num_requests, context)

    def window(
        self,
        all_token_ids: Tensor,
        slots_N: Tensor,
        block_start_N: Tensor,
        offset_N: Tensor,
        width_N: Tensor,
        canvas_NB: Tensor,
        mask_token_id: int,
        first_N: Tensor | int = 0,
    ) -> Tensor:
        """The text that words may stand in: C positions before each open block, and the block.

        Args:
            all_token_ids: [S, max_model_len] tokens of each slot, valid for known positions.
            block_start_N: [N] first position of the open block.
            offset_N: [N] known positions of the block; canvas entries below have no meaning.
            width_N: [N] end of the block within the canvas.
            canvas_NB: [N, B] tokens, `mask_token_id` where a position is masked.
            first_N: [N] first position that a word may begin at: 0, or the prompt's length to
                look at the output alone.

        Returns:
            [N, C + B] token ids, `MASKED`, or `NOTHING` outside of what counts.
        """
        entry = torch.arange(-self.context, canvas_NB.shape[1], device=canvas_NB.device)
        position = block_start_N[:, None] + entry
        inside = position.clamp(0, all_token_ids.shape[1] - 1)
        known = all_token_ids[slots_N[:, None], inside].to(torch.int64)
        canvas_NB = canvas_NB.to(torch.int64).masked_fill(canvas_NB == mask_token_id, MASKED)
        canvas = torch.nn.functional.pad(canvas_NB, (self.context, 0), value=NOTHING)
        text = torch.where(entry < offset_N[:, None], known, canvas)
        first = first_N[:, None] if isinstance(first_N, Tensor) else first_N
        return text.masked_fill((position < first) | (entry >= width_N[:, None]), NOTHING)

    def banned(self, window: Tensor) -> "BannedTokens":
        """What must not be chosen in a window [N, C + B], so that no word arises."""
        block_length = window.shape[1] - self.context
        faults_WB, back_WB = self._faults(window)
        is_banned = faults_WB == 1
        back_WB = back_WB.masked_fill(~is_banned, 0)
        entry = torch.arange(block_length, device=window.device) - back_WB
        return BannedTokens(
            # Only banned places have an entry, that of a masked position, in the canvas.
            cell=(self.request[:, None] * block_length + entry).flatten(),
            token=self.token[self.last[:, None] - back_WB].flatten(),
            is_banned=is_banned.flatten(),
            num_cells=self.num_requests * block_length,
        )

    def completes(self, before: Tensor, after: Tensor) -> Tensor:
        """[N] bool: a word stands in window `after` at a place where `before` it did not."""
        arises_WB = (self._faults(before)[0] > 0) & (self._faults(after)[0] == 0)
        arises_W = arises_WB.any(dim=1).to(torch.int32)
        count_N = torch.zeros(self.num_requests, dtype=torch.int32, device=before.device)
        return count_N.index_add(0, self.request, arises_W) > 0

    def _faults(self, window: Tensor) -> tuple[Tensor, Tensor]:
        """Both [W, B], for each word and each canvas entry that it may end at: its faults, and
        how far before its end its masked position lies if there is just one."""
        end_B = torch.arange(self.context, window.shape[1], device=window.device)
        ends_at_once = max(1, MAX_PAIRS // len(self.token))
        parts = [self._faults_at(window, end) for end in end_B.split(ends_at_once)]
        faults, back = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return faults, back

    def _faults_at(self, window: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """The same for the words that end at positions `end` [E] of the window."""
        held_JE = window[self.request[self.word][:, None], end - self.back[:, None]]
        masked_JE = held_JE == MASKED
        wrong_JE = (held_JE != self.token[:, None]) & ~masked_JE
        zeros_WE = held_JE.new_zeros(len(self.last), len(end))
        faults_WE = zeros_WE.index_add(0, self.word, masked_JE + 2 * wrong_JE.to(torch.int64))
        back_WE = zeros_WE.index_add(0, self.word, masked_JE * self.back[:, None])
        return faults_WE, back_WE


@dataclass(frozen=True)
class BannedTokens:
    """Tokens banned at masked positions, one candidate for each place; tensors [K].

    Attributes:
        cell: flat index into the canvases [N, B].
        token: token id.
        is_banned: bool, the candidates that count; the cell of another means nothing.
        num_cells: N * B.
    """

    cell: Tensor
    token: Tensor
    is_banned: Tensor
    num_cells: int

    def apply_(self, logits_RV: Tensor, cell_R: Tensor) -> Tensor:
        """Set the banned tokens' logits to -inf, in place.

        Args:
            logits_RV: [R, V] contiguous rows, one at least, any part of the step's rows.
            cell_R: [R] int64 cell of each row.

        Returns:
            `logits_RV`.
        """
        num_rows, vocab_size = logits_RV.shape
        row_of_cell = cell_R.new_full((self.num_cells,), -1)
        row_of_cell.scatter_(0, cell_R, torch.arange(num_rows, device=cell_R.device))
        row_K = row_of_cell[self.cell.clamp(0, self.num_cells - 1)]
        # A tokenizer may know tokens that the model has no logit for.
        counts_K = self.is_banned & (row_K >= 0) & (self.token < vocab_size)
        # Shapes are fixed, so candidates that do not count lower some logit to +inf: not at all.
        index_K = (row_K * vocab_size + self.token).masked_fill(~counts_K, 0)
        ceiling_K = torch.where(counts_K, -torch.inf, torch.inf).to(logits_RV.dtype)
        logits_RV.view(-1).scatter_reduce_(0, index_K, ceiling_K, reduce="amin")
        return logits_RV
