"""Upload the tuned model, its card and its metrics to the Hub in one commit. `make publish REPO=owner/name` runs it."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from review.markup import table
from review.runs import metrics_of_split
from stages.data.files import read_json
from stages.runtime.errors import UserError
from stages.runtime.preflight import check_project
from stages.runtime.run import run
from stages.runtime.terminal import summary

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCard

TUNED, METRICS = Path("models/tuned"), Path("metrics")
STAGES = ["train", *(f"{stage}@{model}" for stage in ("predict", "evaluate") for model in ("base", "tuned"))]
NAMES = {"loss": "loss (nats/token)", "pass_rate": "pass rate", "rouge_l": "ROUGE-L", "stop_rate": "stop rate"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.publish", description=__doc__)
    parser.add_argument("repo", help="id of the model on the Hub, such as owner/name; created as private if it is new")
    repo = parser.parse_args().repo
    if not repo:
        raise UserError("REPO is empty; name a model of yours on the Hub: make publish REPO=owner/name")
    check_is_evaluated()

    from huggingface_hub import CommitOperationAdd, HfApi

    from stages.runtime.hub import upload_errors

    files = {str(path.relative_to(TUNED)): path for path in sorted(TUNED.rglob("*")) if path.is_file()}
    files |= {str(path): path for path in sorted(METRICS.rglob("*.json"))}
    files |= {name: Path(name) for name in ("params.yaml", "dvc.lock")}
    operations = [CommitOperationAdd(name, path) for name, path in files.items() if name != "README.md"]
    api = HfApi()
    with upload_errors(repo):
        operations.append(CommitOperationAdd("README.md", str(card(repo, api)).encode()))
        url = api.create_repo(repo, private=True, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message="Upload the model, its card and its metrics")
    summary({"uploaded": f"{len(operations)} files to {url}"}, wrote=[], then=f"open {commit.commit_url}")


def check_is_evaluated() -> None:
    """Check that the model and its metrics on disk are those of `dvc.lock`, and belong together.

    Raises:
        UserError: one of the stages from training to evaluation would run again.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    check_project()
    try:
        with Repo() as repo:
            changed = repo.status(targets=STAGES)
    except DvcException as error:
        raise UserError(f"{TUNED}: {error}; run `dvc repro`") from None
    if changed:
        raise UserError(f"{TUNED}: {', '.join(changed)} changed since they ran, or their results did; run `dvc repro`")


def card(repo: str, api: "HfApi") -> "ModelCard":
    """The model card of `models/tuned` for the Hub.

    Its snippets load the model from the repository, and it has a table of metrics before and after fine-tuning. Its
    metadata have the metrics after it, and the license of the base model.
    """
    from huggingface_hub import EvalResult, ModelCard

    card: ModelCard = ModelCard.load(TUNED / "README.md")
    card.text = card.text.replace(f'"{TUNED}"', f'"{repo}"')
    source = read_json(Path("data/source.json"))["source"]
    base, tuned = (read_json(METRICS / f"evaluate/{name}.json") for name in ("base", "tuned"))
    rows, results = [], []
    for split in ("test", "retention"):
        before, after = (metrics_of_split(metrics, split) for metrics in (base, tuned))
        data = f"{split} set, {after.get('examples', 0):,} examples"
        for name, title in NAMES.items():
            if (value := after.get(name)) is not None:
                rows.append([data, title, shown(before, name), shown(after, name)])
                results.append(
                    EvalResult("text-generation", source, data, name, value, dataset_split=split, metric_name=title)
                )
    card.text += f"\n## Evaluation\n{table(['data', 'metric', 'base model', 'this model'], rows)}\n"
    card.data["model_name"], card.data["eval_results"] = repo, results
    if base_model := card.data.get("base_model"):
        card.data["license"] = license_of(base_model, api)
    return card


def license_of(model: str, api: "HfApi") -> str | None:
    """The license of a model on the Hub; None if it does not state one, or if the model is not there any more."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        data = api.model_info(model).card_data
    except RepositoryNotFoundError:  # also if this token may not see it
        return None
    return data.license if data else None


def shown(metrics: Mapping[str, Any], name: str) -> str:
    """A metric with its standard error."""
    value, error = metrics.get(name), metrics.get(f"{name}_se")
    return "" if value is None else f"{value:.3f}" + ("" if error is None else f" ± {error:.3f}")


if __name__ == "__main__":
    run(main, exclusive=False)
