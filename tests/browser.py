"""A headless Chromium for pages that less writes; tests skip, by name, where there is none."""

import shutil
from contextlib import contextmanager

import pytest


@contextmanager
def opened(file, **settings):
    """The page of a file; afterwards, no error may stand on its console."""
    playwright = pytest.importorskip("playwright.sync_api", reason="NO BROWSER: wants playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("NO BROWSER: wants Debian's chromium")
    said = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            page = browser.new_page(**settings)
            page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: said.append(f"error: {error}"))
            page.on("request", lambda request: said.append(f"request: {request.url}"))
            page.goto(file.resolve().as_uri())
            yield page
        finally:
            browser.close()
    unwanted = [x for x in said if not x.startswith((f"request: {file.resolve().as_uri()}", "log"))]
    assert not [x for x in unwanted if not x.startswith(("request: data:", "request: blob:"))]
