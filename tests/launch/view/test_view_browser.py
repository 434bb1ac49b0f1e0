"""The page in Chromium: its keys, what its console says, what it asks for, whether it fits, and hostile shards.

Skipped where there is no chromium, which tests/launch/install_system_packages.sh installs.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from triweave.data_pipeline.config import ScheduleEntry, load_data_config
from triweave.launch.view import server
from triweave.launch.view.packs import PackBook
from triweave.launch.view.server import ViewServer
from triweave.launch.view.shard_folder import ShardFolder

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright: pip install '.[dev]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: run tests/launch/install_system_packages.sh")

PATIENCE_SECONDS = 20
WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
PAPER = {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 22, 26)"}
WORST_CONTRAST = """() => {
  const rgb = text => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
  const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  const luminance = text => rgb(text).map(value => linear(value / 255))
    .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
  const paper = luminance(getComputedStyle(document.body).backgroundColor) + 0.05;
  const shown = [...document.querySelectorAll("p, a, dt, dd, h1, h2, h3, label, span, button, select, input, th, td")]
    .filter(node => node.checkVisibility() && node.textContent.trim() && !node.disabled);
  return Math.min(...shown.map(node => luminance(getComputedStyle(node).color) + 0.05)
    .map(ink => Math.max(ink, paper) / Math.min(ink, paper)));
}"""


@dataclass
class Watched:
    """A page with what went on in it. asked: addresses; said: console messages, errors, dialogs."""

    page: Any
    asked: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    arguments = [
        "--no-sandbox",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def watch(chromium: Any) -> Iterator[Callable[..., Watched]]:
    contexts = []

    def open_page(scheme: str = "light", viewport: dict[str, int] = WIDE) -> Watched:
        context = chromium.new_context(color_scheme=scheme, viewport=viewport)
        contexts.append(context)
        watched = Watched(context.new_page())
        watched.page.set_default_timeout(PATIENCE_SECONDS * 1000)
        watched.page.on("request", lambda request: watched.asked.append(request.url))
        watched.page.on("console", lambda message: watched.said.append(message.text))
        watched.page.on("pageerror", lambda error: watched.said.append(str(error)))
        watched.page.on("dialog", lambda dialog: (watched.said.append(dialog.message), dialog.dismiss()))
        return watched

    yield open_page
    for context in contexts:
        context.close()


def wait_for(page: Any, expression: str) -> None:
    """Wait until an expression is true; playwright's own way of waiting is an eval that the page's policy forbids."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


def unexpected(watched: Watched) -> list[str]:
    """Return what was said beside that a medium of the hostile shard is none."""
    return [line for line in watched.said if "422 (Unprocessable Entity)" not in line]


def heading(page: Any, text: str) -> None:
    page.get_by_role("heading", name=text, exact=True).wait_for()


def test_everything_by_keyboard(watch: Callable[..., Watched], view_server: ViewServer) -> None:
    watched = watch()
    page = watched.page
    page.goto(view_server.url)
    wait_for(page, "document.querySelectorAll('#list a').length === 40")
    page.keyboard.press("j")
    heading(page, "item/0")
    wait_for(page, "document.querySelector('#document img')?.naturalWidth === 64")
    page.keyboard.press("j")
    heading(page, "item/1")
    page.keyboard.press("k")
    heading(page, "item/0")
    page.keyboard.press("/")
    page.keyboard.type("chante modality:audio")
    wait_for(page, "document.querySelectorAll('#list a').length === 7")
    assert page.input_value("[data-facet=modality]") == "audio"
    page.keyboard.press("Escape")
    page.keyboard.press("j")  # the first that was found
    heading(page, "item/4")
    page.keyboard.press("t")
    wait_for(page, "document.querySelectorAll('.token').length > 3")
    assert "".join(page.locator(".token").all_text_contents()) == "Un oiseau d'été chante 4."
    wait_for(page, "document.querySelector('.waveform path')?.getTotalLength() > 100")
    page.keyboard.press("Space")
    wait_for(page, "document.querySelector('audio').currentTime > 0")
    page.keyboard.press("?")
    page.get_by_role("dialog").wait_for()
    page.keyboard.press("Escape")
    page.keyboard.press("g")
    page.keyboard.type("33")
    page.keyboard.press("Enter")
    heading(page, "item/33")
    page.keyboard.press("p")
    page.locator(".matrix polygon").first.wait_for()
    page.keyboard.press("j")
    wait_for(
        page, "location.hash === '#packs/0/0/1' && document.querySelector('#packs h1')?.innerText.startsWith('Pack 1:')"
    )
    page.keyboard.press("]")
    wait_for(page, "document.querySelector('#packs .about')?.innerText.startsWith('Block 1:')")
    page.keyboard.press("d")
    heading(page, "item/33")
    page.go_back()
    page.go_back()
    wait_for(page, "location.hash === '#packs/0/0/1'")
    assert watched.said == []
    assert {url.split("/")[2] for url in watched.asked} == {f"127.0.0.1:{view_server.server_port}"}


