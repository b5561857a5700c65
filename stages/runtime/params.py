"""The parameters of each stage, validated before heavy imports.

Each stage has a model with exactly the parameters that it declares in `dvc.yaml`; reading any other is an error.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from stages.runtime.errors import UserError
from stages.runtime.yaml12 import YAMLError, parse_yaml

PARAMS_FILE = Path("params.yaml")
PYPI_MODEL = (
    r"pypi:(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)#sha256=(?P<sha256>[0-9a-f]{64})"
)


def _warmup(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("must be a whole number of steps, or below 1 for a fraction of the run")
    return value


def _target_modules(value: object) -> object:
    are_names = isinstance(value, list) and value and all(isinstance(name, str) and name.strip() for name in value)
    if value != "all-linear" and not are_names:
        raise ValueError("must be all-linear, or a list of names of linear layers")
    return value


def _temperature(value: float) -> float:
    if value < 0.01 and value != 0:
        raise ValueError("must be 0 for greedy answers, or 0.01 and above")
    return value


def _model_name(value: str) -> str:
    if value.startswith("pypi:") and not re.fullmatch(PYPI_MODEL, value):
        raise ValueError("must be pypi:PACKAGE==VERSION#sha256=64 HEX DIGITS, a Hub id or a folder")
    return value


def _template(value: str) -> str:
    # `format` depends on the folder `templates`, so DVC notices when a file in it changes.
    if not re.fullmatch(r"alpaca|chat(:[\w.-]+)?|templates/[\w.-]+\.jinja", value):
        raise ValueError(
            "must be alpaca, chat (the template of the tokenizer), chat:NAME (one of several) or a file "
            "templates/NAME.jinja"
        )
    return value


def _inside(value: str) -> str:
    if Path(value).is_absolute() or ".." in Path(value).parts:
        raise ValueError("must be a path inside the folder dataset_file")
    return value


def _columns(value: dict[str, str]) -> dict[str, str]:
    needed = next((schema for schema in COLUMNS if value.keys() >= {*schema}), None)
    if needed is None:
        raise ValueError("must name prompt and completion, messages, or text")
    if unknown := sorted(value.keys() - {*needed, *COLUMNS[needed]}):
        raise ValueError(f"{unknown[0]}: must be {', '.join(needed + COLUMNS[needed])}")
    return value


def _distinct(entries: list["DatasetParams"]) -> list["DatasetParams"]:
    if len({(one.file, one.name, one.subset, one.data_files, one.split) for one in entries}) < len(entries):
        raise ValueError("must list each dataset once")
    return entries


# What columns can be mapped to: those that a row needs, and those that it may have.
COLUMNS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("prompt", "completion"): ("system", "input", "history", "reasoning", "tools"),
    ("messages",): ("system", "tools"),
    ("text",): (),
}
Columns = Annotated[dict[str, str], AfterValidator(_columns)] | None
PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(pattern=r"\S")]  # not blank
MaxLength = Annotated[int, Field(ge=2, le=1_000_000_000)]
Precision = Literal["auto", "fp32", "bf16"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Template = Annotated[Text, AfterValidator(_template)]


class StageParams(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class DatasetParams(StageParams):
    """One dataset of a mixture: `file` or `name`. It gives `count` rows, a share by `weight`, or else all rows."""

    file: Annotated[Text, AfterValidator(_inside)] | None = None
    name: Text | None = None
    revision: Text | None = None
    subset: Text | None = None
    data_files: Text | None = None
    split: Text = "train"
    columns: Columns = None
    use: Literal["train", "validation", "test"] | None = None
    count: PositiveInt | None = None
    weight: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _is_one_dataset(self) -> Self:
        if (self.file is None) == (self.name is None):
            raise ValueError("must have either `file`, inside the folder dataset_file, or `name`, a Hub id")
        if self.count and self.weight:
            raise ValueError("must have `count` or `weight`, not both")
        if self.file and (self.revision or self.subset or self.data_files):
            raise ValueError("`revision`, `subset` and `data_files` are for a Hub dataset; must have `name`")
        return self


class DownloadDatasetParams(StageParams):
    datasets: Annotated[list[DatasetParams], Field(min_length=1), AfterValidator(_distinct)] | None
    dataset_file: Text
    dataset_name: Text | None
    dataset_revision: Text | None
    dataset_subset: Text | None
    dataset_split: Text
    dataset_columns: Columns
    max_examples: PositiveInt | None
    slice_column: Text


class DownloadModelParams(StageParams):
    model_name: Annotated[Text, AfterValidator(_model_name)]
    model_revision: Text | None


class FormatParams(StageParams):
    template: Template
    max_length: MaxLength
    train_on: Literal["all_answers", "last_answer"]


class SplitParams(StageParams):
    validation_fraction: Fraction
    test_fraction: Fraction
    drop_near_duplicates: bool
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


class TrainingParams(StageParams):
    """The parameters of a training run, except its seed."""

    template: Template
    max_length: MaxLength
    batch_size: PositiveInt
    gradient_accumulation_steps: PositiveInt
    learning_rate: Annotated[float, Field(gt=0)]
    lr_scheduler: Literal["linear", "cosine", "constant"]
    warmup_steps: Annotated[float, Field(ge=0, le=1_000_000_000), AfterValidator(_warmup)]
    num_epochs: PositiveInt
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    logging_steps: PositiveInt
    eval_steps: PositiveInt
    save_steps: PositiveInt
    precision: Precision
    launcher: Annotated[Text, Field(pattern=r"^[^\n]+$")]
    finetuning: Literal["full", "lora"]
    lora_rank: PositiveInt
    lora_alpha: PositiveInt
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    lora_target_modules: Annotated[str | list[str], PlainValidator(_target_modules)]

    @property
    def effective_batch_size(self) -> int:
        """Examples per optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps


