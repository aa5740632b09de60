import base64
import io
import re
import shutil
import subprocess

import pandas as pd
import plotly.graph_objects as go
import pytest

from tests.fake_results import FakeSweep, sweep_data
from tvlens.reports import report
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
    assert f"{row['hypothesis']:.2f} <small>{low:.2f}–{high:.2f}</small>" in markup
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
    assert 'id="overview"' not in page
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
    assert "<td>–</td><td>1,234</td><td>yes</td>" in page
    assert "plain \\ud800 ␀" in page
    assert "<title>2 results</title>" in page


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


def browse(path, folder, *, width):
    """Open a page in headless Chromium, and give its DOM and what it wrote to the console."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((found for name in names if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a browser on the PATH, one of: {', '.join(names)}")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run",
        f"--user-data-dir={folder}", "--enable-logging=stderr", "--v=0",
        f"--window-size={width},900", "--virtual-time-budget=20000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    dom = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    return dom, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def drawn(dom):
    return len(re.findall(r'class="plot js-plotly-plot"', dom)), dom.count('class="main-svg"')


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
