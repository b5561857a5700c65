"""The table and the verdicts in docs/sweeps.md are those of docs/sweep.csv and docs/reviews."""

import re

import pandas as pd
import pytest

from tests.clone import ROOT
from tests.test_docs import block, read_page

PAGE = read_page("docs/sweeps.md")
CHANGED = ["learning_rate", "weight_decay", "gradient_accumulation_steps"]


def test_the_table_of_the_page_equals_sweep_csv() -> None:
    rows = pd.read_csv(ROOT / "docs/sweep.csv").dropna(subset="Experiment")
    columns = ["validation_loss", "metrics/evaluate/tuned.json:loss", "metrics/evaluate/tuned.json:stop_rate"]
    expected = [
        f"| {rate:.0e} | {decay:g} | {4 * steps:g} | {validation:.4f} | {test:.4f} | {stopped:.2f} |"
        for rate, decay, steps, validation, test, stopped in rows[[*CHANGED, *columns]].to_numpy()
    ]
    assert block("sweep", PAGE).splitlines()[2:] == expected


@pytest.mark.parametrize("name", ["learning-rate", "weight-decay", "batch-size"])
def test_the_verdicts_of_the_page_equal_those_of_its_reviews(name: str) -> None:
    headline = read_page(f"docs/reviews/{name}.md").splitlines()[2]
    pattern = (
        r"\*\*Test loss: (?:. )?(\w+)\. (.+ → .+) nats/token, (.+), 95% interval (.+); 3 runs paired by seed\.\*\*"
    )
    found = re.fullmatch(pattern, headline)
    assert found
    verdict, losses, difference, interval = found.groups()
    assert f"| {losses} | {difference} ({interval}) | [{verdict}](reviews/{name}.md) |" in PAGE
