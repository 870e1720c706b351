"""The model `edlm` of lm-evaluation-harness: generation and likelihoods, by the served model."""

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.vllm_causallms import VLLM
from more_itertools import chunked
from tqdm import tqdm
from vllm import RequestOutput

from vllm_edlm.evaluate.bound import Bound
from vllm_edlm.evaluate.chain import Next, Pair, Query, chain_likelihoods
from vllm_edlm.evaluate.checkpoint import checkpoint_options
from vllm_edlm.evaluate.engine import Usage
from vllm_edlm.options import check_choice, check_count, request_options

LIKELIHOODS = ("chain", "bound")
# Texts whose likelihoods are asked for together: each is a request for every token of its end.
PAIRS_TOGETHER = 256

Likelihood = tuple[float, bool]
EncodedRequest = tuple[tuple[str, str] | None, list[int], list[int]]


class ServedLM(VLLM):
    """lm-evaluation-harness' vLLM model, with options of each request and a count of its cost.

    Attributes:
        request_options: what a generation carries in `extra_args`, where it names nothing else.
        usage: what all generations so far have taken.
    """

    request_options: Mapping[str, Any] = {}
    usage = Usage()

    @staticmethod
    def modify_gen_kwargs(
        gen_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], list[str], int]:
        """A task's generation options as vLLM takes them; greedy if it does not ask to sample.

        The harness leaves out the temperature where a task names neither it nor `do_sample`, and
        then vLLM's default would be 1.
        """
        default = {} if gen_kwargs.get("do_sample") else {"temperature": 0.0}
        return VLLM.modify_gen_kwargs(default | gen_kwargs, *args, **kwargs)

    def _model_generate(
        self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None
    ) -> list[RequestOutput]:
        for params in sampling_params if self.request_options else ():
            params.extra_args = {**self.request_options, **(params.extra_args or {})}
        outputs: list[RequestOutput] = super()._model_generate(requests, generate, sampling_params)
        self.usage += Usage.of(outputs)
        return outputs


@register_model("edlm")
class BlockDiffusionHarness(ServedLM):
    """A block-diffusion model in vLLM.

    The likelihood of a continuation is the exact left-to-right chain (`chain.py`), or a
    Monte-Carlo bound of it by the training objective (`bound.py`), whose model runs in
    transformers beside the engine.
    """

    def __init__(
        self,
        pretrained: str,
        threshold: float | None = None,
        reveal: str | None = None,
        max_steps: int | None = None,
        block_length: int | None = None,
        prompt_attention: str | None = None,
        likelihood: str = "chain",
        bound_samples: int = 32,
        bound_seed: int = 0,
        **vllm_args: Any,
    ) -> None:
        """Check the options, then start the engine.

        Args:
            pretrained: a folder or a hub name.
            threshold: parameter of the reveal rule; None: the rule's default.
            reveal: rule of every generation; None: the checkpoint's default.
            max_steps: denoise steps of a block at most; None: as many as it has positions.
            block_length: of all requests; None: the checkpoint's.
            prompt_attention: the server option; None: the checkpoint's.
            likelihood: one of `LIKELIHOODS`.
            bound_samples: masked copies of a text that the bound is the mean over.
            bound_seed: of their masks.
            vllm_args: of the harness' own vLLM model, so of vLLM's engine.

        Raises:
            ValueError: no block-diffusion model, or an option that is out of range.
        """
        self.served = checkpoint_options(pretrained, block_length, prompt_attention)
        options = {
            "diffusion_threshold": threshold,
            "diffusion_reveal": reveal,
            "diffusion_max_steps": max_steps,
        }
        self.request_options = {key: value for key, value in options.items() if value is not None}
        request_options(self.request_options, self.served)
        self.likelihood = check_choice("likelihood", likelihood, LIKELIHOODS)
        self.bound_samples = check_count("bound_samples", bound_samples)
        self.bound_seed = bound_seed
        self.pretrained = pretrained
        if prompt_attention is not None:
            vllm_args["additional_config"] = {"edlm": {"prompt_attention": prompt_attention}}
        super().__init__(pretrained, diffusion_config=self._diffusion_config, **vllm_args)

    @property
    def _diffusion_config(self) -> dict[str, int]:
        block_length = self.served.block_length
        return {"canvas_length": block_length, "max_denoising_steps": block_length}

    @cached_property
    def bound(self) -> Bound:
        """The model of the bound, loaded when it is first asked for."""
        return Bound.load(
            self.pretrained,
            self.served,
            self.model.llm_engine.model_config.dtype,
            self.bound_samples,
            self.bound_seed,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[EncodedRequest], disable_tqdm: bool = False
    ) -> list[Likelihood]:
        """Log-likelihood of each continuation, in nats, and whether it is the greedy one."""
        score = {"chain": self._chain, "bound": self._by_bound}[self.likelihood]
        likelihoods: list[Likelihood] = []
        with tqdm(total=len(requests), disable=disable_tqdm, desc=self.likelihood) as bar:
            for part in chunked(requests, PAIRS_TOGETHER):
                likelihoods += score([self._fit(*pair) for _, *pair in part])
                bar.update(len(part))
        for (key, _, _), likelihood in zip(requests, likelihoods, strict=True):
            # Windows of one long text come without a key.
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, likelihood)
        return likelihoods

    def _fit(self, context: list[int], continuation: list[int]) -> Pair:
        """Cut a context from the left, so that its text fits into the model's length.

        Raises:
            ValueError: the continuation alone does not fit.
        """
        room = self.max_length - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation must be shorter than the model's length ({self.max_length} "
                f"tokens), got {len(continuation)}"
            )
        return context[-room:], continuation

    def _chain(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        return chain_likelihoods(pairs, self._ask)

    def _ask(self, queries: Sequence[Query]) -> list[Next]:
        outputs = self._model_generate(
            [list(query.text) for query in queries],
            generate=True,
            sampling_params=[query.params() for query in queries],
        )
        return [query.answer(output) for query, output in zip(queries, outputs, strict=True)]

    def _by_bound(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        return [self.bound.likelihood(*pair) for pair in pairs]


def run_command(arguments: Sequence[str]) -> None:
    """Run the `lm_eval` command, to which the model `edlm` is known as this module is loaded.

    Versions after 0.4.13 find it by themselves, through the entry point `lm_eval.models`.
    """
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()
