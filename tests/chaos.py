"""Kill the pipeline at random moments, go on, and hold what comes out against a run that nobody interrupted.

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
from ruamel.yaml.error import YAMLError

from stages.shared.files import file_sha256
from tests.clone import environment, lock_hashes, make_clone, make_tiny_model, run

RESULTS = Path(__file__).with_suffix(".json")
CURVE = "metrics/curve.csv"
DONE = "mean of the run"  # in the summary of train
# What is run, in turn. An experiment in the workspace is the same stages under other locks and signal handlers of DVC.
COMMANDS = (("dvc", "repro"), ("dvc", "exp", "run"))
# How runs end: the signal, and who gets it. `kill -9` of dvc alone leaves its stage running.
WAYS = {
    "power failure (kill -9 of all)": (signal.SIGKILL, "all"),
    "kill -9 of dvc": (signal.SIGKILL, "dvc"),
    "kill -9 of the stage (out of memory)": (signal.SIGKILL, "stage"),
    "Ctrl-C": (signal.SIGINT, "all"),
    "kill (SIGTERM) of all": (signal.SIGTERM, "all"),
}
CUT_LOCK = re.compile(r"'(?:\./)?(dvc\.lock|\.dvc/tmp/rwlock)'(?: validation failed| is invalid|\. JSON)")
GOING_ON = "Going on from the checkpoint of step"
# Some seconds of training with many checkpoints, so that kills fall between them.
LONGER = {"num_epochs": "6", "eval_steps": "20"}


@dataclass
class Reference:
    """A run that nobody interrupted: its folder, the MD5 of each output in dvc.lock, and how many seconds it took."""

    folder: Path
    hashes: dict[str, str]
    seconds: float

    @classmethod
    def of(cls, folder: Path) -> "Reference":
        start = time.monotonic()
        run(folder, "dvc", "repro")
        return cls(folder, lock_hashes((folder / "dvc.lock").read_text()), time.monotonic() - start)


@dataclass
class Chaos:
    """Runs one clone after another into the ground, and says what it saw.

    kills, stages: how often each way was taken, and what ran then.
    seen: how often what was asked for happened: resumes, refusals, damaged checkpoints passed over, clones done.
    problems: what must not happen, one text each.
    """

    reference: Reference
    random: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def run_until_done(self, folder: Path, command: tuple[str, ...], kills: int) -> None:
        """Run `command` in a fresh clone again and again, the first `kills` times with a kill, until it succeeds."""
        # A stage is a ninth of the run, most of it start-up. Twice that leaves a fair chance that one more is done.
        window = 2 * self.reference.seconds / 9
        while True:
            orphaned = bool(running_stages(folder))  # and may save more checkpoints yet
            checkpoint = None if orphaned else self.maybe_damage(checkpoints_in(folder))
            # A file of its own for each run: an orphan goes on writing to that of the run before.
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
            self.look_at(output)
            if not orphaned:
                self.check_resumed(output, checkpoint)
            self.check_whole(folder)
            if process.returncode == 0:
                break
            if holder := re.search(r"held by process (\d+)", output):
                self.seen["refusals"] += 1
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(int(holder[1])).wait()
            elif (cut := CUT_LOCK.search(output)) and not interrupted:
                # DVC writes these in place. Deleted, as dvc.lock was never committed here, they cost no stage.
                self.seen["cut locks"] += 1
                (folder / cut[1]).unlink()
            elif not interrupted:
                self.problems.append(f"a run that nobody interrupted failed:\n{output}")
                return
        self.check_done(folder)

    def kill(self, process: "subprocess.Popen[bytes]", folder: Path, seconds: float) -> bool:
        """Kill the run after so many seconds. False where it was over before."""
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
        """Sometimes cut or change the newest checkpoint. The step that the next run must go on from, if any."""
        training = checkpoints and not (checkpoints[-1].parent / "finished").exists()
        if training and self.random.random() < 0.5:
            victim = self.random.choice(sorted(checkpoints.pop().iterdir()))
            content = victim.read_bytes()
            middle = len(content) // 2
            changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            victim.write_bytes(self.random.choice([content[:middle], changed]))
            self.seen["checkpoints damaged"] += 1
        return int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else None

    def look_at(self, output: str) -> None:
        self.seen["resumes"] += output.count(GOING_ON)
        self.seen["damaged checkpoints refused"] += output.count("this checkpoint is damaged")
        if "Traceback" in output and "KeyboardInterrupt" not in output:
            self.problems.append(f"a traceback:\n{output}")

    def check_resumed(self, output: str, checkpoint: int | None) -> None:
        """Training went on from the newest whole checkpoint: nothing of what was saved is lost."""
        resumed = re.search(rf"{GOING_ON} ([\d,]+)", output)
        step = int(resumed[1].replace(",", "")) if resumed else None
        if (resumed or DONE in output) and step != checkpoint:
            self.problems.append(f"training went on from step {step}, the newest whole checkpoint is {checkpoint}")

    def check_whole(self, folder: Path) -> None:
        """Outputs and what dvc.lock describes are those of the reference or not there; two checkpoints at most."""
        lock, described = folder / "dvc.lock", {}
        with suppress(FileNotFoundError, YAMLError, AttributeError, KeyError, TypeError):  # not there, or cut off
            described = lock_hashes(lock.read_text())
        for path, md5 in described.items():
            if self.reference.hashes[path] != md5:
                self.problems.append(f"dvc.lock describes another {path}")
        for path, expected in files_of(self.reference).items():
            found = folder / path
            with suppress(FileNotFoundError):  # between two looks, an orphan may replace it
                begun = path == CURVE and expected.read_bytes().startswith(found.read_bytes())
                if not begun and file_sha256(found) != file_sha256(expected):
                    self.problems.append(f"{path} is another or half of it")
        if len(checkpoints_in(folder)) > 2:
            self.problems.append("more than two checkpoints")

    def check_done(self, folder: Path) -> None:
        """All is as in the reference, down to the bit, and nothing is left lying about."""
        self.seen["pipelines done"] += 1
        if lock_hashes((folder / "dvc.lock").read_text()) != self.reference.hashes:
            self.problems.append("the finished dvc.lock differs")
        missing = [path for path in files_of(self.reference) if not (folder / path).exists()]
        left = [str(path) for path in folder.rglob("*.partial")]
        status = run(folder, "dvc", "status").stdout
        if missing or left or "up to date" not in status:
            self.problems.append(f"missing {missing}, left behind {left}, dvc status: {status}")


def heed_ctrl_c() -> None:
    """A process that was started in the background ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def running_stages(folder: Path) -> dict[psutil.Process, str]:
    """The processes of stages in this folder, and the stages' names."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = process.cmdline()
            if "-m" in command and command[-1] != "-m" and process.cwd() == str(folder.resolve()):
                found[process] = " ".join(command[command.index("-m") + 1 :]).removeprefix("stages.")
    return found


def checkpoints_in(folder: Path) -> list[Path]:
    return sorted((folder / ".scratch/train").glob("*/step-*"))


def files_of(reference: Reference) -> dict[str, Path]:
    """The files of all outputs: paths in a clone, and in the reference."""
    outs = [reference.folder / path for path in reference.hashes]
    files = [file for out in outs for file in (out.rglob("*") if out.is_dir() else [out]) if file.is_file()]
    return {str(file.relative_to(reference.folder)): file for file in files}


def table(results: dict[str, Any]) -> str:
    """The results as a table in Markdown."""
    seen = Counter(results["seen"])  # what never happened is not in the file
    kills = ", ".join(f"{count} {way}" for way, count in sorted(results["kills"].items()))
    stages = ", ".join(f"{count} {stage}" for stage, count in sorted(results["stages"].items()))
    rows = {
        f"kills (seed {results['seed']})": f"{sum(results['kills'].values())}: {kills}",
        "what ran then": stages,
        "pipelines that were done in the end": seen["pipelines done"],
        "trainings that went on from a checkpoint": seen["resumes"],
        "runs refused while an orphan still ran": seen["refusals"],
        "damaged checkpoints passed over": seen["damaged checkpoints refused"],
        "files of DVC (dvc.lock, .dvc/tmp/rwlock) cut off by a kill of DVC itself, and deleted": seen["cut locks"],
        "differences, losses, tracebacks, half outputs": results["problems"],
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
        reference = Reference.of(make_clone(Path(scratch) / "reference", model, **LONGER))
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
