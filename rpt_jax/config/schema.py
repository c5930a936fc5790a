"""The schema of an experiment: frozen dataclasses that every config file is validated into.

A config file returns an `ml_collections.ConfigDict` with these names (`default_config`), and `from_config_dict` turns it into an
`Experiment`. The comment above each field is its documentation: the reference page is generated from it. A comment that begins
with "[memory]" marks a field that changes speed and memory, and results by rounding at most. "Paper" is arXiv 2506.08007;
"verl" is the framework that the paper used, with its defaults of June 2025; where neither is named, the default is ours.
"""

from __future__ import annotations

import dataclasses
from typing import Any

TASKS = ("rpt", "rft", "pretrain", "score", "difficulty", "traces")
TRACE_PROMPTS = ("text", "questions")
LONG_CONTEXTS = ("cut", "cut_at_line")
BOX_READINGS = ("balanced", "to_end")
SCHEDULES = ("constant", "cosine")
DTYPES = ("auto", "float32", "bfloat16")
PRECISIONS = ("tensorfloat32", "float32")
HEAD_PRECISIONS = ("auto", "bfloat16", *PRECISIONS)
REMATS = ("auto", "none", "dots", "full")
ATTENTIONS = ("auto", "reference", "blockwise", "gpu_kernels", "tpu_kernels")
EVALUATION_SPLITS = ("held_out", "unseen", "train")
UNPARSED = ("wrong", "random")
DIVERGENCE_ACTIONS = ("warn", "stop")
TRACKERS = ("wandb", "trackio")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEMPLATE_SEPARATOR = "|||"  # Between the document templates of the parts of a mixture.

# An instance of the options dataclass of the choice that the field above it names, or None for the defaults.
Options = Any


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685), which are trained in place of the policy's own parameters."""

    # Rank of the adapters; 0 trains all parameters instead.
    rank: int = 0
    # The adapters' products are scaled by alpha / rank.
    alpha: float = 32.0
    # Matrices with adapters, by their names in Hugging Face's models: "all", or some of "q_proj", "k_proj", "v_proj", "o_proj",
    # "gate_proj", "up_proj" and "down_proj", separated by commas.
    targets: str = "all"


