"""The commands of docs/sharing.md, run as on the page: a pusher, a git remote, a DVC remote, colleagues."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.clone import EVERY_STAGE, ROOT, commit, copy_clone, edit, run, stages_run

pytestmark = pytest.mark.subprocess

PAGE = (ROOT / "docs/sharing.md").read_text(encoding="utf-8")
WEIGHTS = Path("models/tuned/model.safetensors")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def block(first_line: str) -> str:
    (found,) = (text for text in blocks("console") if text.startswith(first_line + "\n"))
    return str(found)


@dataclass(frozen=True)
class Team:
    """The first clone, which ran the pipeline and an experiment and pushed both, and its remotes."""

    mine: Path
    origin: Path  # the bare git repository
    store: Path  # the DVC remote
    cache: Path
    weights: bytes = field(repr=False)  # of main
    slow: bytes = field(repr=False)  # of the experiment
    s3: str = ""  # address of the bucket's server

    def run_block(self, folder: Path, first_line: str, **env: str) -> subprocess.CompletedProcess[str]:
        """A block of the page as a shell script that stops at the first failure."""
        script = block(first_line)
        for placeholder, path in {
            "git@github.com:team/sft.git": self.origin,
            "/mnt/team/sft": self.store,
            "/mnt/team/cache": self.cache,
            "https://minio.example.com": self.s3,
        }.items():
            script = script.replace(placeholder, str(path))
        return run(folder, "bash", "-ec", script, **env)

    def clone(self, folder: Path, **config: str) -> Path:
        """A colleague's clone without results. config: options of the remote for this clone."""
        run(folder, "git", "clone", "-q", str(self.origin), str(folder / "sft"))
        for name, value in config.items():
            run(folder / "sft", "dvc", "remote", "modify", "--local", "storage", name, value)
        return folder / "sft"

    def mirror(self, folder: Path) -> "Team":
        """The same team with another git remote, which a test may change."""
        run(folder, "git", "clone", "-q", "--mirror", str(self.origin), str(folder / "sft.git"))
        return replace(self, origin=folder / "sft.git")


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, with_experiment: Path) -> Iterator[Team]:
    folder = tmp_path_factory.mktemp("team")
    with pytest.MonkeyPatch.context() as context:
        # Without the credentials and the proxy that this machine may have.
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            context.delenv(name)
        (folder / "empty").touch()
        for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
            context.setenv(name, str(folder / "empty"))
        context.setenv("AWS_EC2_METADATA_DISABLED", "true")
        context.setenv("NO_PROXY", "127.0.0.1")

        mine = copy_clone(with_experiment, folder / "mine")
        run(mine, "dvc", "exp", "remove", "slow")  # its block then restores it from the run cache
        run(mine, "git", "reset", "-q", "HEAD~1")  # the page commits the results
        origin = folder / "sft.git"
        run(folder, "git", "init", "-q", "--bare", "-b", "main", str(origin))
        run(mine, "git", "remote", "add", "origin", str(origin))
        run(mine, "git", "push", "-q", "-u", "origin", "main")

        new = Team(mine, origin, folder / "store", folder / "cache", b"", b"")
        new.run_block(mine, "dvc cache dir --local /mnt/team/cache")
        shutil.copytree(mine / ".dvc/cache", folder / "cache", dirs_exist_ok=True)
        for path in [folder / "cache", *(folder / "cache").rglob("*/")]:
            path.chmod(0o2775)  # as DVC creates them in a shared cache
        new.run_block(mine, "dvc remote add -d storage /mnt/team/sft")
        new.run_block(mine, "git add params.yaml dvc.lock metrics")
        assert run(mine, "git", "status", "--porcelain").stdout == ""
        weights = (mine / WEIGHTS).read_bytes()

        new.run_block(mine, "dvc exp run -n slow -S learning_rate=1e-5")
        slow = (mine / WEIGHTS).read_bytes()
        assert slow != weights
        run(mine, "git", "checkout", "-q", ".")
        yield Team(mine, origin, new.store, new.cache, weights, slow)


def skipped(result: subprocess.CompletedProcess[str]) -> int:
    assert stages_run(result) == []
    return result.stdout.count(" didn't change, skipping")


