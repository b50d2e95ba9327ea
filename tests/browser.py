"""A real Chromium for tests, which looks at a page as a person does."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
from playwright.sync_api import Page, Request, sync_playwright

HOW_TO_INSTALL = "apt-get install chromium"


@dataclass
class Watched:
    """An open page with what it said and asked for."""

    page: Page
    said: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def note(self, request: Request) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.requests.append(request.url)

    def violations(self) -> list[str]:
        """What axe finds serious or critical."""
        found = Axe().run(self.page).response["violations"]
        return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found if one["impact"] in ("serious", "critical")]


@contextmanager
def opened(what: Path | str, *, width: int, scheme: Literal["light", "dark"]) -> Iterator[Watched]:
    """The file or address in a window of so many pixels; axe may run in it, which the page's own policy forbids."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail(f"no Chromium to open the page in: {HOW_TO_INSTALL}")
    with sync_playwright() as playwright:
        # Its own sandbox takes rights that a container's root does not have.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce"
        )
        watched = Watched(context.new_page())
        watched.page.on("console", lambda message: watched.said.append(message.text))
        watched.page.on("pageerror", lambda error: watched.said.append(str(error)))
        watched.page.on("request", watched.note)
        watched.page.goto(what if isinstance(what, str) else what.as_uri())
        yield watched
        browser.close()