def lora_targets(targets: str) -> tuple[str, ...]:
    """Return the names in `policy.lora.targets`, in the order of a layer."""
    names = {name.strip() for name in targets.split(",")}
    return tuple(name for name in LORA_TARGETS if name in names or names == {"all"})


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The model that is trained."""

    # Directory of a Hugging Face model (config.json, weights, tokenizer) or a .gguf file; "" for random weights of `preset` and a
    # new tokenizer, for task "pretrain" or a cold start.
    path: str = ""
    # Name of a model configuration in model/model_config.py; must match `path` where both are given, "" for no check.
    preset: str = "tiny"
    # Dtype of the layers' computation: "float32", "bfloat16", or "auto" for bfloat16 on a GPU or TPU and float32 on a CPU;
    # parameters, norms, softmax and logits stay float32.
    dtype: str = "auto"
    # Products of the layers on a GPU or TPU if dtype is "float32": "tensorfloat32" (at least its precision) or "float32".
    precision: str = "tensorfloat32"
    # Precision of the output head, in the sampler and the trainer: "bfloat16" (fastest; verl), "tensorfloat32", "float32", or
    # "auto" for bfloat16 on a GPU or TPU and tensorfloat32 on a CPU.
    head_precision: str = "auto"
    # [memory] What the backward pass recomputes in each layer: "none", "dots" (all but matrix products) or "full"; "auto" is the
    # fastest of them that fits the device's memory.
    remat: str = "auto"
    # [memory] Attention: "reference", "blockwise" (plain XLA), "gpu_kernels", "tpu_kernels", or "auto" (the platform's).
    attention: str = "auto"
    lora: LoraConfig = LoraConfig()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The corpus, and the positions of it that become prompts."""

    # Corpus source, by its registered name: "gsm_symbolic", "champ", "math", "path" (your own files), or one that you register.
    source: str = "gsm_symbolic"
    # Options of the source, such as `data.source_options.documents` of "gsm_symbolic".
    source_options: Options = None
    # File, folder or glob of source "path" (.txt, .jsonl, .json, .csv, .tsv, also compressed, .parquet, .arrow, .array_record);
    # several are separated by commas, with sampling weights ("0.7=wiki/*.parquet,0.3=math.jsonl") or without.
    path: str = ""
    # Record field that holds the text of a document, such as "text", "doc.text" or "messages"; for a mixture, one for all of
    # its parts or one for each, separated by commas.
    text_field: str = "text"
    # Text with record fields in braces, such as "{problem}\n{solution}", that replaces `text_field`; "" for none. For a
    # mixture, one for all of its parts or one for each, separated by "|||".
    document_template: str = ""
    # What is held out together: "auto" (the pieces of a text file; every record by itself), "file" (the records of a file too),
    # or a record field whose value is the same in records that belong together; for a mixture, as `text_field`.
    group_by: str = "auto"
    # Documents with more bytes than this are rejected.
    max_document_bytes: int = 16_777_216
    # Stop at the first rejected document; by default rejected documents are counted and listed.
    strict: bool = False
    # Number of documents held out for evaluation, in whole groups (`group_by`); of your own texts at most a fifth, also
    # of each part of a mixture (paper: 200).
    held_out_documents: int = 300
    # Part of the corpus that task "score" prepares, such as "3/64" (of "0/64" to "63/64"); "" for all of it.
    shard: str = ""
    # Run directory of a finished task "score" whose prepared corpus is used; "" to prepare the corpus at the start of the run.
    prepared: str = ""
    # Seed of generated documents and of the split, independent of the run's seed.
    seed: int = 0
    # Longer documents are cut into windows of at most this many tokens.
    max_document_tokens: int = 256
    # A position must have at least this many tokens of its window before it.
    min_context: int = 16
    # [memory] Windows per forward pass when entropies are scored.
    score_batch_windows: int = 32
    # The proxy's entropy is computed over its k most likely next tokens (paper, section 3.3: 16).
    entropy_top_k: int = 16
    # Renormalize the probabilities of those k tokens; False uses their terms of the entropy over the whole vocabulary.
    entropy_renormalized: bool = True
    # What a prediction is compared with, by registered name: "token" (the next token; the paper) or "segment" (the next sentence
    # or the next k tokens; RLPT, arXiv 2509.19249).
    targets: str = "token"
    # Options of the targets, such as `data.target_options.unit` of "segment".
    target_options: Options = None
    # Positions to train on, by registered name: "threshold", "quantile", "every", "random", "curriculum" or "self_entropy".
    positions: str = "threshold"
    # Steps between two choices of positions by the policy's own entropies ("self_entropy").
    rescore_every_steps: int = 100
    # Windows that are scored for each such choice ("self_entropy").
    rescore_windows: int = 1024
    # Maximum number of positions of one window in a step's batch; 0 for no limit.
    positions_per_window: int = 0
    # Worker processes that build prompts ahead; 0 for a thread of the training process.
    workers: int = 0
    # Fraction of all positions that "quantile", "random" and "self_entropy" keep.
    keep_fraction: float = 0.2
    # Entropy in nats above which "threshold" and "curriculum" keep a training position (the paper gives no value).
    entropy_threshold: float = 0.5