def printed(result: subprocess.CompletedProcess[str], message: str) -> bool:
    """Whether the command printed a message that is on the page."""
    assert f"`{message}`" in PAGE
    return message in result.stdout + result.stderr


def files(folder: Path, pattern: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.glob(pattern))


def test_every_block_of_the_page_is_run() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    first_lines = {text.splitlines()[0] for text in blocks("console")}
    assert {line for line in first_lines if f'"{line}"' not in here and f"'{line}'" not in here} == set()
    assert len(blocks("console")) == len(first_lines)


def test_a_colleague_pulls_and_every_stage_is_skipped(team: Team, tmp_path: Path) -> None:
    result = team.run_block(tmp_path, "git clone git@github.com:team/sft.git")
    assert skipped(result) == len(EVERY_STAGE)
    assert (tmp_path / "sft" / WEIGHTS).read_bytes() == team.weights
    assert run(tmp_path / "sft", "git", "status", "--porcelain").stdout == ""


def test_results_that_were_not_pushed_are_listed_and_the_hook_pushes_them(team: Team, tmp_path: Path) -> None:
    other = tmp_path / "other"
    mirror = team.mirror(tmp_path)
    clone = mirror.clone(tmp_path)
    run(clone, "dvc", "pull")
    run(clone, "dvc", "remote", "modify", "--local", "storage", "url", str(other))
    assert "\tnew:                models/tuned\n" in run(clone, "dvc", "status", "--cloud").stdout
    run(clone, "dvc", "install")
    run(clone, "git", "commit", "-q", "--allow-empty", "-m", "more")
    run(clone, "git", "push", "-q")
    assert len(files(other, "files/md5/*/*")) == 30  # a file per output, and a list per model folder


def test_results_of_commits_before_the_remote_are_pushed_if_the_clone_names_it(
    team: Team, tmp_path: Path, fast_stages: None
) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    run(folder, "git", "init", "-q", "-b", "main")
    run(folder, "dvc", "init", "-q")
    for text in ("before the remote", "after it"):
        (folder / "model").write_text(text)
        run(folder, "dvc", "add", "-q", "model")
        commit(folder, text)
        store = tmp_path / "store"
        run(folder, "dvc", "remote", "add", "-q", "--force", "--default", "storage", str(store))
    run(folder, "dvc", "push", "--all-commits")
    assert len(files(store, "files/md5/*/*")) == 1
    new = replace(team, store=store)
    new.run_block(folder, "dvc remote add --local --default storage /mnt/team/sft")
    assert len(files(store, "files/md5/*/*")) == 2


def test_a_name_of_an_experiment_that_is_taken_is_reported_and_renaming_helps(team: Team, tmp_path: Path) -> None:
    mirror = team.mirror(tmp_path)
    clone = copy_clone(team.mine, tmp_path / "mine")
    run(clone, "git", "remote", "set-url", "origin", str(mirror.origin))
    taken = run(clone, "dvc", "exp", "run", "-n", "slow", "-S", "learning_rate=1e-6", check=False)
    assert printed(taken, "Experiment conflicts with existing experiment")
    run(clone, "git", "checkout", "-q", ".")
    run(clone, "dvc", "exp", "save", "-n", "slow", "--force")
    diverged = run(clone, "dvc", "exp", "push", "--no-cache", "origin", "slow", check=False)
    assert printed(diverged, "has diverged from remote experiment with the same name")
    assert "`dvc exp rename OLD NEW`, then push it" in PAGE
    run(clone, "dvc", "exp", "rename", "slow", "slower")
    run(clone, "dvc", "exp", "push", "--no-cache", "origin", "slower")
    assert "/slower\n" in run(clone, "git", "ls-remote", "origin").stdout


