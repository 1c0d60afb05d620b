"""A page for a browser in one file: nothing is fetched from elsewhere, light or dark as the reader has it."""

from collections.abc import Iterable
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #555; --paper: #fff; --line: #d4d4d4; --card: #f6f7f8;
  --good: #007a58; --bad: #b03a00; --near: #7a5b00; --one: #0072b2; --two: #c25700; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a8a8a8; --paper: #16181b; --line: #3a3e44;
  --card: #1f2226; --good: #3fcf9f; --bad: #ff8f5a; --near: #e0b84c; --one: #5ab4ec; --two: #f0994a; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 84rem;
  margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.verdict { border-left: .5rem solid; padding: .7rem 1rem; border-radius: .2rem; background: var(--card); }
.passed { border-color: var(--good); } .failed { border-color: var(--bad); }
.open { border-color: var(--one); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 1.2rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
figure { margin: 0; } figcaption { color: var(--soft); font-size: .92rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .18rem .5rem; text-align: right; white-space: nowrap; } th { color: var(--soft); font-weight: 600; }
th.l, td.l { text-align: left; } td.any { white-space: normal; overflow-wrap: anywhere; }
thead tr:last-child th { border-bottom: 2px solid var(--line); } tbody tr.new td { border-top: 1px solid var(--line); }
td.bad { color: var(--bad); font-weight: 600; } td.near { color: var(--near); } th.run { text-align: center; }
code, pre { font: .92em/1.5 ui-monospace, monospace; }
pre { background: var(--card); padding: .7rem 1rem; border-radius: .2rem; overflow-x: auto; margin: .3rem 0 1rem; }
footer { color: var(--soft); font-size: .88rem; margin: 2.5rem 0 1rem; }
"""


def page(title: str, body: str, style: str = "", made: str = "") -> str:
    """A whole page.

    Args:
        title: as text; the first heading, too.
        body: HTML behind it.
        style: rules of this page besides the common ones.
        made: by what and when, at the foot.
    """
    foot = f"<footer>{escape(made)}</footer>\n" if made else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{GENERATOR}">
<title>{escape(title)}</title><style>{_STYLE}{style}</style></head>
<body>
<h1>{escape(title)}</h1>
{body}
{foot}</body>
</html>
"""


GENERATOR = "dsv4-bridge"


def verdict(good: bool | None, words: str) -> str:
    """A sentence that stands out; None: it is neither good nor bad yet."""
    kind = "open" if good is None else "passed" if good else "failed"
    return f'<p class="verdict {kind}">{escape(words[:1].upper() + words[1:])}.</p>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and what they are, as text."""
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(words)}</dd>' for name, words in pairs)}</dl>"