@dataclasses.dataclass(frozen=True)
class QuestionsConfig:
    """Questions with verifiable answers: where they come from, how they are split, and how an answer is verified."""

    # Question source, by its registered name: "path" (your own files), "math", "gsm8k", "mmlu", "mmlu_pro", "super_gpqa",
    # "arc_easy", "arc_challenge", "worked_solutions", "reasoning_gym", or one that you register.
    source: str = "path"
    # Options of the source, such as `questions.source_options.task` of "reasoning_gym".
    source_options: Options = None
    # File, folder or glob of source "path" (.jsonl, .json, .csv, .tsv, also compressed, .parquet, .arrow, .array_record); several
    # are separated by commas.
    path: str = ""
    # Files of the test questions, given as `path` is; "" to hold out test questions of `path`. Alone, it is enough to evaluate.
    test_path: str = ""
    # Record field that holds the question, such as "problem" or "messages.0.content".
    question_field: str = "question"
    # Text with record fields in braces, such as "{context}\n{question}", that replaces `question_field`; "" for none.
    question_template: str = ""
    # Record field with the accepted answer, or with a list of them; several fields are separated by commas. With options, the
    # answer is a letter, the text of an option or its number from 0.
    answer_field: str = "answer"
    # Record field whose value names the question in results and is unique; "" to name it by its file and line.
    id_field: str = ""
    # Record field by whose values results are also reported, such as "subject"; "" for none.
    category_field: str = ""
    # Record field with the options of a multiple-choice question, a list of texts; "" for free answers.
    choices_field: str = ""
    # Stop at the first rejected question; by default rejected questions are counted and listed.
    strict: bool = False
    # Questions to train on, chosen by `seed`; 0 for all that are not test questions (paper, section 4.3: 256).
    train_questions: int = 0
    # Questions to test with, chosen by `seed`; 0 for all, where the source has a test part (paper, section 4.3: 200).
    test_questions: int = 200
    # Seed of generated questions and of the choice of questions, independent of the run's seed.
    seed: int = 0
    # How a response is verified, by registered name: "boxed_math" (symbolic and numeric equality), "boxed_exact", "choice",
    # "contains" or "reasoning_gym"; also of the reward "verified" of task "rpt".
    verifier: str = "boxed_math"
    # Worker processes that verify responses; 0 for one for each core.
    verifier_workers: int = 0
    # Seconds after which the verification of a response is abandoned, and the response counts as wrong.
    verifier_seconds: float = 10.0
    # File of pass rates that the difficulty filter has written; "" to train on questions of any difficulty.
    pass_rates: str = ""
    # Train on questions that the policy of `pass_rates` solved at least this many times (Skywork-OR1, the paper's source: 1).
    min_passes: int = 1
    # Train on questions that it solved at most this many times; -1 for all samples but one (Skywork-OR1: 15 of 16).
    max_passes: int = -1


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """How a position becomes a prompt."""

    # Prompt template, by its registered name ("plain", "v0") or the path of a text file with one {context}.
    template: str = "plain"
    # Put the prompt where the model's own chat template has the user's message.
    chat_template: bool = False
    # End the prompt with the start-of-thinking token, so that the response begins with the reasoning.
    prefill_think_token: bool = True
    # Maximum number of tokens of a prompt; longer contexts lose their oldest tokens (paper, Table 5: 4,096).
    max_tokens: int = 256
    # How long contexts are shortened: "cut" at any token, "cut_at_line" at the end of a line where there is one near.
    long_context: str = "cut"
    # How the prediction is read from its box: "balanced", up to the brace that balances the box, or "to_end", up to a brace that
    # ends the response. Positions whose next token cannot be read so are left out; "to_end" can read tokens such as "})" (ours).
    box_reading: str = "balanced"
    # Bytes of the true continuation that a prediction is compared with; a longer prediction earns nothing, and a longer segment
    # is not a target.
    reference_bytes: int = 64


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled."""

    # Responses that are sampled for each prompt, the group size G of GRPO (paper, Table 5: 8).
    samples_per_prompt: int = 8
    # Sampling temperature, also that of the trained distribution (paper, Table 5: 0.8).
    temperature: float = 0.8
    # Maximum number of tokens of a response (paper, Table 5: 8,192).
    max_new_tokens: int = 48
    # Sample from the k most likely tokens; 0 for all. Needs `objective.importance`, because the trained distribution is another.
    top_k: int = 0
    # Sample from the smallest set of tokens with this probability mass; 1 for all. Needs `objective.importance`.
    top_p: float = 1.0
    # End a response at the brace that closes its box after the reasoning.
    stop_at_box: bool = False
    # [memory] Rollouts that are decoded at the same time; 0 for all of them, or as many as fit the device's memory.
    decode_slots: int = 0
    # [memory] Prompt tokens that are prefilled at the same time.
    prefill_tokens: int = 4096


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is maximized. Defaults are the paper's or, where it is silent, verl's."""

    # Training reward, by registered name: the paper's "prefix" (Equation 3), or an alternative.
    reward: str = "prefix"
    # Tokens of the true continuation that "info_gain", "mean_prob" and "log_prob" score, as far as they fit into
    # `prompt.reference_bytes`.
    reference_tokens: int = 1
    # Decay of the moving average of parameters that "info_gain" compares with.
    baseline_decay: float = 0.999
    # Weight of a reward of 1 for a finished response with a box; 0 for none.
    format_weight: float = 0.0
    # Weight of the penalty for responses near the length limit (DAPO's soft overlong punishment); 0 for none.
    overlong_weight: float = 0.0
    # The penalty ramps up over this many tokens before the limit.
    overlong_tokens: int = 0
    # Fraction of the reward that is given for reasoning of a target length; 0 for none.
    budget_weight: float = 0.0
    # Target length of the reasoning in the first step, in tokens.
    budget_start: int = 0
    # Factor by which the target length shrinks from the first step to the last.
    budget_decay: float = 1.0
    # Lower bound of the target length, in tokens.
    budget_min: int = 1
    # Group-relative advantage, by registered name (paper: "grpo").
    advantage: str = "grpo"
    # Added to the standard deviation that "grpo" and "batch" divide by (verl).
    advantage_epsilon: float = 1e-6
    # Policy-gradient loss, by registered name (paper: "clip").
    loss: str = "clip"
    # The probability ratio is clipped from below at 1 - clip_low (verl).
    clip_low: float = 0.2
    # The probability ratio is clipped from above at 1 + clip_high (verl).
    clip_high: float = 0.2
    # Upper bound of the loss of a token with a negative advantage, as a multiple of the advantage ("dual_clip").
    dual_clip: float = 3.0
    # How token losses become one number: "token_mean" (verl), "sequence_mean" or "constant".
    aggregation: str = "token_mean"
    # Correction of the difference between sampler and trainer, by the ratio of their probabilities: "none", "truncate" or "mask".
    importance: str = "none"
    # "mask" drops tokens whose ratio is below this.
    importance_low: float = 0.5
    # "mask" drops tokens whose ratio is above this; "truncate" caps the ratio here.
    importance_high: float = 2.0
    # Estimator of the KL divergence from the starting policy: "none" (paper), "k1", "k2" or "k3".
    kl: str = "none"
    # Weight of the KL divergence.
    kl_weight: float = 0.0
    # Weight of the entropy bonus.
    entropy_weight: float = 0.0
    # Weight of the next-token cross-entropy of the windows that the prompts are from.
    document_weight: float = 0.0
    # Weight of the load-balancing loss of a policy with experts (Switch Transformer, arXiv 2101.03961, equation 4, over the whole
    # batch); it takes one more forward pass. Task "pretrain" and the cold start have it too, without that pass.
    balance_weight: float = 0.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    # Peak learning rate (paper, Table 5: 1e-6).
    learning_rate: float = 1e-6
    # Optimizer steps of linear warm-up (verl: 0), of which a training step has `training.minibatches_per_step`; the first of n
    # has 1/(n + 1) of the peak, not 0.
    warmup_steps: int = 0
    # Schedule after the warm-up: "constant" (verl; needed by a budget), or "cosine" to a tenth of the peak over
    # `training.total_steps`.
    schedule: str = "constant"
    # Decay of the first moment (paper, Table 5).
    beta1: float = 0.9
    # Decay of the second moment (paper, Table 5).
    beta2: float = 0.999
    # Added to the root of the second moment.
    epsilon: float = 1e-8
    # Decoupled weight decay (paper, Table 5).
    weight_decay: float = 0.01
    # The gradient is scaled down to this global norm (paper, Table 5: "actor gradient clip").
    max_grad_norm: float = 0.2


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    # Number of steps (paper, section 3.3: 1,000); with a budget, the maximum.
    total_steps: int = 1000
    # Model FLOPs that training may take (`flops/train_total`): the step that reaches them is the last one; 0 for no budget.
    flops_budget: float = 0.0
    # Seconds that training may take, without evaluations: the step that reaches them is the last one; 0 for no budget.
    seconds_budget: float = 0.0
    # Prompts of a step, over all devices (paper, Table 5: 256).
    prompts_per_step: int = 256
    # Optimizer steps on each batch of rollouts; 1 is exactly on-policy (paper, Table 5).
    minibatches_per_step: int = 1
    # First step of dynamic sampling, which replaces groups without reward variance by fresh prompts (paper, section 3.3: 500).
    dynamic_sampling_from: int = 500
    # Maximum number of rounds of generation in a step of dynamic sampling.
    dynamic_sampling_rounds: int = 3
    # [memory] Tokens of a forward and backward pass on each device, prompts and responses together; 0 for 16,384, or more for
    # a longer prompt and response, or fewer if the device's memory demands it.
    microbatch_tokens: int = 0
    # [memory] Tokens per device whose logits exist at the same time: with at least training.microbatch_tokens, they are kept for
    # the backward pass, with fewer it computes them again; 0 = planned.
    logit_chunk_tokens: int = 0
    # Steps between two prints of sampled responses, and steps in a file of kept ones.
    log_rollouts_every: int = 50
    # Prompts of each step whose responses are kept in `rollouts/` of the run directory; 0 for none.
    kept_prompts_per_step: int = 4


