"""The host's reader of boxes, and the form in which questions are compared."""

from __future__ import annotations

import numpy as np
import pytest

from rpt_jax.prompts.response_format import BOX
from rpt_jax.questions.text import last_box
from tests.helpers.reward_fuzz import merged, random_response
from tests.helpers.reward_reference import read_prediction


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{4}.", "4"),
        (r"\boxed{1} or \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{ 4 }", " 4 "),
        (r"\boxed{}", ""),
        (r"\boxed{}}", "}"),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{a{b}", "a{b"),
        (r"\boxed{4", None),
        ("4", None),
        (r"\boxed 4", None),
    ],
)
def test_the_content_of_the_last_box_is_read(text: str, content: str | None):
    read = last_box(text.encode())
    assert (read if read is None else read.decode()) == content


def test_the_host_reads_what_the_reference_of_the_kernel_reads():
    rng = np.random.default_rng(0)
    boxes = 0
    for _ in range(3000):
        parts = merged(random_response(rng, [b" size", b"}", b"\\frac"]))
        answer = b"".join(part for part in parts if isinstance(part, bytes)).rpartition(b"</think>")[2]
        expected = read_prediction(b"</think>" + answer)
        assert last_box(answer) == expected, answer
        boxes += expected is not None
    assert 1000 < boxes < 2900


def test_the_box_is_that_of_the_response_format():
    assert last_box(f"{BOX}x}}".encode()) == b"x"
