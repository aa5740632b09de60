"""Pages in headless Chromium: what they became, and what they complained about."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")


def browse(path: Path, folder: Path, *, width: int = 1200) -> tuple[str, list[str]]:
    """Open a page, and give its DOM without scripts, and what it wrote to the console."""
    browser = next((found for name in _NAMES if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a browser on the PATH, one of: {', '.join(_NAMES)}")
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run",
        f"--user-data-dir={folder}", "--enable-logging=stderr", "--v=0",
        f"--window-size={width},900", "--virtual-time-budget=20000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    dom = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
    return dom, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def drawn(dom: str) -> tuple[int, int]:
    """How many figures a page drew, and of how many layers they are."""
    return len(re.findall(r'class="plot js-plotly-plot"', dom)), dom.count('class="main-svg"')
