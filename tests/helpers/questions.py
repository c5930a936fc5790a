"""Small runs of task "rft"."""

from __future__ import annotations

# Changes of configs/rft_tiny.py that make a run of a few steps take seconds.
SMALL_RFT = {
    "questions.source_options.documents": 60,
    "questions.source_options.test_documents": 20,
    "questions.source_options.held_out_templates": 2,
    "questions.test_questions": 8,
    "prompt.max_tokens": 256,
    "rollout.samples_per_prompt": 4,
    "rollout.max_new_tokens": 24,
    "rollout.decode_slots": 8,  # A decode loop for one size of the live batch is compiled, not for many.
    "training.prompts_per_step": 8,
    "training.microbatch_tokens": 512,
    "training.total_steps": 3,
    "training.dynamic_sampling_from": 2,
    "training.dynamic_sampling_rounds": 2,
    "training.log_rollouts_every": 2,
    "evaluation.every_steps": 2,
    "checkpoint.every_steps": 1,
}
