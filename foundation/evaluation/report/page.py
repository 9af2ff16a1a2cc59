"""The page: a document that holds its style and pictures, runs no script and may fetch nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from foundation.evaluation.report.markup import Markup, element, together

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #4f5965; --ground: #f4f5f7; --card: #ffffff;
  --line: #d0d5db; --link: #004e8a; }
@media (prefers-color-scheme: dark) { :root { --text: #e8eaed; --soft: #b3bac3; --ground: #15181c; --card: #1f242a;
  --line: #3d454f; --link: #8cc4ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
header, main, footer { max-width: 1320px; margin: 0 auto; padding: 0 16px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 24px 0 8px; }
h2 { font-size: 1.25rem; margin: 0 0 8px; }
h3 { font-size: 1.05rem; margin: 20px 0 4px; }
p { margin: 6px 0; max-width: 75ch; }
.lead, figcaption, footer { color: var(--soft); }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; padding: 0; margin: 8px 0 16px; }
nav a { display: inline-block; padding: 4px 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px; margin: 0 0 16px; }
ul { margin: 6px 0; padding-left: 1.3em; max-width: 90ch; }
.panels { display: grid; gap: 12px; margin: 12px 0; align-items: start; justify-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); }
.panels.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 268px), 1fr)); }
figure { margin: 0; background: #ffffff; color: #1b1f24; border: 1px solid var(--line); border-radius: 6px;
  padding: 4px; max-width: 100%; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: #4f5965; font-size: 0.85rem; padding: 4px 6px; max-width: 400px; }
.example figcaption { max-width: 250px; }
.example img { margin: 0 auto; }
.scroll { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; color: var(--soft); padding: 4px 0; position: sticky; left: 0;
  max-width: min(75ch, calc(100vw - 40px)); }
th, td { padding: 3px 10px 3px 0; text-align: right; white-space: nowrap; vertical-align: top; }
thead th { border-bottom: 1px solid var(--line); vertical-align: bottom; }
tbody th, .leading { text-align: left; font-weight: 600; }
.wrapped td { white-space: normal; text-align: left; overflow-wrap: anywhere; min-width: 9em; }
.wrapped thead th { text-align: left; white-space: normal; }
.ruled > * { border-top: 1px solid var(--line); }
details { margin: 8px 0; }
summary { cursor: pointer; padding: 4px 0; color: var(--link); }
summary:focus-visible, a:focus-visible, .scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
@media (max-width: 480px) { header, main, footer { padding: 0 4px; } section { padding: 12px 8px; }
  figure { padding: 0; } tbody th { white-space: normal; } }
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    key: str
    """What a link to it says."""
    heading: str
    lead: str
    """One plain sentence: what is shown, and how to read it."""
    body: Markup


def page(title: str, sections: Sequence[Section], *, made: str) -> str:
    """Return the document.

    Parameters
    ----------
    made
        What made it and when, for its foot.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", title),
        element("style", Markup(_STYLE)),
    )
    links = (element("li", element("a", section.heading, href=f"#{section.key}")) for section in sections)
    header = element("header", element("h1", title), element("nav", element("ul", *links), aria_label="Sections"))
    body = element("body", header, element("main", *map(_section, sections)), element("footer", element("p", made)))
    return together([Markup("<!DOCTYPE html>\n"), element("html", head, body, lang="en"), "\n"])


def _section(section: Section) -> Markup:
    heading = element("h2", section.heading, id=f"{section.key}-heading")
    lead = element("p", section.lead, class_="lead")
    return element("section", heading, lead, section.body, id=section.key, aria_labelledby=f"{section.key}-heading")