@dataclasses.dataclass(frozen=True)
class ColdStartConfig:
    """Pre-training steps on written traces with which task "rpt" begins, for a policy that does not know the format."""

    # Number of steps; 0 for no cold start. Section `pretrain` says what they learn.
    total_steps: int = 0
    # Learning rate of these steps; all other settings are those of section `optimizer`.
    learning_rate: float = 1e-4


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Next-token pre-training on windows of documents, of `data.max_document_tokens` at most, and on cold-start traces."""

    # Windows of documents of a step, over all devices.
    windows_per_step: int = 16
    # Weight of the mean cross-entropy of the windows; 0 to learn traces only.
    document_weight: float = 1.0
    # Traces that are learned with each window.
    traces_per_window: int = 18
    # Kind of reasoning in the traces, by registered name: "recall" (repeat the end of the context), "arithmetic" (also write
    # out the calculations of the document) or "sampled" (what runs of task "traces" have kept, with prompts of their own).
    traces: str = "recall"
    # Options of the traces, such as `pretrain.trace_options.calculation_fraction` of "arithmetic".
    trace_options: Options = None
    # Tokens of context that a recalling trace repeats.
    recalled_tokens: int = 4
    # The traces of a window are packed into this many rows.
    rows_per_window: int = 4
    # Tokens of such a row; a longer trace is left out.
    row_tokens: int = 64
    # Weight of the mean cross-entropy of the traces; 0 to learn windows only (continual pre-training).
    trace_weight: float = 1.0
    # Vocabulary of the tokenizer that is trained where `policy.path` is empty.
    vocab_size: int = 1024
    # Directory that the finished policy is written to; "" for `policy/` in the run directory.
    export: str = ""


@dataclasses.dataclass(frozen=True)
class TracesConfig:
    """Rejection sampling (task "traces"): responses of a policy that are accepted become traces to pre-train on."""

    # What the policy responds to: "text" (positions of the corpus, accepted as task "rpt" rewards them by Equation 3) or
    # "questions" (training questions, accepted by the verifier as in task "rft").
    prompts: str = "text"
    # Number of prompts, each used once: the first ones of the order that task "rpt" trains in, or the first training questions.
    total_prompts: int = 1024
    # Accepted responses that are kept of each prompt: the first distinct ones in the order of sampling, a random choice.
    kept_per_prompt: int = 1


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Accuracy on held-out documents or test questions, before, during and after training."""

    # Steps between evaluations (paper, section 4.2: 100).
    every_steps: int = 100
    # Held-out positions above 0.5 nats, the easiest level, the same in every evaluation of a run.
    positions: int = 600
    # The same for documents of a kind that training never sees, where the corpus has any.
    unseen_positions: int = 200
    # Documents that the suite "next_token" of `rpt_jax.evaluate` takes its positions from: "held_out", "unseen", or "train" for a
    # corpus that was not trained on.
    split: str = "held_out"
    # Responses that are sampled at each held-out position or to each question; 0 for as many as in training.
    samples: int = 0
    # [memory] Prompts of a batch of evaluations, whose responses take turns in the decode slots; 0 for as many as in a step of
    # training.
    prompts_per_batch: int = 0
    # Sampling temperature of evaluations (paper, section 4.3, for questions: 0.6); 0 for that of training.
    temperature: float = 0.0
    # Maximum number of tokens of a response in evaluations (paper, section 4.3, for questions: 32,000); 0 for that of training.
    max_new_tokens: int = 0
    # Keep the responses of evaluations during training, and the text that they are evaluated on, in `rollouts/`. The command
    # `rpt_jax.evaluate` always keeps all responses, in `records.jsonl`.
    keep_rollouts: bool = True


