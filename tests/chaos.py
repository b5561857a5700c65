"""Kill the pipeline at random moments, continue, and compare the results with an uninterrupted run.

`make chaos` kills it a hundred times and writes `tests/chaos.json`; `make test` a few times.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from stages.data.files import file_sha256
from stages.runtime.yaml12 import YAMLError
from tests.clone import environment, lock_hashes, make_clone, make_tiny_model, run

RESULTS = Path(__file__).with_suffix(".json")
CURVE = "metrics/curve.csv"
DONE = "mean of the run"  # in the summary of train
# The commands to run, alternately. An experiment runs the same stages under other locks and signal handlers of DVC.
COMMANDS = (("dvc", "repro"), ("dvc", "exp", "run"))
# How runs are killed: the signal, and which processes get it. `kill -9` of dvc alone leaves its stage running.
WAYS = {
    "power failure (kill -9 of all)": (signal.SIGKILL, "all"),
    "kill -9 of dvc": (signal.SIGKILL, "dvc"),
    "kill -9 of the stage (out of memory)": (signal.SIGKILL, "stage"),
    "Ctrl-C": (signal.SIGINT, "all"),
    "kill (SIGTERM) of all": (signal.SIGTERM, "all"),
}
CUT_LOCK = re.compile(r"'(?:\./)?(dvc\.lock|\.dvc/tmp/rwlock)'(?: validation failed| is invalid|\. JSON)")
# DVC stages small outputs in git, and deletes them before it runs their stage again. After a kill between the two,
# `dvc exp run` stops with this message; `git reset` is enough.
STAGED = "uncommitted changes exist in the index"
RESUMING = "Resuming from the checkpoint at step"
# Printed by Python if a Ctrl-C interrupts DVC while it creates a progress bar.
DVC_PROGRESS_BAR = re.compile(
    r"Exception ignored in: <function tqdm\.__del__ .*\nTraceback .*\n(?: .*\n)*AttributeError: .*"
)
# Several seconds of training with many checkpoints, so that kills happen between them.
LONGER = {"num_epochs": "6", "eval_steps": "20"}


@dataclass
class Reference:
    """An uninterrupted run: its folder, the MD5 of each output in dvc.lock, and its duration in seconds."""

    folder: Path
    hashes: dict[str, str]
    seconds: float


@dataclass
class Chaos:
    """Run clones with kills until they are done, and count what happens.

    kills, stages: the number of kills of each kind, and in each stage.
    seen: the number of expected events: resumes, refusals, skipped damaged checkpoints, finished pipelines.
    problems: descriptions of events that must not happen.
    damaged: the checkpoints that were damaged. A run may be killed before it notices.
    """

    reference: Reference
    random: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    damaged: set[tuple[Path, int]] = field(default_factory=set)

    def run_until_done(self, folder: Path, command: tuple[str, ...], kills: int) -> None:
        """Run `command` in a new clone repeatedly, the first `kills` times with a kill, until it succeeds."""
        # A stage takes a ninth of the run. Twice that gives a fair chance that another stage is completed.
        window = 2 * self.reference.seconds / 9
        while True:
            orphaned = bool(running_stages(folder))  # which may still save checkpoints
            checkpoint = None if orphaned else self.maybe_damage(checkpoints_in(folder))
            # Each run has its own file, because an orphan still writes to the file of the previous run.
            with tempfile.TemporaryFile("w+") as log:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=environment(),
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=heed_ctrl_c,
                )
                interrupted = kills > 0 and self.kill(process, folder, self.random.uniform(0, window))
                process.wait()
                kills -= interrupted
                log.seek(0)
                output = log.read()
            self.count_events(output)
            if not orphaned:
                self.check_resumed(output, checkpoint)
            self.check_outputs(folder)
            if process.returncode == 0:
                break
            if holder := re.search(r"held by process (\d+)", output):
                self.seen["refusals"] += 1
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(int(holder[1])).wait()
            elif (cut := CUT_LOCK.search(output)) and not interrupted:
                # DVC writes these files in place. dvc.lock was never committed here, so deleting it loses no result.
                self.seen["cut locks"] += 1
                (folder / cut[1]).unlink()
            elif STAGED in output and not interrupted:
                self.seen["git resets"] += 1
                run(folder, "git", "reset", "-q")
            elif not interrupted:
                self.problems.append(f"an uninterrupted run failed:\n{output}")
                return
        self.check_done(folder)

    def kill(self, process: "subprocess.Popen[bytes]", folder: Path, seconds: float) -> bool:
        """Kill the run after some seconds; False if it ended before."""
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return False
        way, (number, who) = self.random.choice(list(WAYS.items()))
        running = running_stages(folder)
        if who == "stage" and not running:
            way, (number, who) = "kill -9 of dvc", WAYS["kill -9 of dvc"]
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if who == "all":
                os.killpg(process.pid, number)
            elif who == "dvc":
                process.send_signal(number)
            else:
                next(iter(running)).send_signal(number)
        self.kills[way] += 1
        self.stages[next(iter(running.values()), "dvc between stages")] += 1
        return True

    def maybe_damage(self, checkpoints: list[Path]) -> int | None:
        """Damage the newest checkpoint at random. Returns the step from which the next run must resume, if any."""
        intact = [path for path in checkpoints if identity(path) not in self.damaged]
        training = intact and not (intact[-1].parent / "finished").exists()
        if training and self.random.random() < 0.5:
            newest = intact.pop()
            victim = self.random.choice(sorted(newest.iterdir()))
            content = victim.read_bytes()
            middle = len(content) // 2
            changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            victim.write_bytes(self.random.choice([content[:middle], changed]))
            self.damaged.add(identity(newest))
            self.seen["checkpoints damaged"] += 1
        return int(intact[-1].name.removeprefix("step-")) if intact else None

    def count_events(self, output: str) -> None:
        self.seen["resumes"] += output.count(RESUMING)
        self.seen["damaged checkpoints refused"] += output.count("this checkpoint is damaged")
        output = DVC_PROGRESS_BAR.sub("", output)
        if "Traceback" in output and "KeyboardInterrupt" not in output:
            self.problems.append(f"a traceback:\n{output}")

    def check_resumed(self, output: str, checkpoint: int | None) -> None:
        """Training must resume from the newest intact checkpoint, so that no saved work is lost."""
        resumed = re.search(rf"{RESUMING} ([\d,]+)", output)
        step = int(resumed[1].replace(",", "")) if resumed else None
        if (resumed or DONE in output) and step != checkpoint:
            self.problems.append(f"training resumed from step {step}, the newest intact checkpoint is {checkpoint}")

    def check_outputs(self, folder: Path) -> None:
        """Outputs and the entries of dvc.lock must equal the reference or be absent; at most two checkpoints."""
        lock, described = folder / "dvc.lock", {}
        with suppress(FileNotFoundError, YAMLError, AttributeError, KeyError, TypeError):  # missing or truncated
            described = lock_hashes(lock.read_text())
        for path, md5 in described.items():
            if self.reference.hashes[path] != md5:
                self.problems.append(f"dvc.lock has another hash of {path}")
        for path, expected in files_of(self.reference).items():
            found = folder / path
            with suppress(FileNotFoundError):  # an orphan may replace it in the meantime
                begun = path == CURVE and expected.read_bytes().startswith(found.read_bytes())
                if not begun and file_sha256(found) != file_sha256(expected):
                    self.problems.append(f"{path} differs or is incomplete")
        if len(checkpoints_in(folder)) > 2:
            self.problems.append("more than two checkpoints")

    def check_done(self, folder: Path) -> None:
        """All files must be bit-identical to the reference, without leftovers."""
        self.seen["pipelines done"] += 1
        if lock_hashes((folder / "dvc.lock").read_text()) != self.reference.hashes:
            self.problems.append("the finished dvc.lock differs")
        missing = [path for path in files_of(self.reference) if not (folder / path).exists()]
        left = [str(path) for path in folder.rglob("*.partial")]
        status = run(folder, "dvc", "status").stdout
        if missing or left or "up to date" not in status:
            self.problems.append(f"missing {missing}, leftovers {left}, dvc status: {status}")


def heed_ctrl_c() -> None:
    """Handle SIGINT, which a process that was started in the background and its children ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def running_stages(folder: Path) -> dict[psutil.Process, str]:
    """The processes of stages in this folder, with the names of the stages."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, ValueError):  # the process has ended, or has no -m; a shell has it inside a text
            command = process.cmdline()
            name = " ".join(command[command.index("-m") + 1 :])
            if name.startswith("stages.") and process.cwd() == str(folder.resolve()):
                found[process] = name.removeprefix("stages.")
    return found


def identity(path: Path) -> tuple[Path, int]:
    """What distinguishes a folder from a later one at the same path."""
    return path, path.stat().st_ctime_ns


def checkpoints_in(folder: Path) -> list[Path]:
    return sorted((folder / ".scratch/train").glob("*/step-*"))


def files_of(reference: Reference) -> dict[str, Path]:
    """The files of all outputs: the path in a clone → the path in the reference."""
    outs = [reference.folder / path for path in reference.hashes]
    files = [file for out in outs for file in (out.rglob("*") if out.is_dir() else [out]) if file.is_file()]
    return {str(file.relative_to(reference.folder)): file for file in files}


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    seen = Counter(results["seen"])  # 0 for events that are not in the file
    kills = ", ".join(f"{count} {way}" for way, count in sorted(results["kills"].items()))
    stages = ", ".join(f"{count} {stage}" for stage, count in sorted(results["stages"].items()))
    rows = {
        f"kills (seed {results['seed']})": f"{sum(results['kills'].values())}: {kills}",
        "stages that were killed": stages,
        "finished pipelines": seen["pipelines done"],
        "trainings resumed from a checkpoint": seen["resumes"],
        "runs refused while an orphaned stage was running": seen["refusals"],
        "damaged checkpoints skipped": seen["damaged checkpoints refused"],
        "DVC files (dvc.lock, .dvc/tmp/rwlock) truncated by a kill of DVC, and deleted": seen["cut locks"],
        "outputs staged in git and deleted when a run was killed, unstaged with `git reset`": seen["git resets"],
        "diffs, lost data, tracebacks, partial outputs": results["problems"],
    }
    return "\n".join(["| what | number |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        model = make_tiny_model(Path(scratch) / "model")
        folder = make_clone(Path(scratch) / "reference", model, **LONGER)
        start = time.monotonic()
        run(folder, "dvc", "repro")
        hashes = lock_hashes((folder / "dvc.lock").read_text())
        reference = Reference(folder, hashes, time.monotonic() - start)
        chaos = Chaos(reference, random.Random(options.seed))
        while chaos.kills.total() < options.kills:
            number = chaos.seen["pipelines done"]
            clone = make_clone(Path(scratch) / f"clone {number}", model, **LONGER)
            chaos.run_until_done(clone, COMMANDS[number % len(COMMANDS)], options.kills - chaos.kills.total())
            print(f"{chaos.kills.total()} kills: {dict(chaos.seen)}, {len(chaos.problems)} problems", flush=True)
            if chaos.problems:
                break
    print("\n".join(chaos.problems) or "No difference, nothing lost.")
    results: dict[str, Any] = {"seed": options.seed, "kills": chaos.kills, "stages": chaos.stages, "seen": chaos.seen}
    results["problems"] = len(chaos.problems)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))
    sys.exit(bool(chaos.problems))


if __name__ == "__main__":
    main()
