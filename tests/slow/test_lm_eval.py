"""lm-evaluation-harness with our model and with its own Hugging Face model, on tasks in local files and the same weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpt_jax.conversion import convert
from rpt_jax.model.transformer import Transformer
from rpt_jax.weights.hf import save_policy
from tests.helpers.hf_models import SHAPE, tokenizer_spec
from tests.helpers.paths import TINY
from tests.helpers.policy_reference import random_params
from tests.helpers.tokenizers import write_hf

pytestmark = pytest.mark.slow
lm_eval = pytest.importorskip("lm_eval", reason="an optional extra: pip install -e '.[lm-eval]'")
pytest.importorskip("accelerate", reason="the harness's own Hugging Face model needs it: pip install accelerate")

TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_without_context": """
output_type: multiple_choice
doc_to_text: ""
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: byte_perplexity}]
""",
    "local_generate": """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["x", "."], max_gen_toks: 80, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
# Small, so that the texts have several windows, and prompts lose their beginning.
MAX_LENGTH = 120


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Write tasks and their questions; return the folder."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    with (folder / "questions.jsonl").open("w") as file:
        for i in range(10):
            a, b = (int(n) for n in rng.integers(1, 20, 2))
            question = f"Tom has {a} apples and buys {b} more. " * int(rng.integers(1, 5)) + "How many apples has he?"
            choices = [str(a + b), f"about {a * b}", "none at all"]
            file.write(json.dumps({"question": question, "choices": choices, "answer": i % 3}) + "\n")
    for name, task in TASKS.items():
        data = f"{{test: {folder / 'questions.jsonl'}}}"
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {data}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + task)
    return folder


def evaluate(model: str, model_args: dict[str, Any], tasks: Path, names: list[str]) -> tuple[dict[str, Any], list[Any]]:
    """Return the results by task, and the responses to all requests."""
    from lm_eval.tasks import TaskManager

    import rpt_jax.evaluation.lm_eval_model  # noqa: F401

    output = lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
        log_samples=True,
        device="cpu" if model == "hf" else None,
    )
    assert output
    results = {
        name: {
            key: value
            for key, value in values.items()
            if key.partition(",")[0] in ("acc", "acc_norm", "byte_perplexity")
        }
        for name, values in output["results"].items()
    }
    samples = [sample["filtered_resps"] for name in names for sample in output["samples"][name]]
    return results, samples


def export(kind: str, directory: Path) -> Path:
    """Write a policy of a kind in Hugging Face format; return its directory."""
    policy = directory / kind
    if kind == "tiny":
        convert(TINY, policy)
        return policy
    config = dataclasses.replace(SHAPE, vocab=260)
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    write_hf(policy, tokenizer_spec() | {"decoder": decoder}, tokenizer_config={"eos_token": "<|im_end|>"})
    save_policy(policy, config, random_params(Transformer(config), 0), {}, "")
    return policy


@pytest.mark.parametrize("kind", ["llama", "tiny"])
def test_numbers_equal_those_of_the_harness_own_model(kind: str, tasks: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    policy = str(export(kind, tmp_path))
    names = list(TASKS)
    ours, our_samples = evaluate("rpt_jax", {"policy": policy, "max_length": MAX_LENGTH}, tasks, names)
    args = {"pretrained": policy, "dtype": "float32", "max_length": MAX_LENGTH}
    theirs, their_samples = evaluate("hf", args, tasks, names)

    assert len(our_samples) == len(their_samples) == 10 * len(TASKS)
    for mine, other in zip(our_samples, their_samples, strict=True):
        if isinstance(mine[0], str):
            assert mine == other  # A text.
        elif isinstance(mine[0], tuple):
            np.testing.assert_allclose([m[0] for m in mine], [o[0] for o in other], atol=1e-4)
            assert [m[1] for m in mine] == [o[1] for o in other]
        else:
            np.testing.assert_allclose(mine, other, atol=1e-3, rtol=1e-5)  # The sum over a whole text.
    for name in names:
        for key, value in theirs[name].items():
            assert ours[name][key] == pytest.approx(value, rel=0 if key.startswith("acc") else 1e-5), (name, key)
