import io
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from bit_ray.errors import ConfigError
from bit_ray.plots.lines import Line, LinePlot, line_csv, plain
from bit_ray.studies.report import Report, Table, render

FEW = settings(deadline=None, database=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])
VOID = {"meta", "br", "img", "input", "link", "hr"}
TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "section", "ul", "li", "figure", "figcaption"}
TAGS |= {"div", "table", "thead", "tbody", "tr", "th", "td", "p", "pre", "code", "details", "summary"}
TAGS |= {"svg", "g", "path", "use", "defs", "text", "clippath", "rect"}


def plot(name="loss", *lines, **settings):
    return LinePlot(name=name, title="Loss falls", x_label="step", y_label="loss (nats)", lines=lines, **settings)


FALLING = Line(label="rate 0.03", x=(0.0, 1.0, 2.0), y=(3.0, 2.0, 1.0), low=(2.9, 1.9, 0.9), high=(3.1, 2.1, 1.1))
MARKS = Line(label="best", x=(1.0, 2.0), y=(0.5, 0.6), low=(0.4, 0.5), high=(0.6, 0.7), points=True)
FULL = Report(
    title="Rates",
    command="bit-ray rates \\\n  --seeds 3",
    findings=("0.03 leads by 1.2 points [0.4, 2.0].",),
    tables=(Table(title="Top-1", header=("rate", "top-1"), rows=(("low", "84.1%"), ("high", "–")), note="3 seeds"),),
    plots=(plot("loss", FALLING), plot("best", MARKS, caption="Means of 3 seeds.", log_x=True, percent_y=True)),
    paper=("The paper has 85.0%.",),
    missing=("0.3, seed 2",),
    settings={"seeds": "3"},
)


class Page(HTMLParser):
    """Reads a page, and checks that each tag is one of ours, is closed in order, and loads nothing."""

    def __init__(self, html):
        super().__init__()
        self.open, self.found, self.ids = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag in TAGS
        values = dict(attrs)
        assert not {name for name in values if name == "src" or name.startswith("on")}
        assert values.get("href", values.get("xlink:href", "#")).startswith("#")
        self.ids += [values["id"]] if "id" in values else []
        self.found.append([tag, "", values])
        if tag not in VOID:
            self.open.append(len(self.found) - 1)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.found[self.open.pop()][0] == tag

    def handle_data(self, data):
        for index in self.open:
            self.found[index][1] += data

    def handle_comment(self, data):
        raise AssertionError(data)

    def texts(self, tag):
        return [one_line(text) for found, text, _ in self.found if found == tag]

    def classes(self, tag):
        return [values.get("class") for found, _, values in self.found if found == tag]


def one_line(text):
    return " ".join(plain(text).split())


def page(report):
    return Page(render(report)["report.html"].decode())


def markdown(report):
    return MarkdownIt("commonmark").enable("table").parse(render(report)["report.md"].decode())


def cells(tokens):
    """Texts of the tables of a Markdown page, row by row."""
    rows = []
    for before, token in zip(tokens, tokens[1:], strict=False):
        if token.type == "tr_open":
            rows.append([])
        if before.type in ("th_open", "td_open"):
            assert {child.type for child in token.children} <= {"text"}
            rows[-1].append("".join(child.content for child in token.children))
    return rows


def test_page_has_all_parts_with_what_is_missing_first():
    found = page(FULL)
    headings = ["Not finished", "Findings", "Top-1", "Beside the paper", "Run it again"]
    assert found.texts("h1") == ["Rates"]
    assert found.texts("h2") == headings
    assert found.texts("li") == ["0.3, seed 2", "0.03 leads by 1.2 points [0.4, 2.0].", "The paper has 85.0%."]
    assert found.texts("th") == ["rate", "top-1", "seeds"]
    assert found.texts("td") == ["low", "84.1%", "high", "–", "3"]
    assert found.classes("td") == [None, "n", None, "n", None]
    assert found.texts("figcaption") == [
        "The numbers: plots/loss.csv",
        "Means of 3 seeds. The numbers: plots/best.csv",
    ]
    [command] = [text for tag, text, _ in found.found if tag == "code"]
    assert command.strip() == FULL.command
    assert found.found[0][2] == {"lang": "en"}
    assert render(FULL)["report.html"].startswith(b"<!DOCTYPE html>\n<html")


def test_plots_are_in_the_page_each_with_a_name_for_those_who_do_not_see_it():
    found = page(FULL)
    assert found.texts("svg")[0].startswith("Loss falls")
    assert {"rate 0.03", "step", "loss (nats)"} <= set(found.texts("text"))
    drawings = [values for tag, _, values in found.found if tag == "svg"]
    assert [values["aria-labelledby"] for values in drawings] == ["loss_title", "best_title"]
    assert {"loss_title", "best_title"} <= set(found.ids)
    assert len(set(found.ids)) == len(found.ids)


