"""Tests of the demo: README, documentation and data agree with its results. Other projects skip them.

The hash is that of the user's files. To get its new value after a change to one of them, run
`pytest -rs tests/demo`.
"""

import hashlib

import pytest

from tests.clone import ROOT

USER_FILES = ("data/instructions.jsonl", "data/retention.jsonl")
USER_FILES += ("gates.yaml", "must_pass.yaml", "params.yaml", "scorers.py")
DEMO = "be1ca8147c03c342f34253244c5d859951e14271a3559c55fc3cfdf3381dad57"

contents = [(ROOT / name).read_bytes() if (ROOT / name).exists() else b"missing" for name in USER_FILES]
found = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
if found != DEMO:
    pytest.skip(
        f"this project is not the demo, because one of these files differs: {', '.join(USER_FILES)}. "
        f'If you changed the demo itself, set DEMO in tests/demo/__init__.py to "{found}"',
        allow_module_level=True,
    )
if "<!-- results -->\n|" not in (ROOT / "README.md").read_text(encoding="utf-8"):
    pytest.skip("the README does not show the results of the demo", allow_module_level=True)
