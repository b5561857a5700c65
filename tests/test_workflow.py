"""The workflow of a pull request: its structure, and its commands, run in a clone."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from stages.runtime.yaml12 import parse_yaml
from tests.clone import EVERY_STAGE, ROOT, commit, copy_clone, copy_tree, edit, lock_hashes, run

pytestmark = pytest.mark.subprocess
TEXT = (ROOT / ".github/workflows/review.yml").read_text(encoding="utf-8")
WORKFLOW = parse_yaml(TEXT)
JOBS = WORKFLOW["jobs"]
STEPS = {step["name"]: step for job in JOBS.values() for step in job["steps"] if "name" in step}

CHECK = "Check that dvc.lock matches the code, the parameters, the data and the metrics"
PULL = "Pull what the review compares if a DVC remote is configured"
SUMMARY = "Add the review to the job summary"
COMMENT = "Comment on the pull request"

PULL_REQUEST = "https://github.example/o/p/pull/7"
PAGE = "https://github.example/o/p/actions/runs/1/artifacts/2"
EXPRESSIONS = {  # the values that GitHub inserts
    "${{ github.token }}": "ghs_secret",
    "origin/${{ github.base_ref }}": "origin/main",
    "${{ secrets.AWS_ACCESS_KEY_ID }}": "",
    "${{ secrets.AWS_SECRET_ACCESS_KEY }}": "",
    "${{ github.event.pull_request.html_url }}": PULL_REQUEST,
    "${{ steps.page.outputs.artifact-url }}": PAGE,
}


def run_step(name: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command of a step as GitHub does, with the environment variables of the step."""
    step = STEPS[name]
    env = {variable: EXPRESSIONS[value] for variable, value in step.get("env", {}).items()} | env
    return run(folder, "bash", "-e", "-c", step["run"], check=False, **env)


# Structure


def test_actions_are_pinned_by_commit_with_a_version_comment() -> None:
    actions = re.findall(r"uses: *(.*)", TEXT)
    pinned = re.compile(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
    assert [action for action in actions if not pinned.fullmatch(action)] == []


def test_shell_commands_contain_no_expressions() -> None:
    assert [step for job in JOBS.values() for step in job["steps"] if "${{" in step.get("run", "")] == []


def test_only_the_step_that_pulls_has_secrets() -> None:
    assert TEXT.count("{{ secrets.") == str(STEPS[PULL]["env"]).count("{{ secrets.") == 2


# dvc.lock


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, ran: Path, fast_stages: None) -> Path:
    """A repository with committed results of the pipeline and the scripts of the workflow."""
    folder = copy_clone(ran, tmp_path_factory.mktemp("workflow") / "project")
    copy_tree(ROOT / ".ci", folder / ".ci")
    commit(folder, "workflow")
    return folder


def clone_of(repository: Path, folder: Path, *options: str) -> Path:
    """The checkout of a job, without cache, data and models."""
    run(folder, "git", "clone", "-q", *options, str(repository), "clone")
    return folder / "clone"


@pytest.fixture
def clone(tmp_path: Path, project: Path) -> Path:
    return clone_of(project, tmp_path)


def rerun_train_alone(folder: Path) -> None:
    """Edit dvc.lock as if only train had run again and had written a different model."""
    lock = parse_yaml((folder / "dvc.lock").read_text())
    [model] = [out for out in lock["stages"]["train"]["outs"] if out["path"] == "models/tuned"]
    model["md5"] = "0" * 32 + ".dir"
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))


def move_data(folder: Path, path: str = "/elsewhere/mine.jsonl") -> None:
    """Edit dvc.lock as if the pipeline had run with a dataset at another path, which git does not track."""
    (folder / "data/instructions.jsonl").unlink()
    lock = (folder / "dvc.lock").read_text()
    (folder / "dvc.lock").write_text(lock.replace("data/instructions.jsonl", path))
    edit(folder, dataset_file=path)


def move_data_to_dvc_and_change_it(folder: Path) -> None:
    """Edit dvc.lock as if DVC tracked the dataset, and `dvc add` had then added a different one."""
    move_data(folder, "data/mine.jsonl")
    (folder / "data/mine.jsonl.dvc").write_text(f"outs:\n- path: mine.jsonl\n  hash: md5\n  md5: {'a' * 32}\n")