def test_what_a_drawing_refers_to_is_in_it():
    html = render(FULL)["report.html"].decode()
    first, second = re.findall(r"<svg .*?</svg>", html, re.DOTALL)
    for drawing in (first, second):
        wanted = set(re.findall(r'(?:url\(|href=")#([^")]+)', drawing))
        assert wanted
        assert wanted <= set(re.findall(r' id="([^"]+)"', drawing))


def test_markdown_has_all_parts_and_links_to_its_pictures():
    files = render(FULL)
    assert files["report.md"].decode() == (
        "# Rates\n\n"
        "## Not finished\n\n- 0.3, seed 2\n\n"
        "## Findings\n\n- 0.03 leads by 1.2 points \\[0.4, 2.0\\].\n\n"
        "## Loss falls\n\n![Loss falls](plots/loss.png)\n\n[The numbers](plots/loss.csv)\n\n"
        "## Loss falls\n\n![Loss falls](plots/best.png)\n\nMeans of 3 seeds. [The numbers](plots/best.csv)\n\n"
        "## Top-1\n\n| rate | top-1 |\n| --- | ---: |\n| low | 84.1% |\n| high | – |\n\n3 seeds\n\n"
        "## Beside the paper\n\n- The paper has 85.0%.\n\n"
        "## Run it again\n\n    bit-ray rates \\\n      --seeds 3\n\n"
        "<details><summary>Settings</summary>\n\n| setting | value |\n| --- | ---: |\n| seeds | 3 |\n\n</details>\n"
    )
    assert sorted(files) == [
        "plots/best.csv",
        "plots/best.png",
        "plots/loss.csv",
        "plots/loss.png",
        "report.html",
        "report.md",
    ]
    assert files["plots/loss.csv"].decode() == line_csv(FULL.plots[0])


def test_pictures_can_be_opened_and_tell_nothing_of_their_time_and_program():
    with Image.open(io.BytesIO(render(FULL)["plots/loss.png"])) as picture:
        picture.load()
        assert picture.size == (1125, 690)
        assert set(picture.info) == {"dpi"}
    assert "<metadata" not in render(FULL)["report.html"].decode()


def test_a_report_before_the_first_result_is_a_page():
    report = Report(title="Rates", command="bit-ray rates", findings=(), plots=(plot(),), missing=("all of it",))
    found = page(report)
    assert found.texts("h2") == ["Not finished", "Findings", "Run it again"]
    assert found.texts("li") == ["all of it", "Nothing is finished yet."]
    assert "no data yet" in found.texts("text")
    assert "- Nothing is finished yet.\n" in render(report)["report.md"].decode()
    assert "details" not in render(report)["report.md"].decode()


