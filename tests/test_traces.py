"""Task "traces": which responses are kept, and fields without an effect."""

from __future__ import annotations

import numpy as np
import pytest

from rpt_jax.errors import UserError
from rpt_jax.prompts.builder import PromptBatch
from rpt_jax.prompts.positions import Position
from rpt_jax.rewards.prefix_match import Status
from rpt_jax.tokenizers.tokenizer import load_tokenizer
from rpt_jax.traces import JudgedBatch, collect, summarize
from tests.helpers.paths import TINY
from tests.helpers.runs import experiment


class FakeSource:
    """The parts of a prompt source that `collect` uses."""

    statuses = Status

    def origin(self, position: Position) -> dict[str, int]:
        return {"window": position.window}


def test_exactly_the_accepted_responses_are_kept() -> None:
    """Two prompts with three responses each, and a third prompt that only fills the batch."""
    prompts = PromptBatch(*[np.zeros(3)] * len(PromptBatch._fields))._replace(
        tokens_PxS=np.array([[10, 11, 12, 0], [20, 21, 0, 0], [20, 21, 0, 0]]), lengths_P=np.array([3, 2, 2])
    )
    right, wrong, cut = Status.CORRECT, Status.WRONG_BYTES, Status.NOT_FINISHED
    judged = JudgedBatch(
        prompts=prompts,
        tokens_PxGxT=np.array(
            [[[31, 2, 0], [32, 33, 2], [31, 2, 0]], [[41, 2, 0], [42, 43, 44], [45, 46, 2]], [[41, 2, 0]] * 3]
        ),
        lengths_PxG=np.array([[2, 3, 2], [2, 3, 3], [2, 2, 2]]),
        status_PxG=np.array([[right, right, right], [wrong, cut, right], [right, right, right]]),
        flops=7.0,
    )
    positions = [Position(window=4, position=3, entropy=1.0), Position(window=9, position=2, entropy=1.0)]
    header, traces = collect(judged, positions, FakeSource(), 2, load_tokenizer(TINY))  # pyright: ignore[reportArgumentType]
    assert [(t["window"], t["prompt"], t["response"], t["length"]) for t in traces] == [
        (4, [10, 11, 12], [31, 2], 2),
        (4, [10, 11, 12], [32, 33, 2], 3),
        (9, [20, 21], [45, 46, 2], 3),
    ]
    statuses = {status.name.lower(): 0 for status in Status}
    assert header == {
        "prompts": 2,
        "responses": 6,
        "accepted": 4,
        "solved": 2,
        "kept": 3,
        "status": statuses | {"correct": 4, "wrong_bytes": 1, "not_finished": 1},
        "prompt_tokens": 5,
        "response_tokens": 15,
        "flops": 7.0,
    }
    result = summarize([{**header, "seconds": 1.5}, {**header, "seconds": 1.0, "solved": 1}], 8.0)
    assert result["accepted_share"] == pytest.approx(2 / 3) and result["prompts_without_accepted"] == 1
    assert result["flops"] == 22.0 and result["seconds"] == 2.5 and result["status"]["correct"] == 8


@pytest.mark.parametrize("positions", ["curriculum", "self_entropy"])
def test_positions_that_change_in_training_are_refused(positions: str) -> None:
    with pytest.raises(UserError) as raised:
        experiment("rpt_tiny", **{"task": "traces", "data.positions": positions})
    assert raised.value.field == "data.positions"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"task": "rpt"}, "traces.total_prompts"),
        ({"task": "traces"}, "questions.seed"),
        ({"task": "traces"}, "optimizer.learning_rate"),
        ({"task": "traces", "traces.prompts": "questions"}, "data.min_context"),
        ({"task": "pretrain", "pretrain.traces": "sampled"}, "pretrain.recalled_tokens"),
        ({"task": "pretrain", "pretrain.traces": "sampled"}, "data.min_context"),
        ({"task": "pretrain", "pretrain.trace_weight": 0}, "pretrain.row_tokens"),
    ],
)
def test_fields_without_an_effect_are_refused(fields: dict[str, object], field: str) -> None:
    with pytest.raises(UserError) as raised:
        experiment("rpt_tiny", **fields, **{field: 1})
    assert raised.value.field == field
