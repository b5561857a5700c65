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
    assert len(actions) == 5
    assert [action for action in actions if not pinned.fullmatch(action)] == []


def test_shell_commands_contain_no_expressions() -> None:
    assert [step for job in JOBS.values() for step in job["steps"] if "${{" in step.get("run", "")] == []


def test_token_and_secrets_are_passed_only_to_the_steps_that_need_them() -> None:
    assert len(re.findall(r"\{ (secrets\.|github\.token)", TEXT)) == 3
    given = {name: [*step["env"]] for name, step in STEPS.items() if re.search("secrets|token", str(step.get("env")))}
    aws = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]
    assert given == {COMMENT: ["GH_TOKEN", "PULL_REQUEST", "REVIEW_PAGE"], PULL: ["BASE", *aws]}


# dvc.lock


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, ran: Path, fast_stages: None) -> Path:
    """A repository with committed results of the pipeline and the scripts of the workflow."""
    folder = copy_clone(ran, tmp_path_factory.mktemp("workflow") / "project")
    copy_tree(ROOT / ".ci", folder / ".ci")
    commit(folder, "workflow")
    return folder


@pytest.fixture
def clone(tmp_path: Path, project: Path) -> Path:
    """The checkout of a job, without cache, data and models."""
    run(tmp_path, "git", "clone", "-q", str(project), "clone")
    return tmp_path / "clone"


def replace(file: str, old: str, new: str) -> Callable[[Path], None]:
    """An edit of a file that contains the old text exactly once."""

    def in_folder(folder: Path) -> None:
        text = (folder / file).read_text(encoding="utf-8")
        assert text.count(old) == 1
        (folder / file).write_text(text.replace(old, new), encoding="utf-8")

    return in_folder


def append(file: str, text: str) -> Callable[[Path], None]:
    def in_folder(folder: Path) -> None:
        with (folder / file).open("a", encoding="utf-8") as stream:
            stream.write(text)

    return in_folder


def delete(*files: str) -> Callable[[Path], None]:
    def in_folder(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return in_folder


def rerun_train_alone(folder: Path) -> None:
    """Edit dvc.lock as if only train had run again and had written a different model."""
    lock = parse_yaml((folder / "dvc.lock").read_text())
    [model] = [out for out in lock["stages"]["train"]["outs"] if out["path"] == "models/tuned"]
    model["md5"] = "0" * 32 + ".dir"
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))


def move_data(folder: Path, path: str) -> None:
    """Edit dvc.lock as if the pipeline had run with a dataset at another path, which git does not track."""
    (folder / "data/instructions.jsonl").unlink()
    lock = (folder / "dvc.lock").read_text()
    (folder / "dvc.lock").write_text(lock.replace("data/instructions.jsonl", path))
    edit(folder, dataset_file=path)


def move_data_out(folder: Path) -> None:
    move_data(folder, "/elsewhere/mine.jsonl")


def move_data_to_dvc_and_change_it(folder: Path) -> None:
    """Edit dvc.lock as if DVC tracked the dataset, and `dvc add` had then added a different one."""
    move_data(folder, "data/mine.jsonl")
    (folder / "data/mine.jsonl.dvc").write_text(f"outs:\n- path: mine.jsonl\n  hash: md5\n  md5: {'a' * 32}\n")


UP_TO_DATE = "dvc.lock matches the code, the parameters, the data and the metrics\n"
ADVICE = "dvc.lock is out of date: run `dvc repro`, then commit dvc.lock and metrics/ with your changes\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: None,
        replace("dvc.yaml", "desc: Score the answers of one model", "desc: Judge the answers of one model"),
        append("params.yaml", "# a comment\n"),
        move_data_out,
    ],
    ids=["nothing", "description", "comment", "data outside the repository"],
)
def test_matching_lock_passes_without_cache_and_data(clone: Path, change: Callable[[Path], None]) -> None:
    change(clone)
    result = run_step(CHECK, clone)
    assert (result.returncode, result.stdout, result.stderr) == (0, UP_TO_DATE, "")