SCRIPT = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from test_report import FULL, render
print({name: hashlib.sha256(content).hexdigest() for name, content in render(FULL).items()})
"""


def test_other_processes_with_other_settings_give_the_same_bytes(tmp_path):
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nsavefig.dpi: 30\nsvg.fonttype: path\nlines.linewidth: 9\n")
    outputs = set()
    for seed, changed in (
        ("1", {}),
        ("2", {"MATPLOTLIBRC": str(tmp_path), "SOURCE_DATE_EPOCH": "1", "TZ": "Asia/Tokyo"}),
    ):
        outputs.add(
            subprocess.run(
                [sys.executable, "-c", SCRIPT, os.path.dirname(__file__)],
                env=os.environ | {"PYTHONHASHSEED": seed} | changed,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
    assert len(outputs) == 1
    assert "report.html" in outputs.pop()


def test_settings_of_matplotlib_are_as_before():
    before = dict(matplotlib.rcParams)
    render(FULL)
    assert dict(matplotlib.rcParams) == before


def test_secrets_in_uris_are_not_shown():
    secret = "s3://me:secret@bucket"
    line = Line(label=secret, x=(0.0,), y=(1.0,))
    report = Report(
        title=secret,
        command=f"bit-ray --storage {secret}",
        findings=(secret,),
        tables=(Table(title=secret, header=(secret,), rows=((secret,),)),),
        plots=(plot("loss", line),),
        settings={"storage": secret},
    )
    files = render(report)
    assert b"s3://***@bucket" in files["report.html"]
    assert not [name for name, content in files.items() if b"secret" in content]


def test_what_looks_like_a_tag_or_cannot_be_encoded_is_text_in_plots_too():
    strange = "</title></svg><script>\ud800"
    line = Line(label=strange, x=(0.0,), y=(1.0,))
    drawn = LinePlot(name="p", title=strange, x_label=strange, y_label=strange, lines=(line,), caption=strange)
    files = render(Report(title="T", command="c", findings=("",), plots=(drawn,)))
    found = Page(files["report.html"].decode())
    assert found.texts("title") == ["T", one_line(strange)]
    assert found.texts("text").count(one_line(strange)) == 4
    assert found.texts("figcaption") == [f"{one_line(strange)} The numbers: plots/p.csv"]
    assert files["plots/p.csv"] == b'"label","x","y","low","high"\n"</title></svg><script>\\ud800",0.0,1.0,"",""\n'


NASTY = st.sampled_from(
    [
        "<script>alert(1)</script>",
        "<img src=http://x onerror=y>",
        "</title></svg>",
        "--><b>",
        "]]>",
        "{{ 7 * 7 }}",
        "{%",
    ]
    + ["|", "\\", "\\|", "`|`", "\n", "\r\n| a | b |\n", "\n\n# x\n", "](http://x)", "![x](http://x)", "<http://x>"]
    + ["&lt;", "&#60;script>", "$x$", "\x00", "\ud800", "\u2028", "'\"", "**b**", "___", "~~~", "```", "- ", "    "]
)
TEXT = st.lists(st.one_of(NASTY, st.text(max_size=12)), max_size=3).map("".join)
SENTENCES = st.lists(TEXT, max_size=2).map(tuple)
NUMBER = st.one_of(st.floats(), st.sampled_from([0.0, 1e-5, 0.5, 0.7, 1e6]))


@st.composite
def tables(draw):
    columns = draw(st.integers(1, 3))
    row = st.tuples(*[TEXT] * columns)
    return Table(title=draw(TEXT), header=draw(row), rows=tuple(draw(st.lists(row, max_size=2))), note=draw(TEXT))


@st.composite
def lines(draw):
    count, bounded = draw(st.integers(0, 4)), draw(st.booleans())
    x, y, low, high = (tuple(draw(NUMBER) for _ in range(count)) for _ in range(4))
    ends = {"low": low, "high": high} if bounded else {}
    return Line(label=draw(TEXT), x=x, y=y, points=draw(st.booleans()), **ends)


PLOT = st.builds(
    LinePlot,
    name=st.just("p"),
    title=TEXT,
    x_label=TEXT,
    y_label=TEXT,
    lines=st.lists(lines(), max_size=3).map(tuple),
    log_x=st.booleans(),
    log_y=st.booleans(),
    percent_y=st.booleans(),
    caption=TEXT,
    verticals=st.lists(st.tuples(NUMBER, TEXT), max_size=2).map(tuple),
)


def reports(plots):
    return st.builds(
        Report,
        title=TEXT,
        command=TEXT,
        findings=SENTENCES,
        tables=st.lists(tables(), max_size=2).map(tuple),
        plots=plots,
        paper=SENTENCES,
        missing=SENTENCES,
        settings=st.dictionaries(TEXT, TEXT, max_size=2),
    )


def check_page(report):
    html = render(report)["report.html"].decode()
    found = Page(html)
    assert "<script" not in html.lower()
    assert found.texts("h1") == [one_line(report.title)]
    sentences = (*report.missing, *(report.findings or ("Nothing is finished yet.",)), *report.paper)
    assert found.texts("li") == [one_line(text) for text in sentences]
    expected = [text for table in report.tables for row in table.rows for text in row] + [*report.settings.values()]
    assert found.texts("td") == [one_line(text) for text in expected]


@FEW
@given(report=reports(st.tuples(PLOT)))
def test_any_text_and_number_in_a_plot_makes_a_page_that_loads_nothing(report):
    check_page(report)


@settings(FEW, max_examples=100)
@given(report=reports(st.just(())))
def test_any_text_in_a_report_stays_text(report):
    check_page(report)


@settings(FEW, max_examples=100)
@given(report=reports(st.just(())))
def test_any_text_in_markdown_stays_text(report):
    tokens = markdown(report)
    expected = [row for table in report.tables for row in (table.header, *table.rows)]
    if report.settings:
        expected += [("setting", "value"), *report.settings.items()]
    assert cells(tokens) == [[plain(text).strip() for text in row] for row in expected]
    html = [token.content for token in tokens if token.type == "html_block"]
    assert [text.strip() for text in html] == ["<details><summary>Settings</summary>", "</details>"] * bool(html)
    kinds = {child.type for token in tokens for child in token.children or ()}
    assert not kinds & {"html_inline", "link_open", "image", "code_inline"}


def test_rows_of_other_lengths_are_refused():
    with pytest.raises(ConfigError, match="^table 'T': 2 columns, and a row of 1; accepted: one or more columns"):
        Table(title="T", header=("a", "b"), rows=(("1", "2"), ("1",)))
    with pytest.raises(ConfigError, match="^table 'T': 0 columns; accepted: one or more columns"):
        Table(title="T", header=(), rows=())


def test_two_plots_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="^plots: loss twice; accepted: a name for each plot; rename one$"):
        Report(title="T", command="c", findings=(), plots=(plot(), plot()))


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (("1", "-0.5", "+1.2 [0.1, 2.3]", "84.1%", "1,000"), True),
        (("[0.1, 0.2]", "", "–", "< 0.01", "±.5"), True),
        (("1", "none"), False),
        (("", "–"), False),
        ((), False),
    ],
)
def test_a_column_is_of_numbers_if_it_has_some_and_nothing_else(column, expected):
    assert Table(title="T", header=("a",), rows=tuple((cell,) for cell in column)).numeric == (expected,)
