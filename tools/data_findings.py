"""What `make data` looks for in the data: repetitions, contradictions, near-duplicates, languages, checks, scores."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from stages.checks.kinds import is_right
from stages.checks.near_duplicates import MIN_ESTIMATED_SIMILARITY, THRESHOLD, band_keys, jaccard, minhash, shingles
from stages.data.splits import SPLITS, normalize
from stages.data.tables import read_batches
from stages.format import FORMATTED
from tools.data_tables import Tables

MAX_GROUPS, MAX_SHOWN = 10, 3  # groups of a kind, and rows of each
MAX_COMPARED = 15_000_000  # characters that are compared for near-duplicates, which take about ten seconds
MAX_LANGUAGES = 2000  # rows
MIN_LANGUAGE_BYTES = 60  # a third of the demo's shorter answers is misjudged, 2% of the others
MAX_LISTED = 20  # languages
MAX_CHECKED = 50_000  # rows whose answer is checked again
COPIED = 0.5  # share of the question that an answer repeats word for word
EARLY_END = 3.0  # nats above the median loss of the EOS token


@dataclass(frozen=True)
class Group:
    """Rows that belong together. rows: the positions of some of them; title: what they are."""

    title: str
    rows: list[int]


@dataclass(frozen=True)
class Finding:
    """The largest groups of a kind. count: how many there are; rows: how many rows they have; note: what was read."""

    count: int = 0
    num_rows: int = 0
    groups: list[Group] = field(default_factory=list)
    note: str = ""


def repeated_answers(rows: pd.DataFrame) -> Finding:
    """Answers that several rows have."""
    sizes = rows.groupby("answer_key", sort=False).size()
    repeated = sizes[sizes > 1].sort_values(ascending=False, kind="stable")
    groups = []
    for key, size in repeated.head(MAX_GROUPS).items():
        repeats = rows[rows["answer_key"] == key]
        groups.append(Group(f"{size:,} rows", repeats.index[:MAX_SHOWN].tolist()))
    return Finding(len(repeated), int(repeated.sum()), groups)


def contradictions(rows: pd.DataFrame) -> Finding:
    """Equal prompts, including the messages before the question, that have different answers."""
    answers = rows.groupby("prompt_key", sort=False)["answer_key"].agg(["size", "nunique"])
    contradicted = answers[answers["nunique"] > 1].sort_values("nunique", ascending=False, kind="stable")
    groups = []
    for key, (size, number) in contradicted.head(MAX_GROUPS).iterrows():
        different = rows[rows["prompt_key"] == key].drop_duplicates("answer_key")
        groups.append(Group(f"{size:,} rows, {number:,} different answers", different.index[:MAX_SHOWN].tolist()))
    return Finding(len(contradicted), int(contradicted["size"].sum()), groups)


def near_duplicates(tables: Tables) -> dict[str, Finding]:
    """Groups of similar questions across splits, and within the training split.

    Every user message of a conversation is compared. A group in which no conversation begins with such a message, such
    as "Thanks, go on", is not one.
    """
    used = tables.used
    sampled = used[used.index.isin([*tables.sample])].sort_values("example_id")
    messages = pd.Series({row: tables.sample[row][0] for row in sampled.index}, dtype=object).explode()
    messages = messages[messages.str.len().cumsum() <= MAX_COMPARED]
    owners, is_first, splits = messages.index.to_numpy(), ~messages.index.duplicated(), sampled["split"].to_dict()
    num_rows = int(is_first.sum())
    note = "" if num_rows == len(used) else f"Compared: {num_rows:,} of {len(used):,} rows, chosen by a hash."
    groups_of_kind: dict[str, list[list[int]]] = {"across": [], "within": []}
    for group in similar(messages.tolist()):
        if is_first[group].any():
            rows = sorted({*owners[group].tolist()})
            trained = [row for row in rows if splits[row] == "train"]
            if len({splits[row] for row in rows}) > 1:
                groups_of_kind["across"].append(rows)
            if len(trained) > 1:
                groups_of_kind["within"].append(trained)
    return {
        kind: Finding(
            len(groups),
            sum(map(len, groups)),
            [describe_group(rows, splits) for rows in sorted(groups, key=len, reverse=True)[:MAX_GROUPS]],
            note,
        )
        for kind, groups in groups_of_kind.items()
    }


def describe_group(rows: list[int], splits: Mapping[int, str]) -> Group:
    """A group with its number of rows in each split; a row of each split is shown."""
    counts = Counter(splits[row] for row in rows)
    firsts = [next(row for row in rows if splits[row] == split) for split in SPLITS if split in counts]
    others = [row for row in rows if row not in firsts][: max(0, MAX_SHOWN - len(firsts))]
    listed = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS if split in counts)
    return Group(f"{len(rows):,} rows: {listed}", firsts + others)


def similar(texts: Sequence[str]) -> list[list[int]]:
    """Groups of two or more texts of which each is a near-duplicate of another one in its group.

    Unlike in the index of the evaluated prompts, frequent words count, because a user sees a false group, but not that
    one is missing.
    """
    from scipy.cluster.hierarchy import DisjointSet

    contents = [shingles(text) for text in texts]
    signatures, has_words = minhash(contents), np.array([bool(content) for content in contents], bool)
    groups = DisjointSet(range(len(texts)))
    for keys in band_keys(signatures):
        order = keys.argsort(kind="stable")
        firsts = order[keys[order].searchsorted(keys[order])]
        # Each text is compared with the first one and the previous one that have the same key: not all pairs, whose
        # number is quadratic.
        for others in (firsts, np.roll(order, 1)):
            is_pair = (keys[others] == keys[order]) & (others != order) & has_words[order]
            similarity = (signatures[others] == signatures[order]).mean(axis=1)
            likely = is_pair & (similarity >= MIN_ESTIMATED_SIMILARITY)
            for one, other in zip(others[likely].tolist(), order[likely].tolist(), strict=True):
                if not groups.connected(one, other) and jaccard(contents[one], contents[other]) >= THRESHOLD:
                    groups.merge(one, other)
    return [sorted(group) for group in groups.subsets() if len(group) > 1]


@dataclass(frozen=True)
class Languages:
    """Languages of answers, and the rows whose last question has another one.

    counts: for the most frequent languages, the code, the number of rows, and the position of one.
    """

    counts: list[tuple[str, int, int]]
    mixed: Finding
    num_rows: int
    num_short: int


def languages(tables: Tables) -> Languages:
    import py3langid

    def classify(text: str) -> str | None:
        return py3langid.classify(text)[0] if len(text.encode()) >= MIN_LANGUAGE_BYTES else None

    used = {*tables.used.index}
    positions = [position for position in sorted(tables.sample) if position in used]
    # Evenly spaced, because sources can follow each other.
    positions = positions[:: len(positions) // MAX_LANGUAGES + 1]
    answers = {row: classify(tables.sample[row][1]) for row in positions}
    first = {language: row for row, language in reversed(answers.items())}
    counts = Counter(language for language in answers.values() if language)
    questions = {row: classify(tables.sample[row][0][-1]) for row, language in answers.items() if language}
    differ = [row for row, language in questions.items() if language and language != answers[row]]
    shown = [Group(f"question: {questions[row]}, answer: {answers[row]}", [row]) for row in differ[:MAX_GROUPS]]
    listed = [(language, count, first[language]) for language, count in counts.most_common(MAX_LISTED)]
    return Languages(listed, Finding(len(differ), len(differ), shown), len(positions), len(positions) - counts.total())


def failing_checks(count: int) -> Finding:
    """Rows whose own answer fails their check. count: as `format` has counted them."""
    groups: list[Group] = []
    start = num_checked = 0
    for batch in read_batches(FORMATTED, ["check", "response"]) if count else ():
        checked = batch["check"].to_pandas().dropna()
        for row, check in checked.items():
            if not is_right(check, batch["response"][row].as_py()):
                groups.append(Group(f"check: {check:.300}", [start + row]))
        num_checked += len(checked)
        start += len(batch)
        if len(groups) >= min(count, MAX_GROUPS) or num_checked >= MAX_CHECKED:
            break
    return Finding(count, count, groups[:MAX_GROUPS])


def score_ends(tables: Tables) -> dict[str, Finding]:
    """The training rows at each end of the scores: how many are beyond the limit, and the furthest ones.

    Empty if there are no scores. Whether an answer copies its question is decided by their texts, which no score does
    as well.
    """
    if (scores := tables.scores) is None:
        return {}
    late = scores["eos_loss"] - scores["eos_loss"].median()
    # Plain text, which has no PMI, is its own question and answer.
    is_copy = [
        row in tables.sample and has_prompt and copies(*tables.sample[row])
        for row, has_prompt in zip(scores["position"], scores["pmi"].notna(), strict=True)
    ]
    kinds = {
        "independent": (scores["pmi"], scores["pmi"] <= 0, "PMI {:.2f} nats", scores["pmi"]),
        "copied": (scores["loss"][is_copy], pd.Series(is_copy), "loss {:.2f} nats/token", scores["loss"]),
        "early end": (-late, late >= EARLY_END, "EOS loss {:.2f} nats", scores["eos_loss"]),
    }
    findings = {}
    for kind, (order, is_beyond, title, values) in kinds.items():
        ends = order.dropna().sort_values(kind="stable").index[:MAX_GROUPS]
        groups = [Group(title.format(values[row]), [int(scores["position"][row])]) for row in ends]
        findings[kind] = Finding(int(is_beyond.sum()), int(is_beyond.sum()), groups)
    return findings


def copies(questions: Sequence[str], answer: str) -> bool:
    """Whether an answer is a part of its question, and at least a share `COPIED` of it."""
    question, answer = normalize(questions[-1]), normalize(answer)
    return question != "" and answer in question and len(answer) >= COPIED * len(question)
