"""The page at /: it needs nothing from elsewhere, everything in it has a name, and it translates."""

from __future__ import annotations

import re
from urllib.parse import quote

import lxml.html
import pytest
from support import PROJECT
from support.playing_browser import BROWSER, Browser
from support.playing_server import Played, post
from support.small_run import TARGET_TOP2, make_run

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
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_browser_translates(pool, tmp_path):
    run = make_run(pool, tmp_path, TARGET_TOP2, TARGET_TOP2, 1)[0]
    text = "ba de fi\n<img src=x onerror=alert(1)>\nlu ki"
    with Played([run], Settings()) as server, Browser(tmp_path / "browser") as browser:
        _, answer = post(server, q=text, source="en", target="de")

        def value(name: str) -> str:
            return browser.evaluate(f"at('{name}').value ?? at('{name}').textContent")

        # From the keyboard alone: the focus begins in the text.
        browser.open(f"{server.url}/#source=en&target=de")
        browser.wait("document.querySelectorAll('#target option').length === 2")
        browser.wait("document.activeElement === at('text')")
        browser.type(text)
        browser.press("Enter", control=True)
        browser.wait("!at('about').hidden")
        assert value("translation") == answer["translatedText"]
        assert browser.evaluate("at('translation').children.length") == 0, "text, and no elements"
        facts = value("facts")
        assert "English to German" in facts and "small" in facts and "CTranslate2" in facts
        layers = browser.evaluate("[...at('layers').children].map(each => each.textContent)")
        assert re.fullmatch(r"Encoder layer 2: experts \d \(\d+\s%\), \d \(\d+\s%\) of 4", layers[0])
        into = browser.evaluate("[...at('target').options].map(each => each.value)")
        assert into == ["fr", "de"], "no direction from English into itself"
        assert browser.evaluate("at('error').hidden")
        assert browser.evaluate("at('model-field').hidden"), "there is one model"
        for name, width, height in (("desktop", 1280, 1000), ("phone", 390, 1300)):
            browser.open(f"{server.url}/#source=en&target=de&q={quote(text)}", width, height)
            browser.wait("!at('about').hidden")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
            browser.picture(tmp_path / f"{name}.png")
            assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        # Swapping takes the translation as the text, and the languages the other way round.
        browser.evaluate("at('swap').click()")
        browser.wait("at('facts').textContent.includes('German to English')")
        assert value("text") == answer["translatedText"] and (value("source"), value("target")) == (
            "de",
            "en",
        )
        browser.evaluate("at('source').value = 'auto'; at('source').dispatchEvent(new Event('change'))")
        assert browser.wait("at('detected').textContent").startswith("Detected: ")
        browser.evaluate("at('text').value = 'a'.repeat(20001); at('go').click()")
        browser.wait("!at('error').hidden")
        assert value("error") == "q has 20,001 characters: at most 20,000 are allowed"


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_each_of_several_models_can_be_chosen(pool, tmp_path):
    run = make_run(pool, tmp_path, TARGET_TOP2, TARGET_TOP2, 1)[0]
    with Played([run, run], Settings()) as server, Browser(tmp_path / "browser") as browser:
        browser.open(f"{server.url}/#source=en&target=de&q=ba%20de")
        browser.wait("at('facts').textContent.includes('Modelsmall')")
        names = browser.evaluate("[...at('model').options].map(each => each.value)")
        assert names == ["", "small", "small-2"] and not browser.evaluate("at('model-field').hidden")
        browser.evaluate("at('model').value = 'small-2'; at('model').dispatchEvent(new Event('change'))")
        browser.wait("at('facts').textContent.includes('Modelsmall-2')")
        languages = browser.evaluate("[at('source').value, at('target').value]")
        assert languages == ["en", "de"], "they stay chosen"
        browser.picture(tmp_path / "models.png")
        kept = browser.evaluate("location.hash")
        assert kept == "#source=en&target=de&model=small-2"
        browser.open(f"{server.url}/?again{kept}&q=lu")
        browser.wait("at('facts').textContent.includes('Modelsmall-2')")
