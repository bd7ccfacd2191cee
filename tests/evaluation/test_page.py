"""The report's page: any kind of run, hostile words, and in a real browser, on a desktop, a phone and paper."""

import html.parser
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import chromium
from tests.evaluation import reports
from trimodal.evaluation import page
from trimodal.evaluation.elements import VOID
from trimodal.evaluation.phrases import PHRASES

KINDS = reports.kinds()
OLD = Path(__file__).parents[1] / "old_run" / "run" / "reports"
HOSTILE = ("<script>window.hacked = 1</script>", "\"><img src=x onerror='window.hacked = 2'>", "</script><b>bold</b>",
           "' onmouseover='window.hacked = 3' x='", "&lt;b&gt; &amp; \x00\x08 \udcff", "]]> --> \u202e turned",
           "{0} {key}")


class Parsed(html.parser.HTMLParser):
    """Elements of a page, its text by element, and whether each is closed in its order."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == [], "all closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.said[self.open[-1]] = self.said.get(self.open[-1], "") + data + "\n"

    def ids(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.elements if "id" in attributes]

    def text(self) -> str:
        return "".join(text for tag, text in self.said.items() if tag not in ("script", "style"))


# ---- any report --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_of_any_run(kind: str) -> None:
    found = json.loads(json.dumps(KINDS[kind]))
    text = page.render(found, reports.media(), language="zh")
    parsed = Parsed(text)
    ids = parsed.ids()
    assert len(ids) == len(set(ids)) and {"results", "environment", "config"} <= set(ids)
    assert not re.search(r"\{\w*\}", parsed.text().replace("a {}", "")), "a place of a phrase is left open"
    assert text.startswith("<!DOCTYPE html>\n<html lang=\"zh-CN\">") and len(text) < 1_000_000
    trains = found["kind"] == "training"
    assert (set(ids) >= {"curves", "memory", "time"}) == trains
    for name, key in (("map", "map"), ("retrievals", "retrievals"), ("similarities", "similarities")):
        assert (name in ids) == bool(found[key]), name
    both = [attributes["lang"] for _, attributes in parsed.elements if "lang" in attributes]
    assert both.count("zh") == both.count("en") > 20


def test_what_is_not_there_is_left_out() -> None:
    ids = {kind: set(Parsed(page.render(found)).ids()) for kind, found in KINDS.items()}
    assert "after_stages" in ids["own_towers"] and "after_stages" not in ids["pretrained"] | ids["speakers"]
    assert "events" in ids["resumed"] and "events" not in ids["own_towers"]
    assert "data" not in ids["zero_shot"] and "map" not in ids["synthetic"]


def test_a_report_of_an_earlier_release_has_a_page() -> None:
    [path] = OLD.glob("*.json")
    found = json.loads(path.read_text("utf-8"))
    assert "curves" not in found and "map" not in found
    parsed = Parsed(page.render(found))
    assert {"results", "curves", "memory", "time", "data"} <= set(parsed.ids()), "curves of the validations"
    for name, value in found["environment"]["packages"].items():
        assert f"{name}\n" in parsed.text() and f"{value}\n" in parsed.text()


def test_all_figures_stand_with_chance_interval_and_candidates() -> None:
    found = KINDS["own_towers"]
    given = {"value": 0.1234, "chance": 0.0567, "candidates": 1234, "queries": 77, "low": 0.1111, "high": 0.2222}
    metrics = found["evaluation"]["figures"]["stamps"]["image-text"]
    changed = {**found, "evaluation": {**found["evaluation"], "figures": {"stamps": {"image-text": dict.fromkeys(
        metrics, given)}}}}
    text = page.render(changed).partition('id="curves"')[0]
    rows = re.findall(r"<tr><td><bdi>(\S+?)</bdi></td>(.*?)</tr>", text)
    told = {name: re.sub(r"<[^>]+>", "|", row) for name, row in rows if name in metrics}
    assert told.keys() == metrics.keys()
    for row in told.values():
        for number in ("0.1234", "0.1111 - 0.2222", "0.0567", "1,234", "77"):
            assert f"|{number}|" in row


def test_the_data_table_tells_what_was_left_out() -> None:
    found = reports.composed(reports.run(), [])
    found["data"]["available"] = {"stamps": {"test": {"samples": 100, "of": 120, "sha256": "0"}}}
    text = Parsed(page.render(found)).text()
    for said in (PHRASES["left_broken"]["en"].format(n=3), PHRASES["left_gone"]["zh"].format(n=20, of=120),
                 PHRASES["left_broken"]["en"].format(n=2), PHRASES["left_alone"]["en"].format(n=10)):
        assert said in text
    found["evaluation"]["facts"]["stamps"] |= {"subset_seed": 0}
    text = Parsed(page.render(found)).text()
    assert PHRASES["left_subset"]["en"].format(n=10) in text and PHRASES["left_alone"]["zh"].format(n=10) not in text


def test_time_adds_up_to_the_stage() -> None:
    [first, second, _] = KINDS["own_towers"]["stages"]
    assert (first["saving_s"], second["saving_s"], first["validation_s"]) == (1.0, 1.0, 3.0)
    assert first["waiting_s"] == pytest.approx(0.04 * 36)
    assert sum(page.time_parts(first).values()) == pytest.approx(first["seconds"])
    assert page.time_parts({"stage": "align", "seconds": 5.0}) == {"time_training": 5.0}, "of an earlier release"


# ---- words from outside ------------------------------------------------------------------------------------------


def hostile_report(words: str) -> dict[str, Any]:
    """A report with these words wherever words come from outside."""
    event = {"kind": "event", "step": 1, "message": words}
    lines = [{**line, "stage": words} if "stage" in line else line for line in reports.records(("align",))]
    found = reports.composed(
        reports.run({words: {"image-text": reports.pair("image", "text")}}, command=words, checkpoint=words,
                    device=words, model={"size": words, "parameters": 1},
                    config={"data": {"manifest": words}, words: words},
                    best={"stage": words, "epoch": 1, "loss": 1.0},
                    **reports.shown(words=words.replace("{", "{{").replace("}", "}}"))), [*lines, event])
    found["data"] = {"counts": {words: {"test": {words: 3}}}, "licences": {words: words}, "digests": {words: words}}
    for row in found["retrievals"]:
        row["source"] = words
    for point in found["map"]["points"]:
        point |= {"set": words, "class": words}
    return found


@pytest.mark.parametrize("words", HOSTILE)
def test_words_from_outside_stay_words(words: str) -> None:
    plain, text = (page.render(hostile_report(one), reports.media()) for one in ("harmless", words))
    parsed = Parsed(text)
    assert [tag for tag, _ in parsed.elements] == [tag for tag, _ in Parsed(plain).elements], "no element more"
    for tag, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), attributes
    shown = re.sub(r"[\x00-\x08]", "\ufffd", words)
    assert parsed.said["bdi"].count(shown) > 20
    assert text.encode("utf-8", "backslashreplace")


def test_a_page_asks_nothing_of_others_and_names_no_more_than_the_markdown() -> None:
    text = page.render(KINDS["own_towers"], reports.media())
    assert re.findall(r"(?:https?:)?//(?!\s)[\w.]+", re.sub(r"base64,[\w+/=]+", "", text)) == [
        "//www.w3.org"] or set(re.findall(r"https?://[\w.]+", text)) == {"http://www.w3.org"}, "a name, no request"
    policy = next(attributes["content"] or "" for tag, attributes in Parsed(text).elements
                  if attributes.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "unsafe-inline'; script" in policy and "script-src 'sha256-" in policy


# ---- in a browser ------------------------------------------------------------------------------------------------


class Shown:
    """Pages in one browser; what they complain of and ask for."""

    def __init__(self, browser: Any, folder: Path):
        self.browser, self.folder = browser, folder
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def open(self, text: str, width: int = 1200, dark: bool = False, touch: bool = False) -> Any:
        (self.folder / "page.html").write_text(text, "utf-8", "backslashreplace")
        context = self.browser.new_context(viewport={"width": width, "height": 800},
                                           color_scheme="dark" if dark else "light", has_touch=touch)
        opened = context.new_page()
        opened.on("console", lambda message: self.complaints.append(message.text))
        opened.on("pageerror", lambda error: self.complaints.append(str(error)))
        opened.on("request", lambda request: self.requests.append(request.url))
        opened.goto((self.folder / "page.html").as_uri())
        return opened

    def outside(self) -> list[str]:
        return [url for url in self.requests if not url.startswith("data:") and not url.endswith("/page.html")]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    with chromium() as browser:
        yield Shown(browser, tmp_path_factory.mktemp("page"))


@pytest.mark.parametrize("width", [1200, 360])
def test_pages_fit_ask_for_nothing_and_complain_of_nothing(shown: Shown, width: int) -> None:
    for kind in ("own_towers", "speakers", "one_epoch", "zero_shot"):
        opened = shown.open(page.render(KINDS[kind], reports.media()), width=width, dark=width == 360)
        for language in ("zh-CN", "en"):
            opened.click(f"[data-language={language}]")
            assert opened.evaluate("document.documentElement.scrollWidth") <= width, (kind, language)
            assert opened.locator("h1").inner_text() == PHRASES[f"title_{KINDS[kind]['kind']}"][language[:2]]
        opened.context.close()
    assert shown.complaints == [] and shown.outside() == []


def test_what_is_under_the_pointer_is_told(shown: Shown) -> None:
    opened = shown.open(page.render(KINDS["own_towers"], reports.media()))
    opened.locator("svg.lines").first.hover()
    assert re.search(r"part_of_pretrain \(image_text\): 0\.\d{4}", opened.locator("#tip").inner_text())
    opened.locator("#similarities rect.band").nth(2).hover()
    assert re.search(r"✓ 33\.3 %, ✗ 6\.2 %", opened.locator("#tip").inner_text())
    point = opened.locator("circle.point").first
    point.hover()
    assert point.get_attribute("data-words") in opened.locator("#tip").inner_text()
    width = opened.locator("#tip img").evaluate("async (image) => { await image.decode(); return image.naturalWidth; }")
    assert width == 64
    assert opened.locator(".links").get_attribute("d").count("M") == 2, "to its caption and its sound"
    opened.locator("h1").hover()
    assert not opened.locator("#tip").is_visible()
    opened.context.close()


def test_a_finger_reads_charts_too(shown: Shown) -> None:
    opened = shown.open(page.render(KINDS["own_towers"], reports.media()), width=360, touch=True)
    opened.locator("svg.lines").first.tap()
    assert "part_of_pretrain" in opened.locator("#tip").inner_text(), "and it stays there"
    opened.locator("circle.point").first.tap()
    assert opened.locator("#tip img").is_visible()
    opened.locator("h1").tap()
    assert not opened.locator("#tip").is_visible()
    opened.context.close()


def test_the_colours_of_the_map_can_be_chosen(shown: Shown) -> None:
    opened = shown.open(page.render(KINDS["own_towers"], reports.media()))
    before = opened.locator(".point").evaluate_all("(all) => all.map((one) => getComputedStyle(one).fill)")
    assert len(set(before)) == 3, "two classes and none"
    opened.click("button[data-by=modality]")
    after = opened.locator(".point").evaluate_all(
        "(all) => Object.fromEntries(all.map((one) => [one.tagName, getComputedStyle(one).fill]))")
    assert len(set(after.values())) == 3 and after.keys() == {"circle", "rect", "polygon"}
    assert opened.locator("[data-legend=modality]").is_visible()
    assert not opened.locator("[data-legend=class]").is_visible()
    opened.context.close()


def test_sounds_can_be_played_one_at_a_time(shown: Shown) -> None:
    opened = shown.open(page.render(KINDS["speakers"], reports.media()))
    playing = opened.evaluate("""async () => {
        const all = [...document.querySelectorAll("audio")];
        for (const audio of all) { audio.loop = audio.muted = true; await audio.play(); }
        await new Promise((done) => setTimeout(done, 50));
        return [all.length, all[0].duration, all.filter((audio) => !audio.paused).length];
    }""")
    assert playing == [12, pytest.approx(0.5, abs=0.1), 1]
    opened.context.close()


def test_hostile_words_do_nothing_in_a_browser(shown: Shown) -> None:
    for words in HOSTILE[:4]:
        opened = shown.open(page.render(hostile_report(words), reports.media()))
        opened.locator("circle.point").first.hover()
        assert words in opened.locator("#tip").inner_text()
        assert opened.evaluate("window.hacked") is None
        opened.context.close()
    assert shown.complaints == [] and shown.outside() == []


def test_a_page_prints_in_dark_ink_with_nothing_folded(shown: Shown) -> None:
    opened = shown.open(page.render(KINDS["own_towers"], reports.media()), dark=True)
    opened.emulate_media(media="print")
    assert opened.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not opened.locator("audio").first.is_visible()
    printed = opened.pdf(format="A4")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 4
    opened.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert opened.locator("details:not([open])").count() == 0
    opened.context.close()