def test_what_is_left_falls_silent_and_never_comes_late(watch: Callable[..., Watched], view_server: ViewServer) -> None:
    page = watch().page
    page.goto(f"{view_server.url}#documents/0/4")
    page.locator("audio").wait_for()
    page.evaluate("() => { window.sound = document.querySelector('audio'); sound.loop = true; return sound.play(); }")
    late: list[Any] = []
    page.route("**/api/document?*sample=5", lambda route: late.append(route))
    with page.expect_request("**/api/document?*sample=5"):
        page.keyboard.press("j")
    page.keyboard.press("j")
    heading(page, "item/6")
    assert page.evaluate("sound.paused")
    with page.expect_response("**/api/document?*sample=5"):
        late[0].continue_()
    page.wait_for_timeout(100)
    heading(page, "item/6")


def test_keys_count_from_each_other_before_the_address_has_changed(
    watch: Callable[..., Watched], view_server: ViewServer
) -> None:
    page = watch().page
    page.goto(f"{view_server.url}#documents/0/4")
    heading(page, "item/4")
    wait_for(page, "document.querySelectorAll('#list a').length === 40")
    page.fill("#query", "nowhere-to-be-found")
    wait_for(page, "document.querySelector('#status').innerText === 'Nothing found. 0 shown, 60 of 60 searched'")
    page.fill("#query", "")
    wait_for(page, "document.querySelectorAll('#list a').length === 40")
    page.keyboard.press("Escape")
    press = "() => document.body.dispatchEvent(new KeyboardEvent('keydown', { key: 'j', bubbles: true }))"
    page.evaluate(f"() => {{ const press = {press}; press(); press(); press(); }}")
    heading(page, "item/7")
    page.keyboard.press("p")
    page.locator(".matrix polygon").first.wait_for()
    page.evaluate(f"() => {{ const press = {press}; press(); press(); }}")
    wait_for(page, "location.hash === '#packs/0/0/2'")


@pytest.mark.slow
def test_plan_segments_by_key_and_by_choice(
    watch: Callable[..., Watched], view_data: Any, serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "SEARCH_SECONDS", 0)  # a step a call, so that the page has to call again
    schedule = [ScheduleEntry(after_step=3, sequence_length=64), ScheduleEntry(after_step=9, sequence_length=128)]
    packs = PackBook(replace(load_data_config(view_data.config), schedule=schedule), 2)
    with serve([ShardFolder("birds", str(view_data.shards))], packs=packs) as shown:
        watched = watch()
        page = watched.page
        page.goto(f"{shown.url}#packs/0/0/0")
        title = "document.querySelector('#packs h1')?.innerText"
        wait_for(page, f"{title}?.includes(' of 96 tokens')")
        page.keyboard.press("}")
        wait_for(page, f"location.hash === '#packs/1/0/0' && {title}?.includes(' of 64 tokens')")
        wait_for(page, "document.querySelector('#packs table')?.innerText.includes('carried over')")
        assert page.locator("#segment option").last.inner_text() == "2: from step 10, 128 tokens a pack"
        page.focus("#segment")
        page.keyboard.press("ArrowDown")
        wait_for(page, f"location.hash === '#packs/2/0/0' && {title}?.includes(' of 128 tokens')")
        assert page.evaluate("document.activeElement.id") == "segment"
        page.keyboard.press("Escape")
        page.keyboard.press("}")  # the last one stays
        page.keyboard.press("{")
        wait_for(page, f"location.hash === '#packs/1/0/0' && {title}?.includes(' of 64 tokens')")
        page.goto(f"{shown.url}#packs/0/0/6")
        wait_for(
            page, "document.querySelector('#packs .problem')?.innerText.includes('segment 1 takes over before it')"
        )
    assert watched.said == []


@pytest.mark.slow
def test_a_piece_of_a_pack_leads_to_its_document(watch: Callable[..., Watched], view_server: ViewServer) -> None:
    page = watch().page
    page.goto(f"{view_server.url}#packs/0/0/0")
    link = page.locator("#packs td a").first
    link.focus()
    assert page.locator(".matrix .lit").count() > 0
    key = link.inner_text()
    page.keyboard.press("Enter")
    page.locator("#document h1").wait_for()
    assert key in page.inner_text("#document")
    page.get_by_role("link", name="pack 0").click()
    wait_for(page, "location.hash === '#packs/0/0/0'")


