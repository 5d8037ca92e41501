"""The page of a report in a real browser: light, dark, narrow and printed, with hostile names.

`make browser` brings one from the registries of packages; others are found on the PATH.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from tests.test_report_page import HOSTILE, project, report

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: run make browser"
)
OURS = Path(__file__).parents[1] / ".browser/chromium"
OTHERS = ("chromium-headless-shell", "chromium", "google-chrome")
# ours was made to run in one process, where nothing else can be asked of the machine
ONE_PROCESS = (
    *("--no-zygote", "--single-process", "--in-process-gpu", "--use-gl=angle"),
    *("--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
)


@dataclass(frozen=True)
class _Browser:
    program: str
    flags: tuple[str, ...]


def _browser() -> _Browser:
    if OURS.with_name(".installed").is_file():
        return _Browser(str(OURS), ONE_PROCESS)
    found = next(filter(None, map(shutil.which, OTHERS)), None)
    if found is None:
        pytest.skip("no browser is installed: run make browser")
    return _Browser(found, ())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page whose names are hostile and long."""
    folder = tmp_path_factory.mktemp("browser")
    words = HOSTILE[0] + "w" * 300
    result = report(project(folder / "project", words=words), "--html", folder / "report.html")
    assert result.exit_code == 0, result.stderr
    return folder / "report.html"


Open = Callable[..., Any]


@pytest.fixture
def opened(page: Path, tmp_path: Path) -> Open:
    """Opens the page; everything that it says, asks for or runs by itself is a failure."""
    browser = _browser()
    fonts = Path(mpl.get_data_path()) / "fonts/ttf"  # the machine may have none
    settings = tmp_path / "fonts.conf"
    settings.write_text(
        f"<fontconfig><dir>{fonts}</dir><cachedir>{tmp_path}/cache</cachedir></fontconfig>"
    )

    @contextmanager
    def open_page(**look: Any) -> Iterator[Any]:
        said: list[str] = []
        with playwright.sync_playwright() as driver:
            program = driver.chromium.launch(
                executable_path=browser.program,
                args=["--no-sandbox", *browser.flags],
                env={"FONTCONFIG_FILE": str(settings), "HOME": str(tmp_path)},
            )
            tab = program.new_context(**look).new_page()
            tab.on("console", lambda message: said.append(message.text))
            tab.on("pageerror", lambda error: said.append(str(error)))
            tab.on("dialog", lambda dialog: said.append(dialog.message))
            tab.on("request", lambda request: said.append(request.url))
            tab.goto(page.as_uri())
            yield tab
            program.close()
        pictures = [word for word in said if word.startswith("data:image/png;")]
        assert said == [page.as_uri(), *pictures]

    return open_page


def _colours(tab: Any, selector: str) -> tuple[float, float]:
    """Relative luminance (WCAG 2.2) of an element's text and of the page."""
    found = tab.evaluate(
        "s => [getComputedStyle(document.querySelector(s)).color,"
        " getComputedStyle(document.body).backgroundColor]",
        selector,
    )
    return _luminance(found[0]), _luminance(found[1])


def _luminance(colour: str) -> float:
    parts = np.array([float(part) for part in colour[4:-1].split(",")]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_plots_can_be_read(opened: Open, scheme: str) -> None:
    with opened(color_scheme=scheme, viewport={"width": 1200, "height": 900}) as tab:
        for selector in ("h1", "td", "caption", "dt", "a", "footer"):
            text, paper = _colours(tab, selector)
            light, dark = max(text, paper), min(text, paper)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, selector  # WCAG 2.2, 1.4.3
        pictures = tab.get_by_role("img").all()
        assert len(pictures) == 6
        plot = Image.open(io.BytesIO(pictures[1].screenshot())).convert("RGB")
        ink, paper, series = (_pixels(tab, name) for name in ("--ink", "--paper", "--series-0"))
        shown = np.asarray(plot).reshape(-1, 3).astype(int)
        share = {
            name: float((np.abs(shown - colour).max(1) < 12).mean())
            for name, colour in (("ink", ink), ("paper", paper), ("series", series))
        }
    assert (paper.mean() < 60) == (scheme == "dark")
    assert share["paper"] > 0.8
    assert share["ink"] > 0.005
    assert share["series"] > 0.0005


def _pixels(tab: Any, variable: str) -> np.ndarray:
    colour = tab.evaluate(
        "v => getComputedStyle(document.documentElement).getPropertyValue(v)", variable
    )
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


@pytest.mark.parametrize("width", [320, 1200])
def test_no_name_makes_the_page_wider_than_the_screen(opened: Open, width: int) -> None:
    with opened(viewport={"width": width, "height": 900}) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        cells = tab.evaluate(
            "[...document.querySelectorAll('th,td')].map(cell => cell.offsetWidth)"
        )
        assert max(cells) <= 400
        beyond = tab.evaluate(
            "[...document.querySelectorAll('th,td,dd')]"
            ".filter(cell => cell.scrollWidth > cell.clientWidth + 1).length"
        )
        assert beyond == 0


def test_it_prints_on_light_paper_without_cutting(opened: Open) -> None:
    with opened(color_scheme="dark", viewport={"width": 700, "height": 900}) as tab:
        tab.emulate_media(media="print", color_scheme="dark")
        text, paper = _colours(tab, "td")
        assert paper == 1.0
        assert text < 0.05
        assert tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
        widest = "Math.max(...[...document.querySelectorAll('svg')].map(s => s.clientWidth))"
        assert tab.evaluate(widest) <= 700
