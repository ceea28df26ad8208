"""What the tests of the server share: a small run, a server over it, and a browser."""

from __future__ import annotations

import shutil

import pytest
from playwright.sync_api import sync_playwright
from support.playing_server import Played
from support.small_run import TARGET_TOP2, make_run

from lsmoe_ds.serve.settings import Settings

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def run(pool, tmp_path_factory):
    """Train a run whose experts are chosen by the target language, and return it."""
    return make_run(pool, tmp_path_factory.mktemp("serve"), TARGET_TOP2, TARGET_TOP2, 1)[0]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Return the folder in which the server keeps converted models."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def server(run, cache):
    """Yield a server of the run, with default limits."""
    with Played([run], Settings(cache=cache)) as played:
        yield played


@pytest.fixture(scope="module")
def browser():
    """Yield the Chromium of this machine, since Playwright's own is not in a package."""
    if not (path := next(filter(None, map(shutil.which, BROWSERS)), None)):
        pytest.skip("needs chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()