@pytest.mark.slow
def test_lists_are_chosen_and_go_on(watch: Callable[..., Watched], view_server: ViewServer) -> None:
    page = watch().page
    page.goto(view_server.url)
    wait_for(page, "document.querySelectorAll('#list a').length === 40")
    page.locator("#more").scroll_into_view_if_needed()
    wait_for(page, "document.querySelectorAll('#list a').length === 60")
    assert page.inner_text("#status") == "60 shown, 60 of 60 searched"
    page.select_option("[data-facet=language]", "ja")
    wait_for(page, "document.querySelectorAll('#list a').length === 20")
    page.select_option("[data-facet=corpus]", "talk")
    wait_for(page, "document.querySelectorAll('#list a').length === 7")
    assert page.input_value("#query") == "language:ja corpus:talk"
    page.select_option("[data-facet=language]", "")
    wait_for(page, "document.querySelectorAll('#list a').length === 20")
    page.fill("#query", '"not closed')
    page.get_by_role("alert").wait_for()
    page.select_option("#folder", "1")
    page.fill("#query", "")
    wait_for(page, "document.querySelectorAll('#list a').length === 11")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", PAPER)
def test_text_reads_in_light_and_dark(watch: Callable[..., Watched], view_server: ViewServer, scheme: str) -> None:
    watched = watch(scheme)
    page = watched.page
    for place in ("#documents/0/4", "#packs/0/0/2", "#documents/1/5"):
        page.goto(view_server.url + place)
        page.locator("main:not([hidden]) h1").wait_for()
        wait_for(page, "document.querySelectorAll('#list a').length > 5 || !packs.hidden")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == PAPER[scheme]
        assert page.evaluate(WORST_CONTRAST) >= 4.5
    assert unexpected(watched) == []


def test_it_fits_a_telephone(watch: Callable[..., Watched], view_server: ViewServer) -> None:
    watched = watch("dark", NARROW)
    page = watched.page
    page.goto(view_server.url)
    page.locator("#list a").first.wait_for()
    for step in ("", "a document", "packs", "a hostile one"):
        if step == "a document":
            page.locator("#list a").nth(4).click()
            heading(page, "item/4")
            assert not page.locator("#finder").is_visible()
        elif step:
            page.goto(view_server.url + {"packs": "#packs/0/0/1", "a hostile one": "#documents/1/0"}[step])
            page.locator("main:not([hidden]) h1").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"], step
    page.keyboard.press("Escape")
    page.locator("#finder").wait_for()
    assert unexpected(watched) == []


def test_a_hostile_shard_runs_nothing(
    watch: Callable[..., Watched], view_server: ViewServer, hostile: dict[str, int]
) -> None:
    watched = watch()
    page = watched.page
    for number in hostile.values():
        page.goto(f"{view_server.url}#documents/1/{number}")
        page.locator("#document h1").wait_for()
    page.goto(f"{view_server.url}#documents/1/{hostile['markup']}")
    page.locator("#document").get_by_text("<script>").first.wait_for()
    wait_for(page, "document.querySelectorAll('#list a').length === 11")
    assert page.evaluate("[...document.scripts].map(one => one.getAttribute('src'))") == ["/view.js"]
    assert (
        page.locator("#documents [onerror], #documents [onload], #documents script, #documents svg script").count() == 0
    )
    assert page.locator("a[href^='javascript']").count() == 0
    for name in ("drawing", "page"):
        page.goto(f"{view_server.url}medium?folder=1&sample={hostile[name]}&part=0")
        assert page.evaluate("document.contentType") == "application/json"
    page.wait_for_timeout(300)
    assert [url for url in watched.asked if "pwned" in url] == []
    assert page.title() != "pwned"
    assert unexpected(watched) == []


@pytest.mark.slow
def test_what_watches_would_see_an_attack(
    watch: Callable[..., Watched], view_server: ViewServer, hostile: dict[str, int]
) -> None:
    """The same text as markup, on a page of the same server without its policy, does all that is looked for above."""
    watched = watch()
    page = watched.page
    page.goto(view_server.url)
    page.locator("#list a").first.wait_for()
    text = page.evaluate(f"fetch('/api/document?folder=1&sample={hostile['markup']}').then(answer => answer.json())")
    page.route("**/bare", lambda route: route.fulfill(content_type="text/html", body=f"<title>x</title>{text['id']}"))
    page.goto(f"{view_server.url}bare")
    wait_for(page, "document.title === 'pwned'")
    assert any("pwned" in url for url in watched.asked)


def test_the_policy_stops_markup_that_gets_in(watch: Callable[..., Watched], view_server: ViewServer) -> None:
    watched = watch()
    page = watched.page
    page.goto(view_server.url)
    page.locator("#list a").first.wait_for()
    for attack in ("document.body.innerHTML = '<b>x</b>'", "document.body.setAttribute('onclick', 'fetch(`/pwned`)')"):
        assert page.evaluate(f"() => {{ try {{ {attack}; }} catch (error) {{ return error.name; }} }}") == "TypeError"
    page.evaluate("() => fetch('http://127.0.0.1:1/').catch(() => 0)")
    page.evaluate("() => { document.body.append(Object.assign(new Image(), { src: 'http://127.0.0.1:1/x.png' })); }")
    page.wait_for_timeout(200)
    assert sum("Content Security Policy" in line for line in watched.said) >= 3
    assert [url for url in watched.asked if "pwned" in url] == []
