"""The schema of an experiment: frozen dataclasses that every config file is validated into.

A file in `configs/` returns an `ml_collections.ConfigDict` with these names; `from_config_dict` turns it into an
`Experiment` and refuses unknown names, wrong types and impossible values by name. Fields marked [memory] change speed and
memory, never results.
"""

from __future__ import annotations

import dataclasses

TASKS = ("rpt", "pretrain", "score")
SOURCES = ("gsm_symbolic", "champ", "path")
POSITIONS = ("threshold", "quantile", "every", "random", "curriculum", "self_entropy")
LONG_CONTEXTS = ("cut", "cut_at_line")
SCHEDULES = ("constant", "cosine")
REMATS = ("none", "dots", "full")
ATTENTIONS = ("auto", "reference", "blockwise", "cudnn", "splash")


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    path: str = ""  # A Hugging Face directory (config.json, weights, tokenizer) or a .gguf file; "" = random weights of `preset`.
    preset: str = "tiny"  # A name in model/model_config.py; checked against the directory when both are given.
    dtype: str = "float32"  # Compute dtype; parameters and reductions stay float32.
    remat: str = (
        "none"  # [memory] What each layer's backward pass recomputes: "none", all but products "dots", all "full".
    )
    attention: str = "auto"  # [memory] "reference", "blockwise", "cudnn", "splash"; "auto": the platform's best.


@dataclasses.dataclass(frozen=True)
class DataConfig:
    source: str = "gsm_symbolic"  # "gsm_symbolic", "champ" or "path".
    # With source "path": a file (.txt, .jsonl, both also .gz or .zst, .parquet, .arrow, .array_record), a folder or a glob; or
    # several with commas between them, with weights ("0.7=wiki/*.parquet,0.3=math") or without.
    path: str = ""
    text_field: str = "text"  # The field of a record that holds the document.
    document_template: str = ""  # In place of it, a text with fields in braces: "{problem}\n{solution}".
    max_document_bytes: int = 16_777_216  # Longer documents are left out.
    strict: bool = (
        False  # Stop at the first document that is empty, too long or damaged, instead of counting and listing it.
    )
    documents: int = 2000  # gsm_symbolic: how many training documents to generate.
    held_out_documents: int = 300  # Documents kept out of training for evaluation.
    held_out_templates: int = 10  # gsm_symbolic: whole templates kept out of training, reported apart.
    shard: str = (
        ""  # Task "score": prepare this shard alone, as "3/64" (from 0/64 to 63/64); "" = all, as many as needed.
    )
    prepared: str = (
        ""  # The workdir of a finished task "score"; "" = prepare the corpus at the start of the run, in its workdir.
    )
    seed: int = 0  # Fixes the documents and the split, apart from the seed of the run.
    max_document_tokens: int = 256  # Longer documents become several windows of so many tokens.
    min_context: int = 16  # Tokens of context before the first position that may be asked for.
    # [memory] Windows per forward pass when entropies are scored.
    score_batch_windows: int = 32
    entropy_top_k: int = 16  # The proxy's entropy is taken over its k likeliest next tokens (paper, section 3.3).
    entropy_renormalized: bool = True  # Among those k; False: what they contribute to the entropy over the vocabulary.
    # Which positions are trained on: "threshold", "quantile" (the hardest keep_fraction of all), "every", "random" (keep_fraction of
    # all: the baseline), "curriculum" (those above the threshold, easy ones first, in eight stages over the run),
    # "self_entropy" (the hardest keep_fraction for the policy itself, which scores documents anew every rescore_every_steps).
    positions: str = "threshold"
    rescore_every_steps: int = 100  # Steps from one choice of "self_entropy" to the next.
    rescore_windows: int = 1024  # "self_entropy": documents, or windows of them, that are scored each time.
    positions_per_document: int = 0  # At most so many in a step's batch; 0 = as chance has it.
    workers: int = 0  # Processes that build prompts ahead; 0 = a thread of the run's own.
    keep_fraction: float = 0.2  # For "quantile", "random" and "self_entropy".
    entropy_threshold: float = 0.5  # Positions at or under it (nats) are dropped; the paper does not give its value.


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    template: str = "plain"  # A name in configs/templates/ or the path of a file with one {context}.
    chat_template: bool = False  # Put it where the model's own chat template has the user's message.
    prefill_think_token: bool = True  # End the prompt with the start-of-thinking token.
    max_tokens: int = 256  # Longer contexts lose their oldest tokens,
    long_context: str = (
        "cut"  # as many as must be ("cut"), or on to the end of a line within the older half ("cut_at_line").
    )
    reference_bytes: int = 64  # How much of the true continuation a prediction may cover.


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    samples_per_prompt: int = 8  # G of GRPO.
    temperature: float = 0.8
    max_new_tokens: int = 48
    top_k: int = 0  # Draw from the k likeliest tokens only; 0: from all. Needs objective.importance, as top_p does.
    top_p: float = 1.0  # Draw from the fewest tokens that hold this share only.
    stop_at_box: bool = False  # End a response at the brace that closes its box after thinking.
    decode_slots: int = 0  # [memory] Rollouts that are live at once; 0: all, or as many as fit.
    prefill_tokens: int = 4096  # [memory] Tokens of prompts that are prefilled at one time.


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is maximized; names are those of config/validation.py. Defaults are the paper's or, where it is silent, verl's."""

    reward: str = "prefix"  # One of REWARDS: the paper's Equation 3, or what others put in its place.
    reference_tokens: int = 1  # Tokens of the true continuation that "info_gain", "mean_prob" and "log_prob" score.
    baseline_decay: float = 0.999  # "info_gain": of the moving average that predicts without reasoning.
    format_weight: float = 0.0  # Added to the reward of a finished response with a box.
    overlong_weight: float = 0.0  # Taken off that of one that fills the length limit, in part over
    overlong_tokens: int = 0  # the last so many tokens before the limit.
    budget_weight: float = 0.0  # Share of the reward that asks for reasoning of so many tokens:
    budget_start: int = 0  # in the first step,
    budget_decay: float = 1.0  # this part of it in the last,
    budget_min: int = 1  # and never fewer.
    advantage: str = "grpo"  # One of ADVANTAGES.
    advantage_epsilon: float = 1e-6  # Added to the standard deviation of "grpo" and "batch".
    loss: str = "clip"  # One of LOSSES.
    clip_low: float = 0.2  # The ratio is clipped to [1 - clip_low, 1 + clip_high].
    clip_high: float = 0.2
    dual_clip: float = 3.0  # "dual_clip": what a bad token costs at most, in advantages.
    aggregation: str = "token_mean"  # One of AGGREGATIONS.
    importance: str = "none"  # "truncate" or "mask" weights tokens by trainer's over sampler's probability,
    importance_low: float = 0.5  # "mask" only where that is at least so much
    importance_high: float = 2.0  # and at most so much; "truncate" takes no larger weight.
    kl: str = "none"  # "k1", "k2" or "k3" holds the policy to the one that it started as,
    kl_weight: float = 0.0  # with this weight.
    entropy_weight: float = 0.0  # Of the policy's entropy, which is to be large.
    document_weight: float = 0.0  # Of the next-token cross-entropy of the documents that the prompts are from.


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 1e-6
    warmup_steps: int = 0
    schedule: str = "constant"  # "constant" or "cosine" (to a tenth) over `training.total_steps`.
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 0.2


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    total_steps: int = 1000
    prompts_per_step: int = 256
    minibatches_per_step: int = 1  # 1 = exactly on-policy, the paper's choice.
    dynamic_sampling_from: int = 500  # From this step on, groups without variance are replaced by fresh prompts.
    dynamic_sampling_rounds: int = 3  # At most so many rounds of generation a step.
    microbatch_tokens: int = (
        65536  # [memory] Tokens of a forward and backward pass on each device: prefixes and responses.
    )
    logit_chunk_tokens: int = 4096  # [memory] Tokens whose logits exist at one time.
    log_rollouts_every: int = 50  # Steps between the rollouts that are shown as text.


@dataclasses.dataclass(frozen=True)
class ColdStartConfig:
    """Steps of pre-training, as section pretrain says, that task "rpt" begins with: a format is learned in few of them."""

    total_steps: int = 0
    learning_rate: float = 1e-4  # In place of the optimizer's, whose other settings hold.


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    documents_per_step: int = 16
    document_weight: float = 1.0  # Weight of the documents' mean cross-entropy: 0 teaches traces alone.
    traces_per_document: int = 18  # Cold-start traces learned beside each document,
    calculation_position_fraction: float = 1 / 3  # this share of them where the result of a calculation is due.
    recalled_tokens: int = 4  # Tokens of context that a trace repeats where nothing is calculated.
    drills_per_document: int = 0  # Calculations like the document's, with other numbers, learned without the document.
    rows_per_document: int = 4  # Traces and drills are packed into so many rows
    row_tokens: int = 64  # of so many tokens; a longer calculation is not shown.
    trace_weight: float = 1.0  # Weight of the traces' mean cross-entropy.
    calculation_fraction: float = 0.4  # Where a calculation is due, how often the trace carries it out.
    vocab_size: int = 1024
    export: str = ""  # Directory to write the finished policy to, for `policy.path` of later runs.


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Predictions are sampled as in training: `rollout.samples_per_prompt` of each, whose mean is the accuracy."""

    every_steps: int = 100
    positions: int = 600  # Held-out positions above the entropy threshold; the same in every evaluation of a run.
    template_positions: int = 200  # Positions of templates never seen, where the corpus has templates.


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int = 100
    keep: int = 2
    grace_seconds: float = 60.0  # To save after a first SIGTERM or SIGINT; with several processes to end the step, too.


