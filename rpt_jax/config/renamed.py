"""Other names of config fields: those of earlier versions, and those that other projects use."""

RENAMED = {
    "data.documents": "data.source_options.documents",
    "data.held_out_templates": "data.source_options.held_out_templates",
    "data.kept_share": "data.keep_fraction",
    "data.entropy_renormalised": "data.entropy_renormalized",
    "data.refresh_steps": "data.rescore_every_steps",
    "data.refresh_windows": "data.rescore_windows",
    "prompt.open_think": "prompt.prefill_think_token",
    "pretrain.due_share": "pretrain.trace_options.calculation_position_fraction",
    "pretrain.calculation_share": "pretrain.trace_options.calculation_fraction",
    "pretrain.drills_per_document": "pretrain.trace_options.drills_per_window",
    "pretrain.trace_options.drills_per_document": "pretrain.trace_options.drills_per_window",
    "pretrain.documents_per_step": "pretrain.windows_per_step",
    "pretrain.traces_per_document": "pretrain.traces_per_window",
    "pretrain.rows_per_document": "pretrain.rows_per_window",
    "data.positions_per_document": "data.positions_per_window",
    "evaluation.template_positions": "evaluation.unseen_positions",
    "evaluation.score_documents": "data.score_batch_windows",
    "mesh.decode_tensor": "mesh.rollout_tensor",
}

# Names that people bring from other projects, without the section.
USUAL_NAMES = {
    "lr": "optimizer.learning_rate",
    "steps": "training.total_steps",
    "max_steps": "training.total_steps",
    "num_steps": "training.total_steps",
    "batch_size": "training.prompts_per_step",
    "group_size": "rollout.samples_per_prompt",
    "num_generations": "rollout.samples_per_prompt",
    "model": "policy.path",
    "model_path": "policy.path",
    "dataset": "data.path",
    "max_length": "rollout.max_new_tokens",
    "beta": "objective.kl_weight",
    "lora_rank": "policy.lora.rank",
    "lora_r": "policy.lora.rank",
    "lora_alpha": "policy.lora.alpha",
    "target_modules": "policy.lora.targets",
}