def test_the_model_alone_is_enough_to_evaluate_it_again(team: Team, tmp_path: Path) -> None:
    clone = team.clone(tmp_path)
    assert skipped(team.run_block(clone, "dvc pull models/tuned")) == len(EVERY_STAGE)
    assert files(clone, "models/*") == ["models/.gitignore", "models/tuned"]
    assert (clone / WEIGHTS).read_bytes() == team.weights
    # The tiny model's answers all have the maximum length.
    assert '"mean_response_tokens": 4.0' in (clone / "metrics/evaluate/tuned.json").read_text()
    first_line = "dvc exp run --pull --allow-missing -S max_new_tokens=8 evaluate@tuned"
    assert stages_run(team.run_block(clone, first_line)) == ["check_params", "evaluate@tuned", "predict@tuned"]
    assert '"mean_response_tokens": 8.0' in (clone / "metrics/evaluate/tuned.json").read_text()
    assert files(clone, "models/*") == ["models/.gitignore", "models/tokenizer", "models/tuned"]
    assert files(clone, "data/**/*.parquet") == [
        "data/answers/tuned.parquet",
        "data/predictions/tuned.parquet",
        "data/retention.parquet",
        "data/scoring.parquet",
        "data/test.parquet",
    ]


def test_with_a_shared_cache_results_are_computed_once(team: Team, tmp_path: Path) -> None:
    clone = team.clone(tmp_path, url=str(tmp_path / "empty"))  # nothing comes from the remote
    team.run_block(clone, "dvc cache dir --local /mnt/team/cache")
    run(clone, "dvc", "pull")
    assert (clone / WEIGHTS).read_bytes() == team.weights
    # Only to evaluate@tuned: the samples are in git and not in the cache, so generate would run again.
    result = run(clone, "dvc", "exp", "run", "-S", "learning_rate=1e-5", "evaluate@tuned")
    assert stages_run(result) == []
    assert "Stage 'train' is cached - skipping run, checking out outputs" in result.stdout
    assert (clone / WEIGHTS).read_bytes() == team.slow
    folders = [folder for folder in (team.cache, *team.cache.rglob("*")) if folder.is_dir()]
    # Writable for the group, and new files belong to it.
    assert {oct(folder.stat().st_mode & 0o2070) for folder in folders} == {"0o2070"}


def test_the_run_cache_of_a_remote_does_not_avoid_training(team: Team, tmp_path: Path) -> None:
    run(team.mine, "dvc", "push", "--run-cache")
    clone = team.clone(tmp_path)
    run(clone, "dvc", "pull", "--run-cache")
    assert len(files(clone, ".dvc/cache/runs/*/*/*")) == 20  # of main and of the experiments
    edit(clone, learning_rate="1e-05")
    assert "train" in stages_run(run(clone, "dvc", "repro", "--dry"))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a server with S3's API and the bucket `team-bucket`."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket="team-bucket")
    yield address
    server.stop()


def test_a_bucket_replaces_the_folder_and_no_secret_is_in_git(team: Team, s3: str, tmp_path: Path) -> None:
    in_bucket = replace(team.mirror(tmp_path), s3=s3)
    clone = in_bucket.clone(tmp_path)
    run(clone, "dvc", "pull")
    run(clone, "dvc", "remote", "remove", "storage")
    in_bucket.run_block(clone, "dvc remote add -d storage s3://team-bucket/sft")
    assert printed(run(clone, "dvc", "push", check=False), "Unable to locate credentials")

    first_line = 'dvc remote modify --local storage access_key_id "$KEY_ID"'
    result = in_bucket.run_block(clone, first_line, KEY_ID="me", SECRET="not-for-git")
    assert "files pushed" in result.stdout
    assert run(clone, "git", "status", "--porcelain").stdout == ""
    assert run(clone, "git", "grep", "not-for-git", check=False).stdout == ""
    assert oct((clone / ".dvc/config.local").stat().st_mode) == "0o100600"

    keys = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "not-for-git"}
    (tmp_path / "colleague").mkdir()
    result = in_bucket.run_block(tmp_path / "colleague", "git clone git@github.com:team/sft.git", **keys)
    assert skipped(result) == len(EVERY_STAGE)
    run(tmp_path, "dvc", "get", str(in_bucket.origin), "models/tuned", "-o", "got", **keys)
    assert (tmp_path / "got" / WEIGHTS.name).read_bytes() == team.weights

    run(clone, "dvc", "remote", "modify", "--local", "storage", "url", "s3://nobody/sft")
    assert printed(run(clone, "dvc", "push", check=False), "The specified bucket does not exist")


