"""Delete checkpoints and leftovers of killed runs; DVC's cache is not touched. `make clean` runs it."""

from pathlib import Path

from stages.data.files import remove
from stages.runtime.locks import file_lock
from stages.runtime.run import run
from stages.runtime.terminal import disk_usage, format_bytes


def main() -> None:
    leftovers = [path for folder in ("data", "models", "metrics") for path in Path(folder).rglob(".*.partial")]
    leftovers += Path(".scratch").glob(".*.partial")
    for path in leftovers:
        remove(path)
        print(f"{path}: deleted")
    for lock in Path(".scratch/train").glob("*.lock"):
        with file_lock(lock, "deletes these checkpoints"):  # fails if the run continues in a temporary copy
            freed = disk_usage(lock.with_suffix(""))
            remove(lock.with_suffix(""))
            print(f"{lock.with_suffix('')}: {format_bytes(freed)} of checkpoints deleted")


if __name__ == "__main__":
    run(main)
