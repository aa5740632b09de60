import base64
import io
import json
import re

import pandas as pd
import plotly.graph_objects as go
import pytest

from tests.browser import browse, drawn
from tests.fake_results import FakeSweep, sweep_data
from tvlens import plots
from tvlens.plots import palette
from tvlens.reports import card, report
from tvlens.results import Result

ATTACK = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def results():
    names = ["to_upper", "gerund", ATTACK]
    return [FakeSweep(sweep_data(name, seed=i, layers=12, n=8)) for i, name in enumerate(names)]


@pytest.fixture(scope="module")
def page(results, tmp_path_factory):
    return report(results, tmp_path_factory.mktemp("report") / "report.html", title="A <b> title")


@pytest.fixture(scope="module")
def markup(page):
    """The page without Plotly's own script."""
    text = page.read_text(encoding="utf-8")
    start = text.index("<script>/**")
    return text[:start] + text[text.index("</script>", start) :]


def test_everything_stands_in_one_file(markup):
    assert not re.search(r"(src|href)=[\"']?(https?:|//|file:)", markup)
    assert "default-src 'none'" in markup
    assert markup.count('<script type="application/json">') == 2 + 3 * 2


def test_plotly_is_in_the_file_once(page):
    assert page.read_text(encoding="utf-8").count("plotly.js v") == 1


def test_text_is_escaped(markup):
    assert "alert('x')</script>" not in markup
    assert "<script>alert" not in markup
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; · fake-135m" in markup
    assert "<h1>A &lt;b&gt; title</h1>" in markup


def test_contents_link_to_every_section(markup):
    links = re.findall(r'<li><a href="#([\w-]+)">', markup)
    assert links == ["summary", "overview", "result-1", "result-2", "result-3", "sources"]
    assert all(f'<section id="{link}">' in markup for link in links)


def test_contents_leave_out_what_all_titles_share(markup):
    nav = markup[markup.index("<nav") : markup.index("</nav>")]
    assert ">to_upper</a>" in nav and ">gerund</a>" in nav and "fake-135m" not in nav


