"""index.html of a gallery: one page that needs nothing but the pictures beside it. No drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

GENERATOR = "fastddpm figures"  # by which a page of ours is known

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fbfbfa; --soft: #666; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e3; --paper: #161617; --soft: #a0a09c; --line: #38383a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 64rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 0 0 .5rem; }
h2 small { font-weight: normal; color: var(--soft); }
section { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: 1.5rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; padding: 0; list-style: none; }
a { color: inherit; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { margin: .75rem 0 0; max-width: 46rem; }
code { font: .85rem/1.4 ui-monospace, monospace; }
pre { margin: .5rem 0 0; overflow-x: auto; color: var(--soft); }
"""


class Section(NamedTuple):
    """A picture on the page.

    numbers: of the paper's figures;  file: its name beside the page;  size: (width, height)
    command: what draws it
    """

    name: str
    title: str
    numbers: str
    file: str
    size: tuple[int, int]
    caption: str
    alt: str
    command: str


def page(
    title: str,
    facts: Mapping[str, str],
    command: str,
    sections: Sequence[Section],
    left_out: Mapping[str, str],
) -> str:
    """The page as HTML, with its own style, and links that are names of files beside it.

    facts: of all pictures;  command: what draws them;  left_out: titles, and why
    """
    links = "".join(f'<li><a href="#{s.name}">{escape(s.title)}</a></li>\n' for s in sections)
    rest = "".join(f"<dt>{escape(name)}</dt><dd>{escape(why)}</dd>\n" for name, why in
                   left_out.items())  # fmt: skip
    if rest:
        rest = f'<section id="left-out">\n<h2>Not here</h2>\n<dl>\n{rest}</dl>\n</section>\n'
    said = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>\n" for k, v in facts.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{GENERATOR}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<dl>
{said}</dl>
<pre><code>{escape(command)}</code></pre>
<nav><ul>
{links}</ul></nav>
</header>
<main>
{"".join(map(_section, sections))}{rest}</main>
</body>
</html>
"""


def is_ours(text: str) -> bool:
    return f'<meta name="generator" content="{GENERATOR}">' in text


def _section(s: Section) -> str:
    width, height = s.size
    return f"""<section id="{s.name}">
<h2>{escape(s.title)} <small>{escape(s.numbers)} of the paper</small></h2>
<figure>
<a href="{s.file}"><img src="{s.file}" alt="{escape(s.alt)}" width="{width}" height="{height}"></a>
<figcaption>{escape(s.caption)}
<pre><code>{escape(s.command)}</code></pre>
</figcaption>
</figure>
</section>
"""
