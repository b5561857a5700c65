"""Train once more with another seed, and answer as `predict` does → `data/answers/replicates/<seed>.parquet`.

The results of several seeds show how much they vary from run to run; a review needs that for a verdict on a change. The
weights are not kept.
"""

import argparse
from pathlib import Path

from stages.data.files import remove
from stages.data.tables import write_parquet
from stages.predict import ANSWERS_SCHEMA, mean_loss, predict
from stages.runtime.params import ReplicateParams, TrainingParams, TrainParams, load_params
from stages.runtime.run import run
from stages.runtime.terminal import summary
from stages.train import train_model


def main() -> None:
    params = load_params(ReplicateParams)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int)
    seed = parser.parse_args().seed
    tuned = Path(f".scratch/.replicate-{seed}.partial")
    answers = Path(f"data/answers/replicates/{seed}.parquet")

    training = TrainParams(**params.model_dump(include=set(TrainingParams.model_fields)), seed=seed)
    from stages.engine.distributed import DistributedContext
    from stages.engine.models import pick_device

    result = train_model(training, tuned)
    if result is None:  # not the main process
        return
    metrics, speed = result
    try:
        rows = predict(tuned, params, DistributedContext(pick_device()))  # the other ranks have ended
    finally:
        remove(tuned)
    write_parquet(answers, rows, ANSWERS_SCHEMA)
    summary(
        {
            "validation": f"loss {metrics['validation_loss']:.4f} at step {metrics['best_step']:,}, the best",
            "speed": speed,
            "test": f"loss {mean_loss([row for row in rows if row['split'] == 'test']):.4f}",
        },
        wrote=[answers],
        then=f"dvc repro evaluate_replicate@{seed}",
    )


if __name__ == "__main__":
    run(main)