def test_titles_that_share_everything_stay_whole(results, tmp_path):
    page = report([results[0], results[0]], tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count(">to_upper · fake-135m</a></li>") == 2


def test_sections_hold_finding_method_provenance_and_sources(results, markup):
    for result in results[:2]:
        assert f"<p class=finding>{result.finding()}</p>" in markup
    assert markup.count("nothing ran") == 3
    assert markup.count("&quot;task&quot;: &quot;gerund&quot;") == 1
    assert "hendel2023context" in markup and "nanda2022transformerlens" in markup


def test_summary_puts_an_interval_into_one_cell(results, markup):
    row = results[0].summary()
    low, high = row["hypothesis_low"], row["hypothesis_high"]
    assert f"{row['hypothesis']:.2f} <small>{low:.2f} to {high:.2f}</small>" in markup
    heads = re.findall(r"<th>([\w ]*)</th>", markup)
    assert "hypothesis" in heads and "query blind" in heads
    assert "hypothesis low" not in heads
    assert "task" not in heads  # the title says it already


def test_data_can_be_downloaded(results, markup):
    links = re.findall(
        r'download="([\w-]+\.csv)" href="data:text/csv;charset=utf-8;base64,([^"]+)"', markup
    )
    assert [name for name, _ in links][:2] == ["to-upper-fake-135m.csv", "gerund-fake-135m.csv"]
    table = pd.read_csv(io.BytesIO(base64.b64decode(links[1][1])), keep_default_na=False)
    expected = results[1].to_dataframe()
    assert table["hypothesis"].tolist() == expected["hypothesis"].tolist()
    assert list(table.columns) == list(expected.columns)


def test_figure_titles_become_captions(results, markup):
    title = results[0].plot().layout.meta["title"]
    assert f"<figcaption><b>{title}</b>" in markup
    assert '"title":{"text":"\\u003cb' not in markup


def test_one_result_needs_no_overview(results, tmp_path):
    page = report(results[0], tmp_path / "one.html").read_text(encoding="utf-8")
    assert 'id="overview"' not in page and 'id="summary"' not in page and "#summary" not in page
    assert "<title>to_upper · fake-135m</title>" in page


def test_other_kinds_and_foreign_figures(results, tmp_path):
    class Plain(Result):
        kind = "plain_kind"
        title = "plain \ud800 \0"

        def finding(self):
            return "Nothing."

        def plot(self, **channels):
            return go.Figure(go.Bar(y=[1]), layout={"title": "<b>Seen</b><br>here"})

        def summary(self):
            return {"share": None, "n": 1234.5, "ok": True, "parts": [1], "share_low": 0.1}

    data = results[0].data.assign_attrs(tvlens='{"schema": 1, "kind": "plain_kind"}')
    page = report([results[0], Plain(data)], tmp_path / "two.html").read_text(encoding="utf-8")
    assert "<figcaption><b>Seen here</b></figcaption>" in page
    rows = re.findall(r"<tr><th scope=row>([\w ]+)</th>(<td>.*?</td>)</tr>", page)
    assert rows[-3:] == [
        ("share", "<td>–</td>"), ("n", "<td>1,234</td>"), ("ok", "<td>yes</td>"),
    ]  # fmt: skip
    assert "plain \\ud800 ␀" in page
    assert "<title>2 results</title>" in page


def test_kinds_alone_are_summed_up_in_words(results, tmp_path):
    class Alone(FakeSweep):
        kind = "alone_kind"

        def tables(self):
            return {"By <word>": pd.DataFrame({"x": [0.5], "x_low": [0.25], "x_high": [1.0]})}

        def figures(self):
            return {"main": self.plot(title=self.finding()), "map": self.plot(title=self.finding())}

    data = sweep_data("alone", layers=4, n=4)
    note = json.loads(data.attrs["tvlens"]) | {"kind": "alone_kind"}
    alone = Alone(data.assign_attrs(tvlens=json.dumps(note)))
    page = report([*results[:2], alone], tmp_path / "three.html").read_text(encoding="utf-8")
    summary = page[page.index('id="summary"') : page.index('id="overview"')]
    assert summary.count("<table>") == 1 and summary.count("<tr>") == 1 + 2
    assert f'<li><a href="#result-3">alone</a>: {alone.finding()}</li>' in summary
    section = re.sub(
        r"<script.*?</script>", "", page[page.index('id="result-3"') :], flags=re.DOTALL
    )
    # What the section says is not said again above its figures.
    assert section.count(alone.finding()) == 1
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", section)
    assert captions[0].startswith("<small>fake-135m") and captions[1].startswith("<b>Map</b><br>")
    folded = re.findall(r"<details><summary>(.*?)</summary>", section)
    assert folded == ["By &lt;word&gt;", "All numbers", "Provenance"]
    assert "<tr><th>x</th></tr><tr><td>0.50 (0.25 to 1.00)</td></tr>" in section


def test_cards_scroll_what_is_wider_than_a_screen(results):
    class Wide(FakeSweep):
        kind = "wide_kind"

        def plot(self, **channels):
            return plots.vocabulary(self.data, title=self.finding())

    note = json.loads(results[0].data.attrs["tvlens"]) | {"kind": "wide_kind"}
    wide = Wide(results[0].data.assign_attrs(tvlens=json.dumps(note)))
    shown = card(wide)
    assert "overflow-x:auto'><div style='min-width:768px'>" in shown
    assert re.sub(r"<script.*?</script>", "", shown, flags=re.DOTALL).count(wide.finding()) == 1


@pytest.mark.slow
def test_bad_input(results, tmp_path):
    with pytest.raises(ValueError, match="at least one result"):
        report([], tmp_path / "r.html")
    with pytest.raises(TypeError, match="holds results, got str"):
        report((item for item in [results[0], "sweep.nc"]), tmp_path / "r.html")
    with pytest.raises(FileNotFoundError, match="does not exist; create it first"):
        report(results, tmp_path / "no" / "r.html")
    assert list(tmp_path.iterdir()) == []


# --- in a browser ---------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.parametrize("width", [500, 1200])
@pytest.mark.slow
def test_every_figure_is_drawn_without_complaint(page, tmp_path, width):
    dom, console = browse(page, tmp_path, width=width)
    assert console == []
    boxes, layers = drawn(dom)
    assert boxes == 8
    assert layers >= 2 * boxes
    assert dom.count('<path class="js-line"') > 20 and dom.count('class="hm"') == 3
    assert "could not be drawn" not in dom


@pytest.mark.browser
@pytest.mark.slow
def test_a_broken_figure_is_seen_and_stops_no_other(page, tmp_path):
    broken = tmp_path / "broken.html"
    text = page.read_text(encoding="utf-8")
    start = '<script type="application/json">{'
    broken.write_text(text.replace(start, start + "{", 1), encoding="utf-8")
    dom, console = browse(broken, tmp_path / "profile", width=1200)
    assert console
    assert drawn(dom)[0] == 7
    assert dom.count("This figure could not be drawn.</p>") == 1


def restyled(page, folder, *, script=""):
    """The page as a reader with a dark screen gets it."""
    path, text = folder / "dark.html", page.read_text(encoding="utf-8")
    assert text.count("@media (prefers-color-scheme: dark)") == 1
    text = text.replace("@media (prefers-color-scheme: dark)", "@media all")
    path.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    return path


def rgb(color):
    return f"rgb({', '.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.mark.browser
@pytest.mark.slow
def test_figures_follow_the_page_into_the_dark(page, tmp_path):
    used = (palette.INK, palette.BLUE, palette.ORANGE, palette.GREEN, palette.MUTED, palette.GRID)
    light, _ = browse(page, tmp_path / "light", width=1200)
    dark, console = browse(restyled(page, tmp_path), tmp_path / "profile", width=1200)
    assert console == []
    for color in used:
        assert rgb(color) in light and rgb(palette.DARK[color]) not in light
        assert rgb(color) not in dark and rgb(palette.DARK[color]) in dark
    assert dark.count(f"background: {rgb(palette.DARK[palette.PAPER])}") >= 8
    # Scales are turned round: what was white is the paper, the darkest blue is the lightest.
    ends = [set(re.findall(r'stop-color="(rgb.*?)"', dom)) for dom in (light, dark)]
    assert rgb("#ffffff") in ends[0] and rgb("#00395a") in ends[0]
    assert rgb(palette.DARK[palette.PAPER]) in ends[1] and not ends[0] & ends[1]
    # Headings hold their colour in their text.
    assert f"color:{palette.MUTED}" in light and f"color:{palette.MUTED}" not in dark


@pytest.mark.browser
@pytest.mark.slow
def test_paper_is_light(page, tmp_path):
    script = "addEventListener('load', () => setTimeout(() => dispatchEvent(new Event('beforeprint')), 9000))"
    dom, console = browse(restyled(page, tmp_path, script=script), tmp_path / "profile", width=1200)
    assert console == [] and drawn(dom)[0] == 8
    assert rgb(palette.BLUE) in dom and rgb(palette.DARK[palette.BLUE]) not in dom


@pytest.mark.browser
@pytest.mark.slow
def test_a_legend_that_wraps_takes_nothing_from_the_plot(page, tmp_path):
    tall = {}
    for width in (500, 1200):
        dom, _ = browse(page, tmp_path / str(width), width=width)
        # The area of each figure's first plot; a legend of seven entries is seven lines on a phone.
        areas = re.findall(r'class="nsewdrag drag" data-subplot="xy"[^>]*? height="([\d.]+)"', dom)
        tall[width] = [float(height) for height in areas]
    assert len(tall[500]) == len(tall[1200]) >= 8
    for narrow, wide in zip(tall[500], tall[1200], strict=True):
        assert narrow > 0.93 * wide
