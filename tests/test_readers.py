"""Files of each format: what was written is what is read, or the row or the file is rejected with a reason."""

import csv
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stages.data.examples import BadRowError
from stages.rows.row_parser import RowParser
from stages.rows.sources import open_files
from stages.runtime.errors import UserError

HEADER = "instruction,output\n"
ONE = {"instruction": "A", "output": "b"}
TWO = {"instruction": "C", "output": "d, e"}


def read(
    path: Path, content: str | bytes | None = None, columns: dict[str, str] | None = None
) -> list[tuple[int, Any]]:
    """Number and content, or the reason and detail, of each row of a file or folder."""
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = open_files(path, "source", RowParser(columns)).rows()
    return [(n, f"{row.reason}: {row}" if isinstance(row, BadRowError) else row) for n, row in rows]


TSV_LINES = ["instruction\toutput", *(f"Q{n}.\tA{n}." for n in range(9))]
QUOTES = ['Who said it?\t"To be or not to be', "Name a tree.\tOak.", 'Finish it.\tthat is the question"']


@pytest.mark.parametrize("delimiter", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("blank", [[], [""]])
def test_a_quote_that_could_swallow_rows_is_an_error_that_names_its_lines(
    tmp_path: Path, delimiter: str, blank: list[str]
) -> None:
    text = "\n".join([*TSV_LINES, *QUOTES[:2], *blank, *QUOTES[2:], *TSV_LINES[1:]]).replace("\t", delimiter)
    with pytest.raises(UserError) as error:
        read(tmp_path / "a.tsv", text)
    where = f"{tmp_path}/a.tsv:11: a quoted field begins here and ends in line {13 + len(blank)}, but lines in it can "
    assert str(error.value).startswith(where)


@pytest.mark.parametrize("header", [HEADER, '"instruction","output"\n'])
def test_a_quoted_field_with_lines_like_rows_is_read_if_another_row_or_the_header_needs_its_quotes(
    tmp_path: Path, header: str
) -> None:
    text = f'{header}Q,"One,\ntwo, three"\n' + ('C,"d, e"\n' if header == HEADER else "")
    assert read(tmp_path / "a.csv", text)[0] == (1, {"instruction": "Q", "output": "One,\ntwo, three"})
    with pytest.raises(UserError, match="can also be rows"):
        read(tmp_path / "a.csv", f'{HEADER}Q,"One,\ntwo, three"\nA,b\n')


def test_a_quoted_field_over_lines_that_are_not_rows_is_read(tmp_path: Path) -> None:
    text = 'instruction\toutput\nQ\t"def f():\n\n    pass"\nA\tb\n'
    expected = {"instruction": "Q", "output": "def f():\n\n    pass"}
    assert read(tmp_path / "a.tsv", text) == [(1, expected), (2, ONE)]


def test_a_row_with_fewer_or_more_fields_than_the_header_is_rejected(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "instruction,output,input\nA,b\n\nA,b,c,\nA,b,c\n") == [
        (1, "missing_fields: line 2: 2 fields, but the header has 3"),
        (2, "extra_fields: line 4: 4 fields, but the header has 3"),
        (3, {**ONE, "input": "c"}),
    ]


@pytest.mark.parametrize(
    "text",
    [
        'instruction, output\nA, b\nC, "d, e"\n',
        'instruction , output\nA,b\nC,"d, e"\n',
        "sep=;\r\ninstruction;output\r\nA;b\r\nC;d, e\r\n",
        "sep=^\ninstruction^output\nA^b\nC^d, e\n",
        "instruction|output\nA|b\nC|d, e\n",
        '\n"instruction";"output"\n"A";"b"\n"C";"d, e"\n',
    ],
)
def test_the_header_shows_the_delimiter_and_whether_spaces_follow_it(tmp_path: Path, text: str) -> None:
    assert read(tmp_path / "a.csv", text) == [(1, ONE), (2, TWO)]


def test_spaces_after_delimiters_are_kept_if_the_header_has_none(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "instruction,output \nA, b\n") == [(1, {"instruction": "A", "output": " b"})]


def test_columns_without_a_name_get_their_number(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", ",instruction,output,\n0,A,b,\n") == [
        (1, {"unnamed 1": "0", **ONE, "unnamed 4": ""})
    ]


def jsonl(*rows: str) -> str:
    return "\n".join(rows)


ROW, EQUAL_KEYS = '{"instruction": "A", "output": "b"}', '{"instruction": "A", "output": "b", "output": "c"}'
EQUAL = "duplicate_key: key 'output' occurs 2 times in an object; keep one of them"


@pytest.mark.parametrize(
    "text",
    [
        f"{EQUAL_KEYS}\n{ROW}\n",
        f"[{EQUAL_KEYS}, {ROW}]",
        f"{EQUAL_KEYS} {ROW}",
        f'{{"data": [{EQUAL_KEYS}, {ROW}]}}',
        f'{{"0": {EQUAL_KEYS}, "1": {ROW}}}',
        EQUAL_KEYS.replace('"b", "output"', '{"x": [{"output": 1, "\\u006futput": 1}]}, "input"') + "\n" + ROW,
    ],
)
def test_an_object_with_two_equal_keys_rejects_its_row(tmp_path: Path, text: str) -> None:
    assert read(tmp_path / "a.json", text) == [(1, EQUAL), (2, ONE)]


def test_a_number_that_would_become_infinite_rejects_its_row(tmp_path: Path) -> None:
    numbers = ["1e999", "-1e999", "9" * 4301, "9" * 4300, "Infinity"]
    text = jsonl(*(f'{{"instruction": "A", "output": "b", "id": {number}}}' for number in numbers))
    assert read(tmp_path / "a.jsonl", text) == [
        (1, "bad_number: number 1e999 is too large; write it as text"),
        (2, "bad_number: number -1e999 is too large; write it as text"),
        (3, "bad_number: number 99999999999999999999 is too large; write it as text"),
        (4, {**ONE, "id": int("9" * 4300)}),
        (5, {**ONE, "id": float("inf")}),
    ]


def test_the_rows_of_several_files_are_numbered_consecutively(tmp_path: Path) -> None:
    for folder, name, empty in (("a", "jsonl", "\n \n"), ("b", "json", "[]"), ("c", "csv", HEADER)):
        two = {"jsonl": f"{ROW}\n{ROW}\n", "json": f"[{ROW}, {ROW}]", "csv": f"{HEADER}A,b\nA,b\n"}[name]
        for number, content in enumerate([empty, two, empty, empty, two]):
            read(tmp_path / folder / f"{number}.{name}", content)
        assert read(tmp_path / folder) == [(1, ONE), (2, ONE), (3, ONE), (4, ONE)]


MESSAGES = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("table", "columns", "rows"),
    [
        ({"instruction": ["A", "C"], "output": ["b", "d, e"]}, None, [ONE, TWO]),
        ({"output": {"7": "d, e", "0": "b"}, "instruction": {"0": "A", "7": "C"}}, None, [ONE, TWO]),
        ({"q": ["A"], "a": ["b"]}, {"prompt": "q", "completion": "a"}, [{"q": "A", "a": "b"}]),
        ({"messages": [MESSAGES, MESSAGES]}, None, [{"messages": MESSAGES}] * 2),
        ({"messages": MESSAGES}, None, [{"messages": MESSAGES}]),
        ({"messages": []}, None, [{"messages": []}]),
        ({"messages": [["A", "b"], ["C", "d"]]}, None, [{"messages": [["A", "b"], ["C", "d"]]}]),
        (
            {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
            None,
            [{"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}],
        ),
        ({"instruction": [], "output": []}, None, []),
        ({"data": []}, None, []),
    ],
)
def test_an_object_of_columns_is_read_as_rows(
    tmp_path: Path, table: dict[str, Any], columns: dict[str, str] | None, rows: list[dict[str, Any]]
) -> None:
    assert [row for _, row in read(tmp_path / "a.json", json.dumps(table), columns)] == rows


@pytest.mark.parametrize(
    "table",
    [
        {"instruction": ["A", "C"], "output": ["b"]},
        {"instruction": {"0": "A"}, "output": {"1": "b"}},
        {"instruction": ["A"], "output": ["b"], "version": 1},
    ],
)
def test_columns_with_different_rows_are_an_error(tmp_path: Path, table: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"have different rows; each must have a value for each row$"):
        read(tmp_path / "a.json", json.dumps(table))


@pytest.mark.parametrize("num_shards", [1, 3])
def test_a_dataset_of_save_to_disk_is_read_in_the_order_of_its_shards(tmp_path: Path, num_shards: int) -> None:
    from datasets import Dataset, DatasetDict

    rows = [{"instruction": f"Q{n}", "output": None if n == 1 else "b"} for n in range(5)]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(tmp_path / "a", num_shards={"train": num_shards})
    read_rows = [row for _, row in read(tmp_path / "a/train")]
    assert read_rows == [{key: text for key, text in row.items() if text} for row in rows]
    with pytest.raises(UserError) as error:
        read(tmp_path / "a")
    assert str(error.value) == (
        f"{tmp_path}/a: has datasets of save_to_disk; name one of {tmp_path}/a/train, or list them in `datasets`"
    )
    (tmp_path / f"a/train/data-00000-of-0000{num_shards}.arrow").unlink()
    if num_shards > 1:
        with pytest.raises(
            UserError, match=r"is missing; copy the folder again, with the files that state.json names$"
        ):
            read(tmp_path / "a/train")


def test_an_arrow_stream_that_is_cut_off_between_batches_is_an_error(tmp_path: Path) -> None:
    table = pa.Table.from_pylist([ONE])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path / "a.arrow") == [(1, ONE)]
    content = (tmp_path / "a.arrow").read_bytes()
    with pytest.raises(UserError, match=r"is truncated; copy or write it again$"):
        read(tmp_path / "a.arrow", content[:-8])


def test_the_only_data_file_of_a_zip_archive_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("mine/README.md", "About these data.")
        archive.writestr("__MACOSX/mine/._a.csv", b"\0\5")
        archive.writestr("mine/a.csv", f'{HEADER}A,b\nC,"d, e"\n')
    assert read(tmp_path / "a.zip") == [(1, ONE), (2, TWO)]
    pd.DataFrame([ONE]).to_csv(tmp_path / "b.csv.zip", index=False)
    assert read(tmp_path / "b.csv.zip") == [(1, ONE)]
    (tmp_path / "a.zip").rename(tmp_path / "a.jsonl.zip")
    (tmp_path / "b.csv.zip").unlink()
    assert read(tmp_path) == [(1, ONE), (2, TWO)]


def test_an_object_can_continue_in_a_line_that_begins_with_a_comma(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", '{"instruction": "A"\n,"output": "b"}\n') == [(1, ONE)]


# Carriage returns are written as part of CSV fields, too. Lone surrogates can't be written as UTF-8.
TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("\"',;|\t\n\r =\0"), max_size=12)
ROWS = st.lists(st.fixed_dictionaries({"instruction": TEXT, "output": TEXT, "id": TEXT}), min_size=1, max_size=8)


def read_or_refuse(path: Path) -> list[Any] | None:
    """The rows of a file; None if the file, or one of its rows, is rejected."""
    try:
        rows = [row for _, row in read(path)]
    except UserError as error:
        assert str(error).startswith(f"{path}:")
        return None
    return rows


@settings(max_examples=150)
@given(
    rows=ROWS,
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_csv_is_read_as_it_was_written_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]], quoting: Any, delimiter: str, end: str
) -> None:
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    text = io.StringIO()
    writer = csv.DictWriter(
        text, ["instruction", "output", "id"], quoting=quoting, delimiter=delimiter, lineterminator=end
    )
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(text.getvalue().encode())
    found = read_or_refuse(path)
    assert found == rows or (found is None and quoting == csv.QUOTE_MINIMAL)


