"""Reading datasets: which rows are kept, which are unreadable, and which errors stop the stage."""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import download_dataset
from stages.data.tables import shards
from stages.rows import json_rows
from stages.rows.row_parser import RowParser
from stages.runtime.errors import UserError
from tests.clone import edit

ALLOWED = (
    "every row needs 'instruction' and 'output', 'prompt' and 'completion', 'messages', or other columns that "
    "docs/data.md lists; map your column names in dataset_columns"
)


def read(name: str, content: bytes | str) -> list[dict[str, Any]]:
    """Run the stage on a file with this content; returns the rows of `raw.parquet`."""
    path = Path("data") / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    edit(Path.cwd(), dataset_file=str(path))
    download_dataset.main()
    return raw()


def read_parquet(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for a Parquet file with these rows."""
    pq.write_table(pa.Table.from_pylist(rows), "data/a.parquet")
    edit(Path.cwd(), dataset_file="data/a.parquet")
    download_dataset.main()
    return raw()


def raw() -> list[dict[str, Any]]:
    """Messages, input and row number of the rows of `raw.parquet`."""
    rows = pq.read_table("data/raw.parquet", columns=["messages", "input", "source_row"]).to_pylist()
    return [row | {"messages": json.loads(row["messages"])} for row in rows]


def zstd(data: bytes) -> bytes:
    buffer = pa.BufferOutputStream()
    with pa.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return bytes(buffer.getvalue())


def slices() -> list[str]:
    return pq.read_table("data/raw.parquet")["slice"].to_pylist()


def unreadable() -> list[tuple[int, str, str]]:
    """Row number, reason and detail of each unreadable row."""
    return [tuple(row.values())[1:] for row in pq.read_table("data/unreadable.parquet").to_pylist()]


def row(instruction: str, output: str, source_row: int, input_text: str = "") -> dict[str, Any]:
    """A row of `raw.parquet` with one question and one answer."""
    messages = [{"role": "user", "content": instruction}, {"role": "assistant", "content": output}]
    return {"messages": messages, "input": input_text, "source_row": source_row}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '[{"instruction": "Name é.", "output": "É."}, {"instruction": "B", "input": "b", "output": "c"}]'),
        (
            "a.json",
            '\ufeff [{"instruction": "Name é.", "output": "É."}, {"instruction": "B", "input": "b", "output": "c"}]',
        ),
        ("a.json", '{"instruction": "Name é.", "output": "É."}\n{"instruction": "B", "input": "b", "output": "c"}\n'),
        ("a.jsonl", '{"instruction": "Name é.", "output": "É."}\n{"instruction": "B", "input": "b", "output": "c"}'),
        (
            "a.jsonl",
            '\ufeff{"instruction": "Name é.", "output": "É."}\r\n{"instruction": "B", "input": "b", "output": "c"}',
        ),
        ("a.csv", "instruction,input,output\nName é.,,É.\nB,b,c\n"),
        ("a.CSV", "\ufeffoutput,instruction,input\r\nÉ.,Name é.,\r\nc,B,b\r\n"),
    ],
)
def test_each_file_format_gives_the_same_rows(project: Path, name: str, content: str) -> None:
    assert read(name, content) == [row("Name é.", "É.", 1), row("B", "c", 2, "b")]
    assert unreadable() == []


def test_the_origin_of_the_rows_is_written_to_source_json(project: Path) -> None:
    read("a.jsonl", '{"instruction": "A", "output": "b"}\n{"instruction": "A"}\n')
    assert json.loads(Path("data/source.json").read_text()) == {
        "source": "data/a.jsonl",
        "revision": None,
        "license": None,
        "columns_not_read": [],
    }


def test_max_examples_takes_the_first_rows(project: Path) -> None:
    edit(project, max_examples="2")
    lines = [f'{{"instruction": "{letter}", "output": "b"}}' for letter in "ABCD"]
    assert [row["messages"][0]["content"] for row in read("a.jsonl", "\n".join(lines))] == ["A", "B"]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ('{"instruction": "A"}', "missing_field", f"'output' is missing; {ALLOWED}"),
        ('{"instruction": "A", "output": {}}', "not_text", "'output' is dict {}; must be text"),
        ('["A", "b"]', "not_an_object", f"found list ['A', 'b']; {ALLOWED}"),
        ('"A"', "not_an_object", f"found str 'A'; {ALLOWED}"),
        (
            '{"instruction": "A", "output": "b\\ud800"}',
            "not_unicode",
            "'output' has a lone surrogate at character 1",
        ),
        (
            '{"instruction": "A", "output": "b"',
            "bad_json",
            "data/a.jsonl:3: not valid JSON: Expecting ',' delimiter: line 1 column 35 (char 34)",
        ),
    ],
)
def test_an_unreadable_row_is_recorded_with_its_reason_and_the_others_are_kept(
    project: Path, line: str, reason: str, detail: str
) -> None:
    good = '{"instruction": "A", "output": "b"}'
    assert [row["source_row"] for row in read("a.jsonl", f"{good}\n\n{line}\n{good}\n")] == [1, 4]
    assert unreadable() == [(3, reason, detail)]


def test_a_file_that_cannot_be_read_leaves_no_output(project: Path) -> None:
    with pytest.raises(UserError, match="not valid CSV"):
        read("a.csv", 'instruction,output\nA,b\nA,"b')
    assert sorted(path.name for path in Path("data").iterdir()) == ["a.csv", "retention.jsonl", "template.jinja"]


def test_other_json_values_beside_the_text_are_ignored(project: Path) -> None:
    digits = "9" * 4300
    content = f'[{{"instruction": "A", "output": "b", "id": {digits}, "x": [1e99, NaN, {{"y": null}}]}}]'
    assert read("a.json", content) == [row("A", "b", 1)]
    assert read("a.jsonl", content[1:-1]) == [row("A", "b", 1)]


def test_a_lone_surrogate_in_a_json_array_makes_its_row_unreadable(project: Path) -> None:
    assert read("a.json", '[{"instruction": "A", "output": "b\\ud800"}, {"instruction": "A", "output": "b"}]') == [
        row("A", "b", 2)
    ]
    assert unreadable() == [(1, "not_unicode", "'output' has a lone surrogate at character 1")]


def test_a_line_that_is_nested_too_deeply_is_unreadable(project: Path) -> None:
    deep = "[" * 100_000
    assert read("a.jsonl", f'{{"instruction": "A", "output": "b"}}\n{{"instruction": {deep}}}\n') == [row("A", "b", 1)]
    assert [(number, reason) for number, reason, _ in unreadable()] == [(2, "bad_json")]


NUMBERS = st.integers(-(10**17), 10**17)  # integers of 20 and more characters are read as floats


@settings(max_examples=60)
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["instruction", "output", "input", "other"]),
            st.text() | st.none() | NUMBERS | st.lists(st.text(), max_size=2),
        )
        | NUMBERS
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.booleans(),
        min_size=1,
        max_size=9,
    ),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    characters=st.integers(1, 40),
)
def test_an_array_has_the_elements_that_json_reads_with_any_read_size(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], indent: int | None, ascii_only: bool, characters: int
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8", errors="replace")
    with pytest.MonkeyPatch.context() as context:
        context.setattr(json_rows, "CHARACTERS_PER_READ", characters)
        found = list(json_rows.read_json(path, "source", RowParser()))
    assert found == list(enumerate(json.loads(path.read_text(encoding="utf-8")), 1))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet"])
@pytest.mark.parametrize("text", ["a" * 3_000_000, "🐎" * 800_000, " <|im_end|>" * 300_000, "\n" * 3_000_000 + "."])
def test_a_row_of_several_megabytes_is_read_unchanged(project: Path, name: str, text: str) -> None:
    edit(project, dataset_file=f"data/{name}")
    path = project / "data" / name
    if name == "a.csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["instruction", "output"], ["A", text]])
    elif name == "a.parquet":
        pq.write_table(pa.table({"instruction": ["A"], "output": [text]}), path)
    else:
        line = json.dumps({"instruction": "A", "output": text})
        path.write_text(f"[{line}]" if name == "a.json" else line)
    download_dataset.main()
    (found,) = pq.read_table("data/raw.parquet").to_pylist()
    assert json.loads(found["messages"])[1]["content"] == text


@pytest.mark.subprocess
def test_many_rows_are_streamed(project: Path) -> None:
    import subprocess
    import sys

    with Path("data/big.csv").open("w") as file:
        file.write("instruction,input,output\n")
        file.writelines(f"Say {i}.,,This is the number {i}.\n" for i in range(140_000))
    edit(project, dataset_file="data/big.csv")
    code = (
        "from stages import download_dataset; download_dataset.main(); "
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    root = str(Path(__file__).parent.parent)
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": root}
    )
    *summary, peak_kib = out.stdout.splitlines()
    assert [line.split() for line in summary[:2]] == [
        ["source", "data/big.csv"],
        ["rows", "140,000", "read,", "0", "unreadable"],
    ]
    sizes = [pq.read_metadata(shard).num_rows for shard in shards(Path("data/raw.parquet"))]
    assert sizes == [65_536, 65_536, 8_928]
    assert int(peak_kib) < 250 * 1024


MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Name a color."},
    {"role": "assistant", "content": "Red."},
]


def test_conversations_and_completions_are_recognized_by_their_columns(project: Path) -> None:
    lines = [
        {"messages": MESSAGES, "prompt": "of the first message", "id": 1},
        {"prompt": "Add.", "completion": "5."},
        {"instruction": "A", "output": "b", "messages": None, "prompt": "c"},
    ]
    assert read("a.jsonl", "\n".join(map(json.dumps, lines))) == [
        {"messages": MESSAGES, "input": "", "source_row": 1},
        row("Add.", "5.", 2),
        row("A", "b", 3),
    ]
    assert read("a.csv", "completion,prompt\nx,A\n") == [row("A", "x", 1)]
    assert read_parquet([{"id": 1, "messages": MESSAGES}]) == [{"messages": MESSAGES, "input": "", "source_row": 1}]


TWO = [row("Name é.", "É.", 1), row("B", "c", 2)]
LINES = '{"instruction": "Name é.", "output": "É."}\n{"instruction": "B", "output": "c"}\n'


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".gz", gzip.compress),
        (".GZ", lambda data: gzip.compress(data[:9]) + gzip.compress(data[9:])),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
        (".zst", zstd),
    ],
)
@pytest.mark.parametrize(("name", "content"), [("a.jsonl", LINES), ("a.csv", "instruction,output\nName é.,É.\nB,c\n")])
def test_a_compressed_file_is_read(
    project: Path, name: str, content: str, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    compressed = compress(content.encode())
    assert read(name + suffix, compressed) == TWO
    with pytest.raises(UserError, match=r"can't be decompressed: .*; copy or download it again$"):
        read(name + suffix, compressed[:-9])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_with_a_byte_order_mark_is_read(project: Path, encoding: str) -> None:
    for name, content in {
        "a.jsonl": LINES,
        "a.json": f"[{LINES.strip().replace(chr(10), ',')}]",
        "a.csv": "instruction;output\r\nName é.;É.\r\nB;c\r\n",
    }.items():
        assert read(name, f"\ufeff{content}".encode(encoding)) == TWO


@pytest.mark.parametrize(
    "content",
    [
        '{\n  "instruction": "Name é.",\n  "output": "É."\n}\n{\n  "instruction": "B",\n  "output": "c"\n}\n',
        '{"version": 1, "data": [{"instruction": "Name é.", "output": "É."}, {"instruction": "B", "output": "c"}]}',
        '{"data": [\n{"instruction": "Name é.", "output": "É."},\n{"instruction": "B", "output": "c"}\n]}',
        '{\n "rows": [\n{"instruction": "Name é.", "output": "É."}, {"instruction": "B", "output": "c"}]}',
    ],
)
def test_json_objects_over_several_lines_and_rows_under_a_key_are_read(project: Path, content: str) -> None:
    assert read("a.json", content) == TWO


def test_a_single_object_is_a_row(project: Path) -> None:
    assert read("a.json", '{"instruction": "A",\n"output": "b"}') == [row("A", "b", 1)]
    assert read("a.jsonl", json.dumps({"messages": MESSAGES, "tags": [{"x": 1}]})) == [
        {"messages": MESSAGES, "input": "", "source_row": 1}
    ]


def test_a_single_mapped_row_with_a_list_is_a_row(project: Path) -> None:
    edit(project, dataset_columns="{prompt: Q, completion: R}")
    assert read("a.jsonl", '{"Q": "A", "R": "b", "tags": ["x"]}') == [row("A", "b", 1)]


def test_a_date_in_the_arguments_of_a_call_makes_its_row_unreadable(project: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"day": date(2026, 1, 2)}}]}
    read_parquet([{"messages": [MESSAGES[1], call]}])
    detail = "message 2: the tool call can't be written as JSON: Object of type date is not JSON serializable"
    assert unreadable() == [(1, "bad_tool_call", detail)]


def test_rows_under_several_keys_are_an_error(project: Path) -> None:
    with pytest.raises(UserError) as error:
        read("a.json", '{"train": [{"instruction": "A", "output": "b"}], "test": [{}]}')
    assert str(error.value) == "data/a.json: has rows under the keys train, test; keep one of these lists"


def test_the_files_of_a_folder_or_a_glob_are_one_dataset(project: Path) -> None:
    for folder in ("more", ".hidden"):
        (project / "data/mine" / folder).mkdir(parents=True)
    for name, letters in {"b.jsonl": "CD", "a.jsonl.gz": "AB", "more/c.jsonl": "E", ".hidden/d.jsonl": "X"}.items():
        text = "".join(f'{{"instruction": "{letter}", "output": "b"}}\n\n' for letter in letters).encode()
        (project / "data/mine" / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    (project / "data/mine/README.md").write_text("About these data.")
    edit(project, dataset_file="data/mine")
    download_dataset.main()
    assert raw() == [row("A", "b", 1), row("B", "b", 3), row("C", "b", 4), row("D", "b", 6), row("E", "b", 7)]
    assert set(slices()) == {"data/mine"}
    edit(project, datasets="[{file: '*.jsonl*', use: test}]")
    download_dataset.main()
    assert [found["messages"][0]["content"] for found in raw()] == ["A", "B", "C", "D"]
    assert set(pq.read_table("data/raw.parquet")["use"].to_pylist()) == {"test"}


def test_columns_are_mapped_and_a_mapped_column_that_no_row_has_is_an_error(project: Path) -> None:
    edit(project, dataset_columns="{prompt: problem, completion: solution, system: rules}")
    lines = '{"problem": "A", "solution": "b", "id": 1}\n{"problem": "B", "solution": "c", "rules": "Be brief."}\n'
    first, second = read("a.jsonl", lines)
    assert first == row("A", "b", 1)
    assert second["messages"][0] == {"role": "system", "content": "Be brief."}
    assert json.loads(Path("data/source.json").read_text())["columns_not_read"] == ["id"]
    with pytest.raises(UserError) as error:
        read("a.jsonl", '{"problem": "A", "solution": "b"}')
    assert str(error.value) == "dataset_columns: no row of data/a.jsonl has rules; must be columns of the dataset"
    with pytest.raises(UserError, match=r"^data/a\.csv: column 'rules' is missing; found problem, solution;"):
        read("a.csv", "problem,solution\nA,b\n")


def test_columns_of_parquet_that_are_not_read_are_listed_and_nulls_in_messages_are_missing_keys(project: Path) -> None:
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    rows = read_parquet([{"id": 1, "messages": MESSAGES}, {"id": 2, "messages": [MESSAGES[1], calls]}])
    assert [row["messages"] for row in rows] == [
        MESSAGES,
        [
            MESSAGES[1],
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
            },
        ],
    ]
    assert json.loads(Path("data/source.json").read_text())["columns_not_read"] == ["id"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet"])
def test_the_slice_of_a_row_is_its_value_in_the_slice_column(project: Path, name: str) -> None:
    rows = [{"kind": kind, "instruction": "A", "output": "b"} for kind in ("sums", None, "lists", "sums")]
    path = Path("data") / name
    if name == "a.csv":
        path.write_text("kind,instruction,output\n" + "".join(f"{row['kind'] or ''},A,b\n" for row in rows))
    elif name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if name == "a.json" else "\n".join(map(json.dumps, rows)))
    edit(project, dataset_file=str(path), slice_column="kind")
    download_dataset.main()
    assert slices() == ["sums", "(none)", "lists", "sums"]
    assert raw() == [row("A", "b", number) for number in (1, 2, 3, 4)]


def test_the_slice_column_may_be_a_column_of_the_schema_a_number_or_missing_in_some_rows(project: Path) -> None:
    edit(project, slice_column="input")
    read("a.jsonl", '{"instruction": "A", "input": "x", "output": "b"}\n{"instruction": "A", "output": "b"}\n')
    assert slices() == ["x", "(none)"]
    edit(project, slice_column="level")
    lines = [f'{{"instruction": "A", "output": "b", "level": {level}}}' for level in ("3", "2.5", "true", '""')]
    read("a.jsonl", "\n".join(lines))
    assert slices() == ["3", "2.5", "True", "(none)"]


def test_the_slice_is_the_source_by_default(project: Path) -> None:
    read("a.jsonl", '{"instruction": "A", "output": "b", "source": "other"}\n')
    assert slices() == ["data/a.jsonl"]
    mixture(project, "[{file: a.jsonl}, {file: b.jsonl}]", a=1, b=2)
    assert slices() == ["data/mine/b.jsonl", "data/mine/a.jsonl", "data/mine/b.jsonl"]


def test_a_row_whose_slice_is_a_list_is_unreadable(project: Path) -> None:
    edit(project, slice_column="kind")
    lines = [f'{{"kind": {kind}, "instruction": "A", "output": "b"}}' for kind in ('"x"', '["x"]')]
    assert read("a.jsonl", "\n".join(lines)) == [row("A", "b", 1)]
    assert unreadable() == [(2, "not_text", "'kind' (slice_column) is list ['x']; must be text or a number")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([None, ""], "no row of data/a.jsonl has 'kind'; must be a column, or source"),
        (range(101), "found more than 100 values of 'kind'; must be a column with few values, or source"),
    ],
)
def test_a_slice_column_with_no_value_or_too_many_is_an_error(project: Path, values: Any, message: str) -> None:
    edit(project, slice_column="kind")
    with pytest.raises(UserError) as error:
        read(
            "a.jsonl", "".join(f"{json.dumps({'instruction': 'A', 'output': 'b', 'kind': kind})}\n" for kind in values)
        )
    assert str(error.value) == f"slice_column: {message}"
    assert sorted(path.name for path in Path("data").iterdir()) == ["a.jsonl", "retention.jsonl", "template.jinja"]


def test_a_slice_column_may_have_100_values(project: Path) -> None:
    edit(project, slice_column="instruction")
    read("a.jsonl", "".join(f'{{"instruction": "{number}", "output": "b"}}\n' for number in range(100)))
    assert len(set(slices())) == 100


def mixture(project: Path, datasets: str, **sizes: int) -> list[tuple[str, int]]:
    """Run the stage on files with these numbers of rows; returns source and row number of each row of the mixture."""
    (project / "data/mine").mkdir(exist_ok=True)
    for name, size in sizes.items():
        lines = [f'{{"instruction": "{name} {number}", "output": "x"}}\n' for number in range(1, size + 1)]
        (project / f"data/mine/{name}.jsonl").write_text("".join(lines))
    edit(project, dataset_file="data/mine", datasets=datasets)
    download_dataset.main()
    rows = pq.read_table("data/raw.parquet").to_pylist()
    return [(row["source"].removeprefix("data/mine/").removesuffix(".jsonl"), row["source_row"]) for row in rows]


def test_weights_give_the_largest_mixture_without_repeated_rows(project: Path) -> None:
    rows = mixture(project, "[{file: a.jsonl, weight: 3.0}, {file: b.jsonl, weight: 1.0}]", a=6, b=10)
    assert rows == [("a", 1), ("a", 2), ("b", 5), ("a", 3), ("a", 4), ("a", 5), ("b", 10), ("a", 6)]
    source = json.loads(Path("data/source.json").read_text())
    assert source["source"] == "data/mine/a.jsonl, data/mine/b.jsonl"
    assert source["license"] == "not stated, not stated"
    assert source["rows_taken"] == {"data/mine/a.jsonl": 6, "data/mine/b.jsonl": 2}
    assert source["rows_in_source"] == {"data/mine/a.jsonl": 6, "data/mine/b.jsonl": 10}


def test_a_count_takes_evenly_spaced_rows_and_without_one_all_rows_are_taken(project: Path) -> None:
    rows = mixture(project, "[{file: a.jsonl, count: 3}, {file: b.jsonl}]", a=9, b=2)
    assert rows == [("a", 3), ("b", 1), ("a", 6), ("b", 2), ("a", 9)]


def test_the_summary_says_how_many_rows_are_left_out(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture(project, "[{file: a.jsonl, weight: 1.0}, {file: b.jsonl, weight: 1.0}]", a=1000, b=10)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:4] == [
        "rows           20 read, 0 unreadable",
        "datasets       data/mine/a.jsonl: 10 of 1,000 rows, 990 left out",
        "data/mine/b.jsonl: 10 of 10 rows",
    ]
    edit(project, max_examples="4")
    download_dataset.main()
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[1:4] == [
        "rows           4 read, 0 unreadable; max_examples = 4",
        "datasets       data/mine/a.jsonl: 2 of 1,000 rows, 998 left out",
        "data/mine/b.jsonl: 2 of 10 rows, 8 left out",
    ]
    assert json.loads(Path("data/source.json").read_text())["rows_taken"] == {
        "data/mine/a.jsonl": 2,
        "data/mine/b.jsonl": 2,
    }


def test_the_first_rows_of_a_mixture_have_its_proportions(project: Path) -> None:
    edit(project, max_examples="20")
    rows = mixture(project, "[{file: a.jsonl, weight: 0.75}, {file: b.jsonl, weight: 0.25}]", a=300, b=200)
    assert [name for name, _ in rows].count("a") == 15


def test_a_dataset_with_fewer_rows_than_its_count_is_an_error(project: Path) -> None:
    with pytest.raises(UserError) as error:
        mixture(project, "[{file: a.jsonl, count: 3}, {file: b.jsonl}]", a=2, b=2)
    assert str(error.value) == "datasets: data/mine/a.jsonl has 2 rows; must have 3; lower its count"


def test_the_files_of_a_mixture_must_be_in_a_folder(project: Path) -> None:
    (project / "data/a.jsonl").write_text('{"instruction": "A", "output": "b"}\n')
    edit(project, dataset_file="data/a.jsonl", datasets="[{file: a.jsonl}]")
    with pytest.raises(
        UserError, match=r"^dataset_file: found 'data/a\.jsonl'; must be the folder of the files in `datasets`, so"
    ):
        download_dataset.main()


def test_columns_that_are_not_trained_on_are_kept_as_json_for_scorers(project: Path) -> None:
    row = {"instruction": "A", "output": "b", "kind": "é", "n": [1, None], "bad": "\ud800", "check": {"equals": "b"}}
    read("a.jsonl", json.dumps(row) + "\n")
    (found,) = pq.read_table("data/raw.parquet").to_pylist()
    assert json.loads(found["other_columns"]) == {"kind": "é", "n": [1, None], "bad": "\ud800"}
    assert download_dataset.date_as_text(date(2026, 1, 31)) == "2026-01-31"
    assert download_dataset.date_as_text(object()) is None  # whose text would differ from run to run


def test_the_retention_set_is_read_after_the_dataset_and_is_not_limited(project: Path) -> None:
    edit(project, max_examples="1", slice_column="kind")
    row = {"instruction": "A", "output": "b", "kind": "x"}
    (project / "data/retention.jsonl").write_text("".join(json.dumps(row | {"kind": n}) + "\n" for n in range(3)))
    read("a.jsonl", json.dumps(row) + "\n" + json.dumps(row) + "\n")
    rows = pq.read_table("data/raw.parquet").to_pylist()
    assert [(row["use"], row["slice"]) for row in rows] == [(None, "x"), *[("retention", str(n)) for n in range(3)]]
    assert json.loads(Path("data/source.json").read_text())["source"] == "data/a.jsonl"
