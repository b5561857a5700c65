"""The parameters of each stage, validated before heavy imports.

Each stage has a model with exactly the parameters that it declares in `dvc.yaml`; reading any other is an error.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from stages.runtime.param_errors import describe_problem, parse_params, raise_problems, unknown_parameter
from stages.runtime.param_types import (
    Columns,
    Datasets,
    Fraction,
    Launcher,
    MaxLength,
    ModelName,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    PositiveSteps,
    Precision,
    ReasoningEnd,
    Seed,
    StageParams,
    Steps,
    TargetModules,
    Temperature,
    Template,
    TemplateOptions,
    Text,
)

PARAMS_FILE = Path("params.yaml")


class DownloadDatasetParams(StageParams):
    datasets: Datasets | None
    dataset_file: Text
    dataset_name: Text | None
    dataset_revision: Text | None
    dataset_subset: Text | None
    dataset_split: Text
    dataset_columns: Columns | None
    max_examples: PositiveInt | None
    slice_column: Text
    retention_file: Text


class DownloadModelParams(StageParams):
    model_name: ModelName
    model_revision: Text | None


class FormatParams(StageParams):
    template: Template
    template_options: TemplateOptions
    max_length: MaxLength
    long_rows: Literal["truncate", "reject", "error"]
    train_on: Literal["all_answers", "last_answer"]
    reasoning_end: ReasoningEnd | None


class SplitFractions(StageParams):
    """The parameters that determine the split of a row."""

    validation_fraction: Fraction
    test_fraction: Fraction
    split_seed: Seed

    @field_validator("test_fraction")
    @classmethod
    def _leaves_examples_to_train_on(cls, test: float, info: ValidationInfo) -> float:
        validation = info.data.get("validation_fraction", 0)
        if validation + test >= 1:
            raise ValueError(
                f"its sum with validation_fraction {validation} must be below 1, so that training examples remain"
            )
        return test


class SplitParams(SplitFractions):
    drop_near_duplicates: bool
    train_fraction: PositiveFraction
    drop_worst_fraction: Fraction


class SelectionParams(StageParams):
    """Rows can be dropped by their scores only if there are scores."""

    score_rows: bool
    drop_worst_fraction: Fraction

    @field_validator("drop_worst_fraction")
    @classmethod
    def _has_scores(cls, worst: float, info: ValidationInfo) -> float:
        if worst and not info.data.get("score_rows", True):
            raise ValueError("must be 0 without scores of the rows; set score_rows: true")
        return worst


class InferenceParams(StageParams):
    """What all stages need that run a model."""

    max_length: MaxLength
    batch_size: PositiveInt
    template: Template
    template_options: TemplateOptions
    launcher: Launcher
    precision: Precision


class ScoreRowsParams(InferenceParams, SplitFractions):
    score_rows: bool


class TrainingParams(InferenceParams):
    """The parameters of a training run, except its seed."""

    gradient_accumulation_steps: PositiveInt
    learning_rate: PositiveFloat
    lr_scheduler: Literal["linear", "cosine", "constant"]
    min_learning_rate_ratio: Fraction
    warmup_steps: Steps
    num_epochs: PositiveInt
    max_steps: PositiveInt | None
    optimizer: Literal["adamw", "adamw_8bit", "adamw_bf16"]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: PositiveFloat
    logging_steps: PositiveInt
    eval_steps: PositiveSteps
    early_stopping_patience: PositiveInt | None
    save_steps: PositiveSteps
    activation_checkpointing: Literal["auto", "on", "off"]
    finetuning: Literal["full", "lora", "qlora"]
    lora_rank: PositiveInt
    lora_alpha: PositiveInt
    lora_dropout: Fraction
    lora_target_modules: TargetModules

    @field_validator("min_learning_rate_ratio")
    @classmethod
    def _is_used(cls, ratio: float, info: ValidationInfo) -> float:
        if ratio and info.data.get("lr_scheduler") == "constant":
            raise ValueError("must be 0 with lr_scheduler: constant, which does not decay")
        return ratio


class TrainParams(TrainingParams):
    seed: Seed


class AnswerParams(InferenceParams):
    reasoning_end: Text | None
    max_new_tokens: PositiveInt


class PredictParams(AnswerParams):
    answers_per_prompt: PositiveInt


class ReplicateParams(TrainingParams, PredictParams):
    """Each replicate has its seed as an argument, so that adding a seed reruns no other."""


class SeedParams(StageParams):
    """The seeds of all runs; DVC makes one stage `replicate` for each of `replicate_seeds`."""

    seed: Seed
    replicate_seeds: list[Seed]

    @field_validator("replicate_seeds")
    @classmethod
    def _are_other_runs(cls, seeds: list[int], info: ValidationInfo) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("must list each seed once")
        if info.data.get("seed") in seeds:
            raise ValueError("must not contain the seed of train, which gives the same run again")
        return seeds


class GenerateParams(AnswerParams):
    sample_prompts: Annotated[list[Text], Field(min_length=1)]
    temperature: Temperature
    top_p: Annotated[float, Field(gt=0, le=1)]
    seed: Seed


STAGES: tuple[type[StageParams], ...] = (
    DownloadDatasetParams,
    DownloadModelParams,
    FormatParams,
    ScoreRowsParams,
    SplitParams,
    SelectionParams,
    TrainParams,
    PredictParams,
    ReplicateParams,
    SeedParams,
    GenerateParams,
)
P = TypeVar("P", bound=StageParams)


def load_params(stage: type[P], path: Path = PARAMS_FILE) -> P:
    """Read the parameters of one stage, and check the whole file.

    Raises:
        UserError: lists every parameter that is unknown, missing or invalid, with its value.
    """
    content = parse_params(path.read_bytes(), str(path))
    known = {name for model in STAGES for name in model.model_fields}
    problems = [unknown_parameter(name, known) for name in content if name not in known]
    raise_problems(problems + find_problems(content), str(path))
    return stage.model_validate({name: content[name] for name in stage.model_fields})


def find_problems(content: dict[str, Any], may_lack: bool = False) -> list[str]:
    """A line for each parameter, of any stage, that is missing (unless `may_lack`) or invalid."""
    problems: list[str] = []
    for stage in STAGES:
        try:
            stage.model_validate({name: content[name] for name in stage.model_fields if name in content})
        except ValidationError as errors:
            faults = [error for error in errors.errors() if not (may_lack and error["type"] == "missing")]
            problems += map(describe_problem, faults)
    return problems