def test_git_converts_no_line_ends_so_no_stage_is_outdated(project: Path, tmp_path: Path) -> None:
    original = copy_clone(project, tmp_path / "original")
    (original / "data/crlf.csv").write_bytes(b"prompt,completion\r\nA,b\r\n")
    commit(original, "data from Windows")
    run(tmp_path, "git", "clone", "-q", "-c", "core.autocrlf=true", str(original), "clone")
    clone = tmp_path / "clone"
    names = run(clone, "git", "ls-files").stdout.splitlines()
    assert [name for name in names if (clone / name).read_bytes() != (original / name).read_bytes()] == []
    assert run_step(CHECK, clone).stdout == UP_TO_DATE
    append("data/crlf.csv", "C,d\n")(clone)
    assert "+C,d\n" in run(clone, "git", "diff").stdout


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (append("stages/split.py", "# more\n"), ["split: stages/split.py changed since it ran"]),
        (delete("stages/split.py"), ["split: stages/split.py is missing"]),
        (
            lambda folder: edit(folder, learning_rate="5e-4", num_epochs="9"),
            [
                f"{stage}: learning_rate, num_epochs in params.yaml changed since it ran"
                for stage in ("check_params", "train")
            ],
        ),
        (
            append("data/instructions.jsonl", "{}\n"),
            ["download_dataset: data/instructions.jsonl changed since it ran"],
        ),
        (
            replace("dvc.yaml", "python -m stages.split", "python -m stages.split --all"),
            ["split: its command changed since it ran"],
        ),
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
        (
            replace("dvc.yaml", "      - data/rejected.parquet\n", "      - data/rejected.parquet\n      - data/x\n"),
            ["format: data/x is not in dvc.lock"],
        ),
    ],
    ids=[
        "code",
        "deleted code",
        "parameters",
        "data",
        "command",
        "single stage that ran again",
        "data of dvc add",
        "new output",
    ],
)
def test_outdated_lock_fails_and_lists_the_differences(
    clone: Path, change: Callable[[Path], None], lines: list[str]
) -> None:
    change(clone)
    result = run_step(CHECK, clone)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "".join(f"{line}\n" for line in lines) + ADVICE


def reformat(folder: Path) -> None:
    """Edit metrics as a formatter of a pre-commit hook does."""
    for name in ("evaluate/tuned", "train"):
        path = folder / f"metrics/{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()), indent=4))


def reformat_and_commit(folder: Path) -> None:
    reformat(folder)
    commit(folder, "format")


@pytest.mark.parametrize(
    "change",
    [reformat, reformat_and_commit, delete("metrics/evaluate/tuned.json", "metrics/train.json")],
    ids=["reformatted metrics", "committed", "deleted metrics"],
)
def test_metrics_that_did_not_come_from_the_pipeline_are_restored_from_git(
    clone: Path, change: Callable[[Path], None]
) -> None:
    change(clone)
    result = run_step(CHECK, clone)
    assert result.returncode == 1
    advice = (
        r"dvc.lock is out of date: run `(git checkout \S+ -- metrics/train.json metrics/evaluate/tuned.json)`, then c"
    )
    [command] = re.findall(advice, result.stderr)
    run(clone, *command.split())
    assert run_step(CHECK, clone).stdout == UP_TO_DATE


def test_changed_code_and_metrics_need_both_remedies(clone: Path) -> None:
    append("stages/split.py", "# more\n")(clone)
    append("metrics/train.json", " ")(clone)
    advice = "dvc.lock is out of date: run `git checkout HEAD -- metrics/train.json`, then `dvc repro`, then commit "
    assert advice in run_step(CHECK, clone).stderr


def test_conflict_in_the_lock_is_resolved_by_the_advice(clone: Path) -> None:
    for side, rate in (("one", "1e-4"), ("two", "2e-4")):
        run(clone, "git", "checkout", "-q", "-b", side, "origin/main")
        edit(clone, learning_rate=rate)
        lock = (clone / "dvc.lock").read_text()
        (clone / "dvc.lock").write_text(lock.replace("learning_rate: 0.001", f"learning_rate: {rate}"))
        commit(clone, side)
    assert run(clone, "git", "merge", "one", check=False).returncode == 1
    run(clone, "git", "checkout", "--ours", "params.yaml")
    result = run_step(CHECK, clone)
    assert result.stderr.startswith(
        "error: dvc.lock: has conflict markers; run `git checkout HEAD -- dvc.lock metrics`, "
    )
    run(clone, "git", "checkout", "HEAD", "--", "dvc.lock", "metrics")
    assert run_step(CHECK, clone).stdout == UP_TO_DATE


def test_line_ends_of_an_older_clone_are_restored_by_the_advice(project: Path, tmp_path: Path) -> None:
    original = copy_clone(project, tmp_path / "original")
    (original / ".gitattributes").unlink()
    commit(original, "as before")
    run(tmp_path, "git", "clone", "-q", "-c", "core.autocrlf=true", str(original), "clone")
    clone = tmp_path / "clone"
    shutil.copy(ROOT / ".gitattributes", clone)
    run(clone, "git", "add", ".gitattributes")
    run(clone, "git", "commit", "-q", "-m", "update")
    result = run_step(CHECK, clone)
    assert "out of date: files here have other line ends than in git: commit or stash your edits, run" in result.stderr
    run(clone, "bash", "-c", "git rm -rq --cached . && git reset -q --hard")
    assert run_step(CHECK, clone).stdout == UP_TO_DATE


