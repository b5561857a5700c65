"""What changed between two revisions and is it better: `review.md`, `review.html`, exit code 1 where a gate is broken.

`make review BASE=main` compares the workspace with a branch, a commit or an experiment; REV names another than the
workspace.
"""

import argparse
from pathlib import Path

from review import plots, report
from review.comparison import compare_revisions
from review.gates import GATES, check_gates, read_gates
from review.revisions import WORKSPACE, Revision
from stages.shared.errors import UserError
from stages.shared.files import write_text
from stages.shared.run import run
from stages.shared.terminal import summary

MARKDOWN, PAGE = Path("review.md"), Path("review.html")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m review", description=__doc__)
    parser.add_argument("base", help="branch, tag, commit or experiment to compare with")
    parser.add_argument("revision", nargs="?", default=WORKSPACE, help="the other; left out, the workspace")
    options = parser.parse_args()

    gates = read_gates()
    before, after = Revision(options.base), Revision(options.revision)
    comparison = compare_revisions(before, after)
    checked = check_gates(gates, comparison)
    write_text(MARKDOWN, report.markdown(comparison, checked, plots.as_mermaid(before, after)))
    images = plots.as_images(plots.pictures(before, after))
    write_text(PAGE, report.page(report.markdown(comparison, checked, images), f"{before.name} → {after.name}"))

    facts = {"loss": report.headline(comparison)}
    facts |= {f"gate {number}": gate.sentence for number, gate in enumerate(checked, 1)}
    summary(facts, wrote=[MARKDOWN, PAGE], then=f"open {PAGE} in a browser")
    if broken := sum(not gate.holds for gate in checked):
        raise UserError(f"{broken} of {len(checked)} gates broken; {MARKDOWN} says more, {GATES} is where they stand")


if __name__ == "__main__":
    run(main, alone=False)
