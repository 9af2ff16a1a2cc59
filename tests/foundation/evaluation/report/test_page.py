"""What is put into a page comes out as the text that it is, and a page may fetch nothing and run nothing."""

from html.parser import HTMLParser

import pytest

from foundation.evaluation.report.markup import Markup, element, listed
from foundation.evaluation.report.page import Section, page
from foundation.evaluation.report.tables import p_value, table, with_interval

NASTY = "<script>alert('x')</script>&\"'"


class Reader(HTMLParser):
    """Collects tags, attributes and text as a browser does."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    return reader


def test_text_and_attributes_are_escaped_and_markup_is_not():
    found = read(element("p", NASTY, element("b", NASTY), title=NASTY))
    assert found.tags == ["p", "b"]
    assert found.attributes == [("title", NASTY)]
    assert "".join(found.text) == NASTY * 2


def test_none_is_left_out_and_no_list_stands_empty():
    assert element("td", None, "x", class_=None) == "<td>x</td>"
    assert listed([]) == ""


def test_a_page_of_nasty_names_has_no_script_and_a_policy_that_allows_no_fetching():
    body = table([NASTY, "r"], [[NASTY, NASTY]], caption=NASTY)
    html = page(NASTY, [Section(key="one", heading=NASTY, lead=NASTY, body=body)], made=NASTY)
    found = read(html)
    assert "script" not in found.tags
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in found.attributes
    assert not any(name in ("src", "href") and not str(value).startswith("#") for name, value in found.attributes)
    assert html.count("<h2") == 1
    assert "http" not in html.replace("http-equiv", "")


def test_headings_of_columns_and_rows_say_what_they_head():
    html = table(["subject", "system", "r"], [["subj01", "ridge", ".4"]], caption="scores", n_leading=2)
    assert html.count('scope="col"') == 3
    assert html.count('scope="row"') == 2
    assert "<td>.4</td>" in html


@pytest.mark.parametrize(
    ("numbers", "told"),
    [((0.4, 0.3, 0.5), ".400 [.300 .500]"), ((None, None, None), "n/a"), ((0.4, None, None), ".400")],
    ids=["interval", "undefined", "no interval"],
)
def test_numbers_are_told_with_their_intervals(numbers, told):
    assert with_interval(*numbers) == told


def test_differences_have_a_sign_and_small_p_values_a_bound():
    assert with_interval(0.02, -0.01, 0.05, signed=True) == "+.020 [-.010 +.050]"
    assert [p_value(p) for p in (None, 0.0001, 0.04)] == ["n/a", "< .001", ".040"]


def test_markup_made_of_markup_stays_as_it_is():
    assert element("div", Markup("<b>x</b>")) == "<div><b>x</b></div>"
