"""The search page in a headless Chromium, with and without a mouse. Every page of these tests must have asked no other
host for anything, and have no error on its console."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import chromium
from tests.search.serving import LONG, SCRIPT, Server, served
from trimodal.search.index import Index

PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}


class Gated:
    """A model that waits before it reads the text "slow", until it is let go."""

    def __init__(self, model: Any):
        self.model, self.modalities, self.go_on = model, model.modalities, threading.Event()
        self.is_waiting = threading.Event()

    def encode(self, **given: Any) -> Any:
        if given.get("texts") == ["slow"]:
            self.is_waiting.set()
            self.go_on.wait(30)
        return self.model.encode(**given)


@pytest.fixture(scope="module")
def gated(model: Any) -> Gated:
    return Gated(model)


@pytest.fixture(scope="module")
def server(index: Index, gated: Gated) -> Iterator[Server]:
    with served(index, gated) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


class Opened:
    """Opens pages, and keeps what they asked for and what their consoles said."""

    def __init__(self, browser: Any, url: str):
        self.browser, self.url = browser, url
        self.requests, self.errors, self.contexts = list[str](), list[str](), list[Any]()

    def note(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def __call__(self, path: str = "/", script: str = "", **options: Any) -> Any:
        context = self.browser.new_context(locale=options.pop("locale", "en-US"), **options)
        self.contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("console", self.note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}"))
        if script:
            page.add_init_script(script)
        page.goto(self.url + path)
        page.wait_for_selector("#results .open")
        return page


@pytest.fixture
def opened(browser: Any, server: Server) -> Iterator[Opened]:
    one = Opened(browser, server.url)
    yield one
    for context in one.contexts:
        context.close()
    assert one.errors == []
    assert [url for url in one.requests if not url.startswith((f"{server.url}/", f"blob:{server.url}/"))] == []
    assert one.requests


def names(page: Any, kind: str) -> list[str]:
    return page.locator(f"#{kind} li .name").evaluate_all("all => all.map((one) => one.title)")


def until(page: Any, expression: str, argument: Any = None) -> None:
    """Wait until a script in the page is true. Playwright's own way needs eval, which the page's policy forbids."""
    for _ in range(500):
        if page.evaluate(expression, argument):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"not true within 10 s: {expression} {argument or ''}; {page.inner_text('body')}")


def settled(page: Any, *, liked: str = "") -> None:
    """Wait until the newest query has been answered, and tells that it is by this name."""
    until(page, "name => /^(Found|已找到)/.test(document.getElementById('status').textContent) "
                "&& document.querySelector('#query .about').textContent.includes(name)", liked)


FOCUSED = "document.activeElement.getAttribute('aria-label') || document.activeElement.id"


def assert_focused(page: Any, name: str) -> None:
    """The name of what has the focus begins so, at once or soon."""
    until(page, f"name => ({FOCUSED}).startsWith(name)", name)


def test_from_end_to_end_by_the_keyboard(opened: Opened, index: Index, model: Any) -> None:
    words = next(words for words in ("a low tone", "red", "noise", "a dog", "sea") if "film.webm" not in {
        hit.entry.path for hit in index.search(model.encode(texts=[words])[0], "image", 2)})  # whose arrows seek
    page = opened()
    press = page.keyboard.press
    assert_focused(page, "Words, or a picture or sound")
    page.keyboard.type(words)
    press("Enter")
    settled(page)
    assert page.url.endswith(f"/?text={words.replace(' ', '+')}") and words in page.title()
    best = names(page, "image")[0]
    assert Path(best).name[:20] in page.locator("#status").text_content()
    press("ArrowDown")
    assert_focused(page, f"Open {Path(best).name}, similarity 0.")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is seen"
    press("ArrowRight")
    assert_focused(page, f"Open {Path(names(page, 'image')[1]).name}")
    press("End")
    press("Home")
    press("Enter")
    assert page.locator("#viewer-name").text_content() == best
    press("ArrowRight")  # the next picture, in the view
    assert page.locator("#viewer-name").text_content() == names(page, "image")[1]
    press("Escape")
    assert_focused(page, f"Open {Path(names(page, 'image')[1]).name}")
    press("m")
    settled(page, liked="Most like")
    assert re.search(r"/\?like=\d+$", page.url)
    assert_focused(page, "Open ")
    first_sound = names(page, "audio")[0]
    for _ in range(8):  # to the right, until the other list
        if page.evaluate("Boolean(document.activeElement.closest('#audio'))"):
            break
        press("ArrowRight")
    press("Home")
    assert_focused(page, f"Play {Path(first_sound).name}")
    press("Enter")
    page.wait_for_selector(".playing")
    press("Enter")
    until(page, "!document.querySelector('.playing')")
    press("Tab")
    assert_focused(page, f"Position in {Path(first_sound).name}")
    press("Tab")
    assert_focused(page, f"More like {Path(first_sound).name}")
    press("Enter")
    settled(page, liked=Path(first_sound).name)
    press("Escape")
    until(page, "location.search === ''")
    page.go_back()
    settled(page, liked=Path(first_sound).name)
    press("?")
    assert page.locator("#keyboard dt").count() == 10
    press("Escape")
    press("/")
    assert_focused(page, "Words, or a picture or sound")
    assert page.locator("button:visible:not([aria-label]), input:visible:not([aria-label])").evaluate_all(
        "all => all.filter((one) => !one.textContent.trim()).length") == 0, "all that can be pressed has a name"


def test_each_list_is_one_stop_of_the_tab_key(opened: Opened) -> None:
    page = opened()
    stops = []
    for _ in range(14):
        stops.append(page.evaluate(FOCUSED))
        page.keyboard.press("Tab")
    assert stops[1:4] == ["Search by a picture or sound file", "Record a sound", "go"]
    assert [stop.split()[0] for stop in stops[4:9]] == ["Open", "More", "Play", "Position", "More"]


DROP = """([name, type, content, event]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const given = new DataTransfer();
  given.items.add(new File([bytes], name, { type }));
  const init = { bubbles: true, cancelable: true };
  document.body.dispatchEvent(event === "paste" ? new ClipboardEvent("paste", { ...init, clipboardData: given })
    : new DragEvent(event, { ...init, dataTransfer: given }));
}"""


def give(page: Any, path: Path, media_type: str, event: str) -> None:
    import base64

    page.evaluate(DROP, [path.name, media_type, base64.b64encode(path.read_bytes()).decode(), event])


def test_files_that_are_dropped_pasted_and_chosen(opened: Opened, index: Index) -> None:
    page = opened()
    give(page, index.folder / "red.png", "image/png", "dragenter")
    assert page.locator("#drop").is_visible()
    give(page, index.folder / "red.png", "image/png", "drop")
    settled(page, liked="red.png")
    assert names(page, "image")[0] == "red.png" and not page.locator("#drop").is_visible()
    give(page, index.folder / "wide.webp", "image/webp", "paste")
    settled(page, liked="wide.webp")
    assert names(page, "image")[0] == "wide.webp"
    with page.expect_file_chooser() as chooser:
        page.get_by_label("Search by a picture or sound file").focus()
        page.keyboard.press("Enter")
    chooser.value.set_files(str(index.folder / "inner/high.flac"))
    settled(page, liked="high.flac")
    assert names(page, "audio")[0] == "inner/high.flac"
    give(page, index.folder / "film.webm", "video/webm", "drop")
    settled(page, liked="film.webm")
    assert names(page, "image")[0] == "film.webm"
    page.get_by_role("button", name="Search by its sound").click()
    until(page, "document.querySelector('#audio li .name').title === 'film.webm' "
                "&& document.querySelector('#audio li .score').textContent === '1.00'")
    page.keyboard.press("Tab")  # a browser skips places of the history at which nothing was pressed
    give(page, index.folder / "red.png", "image/png", "drop")
    settled(page, liked="red.png")
    page.go_back()
    settled(page, liked="film.webm")
    assert page.locator("#other-half").text_content() == "Search by its picture"
    give(page, index.folder / "red.png", "text/plain", "drop")
    assert page.locator("#status.trouble").text_content() == "red.png is neither a picture nor a sound."


def test_a_recording_of_the_browser_is_searched(opened: Opened) -> None:
    """Chromium's own recorder, on a microphone that beeps."""
    page = opened()
    page.locator("h1").click()
    page.keyboard.press("r")
    page.wait_for_selector("#record[aria-pressed=true]")
    page.wait_for_timeout(1300)
    with page.expect_response("**/api/search?kind=audio") as response:
        page.keyboard.press("r")
    assert response.value.status == 200, response.value.text()
    settled(page, liked="your recording")
    page.keyboard.press("r")
    page.wait_for_selector("#record[aria-pressed=true]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#record[aria-pressed=false]")
    assert "your recording" in page.locator("#query").text_content()


