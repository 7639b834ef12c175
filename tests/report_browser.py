"""Uses a report in a browser as a person would: sorts, searches, picks a label.

For `tests/test_report_in_browser.py` and `tests.benchmarks.report_in_browser`, which
need Playwright and axe (`pip install playwright axe-playwright-python`) and Chromium.
"""

import dataclasses
import shutil
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""


@dataclasses.dataclass
class Found:
    """The results of opening one page.

    Attributes:
      megabytes: Size of the file.
      seconds: Time until the page was loaded and the table of labels was there.
      noise: Console errors and warnings, exceptions, dialogs and foreign requests.
      axe: Findings by impact, in both themes.
      axe_serious: Descriptions of the serious and critical findings.
      wrong: Failed checks of sorting, searching and the rest.
    """

    megabytes: float = 0.0
    seconds: float = 0.0
    noise: list[str] = dataclasses.field(default_factory=list)
    axe: Counter = dataclasses.field(default_factory=Counter)
    axe_serious: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)


@contextmanager
def browser():
    """Yields a headless Chromium."""
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield opened
        opened.close()


def visit(opened, path: Path) -> Found:
    """Opens a page of jaxii and checks everything on it."""
    found = Found(megabytes=path.stat().st_size / 1e6)
    page = opened.new_page(viewport={"width": 1400, "height": 1000})
    _listen(page, path, found.noise)
    started = time.perf_counter()
    page.goto(path.as_uri())
    if page.query_selector(".explorer"):
        page.wait_for_selector(".explorer tbody tr")
    found.seconds = time.perf_counter() - started
    facts = [*_facts(page), *_on_paper(page), *_without_script(opened, path)]
    found.wrong += [what for what, holds in facts if not holds]
    _audit(page, found)
    page.close()
    return found


def _listen(page: Page, path: Path, noise: list[str]) -> None:
    def told(message):
        if message.type in ("error", "warning"):
            noise.append(f"console {message.type}: {message.text}")

    def asked(request):
        if request.url != path.as_uri() and not request.url.startswith("data:"):
            noise.append(f"request: {request.url}")

    def dialog(shown):
        noise.append(f"dialog: {shown.message}")
        shown.dismiss()

    page.on("console", told)
    page.on("pageerror", lambda error: noise.append(f"exception: {error}"))
    page.on("request", asked)
    page.on("dialog", dialog)


def _facts(page: Page):
    """Yields statements about the page and whether they hold."""
    yield "the page has only its own scripts", page.locator("script").count() <= 2
    sources = page.eval_on_selector_all("img", "all => all.map(i => i.src)")
    yield "images are embedded", all(s.startswith("data:") for s in sources)
    yield "no name became a link", page.locator("main a").count() == 0
    yield from _theme(page)
    if page.query_selector(".explorer"):
        yield from _sort(page)
        yield from _search(page)
        yield from _turn(page)
    if page.query_selector("svg.map"):
        yield from _pick(page)
    page.set_viewport_size({"width": 420, "height": 800})
    wide = page.evaluate("document.documentElement.scrollWidth")
    yield f"a narrow window scrolls only vertically (width {wide})", wide <= 420
    page.set_viewport_size({"width": 1400, "height": 1000})


def _theme(page: Page):
    def paper():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    before = paper()
    page.emulate_media(color_scheme="dark")
    yield "the theme follows the system", paper() != before
    page.emulate_media(color_scheme="light")
    yield "the theme follows the system back", paper() == before


def _column(page: Page, number: int) -> list[float]:
    cells = page.eval_on_selector_all(
        f".explorer tbody tr td:nth-child({number})",
        "all => all.map(c => c.textContent)",
    )
    return [float(c.replace(",", "")) for c in cells if c != "–"]


