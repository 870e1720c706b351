"""Grammars over a canvas, on vLLM's structured-output interface.

A grammar knows what may come next, so the mask of an open position is exact if every token
before it is certain. That holds for the first open position, and for the ones behind it as
long as the grammar leaves no choice: then the only token it allows is what will stand there.
Positions behind those are chosen freely, and checked when they are emitted.
"""

import numpy as np
import torch

from vllm_edlm.compat.vllm_api import (
    Request,
    StructuredOutputGrammar,
    StructuredOutputManager,
)


class CanvasGrammars:
    """The grammars of all constrained requests, in the scheduler."""

    def __init__(self, manager: StructuredOutputManager) -> None:
        self.manager = manager
        self._bitmask: torch.Tensor | None = None

    def certain_tokens(self, request: Request, at_most: int) -> list[int]:
        """Tokens that stand at the request's next positions, whatever the model says.

        Nothing is certain while vLLM does not constrain the request, that is in its reasoning.
        """
        grammar = self._grammar(request)
        tokens: list[int] = []
        if grammar is None or self.manager._get_constraint_bounds(request, ()).constraint_start:
            return tokens
        while len(tokens) < at_most and not grammar.is_terminated():
            token = self._only_token(grammar)
            if token is None or not grammar.accept_tokens(request.request_id, [token]):
                break
            tokens.append(token)
        grammar.rollback(len(tokens))
        return tokens

    def trim(self, request: Request, token_ids: list[int]) -> None:
        """Cut a run of tokens where the request's grammar refuses one, in place.

        If it refuses the first one, which was chosen under its mask, the request's other
        parameters have left it no token, and vLLM ends the request with an error.
        """
        grammar = self._grammar(request)
        if grammar is None or grammar.is_terminated() or not token_ids:
            return
        accepted = self.manager.validate_tokens(request, token_ids)
        del token_ids[max(len(accepted), 1) :]

    @staticmethod
    def _grammar(request: Request) -> StructuredOutputGrammar | None:
        constraint = request.structured_output_request
        grammar = constraint.grammar if constraint is not None else None
        return grammar if isinstance(grammar, StructuredOutputGrammar) else None

    def _only_token(self, grammar: StructuredOutputGrammar) -> int | None:
        """The one token that the grammar allows next, if it allows just one."""
        if self._bitmask is None:
            assert self.manager.backend is not None
            self._bitmask = self.manager.backend.allocate_token_bitmask(1)
        grammar.fill_bitmask(self._bitmask, 0)
        words = self._bitmask[0].numpy().view(np.uint32)
        allowed = np.flatnonzero(words)
        if len(allowed) != 1 or (word := int(words[allowed[0]])) & (word - 1):
            return None
        return int(allowed[0]) * 32 + word.bit_length() - 1