@settings(max_examples=60)
@given(rows=ROWS, separator=st.sampled_from(",;\t|"))
def test_csv_of_pandas_is_read_as_it_was_written_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]], separator: str
) -> None:
    # pandas does not quote a carriage return, which then belongs to the end of the line.
    assume(not any(row[list(rows[0])[-1]].endswith("\r") for row in rows))
    path = tmp_path_factory.mktemp("csv") / "a.tsv"
    pd.DataFrame(rows).to_csv(path, sep=separator, index=False)
    assert read_or_refuse(path) in (rows, None)


@settings(max_examples=100)
@given(
    rows=ROWS,
    orient=st.sampled_from(["records", "columns", "index", "split", "table", "lines"]),
    indent=st.sampled_from([0, 2]),
)
def test_json_of_pandas_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]], orient: Any, indent: int
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    if orient == "lines":
        pd.DataFrame(rows).to_json(path, orient="records", lines=True)
    else:
        pd.DataFrame(rows).to_json(path, orient=orient, indent=indent)
    found = [row for _, row in read(path)]
    assert [{name: row[name] for name in rows[0]} for row in found] == rows


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100)
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(["instruction", "output", "x"]), JSON_VALUES), min_size=2, max_size=6
    ),
    form=st.sampled_from(["lines", "array", "indented array", "indented objects", "key"]),
)
def test_json_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], form: str
) -> None:
    text = {
        "lines": "\n".join(map(json.dumps, rows)),
        "array": json.dumps(rows),
        "indented array": json.dumps(rows, indent=1),
        "indented objects": "\n".join(json.dumps(row, indent=1) for row in rows if row),
        "key": json.dumps({"rows": rows}),
    }[form]
    expected = [row for row in rows if row] if form == "indented objects" else rows
    path = tmp_path_factory.mktemp("json") / "a.json"
    if len(expected) > 1:
        assert read(path, text) == list(enumerate(expected, 1))


@settings(max_examples=40)
@given(rows=ROWS, suffix=st.sampled_from([".parquet", ".arrow", ".feather"]))
def test_arrow_and_parquet_are_read_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]], suffix: str
) -> None:
    path = tmp_path_factory.mktemp("arrow") / f"a{suffix}"
    table = pa.Table.from_pylist(rows)
    if suffix == ".parquet":
        pq.write_table(table, path, row_group_size=3)
    elif suffix == ".feather":
        pd.DataFrame(rows).to_feather(path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    assert read(path) == list(enumerate(rows, 1))


def test_a_compressed_file_in_a_folder_is_read(tmp_path: Path) -> None:
    read(tmp_path / "a/a.jsonl.gz", gzip.compress(ROW.encode()))
    assert read(tmp_path / "a", None) == [(1, ONE)]
