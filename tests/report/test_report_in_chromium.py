"""The page in a browser: it fits a laptop and a telephone, and asks for nothing outside itself."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from run_files import write_evaluation, write_run

from flap_nvflare.report.compare import render_runs
from flap_nvflare.report.page import render_run
from flap_nvflare.report.read import read_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (1280, 390)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not installed")
# The page stands in a frame, as it is and under its own policy; the frame's owner measures it.
MEASURE = """
const found = [];
for (const frame of document.querySelectorAll("iframe")) {
  const inner = frame.contentDocument, width = inner.documentElement.clientWidth;
  const scrolled = (one) => one.closest(".scroll") !== null;
  const wide = [...inner.querySelectorAll("body *")].filter(
    (one) => !scrolled(one) && one.getBoundingClientRect().right > width + 0.5
      && getComputedStyle(one).display !== "none");
  const labels = [...inner.querySelectorAll(".x, .y")].map((axis) =>
    [...axis.children].map((one) => one.getBoundingClientRect()));
  const meet = (a, b) => a.left < b.right && b.left < a.right
    && a.top < b.bottom && b.top < a.bottom;
  const crowded = labels.filter((axis) =>
    axis.some((a, i) => axis.slice(i + 1).some((b) => meet(a, b))));
  found.push({
    width, page: inner.documentElement.scrollWidth,
    wide: wide.slice(0, 5).map((one) => one.outerHTML.slice(0, 200)),
    overlaps: crowded.length,
    axes: labels.length,
    small: [...inner.querySelectorAll("span, td, th, p, li, dd, dt")].filter(
      (one) => parseFloat(getComputedStyle(one).fontSize) < 11).length,
    requests: frame.contentWindow.performance.getEntriesByType("resource")
      .map((one) => one.name).filter((name) => !name.startsWith("data:")),
  });
}
document.body.innerHTML = "<pre></pre>";
document.querySelector("pre").textContent = JSON.stringify(found);
"""


def framed(folder: Path, pages: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """What each page measures in a frame of that width."""
    frames = "".join(
        f'<iframe style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(text)}">'
        "</iframe>"
        for text, width in pages
    )
    script = f"<script>window.addEventListener('load', () => {{{MEASURE}}})</script>"
    path = folder / "probe.html"
    path.write_text(f"<!doctype html><meta charset=utf-8>{script}{frames}", encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--dump-dom",
        path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    match = re.search(r"<body><pre>(.*)</pre>", done.stdout.decode(), flags=re.DOTALL)
    assert match, done.stderr.decode()[-2000:]
    found: list[dict[str, Any]] = json.loads(html.unescape(match[1]))
    assert len(found) == len(pages)
    return found


def test_pages_fit_laptop_and_telephone(tmp_path: Path) -> None:
    few, many = ["A", "B", "C", "a-hospital-with-a-rather-long-name"], [f"s-{i}" for i in range(60)]
    six = write_run(tmp_path / "six", few)
    write_evaluation(six, few, pictures=2)
    runs = [read_run(six), read_run(write_run(tmp_path / "many", many, rounds=40))]
    texts = [*map(render_run, runs), render_runs(runs)]
    pages = [(text, width) for text in texts for width in WIDTHS]
    wide = texts[0].replace("<main>", '<main><p style="width:1300px">wide</p>')
    *measured, control = framed(tmp_path, [*pages, (wide, WIDTHS[0])])
    assert control["page"] > control["width"]  # the measure sees what does not fit
    assert len(control["wide"]) == 1
    for (_, width), found in zip(pages, measured, strict=True):
        assert width - 20 <= found["width"] <= width
        assert found["page"] == found["width"], found
        assert found["wide"] == [], found
        assert found["axes"], "no chart was measured"
        assert found["overlaps"] == 0, found
        assert found["small"] == 0, found
        assert found["requests"] == [], found


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine, and the paths that it was asked for."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_pages_policy_stops_requests_that_it_should_never_hold(
    tmp_path: Path, asked: tuple[str, list[str]]
) -> None:
    address, paths = asked
    text = render_run(read_run(write_run(tmp_path / "run", ["A"])))

    def with_calls(page: str, name: str) -> str:
        where = f"{address}/{name}"
        calls = f'<img src="{where}/img"><link rel="stylesheet" href="{where}/css">'
        calls += f'<script>fetch("{where}/fetch")</script>'
        return page.replace("</body>", calls + "</body>")

    held = with_calls(text, "held")
    free = with_calls(re.sub(r"<meta http-equiv=.*?>", "", text), "free")
    framed(tmp_path, [(held, 1280), (free, 1280)])
    assert {"/free/img", "/free/css", "/free/fetch"} <= set(paths)  # without the policy they leave
    assert [path for path in paths if path.startswith("/held")] == []