@dataclasses.dataclass(frozen=True)
class MultipleChoiceConfig:
    """Zero-shot multiple choice with reasoning, suite "multiple_choice" of `rpt_jax.evaluate`."""

    # Responses that are sampled to each question (the size of the paper's cells suggests 1).
    samples: int = 1
    # Sampling temperature (paper, section 4.4: 0.8).
    temperature: float = 0.8
    # Maximum number of tokens of a response (paper, section 4.4: 12,288).
    max_new_tokens: int = 12_288
    # What a response counts as that no letter can be read from: "wrong" (ours), or "random" for a random letter of A to J, as in
    # the harness that the paper refers to.
    unparsed: str = "wrong"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, and the time limit for saving after a stop signal."""

    # Steps between checkpoints.
    every_steps: int = 100
    # Number of checkpoints that are kept.
    keep: int = 2
    # Seconds that saving may take after a stop signal (SIGTERM, SIGINT, SIGHUP, SIGUSR1 or SIGUSR2); with several processes, they
    # include the rest of the step.
    grace_seconds: float = 60.0


@dataclasses.dataclass(frozen=True)
class DivergenceConfig:
    """Rules that stop or report a diverging run; each compares a mean over some steps with a bound, and 0 turns it off."""

    # What a broken rule does: "warn", or "stop" with exit code 4.
    action: str = "warn"
    # Steps of the mean.
    window: int = 10
    # The reward must not fall below this fraction of its best mean.
    reward_collapse: float = 0.0
    # The policy's entropy must not fall below this many nats per token.
    entropy_floor: float = 0.0
    # The log-probabilities of sampler and trainer must not differ by more than this per token.
    mismatch_ceiling: float = 0.0


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Experiment trackers that get metrics and rollouts, beside `metrics.jsonl` and TensorBoard."""

    # Trackers, separated by commas: "wandb", "trackio" or "wandb,trackio"; "" for none.
    trackers: str = ""
    # Name of the project at the trackers.
    project: str = "rpt_jax"


