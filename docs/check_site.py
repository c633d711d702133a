"""Open every page of the built site in headless Chromium and report what is broken.

    python docs/check_site.py docs/_build/html

Broken is: an image that does not load, a link into the site that leads nowhere, a formula that was
not typeset, an error or warning on the console, a request that leaves the site (it must work
offline), and a page that is wider than its window. Screenshots of every page, wide and narrow, are
left beside the site in ``screenshots/``.
"""

from __future__ import annotations

import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

from playwright.sync_api import ConsoleMessage, Page, Request, sync_playwright

WIDTHS = {"wide": 1400, "narrow": 390}

TYPESET = "() => window.MathJax?.startup?.promise"

LOOK = r"""() => {
    const all = selector => [...document.querySelectorAll(selector)];
    const prose = document.querySelector("main").cloneNode(true);
    prose.querySelectorAll("code, pre, mjx-container, script").forEach(e => e.remove());
    return {
        ids: all("[id]").map(e => e.id),
        links: all("a[href]").map(a => a.href),
        images: all("img").filter(i => !i.complete || !i.naturalWidth).map(i => i.src),
        formulas: all(".math")
            // MathJax shows a macro that it does not know in red.
            .filter(m => !m.querySelector("mjx-container")
                || m.querySelector("mjx-merror, [style*='color: red']"))
            .map(m => m.textContent),
        tex: prose.textContent.match(/\$\$|\\[([]|\\[a-zA-Z]+\{/g) ?? [],
        markup: all(".problematic, .system-message").map(e => e.textContent),
        excess: document.documentElement.scrollWidth - window.innerWidth,
    };
}"""


class Handler(SimpleHTTPRequestHandler):
    """Serve files and say nothing."""

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def check(site: Path, screenshots: Path) -> list[str]:
    """Visit every page; return what is broken, a line each."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/"
    names = sorted(
        str(path.relative_to(site))
        for path in site.rglob("*.html")
        if "_static" not in path.relative_to(site).parts
    )
    broken: list[str] = []
    ids: dict[str, set[str]] = {}
    links: dict[str, set[str]] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for size, width in WIDTHS.items():
            page = browser.new_page(viewport={"width": width, "height": 900})
            for name in names:
                found, problems = visit(page, base, name, screenshots / size)
                broken += [f"{name} ({size}): {problem}" for problem in problems]
                ids[base + name] = set(found["ids"])
                links[base + name] = set(found["links"])
            page.close()
        browser.close()
    server.shutdown()
    for source, targets in links.items():
        for target in sorted(t for t in targets if t.startswith(base)):
            address, fragment = urldefrag(target)
            path = unquote(address.removeprefix(base))
            leads = (site / path).is_file()
            if leads and fragment and address in ids:
                leads = unquote(fragment) in ids[address]
            if not leads:
                broken.append(
                    f"{source.removeprefix(base)}: no target {target.removeprefix(base)}"
                )
    print(f"Looked at {len(names)} pages at {len(WIDTHS)} widths.")
    return broken


def visit(page: Page, base: str, name: str, folder: Path) -> tuple[dict, list[str]]:
    """Open a page, take its picture, and look for what is broken in it."""
    problems: list[str] = []

    def console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            problems.append(f"console: {message.text}")

    def failed(request: Request) -> None:
        problems.append(f"failed request: {request.url}")

    def left(request: Request) -> None:
        if not request.url.startswith((base, "data:")):
            problems.append(f"request that leaves the site: {request.url}")

    listeners = {
        "console": console,
        "pageerror": lambda error: problems.append(f"console: {error}"),
        "requestfailed": failed,
        "request": left,
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    page.goto(base + name, wait_until="load")
    page.evaluate(TYPESET)
    found = page.evaluate(LOOK)
    for event, listener in listeners.items():
        page.remove_listener(event, listener)
    picture = folder / name.replace(".html", ".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=picture, full_page=True)
    kinds = {
        "images": "image did not load",
        "formulas": "formula not typeset",
        "tex": "TeX in the text",
        "markup": "markup error",
    }
    for kind, text in kinds.items():
        problems += [f"{text}: {what}" for what in found[kind]]
    if found["excess"] > 0:
        problems.append(f"wider than the window by {found['excess']} pixels")
    return found, problems


if __name__ == "__main__":
    site = Path(sys.argv[1]).resolve()
    problems = check(site, site.parent / "screenshots")
    print("\n".join(problems) or "Nothing is broken.")
    sys.exit(bool(problems))
