"""The config: schema, validation and loading."""

from rpt_jax.config.loading import default_config, from_config_dict, load_config_file
from rpt_jax.config.schema import (
    CheckpointConfig,
    ColdStartConfig,
    DataConfig,
    DivergenceConfig,
    EvaluationConfig,
    Experiment,
    MeshConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PolicyConfig,
    PretrainConfig,
    ProfileConfig,
    PromptConfig,
    QuestionsConfig,
    RolloutConfig,
    TrainingConfig,
)

__all__ = [
    "CheckpointConfig",
    "ColdStartConfig",
    "DataConfig",
    "DivergenceConfig",
    "EvaluationConfig",
    "Experiment",
    "MeshConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "PretrainConfig",
    "ProfileConfig",
    "PromptConfig",
    "QuestionsConfig",
    "RolloutConfig",
    "TrainingConfig",
    "default_config",
    "from_config_dict",
    "load_config_file",
]