def tracker_names(trackers: str) -> tuple[str, ...]:
    """Return the names in `logging.trackers`."""
    return tuple(name.strip() for name in trackers.split(",") if name.strip())


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Steps that the JAX profiler records into `workdir/profile`, for TensorBoard and xprof."""

    # The first step to record, counted from 1; 0 records nothing. Steps after the second one do not compile programs.
    start: int = 0
    # The number of steps to record; each adds tens of megabytes to the trace.
    steps: int = 3


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh. One axis may be -1, which takes all devices that are left."""

    # Replicas of the policy and its optimizer; the batch is split over them.
    data: int = -1
    # Devices over which parameters and optimizer state are split by width, and the batch too.
    fsdp: int = 1
    # Devices over which each layer is split by heads and feed-forward units.
    tensor: int = 1
    # Tensor-parallel size of rollouts, within one host where possible; 0 for the same as `tensor`.
    rollout_tensor: int = 0
    # [memory] Also split the tokens of an update's row over the devices of `tensor`, outside of attention (sequence parallelism).
    split_rows: bool = False


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A whole experiment: the task, the seed and a section for each part."""

    # What to run: "rpt" (reinforcement pre-training on text), "rft" (reinforcement fine-tuning on questions), "pretrain"
    # (next-token pre-training), "score" (prepare a corpus), "difficulty" (how often a policy solves the training questions) or
    # "traces" (sample responses and keep those that are accepted).
    task: str = "rpt"
    # Seed of everything random in the run but the corpus.
    seed: int = 0
    policy: PolicyConfig = PolicyConfig()
    data: DataConfig = DataConfig()
    questions: QuestionsConfig = QuestionsConfig()
    prompt: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    cold_start: ColdStartConfig = ColdStartConfig()
    pretrain: PretrainConfig = PretrainConfig()
    traces: TracesConfig = TracesConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    multiple_choice: MultipleChoiceConfig = MultipleChoiceConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    logging: LoggingConfig = LoggingConfig()
    profile: ProfileConfig = ProfileConfig()
    mesh: MeshConfig = MeshConfig()

    @property
    def reinforces(self) -> bool:
        """Whether the task is reinforcement learning: "rpt" or "rft"."""
        return self.task in ("rpt", "rft")

    @property
    def trains(self) -> bool:
        """Whether the task updates a policy."""
        return self.reinforces or self.task == "pretrain"

    @property
    def samples(self) -> bool:
        """Whether the task samples responses to prompts."""
        return self.reinforces or self.task in ("difficulty", "traces")

    @property
    def asks_questions(self) -> bool:
        """Whether the prompts of the task are questions."""
        return self.task in ("rft", "difficulty") or (self.task == "traces" and self.traces.prompts == "questions")

    @property
    def scores_corpus(self) -> bool:
        """Whether the task scores the entropies of a corpus, unless it is given a prepared one."""
        return self.task in ("rpt", "score") or (self.task == "traces" and self.traces.prompts == "text")

    @property
    def prompt_slot(self) -> str:
        """What the prompt template has braces around: "context" or "question"."""
        return "question" if self.asks_questions else "context"
