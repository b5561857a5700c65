"""Parameters are validated together, before heavy imports. Single bad values are in `test_bad_input.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

from stages.runtime.errors import UserError
from stages.runtime.params import DownloadDatasetParams, TrainParams, load_params
from tests.clone import ROOT, edit


def test_all_errors_of_the_file_are_in_one_message(project: Path) -> None:
    edit(project, learning_rate="-1", template="chatml", seed="yes", num_epochs=None, test_fraction="0.95")
    with (project / "params.yaml").open("a") as file:
        file.write("num_epohs: 3\n")
    with pytest.raises(UserError) as error:
        load_params(TrainParams)
    assert str(error.value).splitlines() == [
        "params.yaml:",
        "  num_epohs: not a parameter; did you mean num_epochs?",
        "  template: found 'chatml'; must be alpaca, chat (the template of the tokenizer), chat:NAME (one of several) "
        "or a file templates/NAME.jinja",
        "  test_fraction: found 0.95; its sum with validation_fraction 0.1 must be below 1, "
        "so that training examples remain",
        "  learning_rate: found -1; must be greater than 0",
        "  num_epochs: missing; every parameter needs a value",
        "  seed: found 'yes'; must be a valid integer",
    ]


@pytest.mark.subprocess
def test_a_parameter_error_is_reported_before_torch_is_imported(project: Path) -> None:
    edit(project, learning_rate="-1")
    stages = ["train", "predict", "replicate", "generate", "format", "split", "download_model"]
    code = (
        "import runpy, sys\n"
        f"for stage in {stages}:\n"
        "    try: runpy.run_module(f'stages.{stage}', run_name='__main__')\n"
        "    except SystemExit as ending: print(stage, 'torch' in sys.modules, ending.code)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    message = "error: params.yaml:\n  learning_rate: found -1; must be greater than 0\n"
    assert result.stdout == "".join(f"{stage} False {message}" for stage in stages)


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ("[]", "  datasets: found []; must have at least 1 item"),
        ("[{count: 5}]", "must have either `file`, inside the folder dataset_file, or `name`, a Hub id"),
        (
            "[{file: a.jsonl, name: b/c}]",
            "must have either `file`, inside the folder dataset_file, or `name`, a Hub id",
        ),
        ("[{file: a.jsonl, count: 5, weight: 0.5}]", "must have `count` or `weight`, not both"),
        ("[{file: a.jsonl}, {file: a.jsonl, count: 5}]", "must list each dataset once"),
        ("[{file: a.jsonl, weight: 0.0}]", "datasets.0.weight: found 0.0; must be greater than 0"),
        ("[{file: ../a.jsonl}]", "datasets.0.file: found '../a.jsonl'; must be a path inside the folder dataset_file"),
    ],
)
def test_an_invalid_mixture_is_an_error(project: Path, datasets: str, message: str) -> None:
    edit(project, datasets=datasets)
    with pytest.raises(UserError) as error:
        load_params(DownloadDatasetParams)
    assert message in str(error.value)
