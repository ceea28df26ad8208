"""The page at /: it needs nothing from elsewhere, everything in it has a name, and it translates."""

from __future__ import annotations

import re
from urllib.parse import quote

import lxml.html
import pytest
from playwright.sync_api import expect
from support import PROJECT
from support.playing_server import Played, post

from lsmoe_ds.serve.settings import Settings

PAGE = PROJECT / "lsmoe_ds" / "serve" / "page"


def test_nothing_is_loaded_from_elsewhere_and_text_is_text():
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?:|[\"'(=]//|@import", text), f"{path.name} has an address"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|style=", text)


def test_everything_has_a_name():
    page = lxml.html.fromstring((PAGE / "page.html").read_text(encoding="utf-8"))
    labelled = {label.get("for") for label in page.iter("label")}
    fields = [each for tag in ("input", "select", "textarea") for each in page.iter(tag)]
    assert len(fields) == 5 and all(each.get("id") in labelled for each in fields)
    buttons = list(page.iter("button"))
    assert len(buttons) == 3 and all(
        each.get("aria-label") or each.text_content().strip() for each in buttons
    )
    assert not list(page.iter("style")) and all(each.get("src") for each in page.iter("script"))
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    ids = {each.get("id") for each in page.iter() if each.get("id")}
    assert set(re.findall(r"\bat\(\"([\w-]+)\"\)", script)) <= ids


@pytest.mark.slow
def test_a_browser_translates(run, browser, tmp_path):
    text = "ba de fi\n<img src=x onerror=alert(1)>\nlu ki"
    with Played([run], Settings()) as server, browser.new_page() as page:
        _, answer = post(server, q=text, source="en", target="de")
        facts, translation, about = (page.locator(f"#{name}") for name in ("facts", "translation", "about"))
        # From the keyboard alone: the focus begins in the text.
        page.goto(f"{server.url}/#source=en&target=de")
        expect(page.locator("#target option")).to_have_count(2)
        expect(page.locator("#text")).to_be_focused()
        page.keyboard.insert_text(text)
        page.keyboard.press("Control+Enter")
        expect(about).to_be_visible()
        assert translation.text_content() == answer["translatedText"]
        expect(translation.locator("*")).to_have_count(0)  # text, and no elements
        expect(facts).to_contain_text(re.compile("English to German.*small.*CTranslate2", re.DOTALL))
        layer = page.locator("#layers > *").first
        expect(layer).to_have_text(re.compile(r"Encoder layer 2: experts \d \(\d+\s%\), \d \(\d+\s%\) of 4"))
        into = page.locator("#target option").evaluate_all("all => all.map(each => each.value)")
        assert into == ["fr", "de"], "no direction from English into itself"
        expect(page.locator("#error")).to_be_hidden()
        expect(page.locator("#model-field")).to_be_hidden()  # there is one model
        for name, width, height in (("desktop", 1280, 1000), ("phone", 390, 1300)):
            page.set_viewport_size({"width": width, "height": height})
            page.goto(f"{server.url}/?{name}#source=en&target=de&q={quote(text)}")
            expect(about).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
            page.screenshot(path=tmp_path / f"{name}.png")
        # Swapping takes the translation as the text, and the languages the other way round.
        page.locator("#swap").click()
        expect(facts).to_contain_text("German to English")
        expect(page.locator("#text")).to_have_value(answer["translatedText"])
        expect(page.locator("#source")).to_have_value("de")
        expect(page.locator("#target")).to_have_value("en")
        page.locator("#source").select_option("auto")
        expect(page.locator("#detected")).to_have_text(re.compile("^Detected: "))
        page.locator("#text").fill("a" * 20001)
        page.locator("#go").click()
        expect(page.locator("#error")).to_have_text("q has 20,001 characters: at most 20,000 are allowed")


@pytest.mark.slow
def test_each_of_several_models_can_be_chosen(run, browser, tmp_path):
    with Played([run, run], Settings()) as server, browser.new_page() as page:
        facts, model = page.locator("#facts"), page.locator("#model")
        page.goto(f"{server.url}/#source=en&target=de&q=ba%20de")
        expect(facts).to_contain_text(re.compile("Model *small(?!-2)"))
        names = model.locator("option").evaluate_all("all => all.map(each => each.value)")
        assert names == ["", "small", "small-2"]
        expect(page.locator("#model-field")).to_be_visible()
        model.select_option("small-2")
        expect(facts).to_contain_text("Modelsmall-2")
        expect(page.locator("#source")).to_have_value("en")  # the languages stay chosen
        expect(page.locator("#target")).to_have_value("de")
        page.screenshot(path=tmp_path / "models.png")
        kept = page.evaluate("location.hash")
        assert kept == "#source=en&target=de&model=small-2"
        page.goto(f"{server.url}/?again{kept}&q=lu")
        expect(facts).to_contain_text("Modelsmall-2")