Change = str | Callable[[Path], None]  # a shell command, or a function of the clone
UP_TO_DATE = "dvc.lock matches the code, the parameters, the data and the metrics\n"
ADVICE = "dvc.lock is out of date: run `dvc repro`, then commit dvc.lock and metrics/ with your changes\n"


def apply(change: Change, folder: Path) -> None:
    if isinstance(change, str):
        run(folder, "bash", "-ec", change)
    else:
        change(folder)


@pytest.mark.parametrize(
    "change",
    ["true", "sed -i 's/desc: Score/desc: Judge/' dvc.yaml; echo '# a comment' >> params.yaml", move_data],
    ids=["nothing", "description and comment", "data outside the repository"],
)
def test_matching_lock_passes_without_cache_and_data(clone: Path, change: Change) -> None:
    apply(change, clone)
    result = run_step(CHECK, clone)
    assert (result.returncode, result.stdout, result.stderr) == (0, UP_TO_DATE, "")


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ("echo '# more' >> stages/split.py", ["split: stages/split.py changed since it ran"]),
        ("rm stages/split.py", ["split: stages/split.py is missing"]),
        (
            "sed -i 's/^learning_rate:.*/learning_rate: 5e-4/; s/^num_epochs:.*/num_epochs: 9/' params.yaml",
            [
                f"{stage}: learning_rate, num_epochs in params.yaml changed since it ran"
                for stage in ("check_params", "train")
            ],
        ),
        ("echo {} >> data/instructions.jsonl", ["download_dataset: data/instructions.jsonl changed since it ran"]),
        ("sed -i 's/python -m stages.split/& --all/' dvc.yaml", ["split: its command changed since it ran"]),
        (
            rerun_train_alone,
            [
                "predict@tuned: models/tuned was rewritten by train since it ran",
                "generate@tuned: models/tuned was rewritten by train since it ran",
            ],
        ),
        (
            move_data_to_dvc_and_change_it,
            ["download_dataset: data/mine.jsonl was rewritten by data/mine.jsonl.dvc since it ran"],
        ),
        ("sed -i 's/- data.rejected.parquet/&\\n      - data\\/x/' dvc.yaml", ["format: data/x is not in dvc.lock"]),
        ("rm dvc.lock", [f"{stage}: is not in dvc.lock, so it never ran" for stage in EVERY_STAGE]),
    ],
)
def test_outdated_lock_fails_and_lists_the_differences(clone: Path, change: Change, lines: list[str]) -> None:
    apply(change, clone)
    result = run_step(CHECK, clone)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "".join(f"{line}\n" for line in lines) + ADVICE


REFORMAT = "sed -i 's/^ */    /' metrics/train.json metrics/evaluate/tuned.json"  # as a pre-commit hook does


@pytest.mark.parametrize(
    "change",
    [REFORMAT, f"{REFORMAT}; git commit -qam format", "rm metrics/evaluate/tuned.json metrics/train.json"],
)
def test_metrics_that_did_not_come_from_the_pipeline_are_restored_from_git(clone: Path, change: str) -> None:
    apply(change, clone)
    result = run_step(CHECK, clone)
    assert result.returncode == 1
    advice = (
        r"dvc.lock is out of date: run `(git checkout \S+ -- metrics/train.json metrics/evaluate/tuned.json)`, then c"
    )
    [command] = re.findall(advice, result.stderr)
    run(clone, *command.split())
    assert run_step(CHECK, clone).stdout == UP_TO_DATE


def test_changed_code_and_metrics_need_both_remedies(clone: Path) -> None:
    apply("echo '# more' >> stages/split.py; echo >> metrics/train.json", clone)
    advice = "dvc.lock is out of date: run `git checkout HEAD -- metrics/train.json`, then `dvc repro`, then commit "
    assert advice in run_step(CHECK, clone).stderr


