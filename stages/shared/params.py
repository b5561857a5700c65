"""The declared parameters of a stage, validated before anything heavy is imported.

There is one model a stage, with the fields that the stage declares in `dvc.yaml`: reading another one is an error.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from ruamel.yaml import YAML  # YAML 1.2, as DVC: in 1.1 the `1e-05` that `dvc exp run -S` writes is a string
from ruamel.yaml.error import YAMLError

from stages.shared.errors import UserError

PARAMS_FILE = Path("params.yaml")
PYPI_MODEL = (
    r"pypi:(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)#sha256=(?P<sha256>[0-9a-f]{64})"
)


def _warmup(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError("must be a whole number of steps, or below 1 for a fraction of the run")
    return value


def _temperature(value: float) -> float:
    if value < 0.01 and value != 0:
        raise ValueError("must be 0 for greedy answers, or 0.01 and above")
    return value


def _model_name(value: str) -> str:
    if value.startswith("pypi:") and not re.fullmatch(PYPI_MODEL, value):
        raise ValueError("must be pypi:PACKAGE==VERSION#sha256=64 HEX DIGITS; or a Hub id, or a folder")
    return value


PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(pattern=r"\S")]
MaxLength = Annotated[int, Field(ge=2, le=1_000_000_000)]
Precision = Literal["auto", "fp32", "bf16"]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Template = Literal["alpaca"]


class StageParams(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class DownloadDatasetParams(StageParams):
    dataset_file: Text
    dataset_name: Text | None
    dataset_revision: Text | None
    dataset_split: Text
    max_examples: PositiveInt | None


class DownloadModelParams(StageParams):
    model_name: Annotated[Text, AfterValidator(_model_name)]
    model_revision: Text | None


class FormatParams(StageParams):
    template: Template
    max_length: MaxLength


class SplitParams(StageParams):
    validation_fraction: Fraction
    test_fraction: Fraction
    seed: Seed

    @field_validator("test_fraction")
    @classmethod
    def _leaves_examples_to_train_on(cls, test: float, info: ValidationInfo) -> float:
        validation = info.data.get("validation_fraction", 0)
        if validation + test >= 1:
            raise ValueError(
                f"with validation_fraction {validation} must be below 1, so that examples to train on remain"
            )
        return test


class TrainParams(StageParams):
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
    seed: Seed


class EvaluateParams(StageParams):
    max_new_tokens: PositiveInt
    precision: Precision


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
    GenerateParams,
)
P = TypeVar("P", bound=StageParams)


def load_params(stage: type[P], path: Path = PARAMS_FILE) -> P:
    """The parameters of one stage. The whole file is checked, so that a typo for `train` is found before `format` runs.

    Raises:
        UserError: names every parameter that is unknown, missing or not allowed, with its value.
    """
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run in the project's folder") from None
    except (YAMLError, ValueError, RecursionError) as error:  # the last two: numbers and nesting without end
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}; must be a list of `name: value` lines")

    known = {name for model in STAGES for name in model.model_fields}
    problems = [_unknown(name, known) for name in content if name not in known]
    for model in STAGES:
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
    if error["type"] == "missing":
        return f"{name}: missing; every parameter needs a value"
    if error["type"] == "string_pattern_mismatch":
        allowed = "must not be empty"
    else:
        allowed = re.sub("^(Input|List) should", "must", error["msg"].removeprefix("Value error, "))
    return f"{name}: found {error['input']!r:.100}; {allowed}"
