"""Links from page to page lead somewhere, and every page is reached from the front page."""

import re
from pathlib import Path

import pytest

from tests.documented import PAGES, ROOT

DOCS = ROOT / "docs"
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,4} (.+)$", re.MULTILINE)
_TARGET = re.compile(r"^\(([\w-]+)\)=$", re.MULTILINE)


def links(page: Path) -> list[str]:
    """Return what a page links to here: neither the web nor Sphinx's own pages."""
    found = _LINK.findall(_CODE.sub("", page.read_text()))
    return [link for link in found if "://" not in link and link not in ("search", "genindex")]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST make them, and its named targets."""
    text = page.read_text()
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    titles = [
        re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in _HEADING.findall(without_code)
    ]
    return set(titles) | set(_TARGET.findall(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page: Path):
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_front_pages_contents_once():
    front = (DOCS / "index.md").read_text()
    listed = [
        name
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", front, re.DOTALL)
        for name in tree.split("\n\n")[1].split()
    ]
    assert sorted(listed) == sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")


def test_a_dead_link_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n[here](#a-page) [`x`](other.md) [web](https://example.org) `[no](link.md)`\n")
    assert links(page) == ["#a-page", "other.md"]
    assert anchors(page) == {"a-page"}