def test_line_ends_that_git_converted_in_an_older_clone_are_restored_by_the_advice(
    project: Path, tmp_path: Path
) -> None:
    original = copy_clone(project, tmp_path / "original")
    (original / ".gitattributes").unlink()
    (original / "data/crlf.csv").write_bytes(b"prompt,completion\r\nA,b\r\n")
    commit(original, "as before")
    clone = clone_of(original, tmp_path, "-c", "core.autocrlf=true")
    shutil.copy(ROOT / ".gitattributes", clone)
    apply("git add .gitattributes; git commit -qm update", clone)
    result = run_step(CHECK, clone)
    assert "out of date: files here have other line ends than in git: commit or stash your edits, run" in result.stderr
    apply("git rm -rq --cached . && git reset -q --hard", clone)
    assert run_step(CHECK, clone).stdout == UP_TO_DATE
    names = run(original, "git", "ls-files").stdout.splitlines()
    assert [name for name in names if (clone / name).read_bytes() != (original / name).read_bytes()] == []
    apply("echo C,d >> data/crlf.csv", clone)
    assert "+C,d\n" in run(clone, "git", "diff").stdout  # still text for git


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "echo [ >> dvc.lock",
            "dvc.lock: can't be checked: unable to read: 'dvc.lock', YAML file structure is corrupt",
        ),
        ("sed -i '2i <<<<<<< HEAD' dvc.lock", "dvc.lock: has conflict markers; run `git checkout HEAD -- dvc.lock me"),
        ("rm dvc.yaml", "dvc.lock: can't be checked: dvc.yaml is missing or has no stages; restore it with git"),
        ("echo 'unknown: 1' >> dvc.yaml", "dvc.lock: can't be checked: './dvc.yaml' validation failed"),
        ("rm params.yaml", "params.yaml: not found; run in the project's folder"),
    ],
)
def test_unreadable_pipeline_is_reported_on_one_line(clone: Path, change: str, message: str) -> None:
    apply(change, clone)
    result = run_step(CHECK, clone)
    assert (result.returncode, result.stdout) == (1, "")
    [line] = result.stderr.splitlines()
    assert line.startswith(f"error: {message}")


def test_data_is_checked_if_it_is_there_and_may_be_only_in_the_cache(project: Path, tmp_path: Path) -> None:
    folder = copy_clone(project, tmp_path / "copy")
    (folder / "data/test.parquet").unlink()
    assert run_step(CHECK, folder).stdout == UP_TO_DATE
    apply("echo x >> data/train.parquet", folder)
    assert run_step(CHECK, folder).stderr.splitlines()[:2] == [
        "split: data/train.parquet changed since it was written",
        "train: data/train.parquet changed since it ran",
    ]


def test_changed_files_of_a_local_model_are_reported(project: Path, tmp_path: Path) -> None:
    folder = copy_clone(project, tmp_path / "copy")
    source = json.loads((folder / "models/base/source.json").read_text())
    local = shutil.copytree(source["model_name"], tmp_path / "local")
    (folder / "models/base/source.json").write_text(json.dumps({**source, "model_name": str(local)}))
    changed = f"download_model: {local} changed since it ran; run `dvc repro --force -s download_model`"
    assert changed not in run_step(CHECK, folder).stderr
    apply("echo x >> model.safetensors", local)
    assert changed in run_step(CHECK, folder).stderr


@pytest.fixture(scope="module")
def origin(project: Path) -> Path:
    """A copy of the project with a remote that has all results, and a branch `change` with other results."""
    origin = copy_clone(project, project.parent / "origin")
    run(origin, "dvc", "remote", "add", "--default", "storage", str(project.parent / "storage"))
    commit(origin, "remote")
    run(origin, "git", "checkout", "-q", "-b", "change")
    edit(origin, replicate_seeds="[1]")
    for text in ("old", "new"):
        for kind in ("answers", "predictions"):
            (origin / f"data/{kind}/replicates").mkdir(exist_ok=True)
            (origin / f"data/{kind}/tuned.parquet").write_text(f"{text} {kind}")
            (origin / f"data/{kind}/replicates/1.parquet").write_text(f"{text} {kind} of seed 1")
        run(origin, "dvc", "commit", "--force", "--quiet")
        commit(origin, text)
    run(origin, "dvc", "push", "--all-commits")
    return origin


def cached(folder: Path) -> set[str]:
    """The MD5 of each file in DVC's cache."""
    return {"".join(file.parts[-2:]) for file in (folder / ".dvc/cache/files/md5").glob("*/*")}


