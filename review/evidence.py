"""What limits the evidence of a review, as Markdown: outdated stages, changed conditions, missing files."""

from collections import Counter
from collections.abc import Sequence

from review.comparison import Comparison
from review.gates import NOTHING_TO_COMPARE, GateResult
from review.markup import table, text
from stages.scoring.scorers import SCORERS
from stages.text import code

MAX_OUTDATED = 8  # differences that are listed for each revision


def evidence_in_words(comparison: Comparison, gates: Sequence[GateResult]) -> list[str]:
    """What limits the evidence: outdated stages, revisions without results, and changed conditions."""
    parts = []
    for name, stages in comparison.outdated.items():
        more = [f"and {len(stages) - MAX_OUTDATED:,} more"] if len(stages) > MAX_OUTDATED else []
        parts.append(
            f"**✗ The results of {code(name)} are outdated, so no gate is decided:** they do not belong to its "
            f"code, parameters and data. {text('; '.join([*stages[:MAX_OUTDATED], *more]))}. Run {code('dvc repro')} "
            "there, commit the results and review again."
        )
    parts += [f"**{text(warning)}**" for warning in comparison.warnings()]
    if uncompared := [gate.rule for gate in gates if gate.passed and gate.found.startswith(NOTHING_TO_COMPARE)]:
        parts.append(f"**Passed without a comparison:** {text('; '.join(uncompared))}.")
    if changed := changed_kinds(comparison):
        parts.append(f"**Changed conditions:** {text(', '.join(changed))}. The section of that name lists them.")
    return parts


def changed_kinds(comparison: Comparison) -> list[str]:
    """What decides a review and differs between the revisions, with the number of changes."""
    counts = Counter(change.name.partition(":")[0] for change in comparison.changed_conditions)
    if comparison.changed_scorers:
        counts[str(SCORERS)] = sum(line.startswith(("+", "-")) for line in comparison.changed_scorers[2:])
    return [f"{name} ({number:,})" for name, number in counts.items()]


def missing_table(comparison: Comparison) -> str:
    """The files that could not be read, why, and what helps."""
    rows = [
        [code(path), code(side.name), text(reason)]
        for side in (comparison.before, comparison.after)
        for path, reason in sorted(side.missing.items())
    ]
    help_ = (
        f"{code('dvc repro')} in a checkout of that revision writes them again. If they were written on another "
        f"machine and both can use the same DVC remote, {code('dvc push')} there makes them available here."
    )
    return f"{table(['file', 'revision', 'reason'], rows)}\n\n{help_}" if rows else ""