def refusing(name: str) -> str:
    return f"navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('', '{name}'))"


@pytest.mark.parametrize(("script", "line"), [
    (refusing("NotFoundError"), "No microphone"), (refusing("NotAllowedError"), "permission"),
    ("Object.defineProperty(window, 'isSecureContext', { value: false })", "https"),
    ("delete window.MediaRecorder", "cannot record")])
def test_without_a_microphone_there_is_one_line(opened: Opened, script: str, line: str) -> None:
    page = opened(script=script)
    page.get_by_label("Record a sound").click()
    assert line in page.locator("#status.trouble").text_content()


def test_a_file_that_is_no_picture_and_one_that_is_too_large_are_told(opened: Opened, tmp_path: Path) -> None:
    page = opened()
    (tmp_path / "text.png").write_text("no picture at all")
    give(page, tmp_path / "text.png", "image/png", "drop")
    page.wait_for_selector("#status.trouble")
    assert page.locator("#status").text_content().startswith("Not readable: the file is text")
    assert page.locator("main li").count() == 0 and not page.locator("#query").is_visible()
    opened.errors = [error for error in opened.errors if "422" not in error]  # the browser's own line
    page.evaluate("""() => { const file = new File([new Uint8Array(65 << 20)], "a.wav", { type: "audio/wav" });
      const given = new DataTransfer(); given.items.add(file);
      document.body.dispatchEvent(new DragEvent("drop", { bubbles: true, dataTransfer: given })); }""")
    assert page.locator("#status.trouble").text_content() == "The file is too large; 64 MB at most."


