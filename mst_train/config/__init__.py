"""A run's configuration.

schema   every setting, its type and default
rules    what must hold of settings and between them
"""

from mst_train.config.rules import model_problems, validate
from mst_train.config.schema import (
    ACTIVATIONS,
    AUTO,
    NORM_PLACEMENTS,
    OFFLOADS,
    POLICIES,
    PRECISIONS,
    QK_NORMS,
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    KernelConfig,
    LoggingConfig,
    MemoryConfig,
    MixtureConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RopeScalingConfig,
    RunConfig,
    TrainConfig,
    ValidationSetConfig,
    WandbConfig,
    leaves,
    lookup,
)

__all__ = [
    "ACTIVATIONS",
    "AUTO",
    "NORM_PLACEMENTS",
    "OFFLOADS",
    "POLICIES",
    "PRECISIONS",
    "QK_NORMS",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "KernelConfig",
    "LoggingConfig",
    "MemoryConfig",
    "MixtureConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RopeScalingConfig",
    "RunConfig",
    "TrainConfig",
    "ValidationSetConfig",
    "WandbConfig",
    "leaves",
    "lookup",
    "model_problems",
    "validate",
]
