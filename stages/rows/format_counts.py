"""Counts of formatted and rejected rows: for the metrics of `format`, its summary, and the checks that stop it."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.data.examples import IGNORE_INDEX
from stages.rows.show import describe
from stages.runtime.errors import UserError
from stages.runtime.params import FormatParams

COUNT_NAMES = ["rows_in", "kept", "left_out", "examples", "truncated", "tokens", "supervised_tokens"]
COUNT_NAMES += ["checks_failing_own_answer"]
MAX_LISTED = 5  # rows whose own answer fails their check
LENGTH_BIN = 16  # tokens per bar in the plot of lengths
KEPT_WHOLE = {"95%": 0.95, "99%": 0.99, "100%": 1.0}  # shares of the examples for which a max_length is named
MANY_TRUNCATED = 0.05  # share of the examples, above which the summary says what to do


class FormattedBatch(NamedTuple):
    """The result for a batch of raw rows, in order.

    examples, rejected: rows of `FORMATTED_SCHEMA` and of `REJECTED_SCHEMA`.
    failing: the source and a description of each row whose own answer fails its check.
    whole_lengths: tokens of each example before truncation, also of those that are rejected because they are too long.
    """

    examples: pa.Table
    rejected: list[dict[str, Any]]
    failing: Sequence[tuple[str, str]] = ()
    whole_lengths: Sequence[int] = ()


@dataclass
class Counts:
    """Statistics of formatted and rejected rows.

    sources: for each source, counts by the names in `COUNT_NAMES`.
    reasons: for each source, rejected rows by reason.
    lengths: examples by tokens ÷ `LENGTH_BIN`.
    whole_lengths: examples by tokens before truncation.
    first_rejected: for each source, a description of the first rejected row.
    first_failing: descriptions of the first rows whose own answer fails their check.
    """

    sources: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    reasons: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    lengths: Counter[int] = field(default_factory=Counter)
    whole_lengths: Counter[int] = field(default_factory=Counter)
    first_rejected: dict[str, str] = field(default_factory=dict)
    first_failing: list[str] = field(default_factory=list)

    def count(self, batch: FormattedBatch) -> None:
        for source, description in batch.failing:
            self.sources[source]["checks_failing_own_answer"] += 1
            self.first_failing = [*self.first_failing, description][:MAX_LISTED]
        self.whole_lengths.update(batch.whole_lengths)
        for row in batch.rejected:
            self.first_rejected.setdefault(row["source"], describe(row))
            self.sources[row["source"]].update(rows_in=1, left_out=1)
            self.reasons[row["source"]][row["reason"]] += 1
        # Without the texts, which `filter` would copy.
        counted = batch.examples.select(["source", "source_row", "labels", "truncated"])
        for name in pc.unique(counted["source"]).to_pylist():
            rows = counted.filter(pc.equal(counted["source"], name))
            labels = rows["labels"].combine_chunks()
            tokens = labels.flatten().to_numpy()
            num_rows = pc.count_distinct(rows["source_row"]).as_py()  # a row can have several examples
            self.sources[name].update(
                rows_in=num_rows,
                kept=num_rows,
                examples=len(rows),
                truncated=int(rows["truncated"].to_numpy().sum()),
                tokens=len(tokens),
                supervised_tokens=int(np.count_nonzero(tokens != IGNORE_INDEX)),
            )
            self.lengths.update((labels.value_lengths().to_numpy() // LENGTH_BIN).tolist())

    def add(self, later: "Counts") -> None:
        """Add the counts of the rows after these."""
        for name, counts in later.sources.items():
            self.sources[name].update(counts)
        for name, counts in later.reasons.items():
            self.reasons[name].update(counts)
        self.lengths.update(later.lengths)
        self.whole_lengths.update(later.whole_lengths)
        self.first_rejected = later.first_rejected | self.first_rejected
        self.first_failing = [*self.first_failing, *later.first_failing][:MAX_LISTED]

    @property
    def total(self) -> Counter[str]:
        return sum(self.sources.values(), Counter())

    @property
    def all_reasons(self) -> Counter[str]:
        return sum(self.reasons.values(), Counter())

    def check(self) -> None:
        """Check that most rows of each source can be trained on.

        Raises:
            UserError: more than half of the rows of a source were rejected, or all.
        """
        for name, counts in self.sources.items():
            # A row that the template can't express is not a mistake in the source, but nothing is left of it either.
            # Long rows are rejected because the user chose so.
            mistakes = counts["left_out"] - self.reasons[name]["not_rendered"] - self.reasons[name]["too_long"]
            if mistakes > counts["rows_in"] / 2 or not counts["kept"]:
                is_long = self.reasons[name]["too_long"] or self.reasons[name]["prompt_too_long"] == counts["left_out"]
                advice = "raise max_length" if is_long else "more than half were rejected; fix the source"
                raise UserError(
                    f"{name}: {counts['left_out']:,} of {counts['rows_in']:,} rows can't be trained on "
                    f"({listed(self.reasons[name])}); {advice}. First: "
                    f"{self.first_rejected[name]}"
                )

    def check_lengths(self, params: FormatParams) -> None:
        """Check that no row is too long, if the user chose so.

        Raises:
            UserError: a row is too long.
        """
        num_long = self.all_reasons["too_long"] + self.all_reasons["prompt_too_long"]
        if params.long_rows == "error" and num_long:
            raise UserError(
                f"long_rows: found {num_long:,} of {self.total['rows_in']:,} rows longer than max_length = "
                f"{params.max_length:,}; must be none with long_rows: error; set max_length to "
                f"{self.lengths_to_keep()['100%']:,}, or long_rows to truncate or reject"
            )

    def lengths_to_keep(self) -> dict[str, int]:
        """For each share in `KEPT_WHOLE`, the lowest `max_length` that truncates no more than the other examples."""
        lengths = sorted(self.whole_lengths)
        examples = np.cumsum([self.whole_lengths[length] for length in lengths])
        return {
            name: lengths[int(np.searchsorted(examples, math.ceil(share * examples[-1])))]
            for name, share in KEPT_WHOLE.items()
        }

    def metrics(self) -> dict[str, Any]:
        """The content of `metrics/format.json`, by source if there are several."""
        metrics: dict[str, Any] = {name: self.total[name] for name in COUNT_NAMES}
        metrics["max_length_to_keep"] = self.lengths_to_keep()
        metrics["left_out_by_reason"] = dict(sorted(self.all_reasons.items()))
        if len(self.sources) > 1:
            metrics["sources"] = {
                name: {key: counts[key] for key in COUNT_NAMES} for name, counts in sorted(self.sources.items())
            }
        return metrics


def listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common())


def describe_lengths(counts: Counts, params: FormatParams) -> str:
    """How many examples are truncated, and which `max_length` would keep them, if they are many."""
    num_truncated, num_examples = counts.total["truncated"], counts.total["examples"]
    text = f"{num_truncated:,} responses, at max_length = {params.max_length:,}"
    if num_truncated <= MANY_TRUNCATED * num_examples:
        return text
    to_keep = counts.lengths_to_keep()
    return (
        f"{text}: {num_truncated / num_examples:.0%} of the examples lose the end of their response and EOS token;\n"
        f"max_length = {to_keep['99%']:,} keeps 99% whole, {to_keep['100%']:,} all; or set long_rows: reject"
    )
