"""The Python code of `docs/notebook.md` runs in a clone with results and an experiment."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stages.data.examples import FORMATTED_SCHEMA
from tests.clone import ROOT, run

pytestmark = pytest.mark.subprocess
PAGE = (ROOT / "docs/notebook.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def names(with_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The variables of the page's code blocks, run in order in one namespace."""
    import datasets

    result: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as context:
        context.chdir(with_experiment)
        context.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
            exec(block, result)
    return result


def metric(with_experiment: Path, path: str, name: str) -> float:
    return float(json.loads((with_experiment / path).read_text())[name])


def test_parameters_and_metrics_equal_those_in_the_files(names: dict[str, Any], with_experiment: Path) -> None:
    assert names["params"]["learning_rate"] == 0.001
    assert names["params"]["eval_steps"] == 0.5
    base, tuned = (metric(with_experiment, f"metrics/evaluate/{model}.json", "loss") for model in ("base", "tuned"))
    assert names["better"] == pytest.approx(base - tuned)
    assert names["better"] > 0.1
    assert names["perplexity"] == metric(with_experiment, "metrics/evaluate/tuned.json", "perplexity")


def test_table_of_experiments_has_parameters_and_metrics(names: dict[str, Any], with_experiment: Path) -> None:
    table = names["table"]
    assert list(table.columns) == ["name", "learning_rate", "metrics/evaluate/tuned.json:loss"]
    assert list(table["name"]) == ["workspace", "main", "slow"]
    assert list(table["learning_rate"]) == [0.001, 0.001, 0.00001]
    loss = metric(with_experiment, "metrics/evaluate/tuned.json", "loss")
    assert table["metrics/evaluate/tuned.json:loss"].iloc[1] == pytest.approx(loss)
    assert {"data/train.parquet", "models/base", "environment.torch"} <= set(names["experiments"].columns)


def test_predictions_of_two_revisions_are_joined_by_example(names: dict[str, Any]) -> None:
    both, most = names["both"], names["most"]
    assert (len(both), both["example_id"].nunique(), len(most)) == (8, 8, 5)
    # The slow experiment learned almost nothing, so each example got worse.
    assert (both["change"] > 0.1).all()
    assert most["change"].iloc[0] == both["change"].max()
    assert most["change"].is_monotonic_decreasing


def test_predictions_of_base_and_tuned_are_joined_with_prompts_and_references(names: dict[str, Any]) -> None:
    models = names["models"]
    assert len(models) == 8
    assert models.notna().sum().isin([0, 8]).all()  # no answer has reasoning or calls
    assert models["prompt"].str.endswith("### Response:\n").all()
    assert (len(names["worse"]), (models["loss_tuned"] < models["loss_base"]).all()) == (0, True)


def test_revision_is_read_as_a_file_system(names: dict[str, Any]) -> None:
    assert sorted(names["names"]) == ["data/predictions/base.parquet", "data/predictions/tuned.parquet"]
    assert list(names["losses"].columns) == ["example_id", "loss"]
    slow = names["both"][["example_id", "loss_after"]]
    assert names["losses"].head(8).to_numpy().tolist() == slow.to_numpy().tolist()  # then those of the retention set


def test_supervised_tokens_are_the_response_and_the_eos_token(names: dict[str, Any], with_experiment: Path) -> None:
    assert list(names["formatted"].columns) == FORMATTED_SCHEMA.names
    assert len(names["formatted"]) == 126  # 6 of the retention set
    first = json.loads((with_experiment / "data/instructions.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert names["row"]["source_row"] == 1
    assert names["tokenizer"].decode(names["supervised"]) == first["output"] + "<|end|>"


def test_train_split_is_read_as_a_dataset(names: dict[str, Any]) -> None:
    assert names["dataset"].num_rows == len(names["lengths"]) == 98
    assert {"prompt", "response", "input_ids", "labels"} <= set(names["dataset"].column_names)
    assert min(names["lengths"]) > 50


def test_curve_has_every_step_and_the_validation_loss_of_some(names: dict[str, Any]) -> None:
    curve = names["curve"]
    assert list(curve.columns) == ["loss", "validation_loss", "learning_rate", "gradient_norm"]
    assert list(curve.index) == list(range(1, 26))
    assert list(names["validation"].index) == [13, 25]
    assert names["best_step"] == 25


def test_dvc_commands_of_the_vs_code_extension_work(with_experiment: Path) -> None:
    shown = json.loads(run(with_experiment, "dvc", "exp", "show", "--num", "2", "--json").stdout)
    assert shown[0]["rev"] == "workspace"
    assert [experiment["name"] for experiment in shown[1]["experiments"]] == ["slow"]
    plots = ("dvc", "plots", "diff", "main", "slow", "--out", ".dvc/tmp/plots", "--split", "--json")
    drawn = json.loads(run(with_experiment, *plots).stdout)
    assert set(drawn) == {"data"}  # without the key "errors"
    assert {"loss", "learning_rate", "metrics/lengths.csv"} <= set(drawn["data"])
    assert all(plot["revisions"] == ["main", "slow"] for group in drawn["data"].values() for plot in group)
