"""Check all parameters before another stage runs, because DVC deletes the outputs of a stage before it starts it."""

from pathlib import Path

from stages.runtime.params import TrainParams, load_params
from stages.runtime.run import run

CHECKED = Path("data/params_checked")


def main() -> None:
    load_params(TrainParams)  # reports the mistakes in the whole file
    CHECKED.write_text("The parameters are valid.\n")  # the same text each time, so that no other stage runs again


if __name__ == "__main__":
    run(main)
