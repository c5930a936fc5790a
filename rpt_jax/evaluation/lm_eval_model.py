"""A policy as a model of lm-evaluation-harness (lm-eval 0.4.13): importing this module registers it as "rpt_jax".

The harness scores texts and samples continuations; tasks, few-shot examples and metrics are its own.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

from rpt_jax.config import PolicyConfig
from rpt_jax.distributed.mesh import DECODING, make_mesh, num_batch_shards, use_mesh
from rpt_jax.distributed.processes import to_host
from rpt_jax.distributed.sharding import make_reshard_fn, shard_prompts
from rpt_jax.errors import UserError
from rpt_jax.evaluation.likelihood import LikelihoodScorer, Request, collect
from rpt_jax.infra.console import Progress
from rpt_jax.model.transformer import in_compute_dtype
from rpt_jax.prompts.chat_template import render_messages
from rpt_jax.rollout.generate import sample_rollouts
from rpt_jax.rollout.prefix_sharing import separate
from rpt_jax.rollout.rollouts import Decoding
from rpt_jax.setup import load_starting_policy
from rpt_jax.weights.hf import check_files

_POLICY = "--model_args policy"  # The name of the argument in errors.
_REQUESTS_PER_LAUNCH = 256  # While the devices compute these, the host prepares the next ones.
_TOKENS_PER_ROUND = 64  # New tokens after which stop sequences are searched for.


@register_model("rpt_jax")
class PolicyLM(TemplateLM):
    """A policy of this package; `--model_args` are the arguments of the constructor."""

    def __init__(
        self,
        policy: str,
        dtype: str = "float32",
        max_length: int = 0,
        batch_size: int | str = 32,
        tokens_per_pass: int = 16_384,
        logit_chunk_tokens: int = 2048,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        """
        Args:
          policy: directory of a Hugging Face model or of a policy that a run exported, or a GGUF file.
          dtype: of the layers' computation.
          max_length: longest sequence in tokens; 0 for the policy's own context.
          batch_size: sequences that are sampled at the same time; "auto" for the default.
          tokens_per_pass: tokens of a forward pass on each device.
          logit_chunk_tokens: tokens whose logits are in memory at the same time.
          seed: of sampling, for tasks that do not decode greedily.
          device, max_batch_size: what the harness passes to every model; JAX chooses the devices.

        Raises: UserError, if the policy cannot be loaded.
        """
        super().__init__()
        del device, max_batch_size
        check_files(policy, _POLICY)
        self._mesh = make_mesh(-1, 1, 1)
        config = PolicyConfig(path=policy, preset="", dtype=dtype, precision="float32", head_precision="float32")
        with use_mesh(self._mesh):
            self._policy, self._params, self._tokenizer = load_starting_policy(config, self._mesh, _POLICY)
            reshard = make_reshard_fn(self._policy, self._mesh, functools.partial(in_compute_dtype, self._policy))
            self._weights = reshard(self._params) if reshard else self._params
        self._scorer = LikelihoodScorer(
            self._policy,
            self._params,
            self._mesh,
            tokens_per_pass=tokens_per_pass,
            logit_chunk_tokens=logit_chunk_tokens,
        )
        if max_length:
            self._scorer.max_tokens = int(max_length)
        self._batch_size = 32 if batch_size == "auto" else int(batch_size)
        self._key = jax.random.key(int(seed))

    # --- what the harness asks for ---

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token in front of a text without a context."""
        return self._tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """The longest sequence in tokens."""
        return self._scorer.max_tokens

    @property
    def batch_size(self) -> int:
        """Sequences that are sampled at the same time."""
        return self._batch_size

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's file, which the harness's cache of requests is named after."""
        return self._tokenizer.source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the token ids of a text as `transformers` encodes it: with special tokens and the tokenizer's own prefix."""
        ids = self._tokenizer.encode_template(string, True)
        prefix = list(self._tokenizer.prefix_ids)
        if add_special_tokens is False or ids[: len(prefix)] == prefix:
            return ids
        return prefix + ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation. Raises: UserError, if the tokenizer has no chat template."""
        return render_messages(self._tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        # The options of a question have the same context, which then runs once for all of them. But what is left of a context
        # that is too long depends on the option.
        by_context: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            by_context[tuple(context[-self._scorer.prompt_limit(len(continuation)) :])].append(index)
        grouped = [
            Request(context, [requests[index][2] for index in members]) for context, members in by_context.items()
        ]
        members_of = list(by_context.values())

        results: dict[int, tuple[float, bool]] = {}
        starts = range(0, len(grouped), _REQUESTS_PER_LAUNCH)
        with use_mesh(self._mesh), Progress("lm_eval, likelihoods", len(starts)) as progress:
            for start in starts:
                part = grouped[start : start + _REQUESTS_PER_LAUNCH]
                launched = self._scorer.launch(part)
                found = collect(part, launched.indices, to_host(launched.arrays))
                for members, likelihoods in zip(members_of[start : start + len(part)], found, strict=True):
                    for index, likelihood in zip(members, likelihoods, strict=True):
                        results[index] = likelihood.logprob, likelihood.is_greedy
                        texts, _, _ = requests[index]
                        if texts is not None:
                            self.cache_hook.add_partial("loglikelihood", texts, results[index])
                progress.advance()
        return [results[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows of the policy's context."""
        windows: list[list[tuple[Any, list[int], list[int]]]] = [
            [
                (None, *make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            for request in requests
        ]
        found = iter(self._loglikelihood_tokens([window for of_text in windows for window in of_text]))
        totals = [sum(next(found)[0] for _ in of_text) for of_text in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a continuation of each context, up to a stop sequence."""
        # Requests with the same settings are sampled together.
        by_settings: dict[str, list[int]] = collections.defaultdict(list)
        for index, request in enumerate(requests):
            by_settings[json.dumps(request.args[1], sort_keys=True)].append(index)
        batches = [
            members[first : first + self._batch_size]
            for members in by_settings.values()
            for first in range(0, len(members), self._batch_size)
        ]
        texts: dict[int, str] = {}
        with use_mesh(self._mesh), Progress("lm_eval, batches of continuations", len(batches)) as progress:
            for members in batches:
                contexts = [requests[index].args[0] for index in members]
                for index, text in zip(
                    members, self._continue(contexts, requests[members[0]].args[1], members), strict=True
                ):
                    texts[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                progress.advance()
        return [texts[index] for index in range(len(requests))]

    # --- sampling ---

    def _continue(self, contexts: Sequence[str], settings: dict[str, Any], numbers: Sequence[int]) -> list[str]:
        """Return a continuation of each context, sampled in rounds of some tokens.

        Args:
          contexts: the texts to continue.
          settings: keyword arguments of a generation, as the harness names them.
          numbers: of the requests, which determine the noise.
        """
        settings = dict(normalize_gen_kwargs(settings, default_max_gen_toks=256))
        stops = handle_stop_sequences(settings.get("until"), eos=None)
        limit = int(settings["max_gen_toks"])
        if limit >= self.max_length:
            raise UserError(
                f"max_gen_toks={limit} must be less than the longest sequence, max_length={self.max_length}: give a smaller one "
                "with --gen_kwargs max_gen_toks=N.",
                field="--gen_kwargs",
            )
        decoding = self._decoding(settings)
        prompts = [self.tok_encode(context)[-(self.max_length - limit) :] for context in contexts]
        responses: list[list[int]] = [[] for _ in contexts]
        unfinished = list(range(len(contexts)))
        for round_number, start in enumerate(range(0, limit, _TOKENS_PER_ROUND)):
            decoding = dataclasses.replace(decoding, max_new_tokens=min(_TOKENS_PER_ROUND, limit - start))
            sampled = self._sample(
                [prompts[i] + responses[i] for i in unfinished],
                [numbers[i] for i in unfinished],
                decoding,
                jax.random.fold_in(self._key, round_number),
            )
            for i, tokens in zip(unfinished, sampled, strict=True):
                responses[i] += tokens
            unfinished = [
                i
                for i in unfinished
                if responses[i][-1] not in decoding.stop_ids
                and not any(stop and stop in self._tokenizer.decode(responses[i]) for stop in stops)
            ]
            if not unfinished:
                break
        return [
            postprocess_generated_text(self._tokenizer.decode(tokens), stop=stops, think_end_token=None)
            for tokens in responses
        ]

    def _decoding(self, settings: dict[str, Any]) -> Decoding:
        """Return the sampling parameters of a generation; a temperature of 0 is greedy."""
        temperature = float(settings.get("temperature") or 0.0)
        return Decoding(
            samples=1,
            max_new_tokens=_TOKENS_PER_ROUND,
            temperature=temperature or 1.0,
            stop_ids=self._tokenizer.stop_ids,
            top_k=int(settings.get("top_k") or 0) if temperature else 1,
            top_p=float(settings.get("top_p") or 1.0) if temperature else 1.0,
        )

    def _sample(
        self, prompts: Sequence[Sequence[int]], numbers: Sequence[int], decoding: Decoding, key: jax.Array
    ) -> list[list[int]]:
        """Return the token ids of a response to each prompt, the stop token included."""
        shards = num_batch_shards(self._mesh, DECODING)
        rows = -(-self._batch_size // shards) * shards
        # A power of two as the length bounds the number of programs to compile.
        size = 1 << (max(map(len, prompts)) - 1).bit_length()
        tokens_PxS = np.zeros((rows, size), np.int32)
        lengths_P = np.ones(rows, np.int32)
        ids_P = np.zeros(rows, np.int32)
        for p, (prompt, number) in enumerate(zip(prompts, numbers, strict=True)):
            tokens_PxS[p, : len(prompt)] = prompt
            lengths_P[p] = len(prompt)
            ids_P[p] = number
        shared = shard_prompts(separate(tokens_PxS, lengths_P, ids_P), self._mesh, DECODING)
        rollouts, _ = sample_rollouts(self._policy, self._weights, shared, key, decoding)
        sampled_PxT, lengths_Px1 = to_host((rollouts.tokens_PxGxT[:, 0], rollouts.lengths_PxG))
        return [sampled_PxT[p, : lengths_Px1[p, 0]].tolist() for p in range(len(prompts))]
