"""`make data`: what the page finds in the data, and the page in a real browser."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.checks.near_duplicates import jaccard, shingles
from stages.runtime.errors import UserError
from tests.clone import USER_FILES, copy_clone, edit, make_tokenizer, run, run_pipeline
from tests.test_vote_page import BROWSER
from tools import data_findings
from tools.data_examples import token_texts
from tools.data_findings import similar
from tools.data_page import collect, histogram, main, render
from tools.data_tables import SCORES, read_tables, take_rows

HOSTILE = "</script><img src=x onerror=document.title=1>\u202e\x1b[31m{{ 7 * 7 }}"
WORDS = ["harbour", "lantern", "village", "copper", "winter", "bridge", "orchard", "signal", "meadow", "ladder"]
LONG = "The {} of the old town was painted by three brothers who lived beside the {} for all of their lives"


def ask(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"instruction": question, "output": answer, **more}


def chat(*texts: str, **last: Any) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(texts)
    messages: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    messages[-1] |= last
    return {"messages": messages}


def write_tables(tiny_model: Path, train: list[Any], test: list[Any] | None = None, **params: str) -> None:
    """Run the stages up to split on these rows; texts are written as they are."""
    rows = {
        "train": train,
        "validation": [ask("Name a cold thing.", "Ice.")],
        "test": test or [ask("What is up?", "Sky.")],
    }
    Path("data/mine").mkdir()
    for split, own in rows.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in own]
        Path(f"data/mine/{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    shutil.copytree(tiny_model, "models/tokenizer")
    shutil.copytree(USER_FILES / "templates", "templates")
    entries = ", ".join(f"{{file: {split}.jsonl, use: {split}}}" for split in rows)
    fractions = {"validation_fraction": "0", "test_fraction": "0"}
    edit(
        Path.cwd(),
        **{"dataset_file": "data/mine", "datasets": f"[{entries}]", **fractions, "max_length": "512"} | params,
    )
    run_pipeline(Path.cwd(), "download_dataset", "format", "split")


def page_data(max_length: int = 512) -> dict[str, Any]:
    return collect(read_tables(), max_length)


def page(max_length: int = 512) -> str:
    return render(page_data(max_length) | {"changes": None, "outdated": []})


def answers(context: dict[str, Any], kind: str) -> list[list[str]]:
    """The answers that are shown for each group of a kind."""
    return [[context["rows"][row]["response"] for row in group.rows] for group in context["found"][kind].groups]


def test_rows_are_counted_by_source_and_rejected_ones_are_shown(project: Path, tiny_model: Path) -> None:
    write_tables(tiny_model, [ask("Name a color.", "Red."), ask("A", " "), "{bad", ask("Name a color.", "Red.")])
    context = page_data()
    columns = ["source", "slice", "read", "rejected", "taken", "truncated", "train", "duplicate"]
    assert context["origins"][columns].to_numpy().tolist() == [
        ["data/mine/test.jsonl", "data/mine/test.jsonl", 1, 0, 1, 0, 0, 0],
        ["data/mine/train.jsonl", "(not readable)", 1, 1, 0, 0, 0, 0],
        ["data/mine/train.jsonl", "data/mine/train.jsonl", 3, 1, 2, 0, 1, 1],
        ["data/mine/validation.jsonl", "data/mine/validation.jsonl", 1, 0, 1, 0, 0, 0],
    ]
    reasons = {reason["reason"]: reason["examples"][0]["text"] for reason in context["reasons"]}
    assert reasons["bad_json"] is None
    assert json.loads(reasons["empty_response"])[0]["content"] == "A"
    assert context["overview"][0]["text"] == "6 read, 4 taken, 2 rejected"


def test_rows_that_are_rejected_because_they_are_long_are_counted(project: Path, tiny_model: Path) -> None:
    write_tables(tiny_model, [ask("A", "a"), ask("B", "b " * 99)], max_length="100", long_rows="reject")
    assert "1 longer rows are rejected, because of <code>long_rows</code>" in page(100)


def test_equal_rows_of_two_splits_are_in_both(project: Path, tiny_model: Path) -> None:
    write_tables(tiny_model, [ask("What is up?", "Sky."), ask("What is up?", "Sky.")])
    write_scores(loss=[1.0], pmi=[-1.0], eos_loss=[1.0])
    context = page_data()
    columns = ["source", "train", "validation", "test", "duplicate", "left out"]
    assert context["origins"][columns].to_numpy().tolist() == [
        ["data/mine/test.jsonl", 0, 0, 1, 0, 0],
        ["data/mine/train.jsonl", 1, 0, 0, 1, 0],
        ["data/mine/validation.jsonl", 0, 1, 0, 0, 0],
    ]
    assert [group.title for group in context["found"]["across"].groups] == ["2 rows: 1 train, 1 test"]
    assert [context["splits"][row] for row in context["found"]["independent"].groups[0].rows] == ["train"]


def test_a_histogram_has_max_length_and_a_bar_for_all_longer_examples() -> None:
    plot = histogram(pd.Series([0, 1, 1, *[5] * 1000, 100_000]), max_length=20)
    assert [(bar["from"], bar["count"]) for bar in plot["bars"] if bar["count"]] == [(0, 1), (1, 2), (5, 1000), (40, 1)]
    assert (plot["place"], plot["is_beyond"], plot["longest"]) == (100 * 20 / 41, False, 100_000)
    assert histogram(pd.Series([3]), max_length=1024)["is_beyond"]


def test_the_part_of_an_answer_that_is_cut_is_shown(project: Path, tiny_model: Path) -> None:
    answer = " ".join(f"step {n}: {WORDS[n % 10]}" for n in range(100))
    write_tables(tiny_model, [ask("Say it.", answer)], max_length="400")
    context = page_data(400)
    (cut,) = context["cuts"]
    whole = take_rows([0, 1, 2], ["response", "input_ids"])
    (tokens,) = (len(row["input_ids"]) for row in whole.values() if row["response"] == answer)
    assert (tokens, cut["num_tokens"] - cut["num_cut"]) == (400, 400)
    assert cut["kept"] + cut["cut"] in answer
    assert (len(cut["kept"]), len(cut["cut"])) == (300, 300)
    assert context["num_truncated"] == 1


@given(st.text(min_size=1, max_size=40))
def test_tokens_have_the_text_of_the_whole(text: str) -> None:
    tokenizer = make_tokenizer(["<|end|>"], eos_token="<|end|>")
    ids = tokenizer(text)["input_ids"]
    found = token_texts(tokenizer, ids)
    assert "".join(part for _, part in found) == text
    assert [token_id for own, _ in found for token_id in own] == ids


def test_an_example_shows_which_tokens_are_masked_supervised_and_special(project: Path, tiny_model: Path) -> None:
    write_tables(tiny_model, [ask("Name a fruit 🍎.", "Pear 🍐.")], template="templates/plain.jinja")
    (example,) = (each for each in page_data()["examples"] if each["source"] == "data/mine/train.jsonl")
    ((is_masked, prompt), (is_next_masked, answer)) = example["parts"][0]
    assert (is_masked, is_next_masked) == (True, False)
    assert "".join(text for _, text in prompt) == "User: Name a fruit 🍎.\n\nAssistant:"
    assert "".join(text for _, text in answer) == " Pear 🍐.<|end|>"
    assert [text for is_special, text in answer if is_special] == ["<|end|>"]


def test_examples_of_each_kind_are_shown(project: Path, tiny_model: Path) -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    train = [
        *(ask(f"Name {word}.", f"{word}!") for word in WORDS),
        chat("First?", "One.", "Second?", "Two."),
        chat("Why?", "Because.", reasoning_content="Let me think."),
        {"query": "Add it.", "answers": [call], "tools": [{"name": "add", "description": "Add", "parameters": {}}]},
    ]
    write_tables(tiny_model, train, template="templates/plain.jinja")
    context = page_data()
    shown = {kind: example["response"] for example in context["examples"] for kind in example["kinds"]}
    assert shown["several questions"] == "Two."
    assert "add" in shown["tools"]
    assert shown["reasoning"] == "Because."
    assert {*shown} >= {"shortest answer", "longest", "from data/mine/train.jsonl", "from data/mine/test.jsonl"}


def test_languages_of_answers(project: Path, tiny_model: Path) -> None:
    english = "Please tell me in a few words what the weather in the old town will be like tomorrow morning."
    german = "Morgen früh wird es in der alten Stadt regnen, und am Nachmittag scheint wieder die Sonne."
    write_tables(tiny_model, [ask(english, german), ask(german, english), ask(english, english), ask("Hello?", "Ja.")])
    context = page_data()
    languages = context["languages"]
    assert [(code, count) for code, count, _ in languages.counts] == [("en", 2), ("de", 1)]
    assert (languages.num_rows, languages.num_short) == (6, 3)
    titles = [group.title for group in languages.mixed.groups]
    assert sorted(titles) == ["question: de, answer: en", "question: en, answer: de"]


def test_repeated_answers_and_contradictions(project: Path, tiny_model: Path) -> None:
    refusals = [
        ask(f"Tell me about the {word}.", "I can't  help." if word < "m" else "I CAN'T help.") for word in WORDS
    ]
    sums = [ask("What is 2 + 2?", "4"), ask(" what is 2 + 2? ", "5"), ask("What is 2 + 2?", "22")]
    write_tables(tiny_model, [*refusals, *sums, ask("What is 3 + 3?", "six"), ask("What is 3 + 3?", "Six")])
    context = page_data()
    repeated, contradictions = context["found"]["repeated"], context["found"]["contradictions"]
    assert (repeated.count, repeated.num_rows, repeated.groups[0].title) == (2, 12, "10 rows")
    assert (contradictions.count, contradictions.num_rows) == (1, 3)
    assert answers(context, "contradictions") == [["4", "5", "22"]]


def test_an_earlier_message_makes_another_question(project: Path, tiny_model: Path) -> None:
    train = [chat("Name a fruit.", "Pear.", "Another?", "Plum."), chat("Name a tree.", "Oak.", "Another?", "Elm.")]
    write_tables(tiny_model, train, template="templates/plain.jinja")
    assert page_data()["found"]["contradictions"].count == 0


def test_near_duplicates_within_train_and_across_splits(project: Path, tiny_model: Path) -> None:
    leaked, other = LONG.format("gate", "river"), LONG.format("mill", "lake")
    train = [
        *(ask(f"{other}, said {word}.", f"{n}") for n, word in enumerate(WORDS)),
        chat("Hello there.", "Hi.", leaked, "I see."),
        chat("Name a bird.", "Wren.", "Thanks, and now another one, please.", "Owl."),
        chat("Name a fish.", "Carp.", "Thanks, and now another one, please.", "Eel."),
    ]
    write_tables(tiny_model, train, [ask(leaked.upper() + "!", "Yes.")], template="templates/plain.jinja")
    context = page_data()
    within, across = context["found"]["within"], context["found"]["across"]
    assert [group.title for group in within.groups] == ["10 rows: 10 train"]
    assert [group.title for group in across.groups] == ["2 rows: 1 train, 1 test"]
    assert answers(context, "across") == [["I see.", "Yes."]]
    assert (within.count, within.num_rows, within.note) == (1, 10, "")


@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join), max_size=12))
def test_equal_texts_are_in_one_group_and_each_text_has_a_near_duplicate_there(texts: list[str]) -> None:
    groups = similar(texts)
    group_of = {number: at for at, group in enumerate(groups) for number in group}
    assert len(group_of) == sum(map(len, groups))
    for one, text in enumerate(texts):
        others = [other for other in range(len(texts)) if other != one]
        if text and text in (texts[other] for other in others):
            assert group_of[one] == group_of[texts.index(text)]
        if one in group_of:
            near = [other for other in others if jaccard(shingles(text), shingles(texts[other])) >= 0.8]
            assert any(group_of[other] == group_of[one] for other in near)


def test_the_page_says_how_many_rows_were_compared(
    project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tables(tiny_model, [ask(f"Name {word}.", word) for word in WORDS])
    monkeypatch.setattr(data_findings, "MAX_COMPARED", 60)
    note = page_data()["found"]["within"].note
    assert note == "Compared: 4 of 12 rows, chosen by a hash."
    assert note in page()


def test_rows_whose_check_rejects_their_answer(project: Path, tiny_model: Path) -> None:
    train = [ask("2 + 2?", "5", check={"number": 4}), ask("2 + 3?", "5", check={"number": 5}), ask("Name x.", "x")]
    write_tables(tiny_model, train)
    context = page_data()
    assert context["found"]["checks"].count == 1
    assert answers(context, "checks") == [["5"]]
    assert context["found"]["checks"].groups[0].title == 'check: {"number": 4}'


def write_scores(**columns: list[float | None]) -> None:
    ids = pd.read_parquet("data/train.parquet")["example_id"]
    frame = pd.DataFrame({"example_id": ids, "tokens": 3, **columns})
    frame.astype(dict.fromkeys(columns, float)).to_parquet(SCORES)


def test_training_rows_at_the_ends_of_the_scores(project: Path, tiny_model: Path) -> None:
    answers_of = [WORDS[0], "Say  the long word " + WORDS[1], WORDS[2], WORDS[3]]
    write_tables(
        tiny_model, [ask(f"Say the long word {word}.", answer) for word, answer in zip(WORDS, answers_of, strict=False)]
    )
    assert "score_rows=true" in page()
    write_scores(
        loss=[2.0, 0.1, 1.0, 1.0],
        pmi=[-3.0, 5.7, 3.0, 3.0],
        eos_loss=[0.5, 1, 4.5, None],
    )
    context = page_data()
    assert {kind: context["found"][kind].count for kind in ("independent", "copied", "early end")} == {
        "independent": 1,
        "copied": 1,
        "early end": 1,
    }
    assert answers(context, "independent")[0] == ["harbour"]
    assert answers(context, "copied") == [["Say  the long word lantern"]]
    assert answers(context, "early end") == [["village"], ["Say  the long word lantern"], ["harbour"]]
    assert "The answer does not depend on the question: 1 rows with PMI" in page()


def test_plain_text_is_no_copy_of_a_question(project: Path, tiny_model: Path) -> None:
    write_tables(tiny_model, [{"text": "Once upon a time."}])
    write_scores(loss=[1.0], pmi=[None], eos_loss=[1.0])
    assert page_data()["found"]["copied"].count == 0


def test_an_empty_table_of_scores_is_off(project: Path, tiny_model: Path) -> None:
    write_tables(tiny_model, [ask("Name x.", "x")])
    write_scores(loss=[1.0], pmi=[1.0], eos_loss=[1.0])
    pd.read_parquet(SCORES).head(0).to_parquet(SCORES)
    assert "score_rows=true" in page()


@pytest.mark.parametrize(
    "name", ["raw", "formatted", "rejected", "train", "retention", "source.json", "metrics/split.json"]
)
def test_a_missing_table_is_named(project: Path, tiny_model: Path, name: str) -> None:
    write_tables(tiny_model, [ask("Name x.", "x")])
    path = Path(name if "/" in name else f"data/{name}" if "." in name else f"data/{name}.parquet")
    path.unlink()
    with pytest.raises(UserError, match=rf"^{path}: not found; run `dvc repro`"):
        page()


def test_a_table_of_an_older_version_is_an_error(project: Path, tiny_model: Path) -> None:
    write_tables(tiny_model, [ask("Name x.", "x")])
    pd.read_parquet("data/formatted.parquet").drop(columns="questions").to_parquet("data/formatted.parquet")
    with pytest.raises(UserError, match=r"^data/formatted\.parquet: has no column questions; run `dvc repro`"):
        page()


@pytest.mark.parametrize(
    "train",
    [
        [ask("Name x.", "x")],
        [{"text": "Once upon a time."}, {"text": "¿?"}],
        [ask(f"Say {word}.", "x") for word in WORDS],  # answers of one token
        [ask("...", "!"), ask("???", "!!")],  # texts without a word
    ],
    ids=["one row", "plain text", "one token", "no word"],
)
def test_unusual_data_has_a_page(project: Path, tiny_model: Path, train: list[Any]) -> None:
    write_tables(tiny_model, train)
    assert "Examples as the model sees them" in page()


def test_the_page_of_long_hostile_rows_is_small(project: Path, tiny_model: Path) -> None:
    rows = [ask(f"{word} {n} " + "\"'&\x00" * 3000, "'\u2028\"" * 3000) for word in WORDS for n in range(10)]
    write_tables(tiny_model, rows, max_length="20000")
    write_scores(loss=[1.0] * 100, pmi=[1.0] * 100, eos_loss=[1.0] * 100)
    assert len(page().encode()) < 5_000_000


@pytest.mark.subprocess
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome")
def test_the_page_in_a_browser(project: Path, tiny_model: Path) -> None:
    from playwright.sync_api import sync_playwright

    rows = [ask(f"{LONG.format(word, 'x' * 300)} {HOSTILE}", f"{HOSTILE} {word}") for word in WORDS]
    write_tables(tiny_model, [*rows, ask("A" + HOSTILE, " "), ask(HOSTILE, HOSTILE), ask(HOSTILE, "b")])
    Path("data.html").write_text(page(), encoding="utf-8")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        backgrounds, problems = set(), list[str]()
        for width, scheme in ((1280, "light"), (390, "dark")):
            view = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            view.on("console", lambda message: problems.append(message.text))
            view.on("request", lambda request: problems.append(request.url))
            view.goto(Path("data.html").resolve().as_uri())
            assert [problem for problem in problems if not problem.endswith("/data.html")] == []
            assert view.title().startswith("Data: ")  # no text of the data ran as a script
            assert view.locator("img, script").count() == 0
            shown = "</script><img src=x onerror=document.title=1>\\u202e\\x1b[31m{{ 7 * 7 }}"
            assert view.get_by_text(shown, exact=True).count() > 0
            assert view.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            anchors = view.locator(".cards a").evaluate_all("links => links.map(link => link.getAttribute('href'))")
            assert [view.locator(anchor).count() for anchor in anchors] == [1] * 7
            backgrounds.add(view.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(backgrounds) == 2
        browser.close()


@pytest.mark.subprocess
def test_the_command_shows_the_changes_against_a_revision(
    ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clone = copy_clone(ran, tmp_path / "clone")
    monkeypatch.chdir(clone)

    def make(*arguments: str) -> tuple[str, str]:
        """What the command prints, and the section of the page with the changes."""
        monkeypatch.setattr(sys, "argv", ["data_page", *arguments])
        main()
        return capsys.readouterr().out, Path("data.html").read_text(encoding="utf-8").partition("Changes since main")[2]

    printed, changes = make()
    assert ("outdated" in printed, changes) == (False, "")
    assert run(clone, "git", "status", "--porcelain").stdout == ""

    file = Path("data/instructions.jsonl")
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    changed = json.loads(lines[0]) | {"output": f"Another answer. {HOSTILE}"}
    file.write_text(json.dumps(changed) + "\n" + "".join(lines[2:]), encoding="utf-8")
    run_pipeline(clone, "download_dataset", "format", "split")
    printed, changes = make("--base", "main")
    assert "outdated          download_dataset, format, score_rows, split" in printed
    assert "Another answer. &lt;/script&gt;" in changes
    assert re.findall("<h3>(.+)</h3>", changes) == ["removed", "edited"]

    shutil.rmtree(".dvc/cache")
    _, changes = make("--base", "main")
    assert "data/train.parquet (not in the cache, and there is no remote)" in changes
    assert "before" not in changes

    with pytest.raises(UserError, match="unknown Git revision 'nope'"):
        make("--base", "nope")
