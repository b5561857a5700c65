"""Give back the disk space of checkpoints and of what killed runs have left. DVC's cache is not touched."""

from pathlib import Path

from stages.shared.files import remove
from stages.shared.locks import held
from stages.shared.run import run
from stages.shared.terminal import disk_use, size


def main() -> None:
    left = [path for folder in ("data", "models", "metrics") for path in Path(folder).rglob(".*.partial")]
    left += Path(".scratch").glob(".*.partial")
    for lock in Path(".scratch/train").glob("*.lock"):
        with held(lock, "deletes these checkpoints"):  # of a run that goes on in a temporary copy, it refuses
            freed = disk_use(lock.with_suffix(""))
            remove(lock.with_suffix(""))
            print(f"{lock.with_suffix('')}: {size(freed)} of checkpoints deleted")
    for path in left:
        remove(path)
        print(f"{path}: deleted")


if __name__ == "__main__":
    run(main)
