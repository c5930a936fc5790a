"""A corpus source of your own: pages of sums, generated on the fly, with an option for their size.

python -m rpt_jax.main --config=examples/custom_source.py
"""

import collections
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

from rpt_jax.config import DataConfig, load_config_file
from rpt_jax.corpus.documents import Document
from rpt_jax.registry import CORPUS_SOURCES


@dataclasses.dataclass(frozen=True)
class SumOptions:
    # Number of pages.
    pages: int = 200


@CORPUS_SOURCES.register("sums", options=SumOptions)
def sums(config: DataConfig, skipped: collections.Counter) -> Iterator[Document]:
    """Pages of eight sums of two numbers below 100."""
    for page in range(config.source_options.pages):
        draw = random.Random(f"{config.seed}:{page}")
        pairs = [(draw.randrange(100), draw.randrange(100)) for _ in range(8)]
        text = "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)
        yield Document(text, name=f"sums:{page}")


def get_config() -> Any:
    config = load_config_file("configs/rpt_tiny.py")
    config.data.source = "sums"
    config.data.source_options = {"pages": 300}
    config.data.min_context = 16
    config.training.total_steps = 10
    return config
