"""What a task starts from: the policy, its tokenizer and the documents, checked against each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from rpt_jax.config import Experiment, PolicyConfig
from rpt_jax.data.corpus import Corpus, Document, load_corpus
from rpt_jax.data.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.errors import UserError
from rpt_jax.infra.sharding import parameter_shardings
from rpt_jax.policy.hf import load_policy, load_shape
from rpt_jax.policy.presets import Shape, preset
from rpt_jax.policy.transformer import Params, Transformer

Documents = list[list[int]]  # Token ids: of each document its one tokenisation, in windows of bounded length.


class Setup(NamedTuple):
    policy: Transformer
    params: Params
    mesh: Mesh
    tokenizer: Tokenizer
    train: Documents
    held_out: Documents
    unseen_templates: Documents


def make_policy(config: PolicyConfig, shape: Shape) -> Transformer:
    """The decoder of `shape` in the config's dtype."""
    return Transformer(shape, jnp.dtype(config.dtype), config.remat == "full")


def load_start(config: PolicyConfig, mesh: Mesh) -> tuple[Transformer, Params, Tokenizer]:
    """Load the policy of `policy.path` onto the mesh, with its tokenizer.

    Raises: UserError, where a file is missing or damaged, the shape is not the preset's or the tokenizer not the policy's.
    """
    if not config.path:
        raise UserError(
            "policy.path is empty: give the directory of a policy, such as one that task 'pretrain' exports."
        )
    shape, fingerprint = load_shape(config.path)
    if config.preset and preset(config.preset) != shape:
        raise UserError(f"policy.path='{config.path}' holds {shape}, which is not policy.preset='{config.preset}'.")
    tokenizer = load_tokenizer(config.path)
    if tokenizer.vocab_size > shape.vocab or (fingerprint and fingerprint != tokenizer.fingerprint):
        raise UserError(
            f"{tokenizer.source} is not the tokenizer of the policy in '{config.path}' ({tokenizer.vocab_size} tokens, "
            f"SHA-256 {tokenizer.fingerprint[:12]}…; the policy was trained with {shape.vocab} and "
            f"{(fingerprint or 'unknown')[:12]}…). Put the policy's own tokenizer there."
        )
    policy = make_policy(config, shape)
    _, params, _ = load_policy(config.path, parameter_shardings(policy, mesh))
    return policy, params, tokenizer


def set_up(experiment: Experiment, mesh: Mesh) -> Setup:
    """Load the starting policy and the corpus. Raises: UserError, as `load_start` and `load_corpus` do."""
    policy, params, tokenizer = load_start(experiment.policy, mesh)
    corpus = load_corpus(experiment.data)
    return Setup(policy, params, mesh, tokenizer, *tokenise(corpus, tokenizer, experiment.data.max_document_tokens))


def tokenise(corpus: Corpus, tokenizer: Tokenizer, limit: int) -> tuple[Documents, Documents, Documents]:
    """Tokenise the corpus' three parts once; ids of a longer document than `limit` become several windows."""

    def part(documents: Sequence[Document]) -> Documents:
        encoded = tokenizer.encode_batch([d.text for d in documents])
        return [ids[i : i + limit] for ids in encoded for i in range(0, len(ids), limit)]

    return part(corpus.train), part(corpus.held_out), part(corpus.held_out_templates)
