"""The FLOPs of next-token pre-training."""

from __future__ import annotations

import numpy as np
import pytest

from rpt_jax.model.model_config import preset
from rpt_jax.model.transformer import Transformer
from rpt_jax.pretrain import update_flops


@pytest.mark.parametrize("trace_weight", [0.0, 1.0])
def test_the_flops_of_an_update_are_those_of_its_tokens_without_padding(trace_weight: float) -> None:
    """A window of four tokens, and a row with two traces that continue its first two tokens and its first one."""
    batch = {
        "mask": np.array([[False, True, True, True, False, False]]),
        "trace_segment": np.array([[[1, 1, 1, 2, 0]]]),
        "trace_position": np.array([[[2, 3, 4, 1, 0]]]),
    }
    config = preset("tiny")
    # The number of tokens that each token attends to, itself included.
    attended = [1, 2, 3, 4] + ([3, 4, 5, 2] if trace_weight else [])
    matrices = 2 * config.matmul_parameters * len(attended)
    attention = 4 * config.layers * config.heads * config.head_size * sum(attended)
    assert update_flops(Transformer(config), batch, trace_weight) == 3 * (matrices + attention)