def test_the_newest_query_wins_and_waiting_is_shown(opened: Opened, gated: Gated) -> None:
    page = opened()
    page.fill("#text", "slow")
    page.wait_for_selector("#results[aria-busy=true]")
    assert page.locator("#status").text_content() == "Searching…" and gated.is_waiting.wait(10)
    with page.expect_event("requestfailed") as given_up:
        page.fill("#text", "fast")
        page.keyboard.press("Enter")
    assert given_up.value.url.endswith("?text=slow")
    gated.go_on.set()
    settled(page)
    assert page.url.endswith("?text=fast") and page.locator("#results").get_attribute("aria-busy") == "false"


def test_an_answer_that_comes_late_is_not_shown(opened: Opened) -> None:
    """It has been given up; and it would not be shown if it came nevertheless."""
    page = opened(script="window.fetch = ((own) => (url, options) => own(url, { ...options, signal: null }))(fetch)")
    late = list[Any]()
    page.route("**/api/search?text=late", lambda route: late.append(route))
    page.fill("#text", "late")
    while not late:
        page.wait_for_timeout(20)
    page.fill("#text", "new")
    settled(page)
    before = names(page, "image"), page.locator("#image .score").all_text_contents()
    with page.expect_response("**/api/search?text=late"):
        late[0].continue_()
    page.wait_for_timeout(200)
    assert (names(page, "image"), page.locator("#image .score").all_text_contents()) == before
    assert page.url.endswith("?text=new") and page.input_value("#text") == "new"


