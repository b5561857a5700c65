"""Merge params.yaml in an update. Git runs it as a merge driver in `make update`: BASE OURS THEIRS, result in OURS.

Git alone reports a conflict if upstream adds a parameter next to a line that the project has changed.
"""

import re
import sys
from pathlib import Path


def main() -> None:
    base, ours, theirs = (parameters(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:])
    merged = dict(theirs)
    for name, text in ours.items():
        if text in (base.get(name), theirs.get(name)):
            continue
        if name in theirs or name not in base:
            merged[name] = text
        if theirs.get(name) != base.get(name):
            upstream = theirs.get(name, "removed it").strip()
            print(f"params.yaml: changed on both sides: yours: {text.strip()}; upstream: {upstream}")
    Path(sys.argv[2]).write_text("".join(merged.values()), encoding="utf-8")


def parameters(text: str) -> dict[str, str]:
    """The text of each parameter, with the comments above it.

    Example:
        >>> parameters("# Data\\na: 1\\nb:\\n  - 2\\n")
        {'a': '# Data\\na: 1\\n', 'b': 'b:\\n  - 2\\n'}
    """
    text = text.rstrip("\n") + "\n"
    starts = [(match.start(), match[1]) for match in re.finditer(r"^(?:(?:#.*)?\n)*(\w+):", text, re.MULTILINE)]
    ends = [start for start, _ in starts[1:]] + [len(text)]
    return {name: text[start:end] for (start, name), end in zip(starts, ends, strict=True)}


if __name__ == "__main__":
    main()