class TrainParams(TrainingParams):
    seed: Seed


class EvaluateParams(StageParams):
    template: Template
    max_new_tokens: PositiveInt
    precision: Precision


class ReplicateParams(TrainingParams, EvaluateParams):
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


class GenerateParams(StageParams):
    template: Template
    sample_prompts: Annotated[list[Text], Field(min_length=1)]
    max_new_tokens: PositiveInt
    temperature: Annotated[float, AfterValidator(_temperature)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    precision: Precision
    seed: Seed


STAGES: tuple[type[StageParams], ...] = (
    DownloadDatasetParams,
    DownloadModelParams,
    FormatParams,
    SplitParams,
    TrainParams,
    EvaluateParams,
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
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run in the project's folder") from None
    except (YAMLError, ValueError, RecursionError) as error:  # the last two: a huge number, deep nesting
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}; must be a list of `name: value` lines")

    known = {name for model in STAGES for name in model.model_fields}
    problems = [_unknown(name, known) for name in content if name not in known]
    for model in STAGES:  # all of them, so that a mistake in a parameter of `train` is found before `format` runs
        try:
            model.model_validate({name: content[name] for name in model.model_fields if name in content})
        except ValidationError as errors:
            problems += [_describe(error) for error in errors.errors()]
    if problems:
        raise UserError(f"{path}:\n" + "\n".join(f"  {problem}" for problem in dict.fromkeys(problems)))
    return stage.model_validate({name: content[name] for name in stage.model_fields})


def _unknown(name: object, known: set[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
    return f"{name}: not a parameter; {hint}"


def _describe(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "string_type" and isinstance(error["input"], int | float):
        return f"{name}: found the number {error['input']!r}; must be text; put it in quotes"
    if error["type"] == "missing":
        return f"{name}: missing; every parameter needs a value"
    if error["type"] == "string_pattern_mismatch":
        allowed = "must not be empty"
    else:
        allowed = re.sub("^(Input|List) should", "must", error["msg"].removeprefix("Value error, "))
    return f"{name}: found {error['input']!r:.100}; {allowed}"