def test_chinese_light_and_dark_and_a_phone(opened: Opened) -> None:
    grounds = set()
    for locale, scheme, is_phone in (("zh-CN", "dark", True), ("en-GB", "light", True), ("de-DE", "light", False)):
        page = opened("/?text=x", locale=locale, color_scheme=scheme, **(PHONE if is_phone else {}))
        settled(page)
        is_chinese = locale == "zh-CN"
        assert page.locator("h1").text_content() == ("搜索图片和声音" if is_chinese else "Search pictures and sounds")
        assert page.locator("html").get_attribute("lang") == ("zh-CN" if is_chinese else "en")
        assert page.evaluate("document.body.innerText.includes('undefined')") is False
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the window"
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        lefts = [page.locator(f"#{kind}").bounding_box()["x"] for kind in ("image", "audio")]
        assert (lefts[0] == lefts[1]) == is_phone, "side by side where there is room"
    assert len(grounds) == 2


def test_names_with_markup_and_long_names_are_shown_as_they_are(opened: Opened) -> None:
    page = opened("/?text=x")
    settled(page)
    assert {SCRIPT, LONG} <= set(names(page, "image"))
    page.get_by_role("button", name=re.compile("^Open <img src")).click()
    assert page.locator("#viewer-name").text_content() == SCRIPT
    assert page.locator("#viewer-name *, #image .name bdi *").count() == 0
    until(page, "document.querySelector('#viewer img').naturalWidth === 64")


def test_a_video_plays_and_a_sound_is_played_in_ranges(opened: Opened, index: Index) -> None:
    page = opened("/?text=x")
    settled(page)
    page.get_by_role("button", name=re.compile("^Open film.webm")).click()
    page.evaluate("document.querySelector('#viewer video').play()")
    until(page, "document.querySelector('#viewer video').currentTime > 0.1")
    page.keyboard.press("Escape")
    row = page.locator("#audio li").filter(has_text="low.wav")
    with page.expect_response(lambda response: "/files/" in response.url) as response:
        row.get_by_role("slider").focus()
        page.keyboard.press("End")
    assert (response.value.status, response.value.request.headers["range"][:6]) == (206, "bytes=")
    until(page, "document.querySelector('.time').closest('section').querySelector('.bars.drawn')")


def test_a_kind_that_the_index_lacks_is_told(browser: Any, model: Any, index: Index, tmp_path: Path) -> None:
    from trimodal.search.index import ModelName, write_index

    entries, features = index.by_kind["image"][:2], index.features("image")[:2].numpy()
    name = ModelName("m", model.digest, model.embed_dim, model.modalities)
    write_index(tmp_path, index.folder, name, entries, features)
    with served(Index.open(tmp_path), model) as server:
        page = Opened(browser, server.url)("/?text=x")
        settled(page)
        assert page.locator("#audio .nothing").text_content() == "There are no sounds in this index."
        page.get_by_role("button", name=re.compile("^More like")).first.click()
        settled(page, liked="Most like")
        assert len(names(page, "image")) == 1
        page.context.close()


def test_a_server_that_has_ended_is_told(browser: Any, model: Any, index: Index) -> None:
    with served(index, model) as server:
        page = Opened(browser, server.url)()
        page.wait_for_load_state("networkidle")  # what this process has accepted and not answered would stay open
    page.fill("#text", "x")
    page.wait_for_selector("#status.trouble")
    assert page.locator("#status").text_content() == "The server does not answer; is it still running?"
    with page.expect_request("**/api/search?text=x"):  # the same again
        page.keyboard.press("Enter")
    page.context.close()