def test_an_experiment_goes_to_a_colleague_with_its_model(team: Team, tmp_path: Path) -> None:
    mirror = team.mirror(tmp_path)
    clone = mirror.clone(tmp_path)
    result = mirror.run_block(clone, "dvc exp list origin")
    assert result.stdout.startswith("main:\n\tslow\n")
    assert skipped(result) == len(EVERY_STAGE)
    assert (clone / WEIGHTS).read_bytes() == team.slow
    assert "\nlearning_rate: 1e-05" in (clone / "params.yaml").read_text()

    run(clone, "git", "stash", "-q")
    run(clone, "git", "commit", "-q", "--allow-empty", "-m", "later")
    assert run(clone, "dvc", "exp", "list", "origin").stdout == ""
    assert "\tslow\n" in run(clone, "dvc", "exp", "list", "--all-commits", "origin").stdout
    assert "/slow\n" in run(clone, "git", "ls-remote", "origin").stdout
    mirror.run_block(clone, "dvc exp remove -g origin slow")
    assert "/slow\n" not in run(clone, "git", "ls-remote", "origin").stdout


def test_an_experiment_without_its_files_is_reported_and_pushed_again(team: Team, tmp_path: Path) -> None:
    mirror = team.mirror(tmp_path)
    empty = tmp_path / "empty"
    clone = mirror.clone(tmp_path, url=str(empty))
    run(clone, "dvc", "exp", "pull", "origin", "slow")
    failed = run(clone, "dvc", "exp", "apply", "slow", check=False)
    assert failed.returncode != 0
    assert printed(failed, "Checkout failed for following targets")
    run(clone, "git", "checkout", "-q", ".")
    run(team.mine, "dvc", "remote", "add", "--local", "empty", str(empty))
    run(team.mine, "dvc", "exp", "push", "-r", "empty", str(mirror.origin), "slow")
    run(clone, "dvc", "exp", "pull", "origin", "slow")
    run(clone, "dvc", "exp", "apply", "slow")
    assert (clone / WEIGHTS).read_bytes() == team.slow


def test_a_registered_version_loads_with_plain_transformers(
    team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load

    without = run(tmp_path, "dvc", "artifacts", "get", str(team.origin), "tuned", check=False)
    assert printed(without, "Unable to find artifact 'tuned'")
    team.run_block(team.mine, "gto register tuned --version v1.0.0")
    team.run_block(tmp_path, "dvc artifacts get git@github.com:team/sft.git tuned --rev v1.0.0")
    assert (tmp_path / "tuned" / WEIGHTS.name).read_bytes() == team.weights
    assert (tmp_path / "slow" / WEIGHTS.name).read_bytes() == team.slow

    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    (code,) = blocks("python")
    exec(code, names)  # the page's own code
    loaded = names["model"].state_dict()  # type: ignore[attr-defined]
    pushed = load(team.weights)
    assert len(pushed) == 20
    assert {name for name, tensor in pushed.items() if not tensor.equal(loaded[name])} == set()
    assert names["tokenizer"].decode(names["tokenizer"]("Add two.").input_ids) == "Add two."  # type: ignore


def test_missing_results_and_a_missing_remote_are_reported_and_the_fixes_work(team: Team, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    clone = team.clone(tmp_path, url=str(empty))
    failed = run(clone, "dvc", "pull", check=False)
    assert failed.returncode == 1
    assert printed(failed, "Some of the cache files do not exist neither locally nor on remote")
    assert printed(failed, "failed to pull data from the cloud")
    assert printed(failed, "Everything is up to date.")
    got = run(tmp_path, "dvc", "get", str(clone), "models/tuned", check=False)
    assert printed(got, "failed to load directory ('models', 'tuned')")

    # One stage to save time; test_pipeline.py compares the hashes of all stages.
    before = (clone / "dvc.lock").read_bytes()
    assert stages_run(run(clone, "dvc", "repro", "download_dataset")) == ["check_params", "download_dataset"]
    assert (clone / "dvc.lock").read_bytes() == before

    run(team.mine, "dvc", "remote", "add", "--local", "missing", str(empty))
    run(team.mine, "dvc", "push", "-r", "missing")
    run(clone, "dvc", "pull")
    assert skipped(run(clone, "dvc", "repro")) == len(EVERY_STAGE)

    run(clone, "dvc", "remote", "remove", "storage")
    assert printed(run(clone, "dvc", "pull", check=False), "No remote provided and no default remote set")
    assert printed(run(clone, "dvc", "push", check=False), "no remote specified")
