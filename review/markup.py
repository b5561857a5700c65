"""Tables, marked changes and pages from untrusted text, which can't become markup, mentions or links."""

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from html import escape

from markdown_it import MarkdownIt

from stages.text import heading

MAX_CELL_LENGTH = 240  # characters of an example's text in a table
# Text that begins a mention, a reference or a link on GitHub. An invisible word joiner after it prevents that.
LINKS = re.compile(r"@(?=\w)|#(?=\d)|\bGH-(?=\d)|www(?=\.)|:(?=//)", re.IGNORECASE)

STYLE = """
:root { color-scheme: light dark; --line: light-dark(#d1d9e0, #3d444d); --shade: light-dark(#f6f8fa, #151b23) }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
  color: light-dark(#1f2328, #f0f6fc); background: light-dark(#fff, #0d1117) }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border: 1px solid var(--line); padding: .35rem .7rem; text-align: left; vertical-align: top }
th { background: var(--shade) } td { font-variant-numeric: tabular-nums }
code { background: var(--shade); padding: .1rem .3rem; border-radius: .25rem; overflow-wrap: anywhere }
td s { background: light-dark(#ffebe9, #5d1a1d); color: light-dark(#82071e, #ffdcd7) }
td strong { background: light-dark(#dafbe1, #12432a); color: light-dark(#116329, #aff5b4); font-weight: inherit }
img { max-width: min(100%, 34rem) } svg { display: block; max-width: 100%; height: auto }
figure { margin: 1.5rem 0 } figcaption { font-size: 13px; opacity: .8 }
h1, h2 { border-bottom: 1px solid var(--line); padding-bottom: .3rem }
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; empty without rows."""
    lines = [header, ["---"] * len(header), *rows] if rows else []
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def truncate(content: str) -> str:
    return content if len(content) <= MAX_CELL_LENGTH else content[:MAX_CELL_LENGTH] + " …"


def text(content: str) -> str:
    """Untrusted text for a table cell: no markup, mentions or links; line breaks become symbols."""
    return LINKS.sub("\\g<0>\N{WORD JOINER}", heading(one_line(content)))


def one_line(content: str) -> str:
    return re.sub(r"\s*\n\s*", " ⏎ ", content.strip())


def highlight_diff(before: str | None, after: str | None) -> tuple[str, str]:
    """Both texts; removed words are struck through in the first, added words are bold in the second."""
    if before is None or after is None:
        return text(before or "(no such prompt)"), text(after or "(no such prompt)")
    old_words, new_words = one_line(before).split(), one_line(after).split()
    old_parts, new_parts = [], []
    matcher = SequenceMatcher(None, old_words, new_words, autojunk=False)
    for kind, old_start, old_end, new_start, new_end in matcher.get_opcodes():
        old, new = text(" ".join(old_words[old_start:old_end])), text(" ".join(new_words[new_start:new_end]))
        old_parts.append(old if kind in ("equal", "insert") else f"~~{old}~~")
        new_parts.append(new if kind in ("equal", "delete") else f"**{new}**")
    return " ".join(filter(None, old_parts)), " ".join(filter(None, new_parts))


def page(content: str, title: str, figures: Mapping[str, str]) -> str:
    """Markdown as an HTML page without scripts and external resources.

    Args:
        figures: SVG by the title of a section; it is placed after the section's first table.
    """
    body = str(MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).render(content))
    for section, figure in figures.items():
        before, heading, after = body.partition(f"<h2>{escape(section)}</h2>")
        body = before + heading + after.replace("</table>\n", f"</table>\n{figure}", 1)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f"{body}</body></html>\n"
    )
