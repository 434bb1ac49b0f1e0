"""The page in headless Chromium: what its console says, what it asks for, and whether it fits a telephone.

A frame page of ours lies beside the report on a server of this machine and looks into an iframe of the given width;
names of other hosts do not resolve. Skipped where there is no chromium, which tests/launch/install_system_packages.sh
installs.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from triweave.launch.report.write import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NARROW_PX, WIDE_PX = 390, 1440
DARK, LIGHT = 0, 1
DARK_PAPER = "rgb(20, 22, 26)"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: run tests/launch/install_system_packages.sh")

FRAME_PAGE = """<!DOCTYPE html><html><head><meta charset="utf-8"><link rel="icon" href="data:,"></head>
<body><iframe src="PAGE" width="WIDTH" height="900"></iframe><pre id="seen"></pre><script>
const rgb = text => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const luminance = colour => rgb(colour).map(value => linear(value / 255))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const contrast = (a, b) => {
  const [darker, lighter] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (lighter + 0.05) / (darker + 0.05);
};
document.querySelector("iframe").onload = event => {
  const page = event.target.contentDocument, view = event.target.contentWindow;
  const paper = view.getComputedStyle(page.body).backgroundColor;
  const worst = (selector, property) => Math.min(...[...page.querySelectorAll(selector)]
    .map(element => contrast(view.getComputedStyle(element)[property], paper)));
  const boxes = [...page.querySelectorAll("main *")].filter(e => !e.closest(".scroll, pre, svg, details"))
    .map(element => element.getBoundingClientRect().right);
  document.getElementById("seen").textContent = JSON.stringify({
    width: page.documentElement.clientWidth, scroll_width: page.documentElement.scrollWidth, right: Math.max(...boxes),
    paper: paper, text: page.body.innerText, scripts: page.scripts.length,
    resources: view.performance.getEntriesByType("resource").map(entry => entry.name),
    pictures: [...page.images].map(image => image.complete && image.naturalWidth),
    drawing: worst("svg text", "fill"), words: worst("p, dt, dd, td, th, h1, h2, a, caption", "color"),
    curves: worst("svg path.s-c0, svg path.s-c1, svg path.s-c2", "stroke"),
  });
};
</script></body></html>"""


@dataclass
class Seen:
    """facts: what the frame page found. console: what Chromium logged of pages. asked: paths the server was asked."""

    facts: dict[str, Any]
    console: list[str]
    asked: list[str] = field(default_factory=list)


class QuietHandler(SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 - one server at a time

    def log_message(self, *_: object) -> None:
        self.asked.append(self.path)


@pytest.fixture
def look(tmp_path: Path) -> Iterator[Callable[..., Seen]]:
    """Return a function that opens a page of tmp_path at a width in a colour scheme."""
    QuietHandler.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def open_page(page: Path, width: int = WIDE_PX, scheme: int = LIGHT) -> Seen:
        QuietHandler.asked.clear()
        frame = FRAME_PAGE.replace("PAGE", page.name).replace("WIDTH", str(width))
        (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
        command = [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"),
            *("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
            *(f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={scheme}"),
            *(f"--window-size={width + 50},1000", "--virtual-time-budget=5000", "--dump-dom"),
            f"http://127.0.0.1:{server.server_port}/frame.html",
        ]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        found = re.search(r'<pre id="seen">(.+?)</pre>', result.stdout, re.DOTALL)
        assert found, result.stderr[-3000:]
        console = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
        return Seen(json.loads(html.unescape(found[1])), console, sorted(set(QuietHandler.asked)))

    yield open_page
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def rendered(run_writer: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page of two runs, the longer one of names and captions that do not break."""
    folder = tmp_path_factory.mktemp("browser")
    name = "a-run-with-a-name-that-is-longer-than-a-telephone-is-wide"
    runs = [run_writer(folder, "a"), run_writer(folder, name, sample_text="W" * 300)]
    write_report(runs, folder / "page.html", tell=lambda _: None)
    return folder / "page.html"


@pytest.fixture
def page(rendered: Path, tmp_path: Path) -> Path:
    return shutil.copy(rendered, tmp_path / "page.html")


def test_it_fits_a_telephone_and_asks_for_nothing(look: Callable[..., Seen], page: Path) -> None:
    seen = look(page, NARROW_PX, DARK)
    assert seen.console == []
    assert seen.asked == ["/frame.html", "/page.html"]
    assert [name for name in seen.facts["resources"] if not name.startswith("data:")] == []
    assert seen.facts["width"] <= NARROW_PX  # less the scroll bar
    assert seen.facts["scroll_width"] == seen.facts["width"]
    assert seen.facts["right"] <= seen.facts["width"]
    assert "<script>alert(1)</script> & \"quoted\" 'text' </style>" in seen.facts["text"]
    assert seen.facts["scripts"] == 0
    assert seen.facts["paper"] == DARK_PAPER  # the style sheet got through the policy


@pytest.mark.parametrize(("scheme", "paper"), [(LIGHT, "rgb(255, 255, 255)"), (DARK, DARK_PAPER)])
def test_text_reads_in_light_and_dark(look: Callable[..., Seen], page: Path, scheme: int, paper: str) -> None:
    seen = look(page, WIDE_PX, scheme)
    assert seen.console == []
    assert seen.facts["paper"] == paper
    assert seen.facts["words"] >= 4.5
    assert seen.facts["drawing"] >= 4.5
    assert seen.facts["curves"] >= 3
    assert seen.facts["scroll_width"] <= WIDE_PX
    assert set(seen.facts["pictures"]) == {40}


def test_the_checks_see_a_page_that_breaks_the_rules(look: Callable[..., Seen], tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!DOCTYPE html><meta http-equiv=Content-Security-Policy content=\"default-src 'none'\">"
        '<body><main><p style="color: red">a<img src=other.png><script>alert(1)</script>'
        f"<p>{'W' * 300}</main>",
        encoding="utf-8",
    )
    seen = look(bad, NARROW_PX)
    assert len(seen.console) >= 3
    assert seen.facts["scroll_width"] > NARROW_PX
    assert seen.facts["scripts"] == 1
