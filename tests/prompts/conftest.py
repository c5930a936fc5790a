"""A small corpus of arithmetic problems and a tokenizer trained on it."""

from __future__ import annotations

import pytest

from rpt_jax.config import DataConfig
from rpt_jax.corpus.gsm_symbolic import GsmSymbolicOptions
from rpt_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer
from rpt_jax.tokenizers.training import train_sentencepiece
from tests.helpers.paths import TINY
from tests.helpers.whole_corpus import load_corpus


@pytest.fixture(scope="session")
def texts() -> list[str]:
    config = DataConfig(source_options=GsmSymbolicOptions(documents=60, held_out_templates=2), held_out_documents=3)
    return [document.text for document in load_corpus(config).train]


@pytest.fixture(scope="session")
def tokenizer(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(texts, 420, directory / "tokenizer.model")
    return load_tokenizer(directory)


@pytest.fixture(scope="session")
def documents(texts: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """The tokenizer of the small policy, which has tokens for <think>, </think> and the opening of a box."""
    return load_tokenizer(TINY)