def test_missing_lock_means_that_no_stage_ran(clone: Path) -> None:
    (clone / "dvc.lock").unlink()
    result = run_step(CHECK, clone)
    assert result.returncode == 1
    assert [line for line in result.stderr.splitlines() if "is not in dvc.lock, so it never ran" in line] == [
        f"{stage}: is not in dvc.lock, so it never ran" for stage in EVERY_STAGE
    ]
    assert result.stderr.endswith(ADVICE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (append("dvc.lock", "["), "unable to read: 'dvc.lock', YAML file structure is corrupted"),
        (delete("dvc.yaml"), "dvc.yaml is missing or has no stages; restore it with git"),
        (append("dvc.yaml", "unknown: 1\n"), "'./dvc.yaml' validation failed"),
    ],
    ids=["truncated", "no pipeline", "invalid pipeline"],
)
def test_unreadable_pipeline_is_reported_on_one_line(clone: Path, change: Callable[[Path], None], message: str) -> None:
    change(clone)
    result = run_step(CHECK, clone)
    assert (result.returncode, result.stdout) == (1, "")
    [line] = result.stderr.splitlines()
    assert line.startswith("error: dvc.lock: can't be checked: ")
    assert message in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (delete("params.yaml"), "params.yaml: not found; run in the project's folder"),
        (lambda folder: edit(folder, retention_file="null"), "  retention_file: found null; must be a valid string; "),
        (lambda folder: edit(folder, replicate_seeds="3"), "  replicate_seeds: found 3; must be a valid list"),
    ],
    ids=["no parameters", "null", "number for a list"],
)
def test_parameters_that_dvc_can_not_insert_are_named(
    clone: Path, change: Callable[[Path], None], message: str
) -> None:
    change(clone)
    result = run_step(CHECK, clone)
    assert (result.returncode, result.stdout) == (1, "")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_data_is_checked_if_it_is_there_and_may_be_only_in_the_cache(project: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(project, tmp_path / "copy")
    (folder / "data/test.parquet").unlink()
    assert run_step(CHECK, folder).stdout == UP_TO_DATE
    append("data/train.parquet", "x")(folder)
    result = run_step(CHECK, folder)
    assert result.stderr.splitlines()[:2] == [
        "split: data/train.parquet changed since it was written",
        "train: data/train.parquet changed since it ran",
    ]


def test_changed_files_of_a_local_model_are_reported(project: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(project, tmp_path / "copy")
    source = json.loads((folder / "models/base/source.json").read_text())
    local = shutil.copytree(source["model_name"], tmp_path / "local")
    (folder / "models/base/source.json").write_text(json.dumps({**source, "model_name": str(local)}))
    changed = f"download_model: {local} changed since it ran; run `dvc repro --force -s download_model`"
    assert changed not in run_step(CHECK, folder).stderr
    append("model.safetensors", "x")(local)
    assert changed in run_step(CHECK, folder).stderr


@pytest.fixture
def origin(project: Path, tmp_path: Path) -> Path:
    """A copy of the project with a remote that has all results, and a branch `change` with other results."""
    origin = copy_clone(project, tmp_path / "origin")
    run(origin, "dvc", "remote", "add", "--default", "storage", str(tmp_path / "storage"))
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
    run(tmp_path, "git", "clone", "-q", str(origin), "clone")
    clone = tmp_path / "clone"
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
    run(tmp_path, "git", "clone", "-q", str(origin), "clone")
    clone = tmp_path / "clone"
    lost = lock_hashes((clone / "dvc.lock").read_text())["data/predictions/tuned.parquet"]
    (tmp_path / "storage/files/md5" / lost[:2] / lost[2:]).unlink()
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


def comment(folder: Path, review: str) -> str:
    """The body of the comment on a review. A program in place of `gh` checks how it is called, and keeps the body."""
    (folder / "review.md").write_text(review, encoding="utf-8")
    gh = folder / "bin/gh"
    gh.parent.mkdir()
    expected = f"pr comment {PULL_REQUEST} --edit-last --create-if-none --body-file comment.md"
    gh.write_text(f'#!/bin/sh\ntest "$*" = "{expected}" && test "$GH_TOKEN" = ghs_secret && cp comment.md sent.md\n')
    gh.chmod(0o755)
    assert run_step(COMMENT, folder, PATH=f"{gh.parent}:{os.environ['PATH']}").returncode == 0
    return (folder / "sent.md").read_text(encoding="utf-8")


def test_comment_links_to_the_page_and_has_the_review(tmp_path: Path) -> None:
    review = "# Review\n\nBetter.\n"
    assert comment(tmp_path, review) == f"[The whole review as a page]({PAGE})\n\n{review}"


def test_comment_on_a_long_review_ends_with_a_whole_line_below_the_limit_of_github(tmp_path: Path) -> None:
    body = comment(tmp_path, f"{'x' * 98}é\n" * 700)
    assert body.endswith("xé\n")
    assert 64_000 < len(body) <= 65_536