def _sort(page: Page):
    for number in range(2, 1 + page.locator(".explorer th[aria-sort]").count()):
        head = page.locator(".explorer th[aria-sort]").nth(number - 1)
        for direction in ("ascending", "descending"):
            # Two clicks reach both directions, whatever the initial order is.
            for _ in range(2):
                if head.get_attribute("aria-sort") != direction:
                    # By keyboard: the button has to be focusable and to react.
                    head.locator("button").focus()
                    page.keyboard.press("Enter")
            values = _column(page, number)
            wanted = sorted(values, reverse=direction == "descending")
            yield f"column {number} sorts {direction}", values == wanted
            yield (
                f"column {number} is marked {direction}",
                head.get_attribute("aria-sort") == direction,
            )
    page.locator(".explorer th[aria-sort] button").first.click()


def _search(page: Page):
    names = page.evaluate(
        "JSON.parse(document.getElementById('label-data').textContent).names"
    )
    hostile = [n for n in names if any(c in n for c in "<>\"'&\u202e")]
    for name in [*hostile[:12], names[0]]:
        page.fill(".explorer input", name)
        shown = page.eval_on_selector_all(
            ".explorer tbody th bdi", "all => all.map(b => b.textContent)"
        )
        yield f"searching {name!r} finds it, as text", name in shown
        said = page.text_content(".explorer .found")
        yield f"the count for {name!r} is shown ({said})", said.endswith(" labels")
    page.fill(".explorer input", "no label has this name \u2603")
    yield (
        "an unknown name finds nothing",
        page.locator(".explorer tbody tr").count() == 0,
    )
    page.fill(".explorer input", "")


def _turn(page: Page):
    _, following = page.locator(".pager button").all()
    first = page.text_content(".explorer tbody th bdi")
    if following.get_attribute("aria-disabled") == "true":
        return
    following.focus()
    page.keyboard.press("Enter")
    yield (
        "the next page has other labels",
        (page.text_content(".explorer tbody th bdi") != first),
    )
    yield "the page number is shown", "Page 2" in page.text_content(".pager span")


def _pick(page: Page):
    before = page.text_content(".picked")
    page.locator("svg.map").scroll_into_view_if_needed()
    at = page.evaluate(
        """() => {
          const {x, y} = JSON.parse(
            document.getElementById("label-data").textContent).map;
          const to = document.querySelector("svg.map").getScreenCTM();
          return [x[0] * to.a + to.e, y[0] * to.d + to.f];
        }"""
    )
    page.mouse.click(*at)
    text = page.text_content(".picked")
    yield (
        "a click on the map names a label and its nearest",
        (
            text != before
            and "nearest to" in text
            and page.locator(".marks circle").count() > 1
        ),
    )
    page.locator(".explorer tbody button.label").first.focus()
    page.keyboard.press("Enter")
    yield (
        "a label of the table is marked on the map, by keyboard",
        (page.evaluate("document.activeElement.className") == "picked"),
    )


def _on_paper(page: Page):
    if not page.query_selector(".explorer"):
        return
    yield "the screen shows the whole table", page.is_visible(".explorer table")
    yield "the screen hides the table of ends", not page.is_visible(".static table")
    page.emulate_media(media="print")
    yield "paper shows the ends of the table", page.is_visible(".static table")
    yield "paper shows no buttons", page.locator("button:visible").count() == 0
    page.emulate_media(media="screen")


def _without_script(opened, path: Path):
    context = opened.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    yield (
        "without scripts, no buttons are shown",
        page.locator("button:visible").count() == 0,
    )
    if page.query_selector(".explorer"):
        yield (
            "without scripts, the ends of the table are shown",
            page.is_visible(".static table"),
        )
    context.close()


def _audit(page: Page, found: Found) -> None:
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        result = Axe().run(page)
        for violation in result.response["violations"]:
            impact, nodes = violation["impact"], violation["nodes"]
            found.axe[impact] += len(nodes)
            if impact in ("serious", "critical"):
                first = nodes[0]
                found.axe_serious.append(
                    f"{violation['id']} x {len(nodes)}: {first['html'][:160]} "
                    f"{first['failureSummary'][:200]}"
                )
