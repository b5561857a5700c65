"""Rows that are longer than max_length: how many, which length would keep them, and what is done with them."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stages import format as format_stage
from stages.rows.format_counts import Counts
from stages.runtime.errors import UserError
from tests.clone import USER_FILES, edit
from tests.test_format import GOOD, rejected, run_format

LONG = {**GOOD, "output": "Blue. " * 60}
CONVERSATION = {
    "messages": [
        {"role": "user", "content": "Name a color."},
        {"role": "assistant", "content": "Red. " * 40},
        {"role": "user", "content": "Another."},
        {"role": "assistant", "content": "Blue."},
    ]
}


def summary_of(output: str) -> str:
    return " ".join(output.split())


def test_the_lowest_max_length_that_keeps_a_share_of_the_examples_whole() -> None:
    assert Counts(whole_lengths=Counter({10: 95, 20: 4, 999: 1})).lengths_to_keep() == {
        "95%": 10,
        "99%": 20,
        "100%": 999,
    }
    assert Counts(whole_lengths=Counter({10: 94, 20: 6})).lengths_to_keep() == {"95%": 20, "99%": 20, "100%": 20}
    assert Counts(whole_lengths=Counter({7: 1})).lengths_to_keep() == {"95%": 7, "99%": 7, "100%": 7}


def test_the_metrics_and_the_summary_name_the_max_length_that_would_keep_the_rows(
    project: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    too_long = {"instruction": "A" * 300, "output": "b"}
    rows = run_format(tiny_model, [GOOD] * 17 + [LONG] * 2 + [too_long], max_length=150)
    whole = rows[17]["prompt_tokens"] + rows[17]["answer_tokens"]
    assert len(rows[17]["input_ids"]) == 150 < whole
    output = summary_of(capsys.readouterr().out)
    metrics = json.loads(Path("metrics/format.json").read_text())
    longest = metrics["max_length_to_keep"]["100%"]
    assert metrics["max_length_to_keep"]["95%"] == whole
    assert longest > whole  # also rows whose prompt alone is too long are counted
    assert (
        "truncated 2 responses, at max_length = 150: 11% of the examples lose the end of their response and EOS "
        f"token; max_length = {longest} keeps 99% whole, {longest} all; or set long_rows: reject" in output
    )


def test_few_truncated_responses_are_only_counted(
    project: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_format(tiny_model, [GOOD] * 19 + [LONG], max_length=150)  # 5%
    assert "truncated 1 responses, at max_length = 150 wrote" in summary_of(capsys.readouterr().out)


def test_long_rows_are_rejected_if_the_parameter_says_so_even_if_they_are_most_of_the_rows(
    project: Path, tiny_model: Path
) -> None:
    edit(project, long_rows="reject")
    rows = run_format(tiny_model, [LONG, GOOD, LONG, {"instruction": "A" * 300, "output": "b"}, GOOD], max_length=150)
    assert [(row["source_row"], row["truncated"]) for row in rows] == [(2, False), (5, False)]
    assert rejected() == [
        (1, "too_long", "longer than max_length = 150; long_rows is reject"),
        (3, "too_long", "longer than max_length = 150; long_rows is reject"),
        (4, "prompt_too_long", "the prompt leaves no room for a response in max_length = 150"),
    ]


def test_the_error_if_all_rows_are_too_long_names_the_parameter(project: Path, tiny_model: Path) -> None:
    edit(project, long_rows="reject")
    with pytest.raises(UserError, match=r"2 of 2 rows can't be trained on \(too_long: 2\); raise max_length. First: "):
        run_format(tiny_model, [LONG, LONG], max_length=150)


def test_a_conversation_is_rejected_as_a_whole(project: Path, tiny_model: Path) -> None:
    shutil.copytree(USER_FILES / "templates", "templates")
    edit(project, long_rows="reject", template="templates/plain.jinja")
    rows = run_format(tiny_model, [CONVERSATION, GOOD], max_length=100)
    assert {row["source_row"] for row in rows} == {2}
    assert [row[:2] for row in rejected()] == [(1, "too_long")]


def test_a_long_row_is_an_error_if_the_parameter_says_so(project: Path, tiny_model: Path) -> None:
    edit(project, long_rows="error")
    with pytest.raises(UserError) as error:
        run_format(tiny_model, [GOOD, LONG, {"instruction": "A" * 300, "output": "b"}], max_length=150)
    assert str(error.value).startswith(
        "long_rows: found 2 of 3 rows longer than max_length = 150; must be none with long_rows: error; set "
        "max_length to "
    )
    assert not Path("data/formatted.parquet").exists()
    needed = str(error.value).split("set max_length to ")[1].split(",")[0]
    edit(project, max_length=needed)
    format_stage.main()  # all rows fit
    assert pq.read_metadata("data/formatted.parquet").num_rows == 3
