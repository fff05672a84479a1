"""The page of a report: whole, true, accessible; and in a browser, on a phone's width and a desktop's."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench import reports

from gencore.bench import page
from gencore.bench.results import Candidate, Limits

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
VOID = {"meta", "br", "hr", "img", "input", "link", "wbr", "col", "area", "base", "embed", "source", "track"}
# Attributes that name other elements.
REFERENCES = ("aria-labelledby", "aria-describedby", "aria-controls", "for", "headers")


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    parents: tuple[str, ...]
    text: str = ""


@dataclass
class Page(HTMLParser):
    """Every element with its text; what is wrongly nested is an error."""

    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self):
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        element = Element(tag, dict(attrs), tuple(one.tag for one in self.open))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element.text += data

    def all(self, tag):
        return [one for one in self.elements if one.tag == tag]

    def text_of(self, identity):
        (found,) = [one for one in self.elements if one.attributes.get("id") == identity]
        return " ".join(found.text.split())


def parsed(text):
    document = Page()
    document.feed(text)
    document.close()
    assert document.open == []
    return document


@pytest.fixture(scope="module")
def text():
    return page.html(reports.report())


@pytest.fixture(scope="module")
def document(text):
    return parsed(text)


ODD = {
    "no results": reports.report(results=()),
    "one result": reports.single(),
    "no limits": reports.report(limits=Limits(math.nan, math.inf, {}, 0.0)),
    "no bandwidths": reports.report(limits=dataclasses.replace(reports.LIMITS, copy_in_cache=0, copy_beyond_cache=0)),
    "no products": reports.report(limits=dataclasses.replace(reports.LIMITS, products={"float16": math.nan})),
    "nothing known": reports.report(date="some day", commit="", machine={}, versions={}, settings={}),
    "odd facts": reports.report(
        machine={"name": None, "threads": None, "gpus": [{"name": "<b>"}, 1], "memory_bytes": 1 << 34},
        settings={"quick": True, "budget": math.inf},
    ),
    "nothing measured": reports.report(
        results=(reports.result("a", "b", "c", Candidate("ours"), Candidate("eager"), floor_seconds=None),)
    ),
    "nothing but what is no number": reports.report(
        results=tuple(
            reports.result(
                "a", "b", f"case {odd}", Candidate("ours", odd, (odd, odd), 1.0, (1.0, 1.0), error=odd),
                Candidate("eager", odd, (odd, odd), odd, (odd, odd), 0, odd, odd, odd),
                floor_seconds=odd, tolerance=odd,
            )
            for odd in (math.nan, math.inf, -math.inf, 0.0, -1.0)
        )
    ),
    "ratios of any size": reports.report(
        results=tuple(
            reports.result("a", "b", f"{ratio}", reports.ours(1e-9), reports.peer("eager", ratio, 1e-9), nbytes=1)
            for ratio in (1e-300, 1e-5, 1.0, 1e5, 1e300)
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("report", ODD.values(), ids=ODD)
def test_any_report_makes_a_valid_page(report):
    told = page.html(report)
    document = parsed(told)
    check_references(document)
    for element in document.elements:
        for name, value in element.attributes.items():
            if name in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "width", "height"):
                assert re.fullmatch(r"-?\d+(\.\d+)?%?", value), f"<{element.tag} {name}={value}>"
    for result in report.results:
        assert result.case in document.all("main")[0].text


def check_references(document):
    identities = [one.attributes["id"] for one in document.elements if "id" in one.attributes]
    assert len(identities) == len(set(identities))
    for element in document.elements:
        for name in REFERENCES:
            for identity in (element.attributes.get(name) or "").split():
                assert identity in identities, f"<{element.tag} {name}={identity}>"
        link = element.attributes.get("href", "")
        if link:
            assert link.startswith("#"), link
            assert link[1:] in identities, link


def test_names_of_elements_are_unique_and_references_lead_somewhere(document):
    check_references(document)


def test_it_needs_no_network_and_no_script(text, document):
    assert not document.all("script")
    assert not document.all("link")
    assert not re.search(r"(?i)https?:|//\w|@import|url\(|javascript:", text)
    for element in document.elements:
        assert not [name for name in element.attributes if name in ("src", "srcset", "style") or name.startswith("on")]


def test_names_are_no_markup(text):
    assert "<script" not in text
    assert html.escape(reports.HOSTILE) in text.replace("&#34;", "&quot;").replace("&#39;", "&#x27;")


def test_headings_are_in_order_below_one(document):
    levels = [int(one.tag[1]) for one in document.elements if re.fullmatch("h[1-6]", one.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(next_ <= level + 1 for level, next_ in itertools.pairwise(levels))


def test_landmarks_and_language(document):
    assert document.all("html")[0].attributes["lang"] == "en"
    for tag in ("header", "main", "footer", "nav", "title"):
        assert len([one for one in document.all(tag) if "svg" not in one.parents]) == 1
    first = document.all("a")[0]
    assert first.attributes == {"class": "skip", "href": "#main"}
    viewport = [one for one in document.all("meta") if one.attributes.get("name") == "viewport"]
    assert viewport[0].attributes["content"] == "width=device-width, initial-scale=1"


def test_tables_have_captions_and_scopes_and_scroll_where_the_keyboard_reaches(document):
    assert document.all("table")
    assert len(document.all("caption")) == len(document.all("table"))
    assert all(one.attributes.get("scope") in ("col", "row", "rowgroup") for one in document.all("th"))
    regions = [one for one in document.elements if one.attributes.get("role") == "region"]
    assert len(regions) == len(document.all("table"))
    for region in regions:
        assert region.attributes["tabindex"] == "0"
        assert document.text_of(region.attributes["aria-labelledby"])
    captions = [one.text for one in document.all("caption")]
    assert len(captions) == len(set(captions))


def test_pictures_are_told_or_hidden(document):
    """Bars stand beside their figures in words; a roofline tells its own."""
    for svg in document.all("svg"):
        if "svg" in svg.parents or svg.attributes.get("aria-hidden") == "true":
            continue
        assert svg.attributes["role"] == "img"
        title, description = svg.attributes["aria-labelledby"].split()
        assert document.text_of(title).startswith("Roofline of")
        assert "operations per byte" in document.text_of(description)
        assert "Nearest to its limit, at" in document.text_of(description)


def test_every_result_is_there_with_its_figures(document):
    told = document.all("main")[0].text
    for number, result in enumerate(reports.report().results, 1):
        case = document.text_of(f"r{number}")
        assert " ".join(f"{result.case} · {result.dtype}".split()) in case
        for peer in result.peers:
            assert peer.name in case
            if peer.failure:
                assert f"failed: {peer.failure}" in case
        for name in (result.op, result.benchmark):
            assert name in told
    case = document.text_of("r1")
    assert "ours 310 µs" in case
    assert "42% of the limit (instruction issue)" in case
    assert re.search(r"eager 14\.3× 13\.6 to 15\.0 compile 52\.0×", case)
    row = next(one.text for one in document.all("tr") if one.text.startswith("compile16.1 ms"))
    assert row == "compile16.1 ms15.3 ms to 16.9 ms52.0×49.4 to 54.6<1%3.00 MiB9.70 µs7.40 s4.0e-07"


def test_the_machine_and_its_limits_are_told(document):
    header = " ".join(document.all("header")[0].text.split())
    for words in ("AMD EPYC 9575F", "2 threads", "21 November 2026, 18:02 UTC", "v0.1.0-84-ga349dde"):
        assert words in header
    told = " ".join(document.all("main")[0].text.split())
    for words in ("210 GB/s", "31.5 GB/s", "290 GFLOP/s", "1.18 TFLOP/s", "2,200 million values/s", "torch 2.13.0+cpu"):
        assert words in told


def test_losses_are_listed_and_counted(text, document):
    part = text[text.index('<h2 id="slower">') : text.index("Too close to call")]
    for name in ("group_norm · forward and backward · 1x32x4x4-32groups · float32", "attention · forward"):
        assert name in part
    assert part.index("0.82×") < part.index("0.93×")
    # Faster, but it computes something else.
    assert "Liger-Kernel" not in part
    even = text[text.index("Too close to call") : text.index("What could not be compared")]
    assert "normal · into a tensor · 128x20 · float32" in even
    assert "ddpm · training step · MNIST, 28x28 · float32" in even
    counts = next(one.text for one in document.all("ul") if one.attributes.get("class") == "counts")
    assert counts.split() == ["6", "faster", "2", "even", "2", "slower", "2", "without", "comparison"]


def test_where_nothing_is_slower_it_says_so():
    told = page.html(reports.single())
    assert "Nowhere: in no case" in told
    assert "Too close to call" not in told


def test_the_summary_has_the_geometric_mean_against_the_best_peer(document):
    row = next(one for one in document.all("tr") if one.text.startswith("group_norm"))
    # 1.6 and 2.2, where it is faster, and 0.82.
    assert row.text == f"group_norm{(1.6 * 2.2 * 0.82) ** (1 / 3):.2f}×83%2010"


def test_what_does_not_count_says_why(text):
    other = parsed(text).text_of("r4")
    assert "Liger-Kernel 0.71× 0.67 to 0.75 not counted, as it computes something else: error 4.0e-01" in other
    wrong = page.html(
        reports.report(results=(reports.result("a", "b", "c", reports.ours(error=1.0), reports.peer("eager", 2.0)),))
    )
    assert "Ours: not counted, as it computes something else: error 1.0e+00, tolerance 1.0e-05" in wrong
    assert "<b>0</b> faster" in wrong
    assert "<b>1</b> without comparison" in wrong


def test_another_way_to_run_ours_is_no_peer():
    results = (
        reports.result("a", "b", "c", reports.ours(), reports.peer("ours, Triton", 0.5), reports.peer("eager", 2)),
    )
    told = page.html(reports.report(results=results))
    assert "<b>1</b> faster" in told
    assert "also ours" in told
    assert "ours slower" not in told


def test_a_quick_run_says_so():
    assert "A quick run." in page.html(reports.report(settings={"quick": True}))


def test_there_is_a_roofline_for_each_dtype_with_operations(document):
    titles = [one.text for one in document.all("title") if one.text.startswith("Roofline")]
    assert titles == ["Roofline of float32", "Roofline of bfloat16"]
    lacking = dataclasses.replace(reports.LIMITS, products={"float32": 290e9})
    assert "Products of bfloat16 were not measured" in page.html(reports.report(limits=lacking))
    only_noise = tuple(one for one in reports.report().results if one.flops == 0)
    assert "Roofline" not in page.html(reports.report(results=only_noise))


def test_where_there_is_one_bandwidth_it_is_told_once():
    one = dataclasses.replace(reports.LIMITS, copy_in_cache=31.5e9)
    told = parsed(page.html(reports.report(limits=one))).all("main")[0].text
    assert "Copy31.5 GB/s" in told
    assert "copy, 31.5 GB/s" in told
    assert "cache" not in told


def test_a_large_report_makes_a_page_of_bearable_size():
    told = page.html(reports.large(300))
    parsed(told)
    assert len(told.encode()) < 1_500_000


def test_it_is_written_whole(tmp_path, text):
    page.write(reports.report(), tmp_path / "new" / "page.html")
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8") == text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_the_template_is_part_of_the_package():
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"gencore.bench" = ["*.jinja"]' in pyproject[pyproject.index("[tool.setuptools.package-data]") :]


# In a browser.

MEASURE = """
const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
function measure(frame) {
  const view = frame.contentWindow, page = frame.contentDocument, style = e => view.getComputedStyle(e);
  const paper = e => {
    for (; e; e = e.parentElement) {
      const colour = rgb(style(e).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const found = {width: view.innerWidth, scroll: page.documentElement.scrollWidth, texts: 0, small: [], faint: [],
    empty: [], overlapping: [], dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    beyond: [], paper: paper(page.body)};
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, e = node.parentElement, range = page.createRange();
    range.selectNode(node);
    const box = range.getBoundingClientRect();
    if (!node.data.trim() || box.width === 0 || e.closest("title, desc")) continue;
    found.texts += 1;
    const inSvg = e.closest("svg"), scale = inSvg ? e.getScreenCTM().a : 1;
    if (parseFloat(style(e).fontSize) * scale < 11) found.small.push(node.data);
    const ratio = contrast(rgb(inSvg ? style(e).fill : style(e).color), paper(inSvg ? inSvg.parentElement : e));
    if (!(ratio >= 4.5)) found.faint.push([node.data, ratio]);
    if (!e.closest(".scroll, .skip") && (box.right > view.innerWidth + 0.5 || box.left < -0.5))
      found.beyond.push([node.data, box.left, box.right]);
  }
  for (const svg of page.querySelectorAll("svg:not(svg svg)")) {
    const box = svg.getBoundingClientRect();
    if (!(box.width > 0 && box.height > 0)) found.empty.push(svg.outerHTML.slice(0, 80));
  }
  for (const svg of page.querySelectorAll(".axis, .plot svg")) {
    const boxes = [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
    boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
      if (p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom) found.overlapping.push([a, b]);
    }));
  }
  return found;
}
onload = () => {
  const found = [];
  for (const frame of document.querySelectorAll("iframe")) {
    found.push(measure(frame));
    frame.contentDocument.querySelectorAll("details").forEach(e => { e.open = true; });
    found.push(measure(frame));
  }
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = JSON.stringify(found);
  document.body.replaceChildren(told);
};
"""
WIDTHS = (360, 768, 1280)


@pytest.fixture(scope="module", params=["light", "dark"])
def measured(request, text, tmp_path_factory):
    """What a browser makes of the page, at each width with the tables folded and unfolded."""
    if CHROMIUM is None:
        pytest.skip("no chromium or chrome is installed")
    folder = tmp_path_factory.mktemp("chromium")
    # In frames, as a window cannot be as narrow as a phone.
    frames = "".join(
        f'<iframe srcdoc="{html.escape(text)}" style="width:{width}px;height:800px;border:0"></iframe>'
        for width in WIDTHS
    )
    (folder / "page.html").write_text(
        f"<!DOCTYPE html><body>{frames}<script>{MEASURE}</script></body>", encoding="utf-8"
    )
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1400,2600",
            "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000",
            f"--blink-settings=preferredColorScheme={['dark', 'light'].index(request.param)}",
            "--dump-dom", (folder / "page.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told, done.stderr
    found = json.loads(html.unescape(told[1]))
    assert [one["width"] for one in found] == [width for width in WIDTHS for _ in range(2)]
    assert {one["dark"] for one in found} == {request.param == "dark"}
    return found


def test_the_page_fits_the_screen(measured):
    for one in measured:
        assert one["scroll"] <= one["width"]
        assert one["beyond"] == []


def test_text_is_large_enough_to_read_and_stands_alone(measured):
    for one in measured:
        assert one["texts"] > 200
        assert one["small"] == []
        assert one["overlapping"] == []


def test_text_stands_out_in_light_and_dark(measured):
    for one in measured:
        assert (sum(one["paper"][:3]) < 200) == one["dark"]
        assert one["faint"] == []


def test_pictures_have_a_size(measured):
    for one in measured:
        assert one["empty"] == []