def test_results_of_the_base_and_the_checked_out_commit_are_pulled(origin: Path, tmp_path: Path) -> None:
    clone = clone_of(origin, tmp_path)
    result = run_step(PULL, clone)
    assert (result.returncode, result.stdout) == (0, "workspace: 9 files downloaded\norigin/main: 2 files downloaded\n")
    splits = [f"data/{name}.parquet" for name in ("train", "validation", "test", "retention", "scoring")]
    results = ["data/answers/tuned.parquet", "data/predictions/tuned.parquet"]
    replicates = ["data/answers/replicates/1.parquet", "data/predictions/replicates/1.parquet"]
    base, head = (lock_hashes(run(clone, "git", "show", f"{name}:dvc.lock").stdout) for name in ("origin/main", "HEAD"))
    expected = {base[path] for path in splits + results} | {head[path] for path in splits + results + replicates}
    assert cached(clone) == expected
    assert not (clone / "data/test.parquet").exists()  # the workspace is not touched


def test_without_a_remote_nothing_is_pulled(clone: Path) -> None:
    result = run_step(PULL, clone)
    assert (result.returncode, result.stdout) == (0, "No DVC remote is configured.\n")


def test_what_the_remote_lacks_does_not_prevent_that_the_rest_is_pulled(origin: Path, tmp_path: Path) -> None:
    clone = clone_of(origin, tmp_path)
    lost = lock_hashes((clone / "dvc.lock").read_text())["data/predictions/tuned.parquet"]
    storage = shutil.copytree(origin.parent / "storage", tmp_path / "storage")
    (storage / "files/md5" / lost[:2] / lost[2:]).unlink()
    run(clone, "dvc", "remote", "modify", "--local", "storage", "url", str(storage))
    result = run_step(PULL, clone)
    assert (result.returncode, len(cached(clone))) == (0, 10)
    assert f"Missing cache files:\nmd5: {lost}" in result.stderr
    run(clone, "git", "remote", "rename", "origin", "elsewhere")
    result = run_step(PULL, clone)
    assert (result.returncode, result.stdout.splitlines()[1:]) == (
        1,
        ["origin/main: unknown Git revision 'origin/main'"],
    )


def test_remote_without_credentials_is_reported_without_a_traceback(clone: Path, tmp_path: Path) -> None:
    run(clone, "dvc", "remote", "add", "--default", "storage", "s3://bucket/folder")
    result = run_step(PULL, clone, HOME=str(tmp_path), AWS_EC2_METADATA_DISABLED="true")
    assert (result.returncode, result.stdout.splitlines()[0]) == (1, "workspace: 7 files failed to download")
    assert "failed to connect to s3 (bucket/folder/files/md5) - Unable to locate credentials" in result.stderr
    assert "Traceback" not in result.stderr


# Summary and comment


def test_review_is_appended_to_the_job_summary(tmp_path: Path) -> None:
    (tmp_path / "review.md").write_text("# Review\n")
    (tmp_path / "summary").write_text("earlier step\n")
    assert run_step(SUMMARY, tmp_path, GITHUB_STEP_SUMMARY=str(tmp_path / "summary")).returncode == 0
    assert (tmp_path / "summary").read_text() == "earlier step\n# Review\n"
    (tmp_path / "review.md").write_text("x" * 2**21)
    run_step(SUMMARY, tmp_path, GITHUB_STEP_SUMMARY=str(tmp_path / "summary"))
    assert (tmp_path / "summary").stat().st_size < 2**20


def test_comment_links_to_the_page_and_has_the_review_up_to_a_whole_line_below_the_limit_of_github(
    tmp_path: Path,
) -> None:
    gh = tmp_path / "bin/gh"  # a program in place of `gh` that checks how it is called, and keeps the body
    gh.parent.mkdir()
    expected = f"pr comment {PULL_REQUEST} --edit-last --create-if-none --body-file comment.md"
    gh.write_text(f'#!/bin/sh\ntest "$*" = "{expected}" && test "$GH_TOKEN" = ghs_secret && cp comment.md sent.md\n')
    gh.chmod(0o755)

    def comment(review: str) -> str:
        (tmp_path / "review.md").write_text(review, encoding="utf-8")
        assert run_step(COMMENT, tmp_path, PATH=f"{gh.parent}:{os.environ['PATH']}").returncode == 0
        return (tmp_path / "sent.md").read_text(encoding="utf-8")

    assert comment("# Review\n\nBetter.\n") == f"[The whole review as a page]({PAGE})\n\n# Review\n\nBetter.\n"
    body = comment(f"{'x' * 98}é\n" * 700)
    assert body.endswith("xé\n")
    assert 64_000 < len(body) <= 65_536
