"""The types of parameters, with the values that each allows."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, model_validator

PYPI_MODEL = (
    r"pypi:(?P<package>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)#sha256=(?P<sha256>[0-9a-f]{64})"
)


def _steps(value: float) -> float:
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


def _template_options(value: object) -> object:
    if value is not None and not (isinstance(value, dict) and all(isinstance(name, str) for name in value)):
        raise ValueError("must be null, or names and values such as {enable_thinking: false}")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("must have JSON values: strings, numbers, booleans, lists") from None
    return value or {}


def _reasoning_end(value: str) -> str:
    if "\\n" in value:  # as `dvc exp run -S` writes it
        raise ValueError("has a backslash and n for a line break; write it in params.yaml, in double quotes")
    return value


def _inside(value: str) -> str:
    if Path(value).is_absolute() or ".." in Path(value).parts:
        raise ValueError("must be a path inside the folder dataset_file")
    return value


# What columns can be mapped to: those that a row needs, and those that it may have.
COLUMNS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("prompt", "completion"): ("system", "input", "history", "reasoning", "tools", "check", "chat_template_kwargs"),
    ("messages",): ("system", "tools", "check", "chat_template_kwargs"),
    ("text",): (),
}


def _columns(value: dict[str, str]) -> dict[str, str]:
    needed = next((schema for schema in COLUMNS if value.keys() >= {*schema}), None)
    if needed is None:
        raise ValueError("must name prompt and completion, messages, or text")
    if unknown := sorted(value.keys() - {*needed, *COLUMNS[needed]}):
        raise ValueError(f"{unknown[0]}: must be {', '.join(needed + COLUMNS[needed])}")
    return value


Columns = Annotated[dict[str, str], AfterValidator(_columns)]
PositiveInt = Annotated[int, Field(ge=1, le=1_000_000_000)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
# A value of 1 or more counts optimizer steps; below 1 it is a fraction of the run.
Steps = Annotated[float, Field(ge=0, le=1_000_000_000), AfterValidator(_steps)]
PositiveSteps = Annotated[Steps, Field(gt=0)]
Text = Annotated[str, Field(pattern=r"\S")]  # not blank
PathInside = Annotated[Text, AfterValidator(_inside)]
ModelName = Annotated[Text, AfterValidator(_model_name)]
Template = Annotated[Text, AfterValidator(_template)]
TemplateOptions = Annotated[dict[str, Any], PlainValidator(_template_options)]
ReasoningEnd = Annotated[Text, AfterValidator(_reasoning_end)]
Launcher = Annotated[Text, Field(pattern=r"^[^\n]+$")]
MaxLength = Annotated[int, Field(ge=2, le=1_000_000_000)]
Precision = Literal["auto", "fp32", "bf16"]
TargetModules = Annotated[str | list[str], PlainValidator(_target_modules)]
Temperature = Annotated[float, AfterValidator(_temperature)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class StageParams(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class DatasetParams(StageParams):
    """One dataset of a mixture: `file` or `name`. It gives `count` rows, a share by `weight`, or else all rows."""

    file: PathInside | None = None
    name: Text | None = None
    revision: Text | None = None
    subset: Text | None = None
    data_files: Text | None = None
    split: Text = "train"
    columns: Columns | None = None
    use: Literal["train", "validation", "test", "retention"] | None = None
    count: PositiveInt | None = None
    weight: PositiveFloat | None = None

    @model_validator(mode="after")
    def _is_one_dataset(self) -> Self:
        if (self.file is None) == (self.name is None):
            raise ValueError("must have either `file`, inside the folder dataset_file, or `name`, a Hub id")
        if self.count and self.weight:
            raise ValueError("must have `count` or `weight`, not both")
        if self.file and (self.revision or self.subset or self.data_files):
            raise ValueError("`revision`, `subset` and `data_files` are for a Hub dataset; must have `name`")
        return self


def _distinct(entries: list["DatasetParams"]) -> list["DatasetParams"]:
    if len({(one.file, one.name, one.subset, one.data_files, one.split) for one in entries}) < len(entries):
        raise ValueError("must list each dataset once")
    return entries


Datasets = Annotated[list[DatasetParams], Field(min_length=1), AfterValidator(_distinct)]
