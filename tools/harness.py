"""Run tasks of lm-evaluation-harness on both models, and compare them. `make lm-eval TASKS=...` runs it.

Prompts are rendered by the template of the training. The value of each example is written to `metrics/lm_eval/`, so
that `make review` compares two revisions in pairs.
"""

import argparse
import logging
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from review.harness import SAMPLES, Samples, compare_samples, write_samples
from review.report import RESULT_HEADER, result_cells
from review.revisions import WORKSPACE, Revision, output_hashes
from review.verdicts import Results
from stages.data.files import write_text
from stages.runtime.errors import UserError
from stages.runtime.params import GenerateParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import console, summary
from stages.text import printable


def main() -> None:
    params = load_params(GenerateParams)
    parser = argparse.ArgumentParser(prog="python -m tools.harness", description=__doc__)
    parser.add_argument("tasks", help="names of tasks and groups, separated by commas")
    parser.add_argument("--include", default="", help="a folder with YAML files of further tasks")
    parser.add_argument("--limit", default="", help="use only the first examples of each task")
    options = parser.parse_args()
    tasks = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not tasks:
        raise UserError("TASKS is empty; name tasks of lm-evaluation-harness: make lm-eval TASKS=arc_easy,hellaswag")
    if options.limit and not options.limit.isdecimal():
        raise UserError(f"LIMIT: found {options.limit!r}; must be a number of examples")
    limit = int(options.limit) if options.limit else None
    hashes = output_hashes(Revision(WORKSPACE).read_yaml("dvc.lock"))

    manager = open_tasks(tasks, options.include)
    settings = {"lm_eval": metadata.version("lm_eval"), "tasks": tasks, "limit": limit, "template": params.template}
    samples, wrote = {}, []
    for name in ("base", "tuned"):
        results = run_tasks(Path("models") / name, tasks, manager, params, limit)
        samples[name] = read_results(results, hashes.get(f"models/{name}", ""))
        wrote.append(Path(SAMPLES.format(model=name)))
        write_text(wrote[-1], write_samples(samples[name], settings))
    show(compare_samples(samples["base"], samples["tuned"], ("base", "tuned")))
    num_examples = len(samples["tuned"].table)
    summary({"examples": f"{num_examples:,}"}, wrote=wrote, then="git add metrics; make review BASE=main")


def open_tasks(tasks: list[str], include: str) -> Any:
    """The task manager of the harness.

    Raises:
        UserError: the harness is not installed, or a task is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"lm-eval: {error}; run `make lm-eval TASKS=...`, which installs what it needs") from None
    if include and not Path(include).is_dir():
        raise UserError(f"INCLUDE: {include!r} is not a folder")
    for include_defaults in (False, True):  # to index those of the harness takes ten seconds
        manager = TaskManager(include_path=include or None, include_defaults=include_defaults)
        unknown = [name for name in tasks if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise UserError(
        f"TASKS: found {unknown[0]!r}; must be tasks of lm-evaluation-harness (`lm-eval ls tasks` lists them), or of "
        "YAML files in the folder INCLUDE"
    )


def run_tasks(folder: Path, tasks: list[str], manager: Any, params: GenerateParams, limit: int | None) -> Any:
    """The results of one model. Both models use the tokenizer and the template with which the tuned one was trained."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns that the model is already loaded
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from stages.engine.models import load_model, uses_bf16

    model = load_model(folder, precision=params.precision).eval()
    language_model = HFLM(
        pretrained=model,
        tokenizer="models/tuned",
        batch_size=params.batch_size,
        mixed_precision_dtype="bfloat16" if uses_bf16(params.precision, model.device) else None,
        softmax_dtype="float32",
    )
    return simple_evaluate(
        language_model,
        tasks=tasks,
        task_manager=manager,
        limit=limit,
        apply_chat_template=True,
        fewshot_as_multiturn=params.template != "alpaca",  # it renders only the last message
        bootstrap_iters=0,
    )


def read_results(results: Any, model: str) -> Samples:
    """The value of each metric for each example; a metric of a whole corpus has none."""
    rows: dict[str, dict[str, float]] = {}
    directions: dict[str, int] = {}
    for task, samples in results["samples"].items():
        counts: Counter[tuple[str, str]] = Counter()
        for sample in samples:
            key = sample["doc_hash"], sample["filter"]
            counts[key] += 1  # a task can have equal examples
            row = rows.setdefault(f"{task}/{sample['doc_hash'][:16]}/{counts[key]}", {})
            for metric in sample["metrics"]:
                if isinstance(sample[metric], int | float):
                    name = f"{task}: {metric}" + (f" ({sample['filter']})" if sample["filter"] != "none" else "")
                    row[name] = float(sample[metric])
                    directions[name] = 1 if results["higher_is_better"][task].get(metric, True) else -1
    if not directions:
        raise UserError("no metric of these tasks has a value for each example, so they can't be compared in pairs")
    return Samples(model, directions, pd.DataFrame.from_dict(rows, orient="index"))


def show(results: Results) -> None:
    """Print the comparison of the base model with the tuned one."""
    table = Table("task and metric", "base", "tuned", *RESULT_HEADER[2:])
    for result in results.metrics:
        table.add_row(result.metric.name, *(printable(cell).replace("\\", "") for cell in result_cells(result)))
    console().print(table)


if __name__ == "__main__":
    run(main, exclusive=False)
