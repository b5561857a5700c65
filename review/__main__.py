"""Compare two revisions: write `review.md` and `review.html`; exit with code 1 if a gate fails.

`make review BASE=main` compares the workspace with a branch, commit or experiment; REV names another revision than the
workspace.
"""

import argparse
from pathlib import Path

from review import markup, plots, report
from review.comparison import Comparison
from review.conditions import GATES
from review.gates import check_gates
from review.revisions import WORKSPACE, Revision
from review.verdicts import MEASURE_NOISE
from stages.data.files import write_text
from stages.runtime.errors import UserError
from stages.runtime.run import run
from stages.runtime.terminal import summary

MARKDOWN, PAGE = Path("review.md"), Path("review.html")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m review", description=__doc__)
    parser.add_argument("base", help="branch, tag, commit or experiment to compare with")
    parser.add_argument("revision", nargs="?", default=WORKSPACE, help="the other revision; the workspace by default")
    options = parser.parse_args()

    before, after = Revision(options.base), Revision(options.revision)
    comparison = Comparison(before, after)
    results = check_gates(comparison)
    write_text(MARKDOWN, report.markdown(comparison, results, plots.as_mermaid(before, after)))
    images = plots.draw(before, after)
    loss_slices = [result for result in comparison.test.slices if result.metric.name == "loss"]
    about = "after − before, with 95% interval; small circles: runs with one seed; green: better, red: worse, "
    about += "blue: equivalent"
    figures = {
        "Metrics on the test split": plots.forest(comparison.test.metrics, f"Metrics: {about}"),
        "Slices of the test split": plots.forest(loss_slices, "Loss (nats/token) by slice"),
    }
    title = f"{before.name} → {after.name}"
    write_text(PAGE, markup.page(report.markdown(comparison, results, images), title, figures))

    lines = {f"outdated {name}": "; ".join(stages) for name, stages in comparison.outdated.items()}
    if warnings := comparison.warnings():
        lines["not compared"] = " ".join(warnings)
    lines["verdict"] = report.headline(comparison)
    if any(result.verdict == "unknown" for result in comparison.test.metrics):
        lines["run noise"] = f"not known; to measure it: {MEASURE_NOISE}"
    if changed := comparison.changed_kinds():
        lines["changed conditions"] = ", ".join(changed)
    lines |= {f"gate {number}": result.sentence for number, result in enumerate(results, 1)}
    summary(lines, wrote=[MARKDOWN, PAGE], then=f"open {PAGE} in a browser")
    if comparison.outdated:
        raise UserError(
            f"no gate is decided, because {' and '.join(comparison.outdated)} is outdated; run `dvc repro` there, "
            "commit the results and review again"
        )
    if failed := sum(not result.passed for result in results):
        raise UserError(f"{failed} of {len(results)} gates failed; details are in {MARKDOWN}, the gates in {GATES}")


if __name__ == "__main__":
    run(main, exclusive=False)