@dataclasses.dataclass(frozen=True)
class DivergenceConfig:
    """Rules on the mean of some steps of task "rpt"; 0 is no rule."""

    action: str = "warn"  # What a broken rule does: "warn", or "stop" (exit code 4).
    window: int = 10  # Steps.
    reward_collapse: float = 0.0  # The reward may not fall below this share of the best that it has been.
    entropy_floor: float = 0.0  # The policy's entropy may not fall below so many nats a token.
    mismatch_ceiling: float = 0.0  # Sampler and trainer may differ by no more in a token's log-probability.


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Steps that the JAX profiler records into `workdir/profile`, for TensorBoard and xprof."""

    # The first step to record, counted from 1; 0 records nothing. Later steps than the second one do not compile programs.
    start: int = 0
    # The number of steps to record; each adds tens of megabytes to the trace.
    steps: int = 3


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (at most once) takes all that are left.

    Attributes:
      rollout_tensor: that share a policy while it samples, of one host where they can be; 0 = as many as mesh.tensor.
      split_rows: the tokens of an update's row over the devices of mesh.tensor, for long contexts.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    rollout_tensor: int = 0
    split_rows: bool = False


@dataclasses.dataclass(frozen=True)
class Experiment:
    task: str = "rpt"
    seed: int = 0
    policy: PolicyConfig = PolicyConfig()
    data: DataConfig = DataConfig()
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    cold_start: ColdStartConfig = ColdStartConfig()
    pretrain: PretrainConfig = PretrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    profile: ProfileConfig = ProfileConfig()
    mesh: MeshConfig = MeshConfig()
