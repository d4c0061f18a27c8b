"""The page in a headless browser: what a user sees, presses and saves; skipped where there is none."""

import numpy as np
import pytest
from PIL import Image

from regard.evals import report
from regard.evals.results import Results
from tests import chromium
from tests.hand_run import IMAGES, record

pytestmark = pytest.mark.skipif(
    chromium.find() is None, reason=f"no browser is installed: {', '.join(chromium.NAMES)}"
)

COUNT = "document.querySelector('#count').textContent"
FOCUS = "document.activeElement.id || document.activeElement.tagName"
CHOSEN = "document.querySelector('.row[aria-selected=true]').dataset.item"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with pictures, and one of three recipes."""
    path = tmp_path_factory.mktemp("runs")
    files = {}
    for place, image in enumerate(IMAGES):
        files[image] = path / image
        Image.fromarray(np.full((120, 160, 3), 30 * place, np.uint8)).save(files[image])
    record(path / "run")
    Results.load(path / "run").write(files)
    record(path / "other", recipes=("none", "vhr", "var"))
    return path


@pytest.fixture(scope="module")
def browser():
    with chromium.Browser() as found:
        yield found


def opened(browser, page, fragment=""):
    """The page, in a fresh state."""
    browser.errors.clear()
    browser.requests.clear()
    browser.call("Page.navigate", url="about:blank")
    browser.open(page, fragment)
    return browser


@pytest.fixture
def page(browser, folder):
    return opened(browser, folder / "run" / "report.html")


def chip(page, show):
    return page.run(f"document.querySelector('#show input[value={show}]').nextSibling.textContent")


def test_it_asks_nothing_of_the_network_and_complains_of_nothing(page, folder):
    asked = [url for url in page.requests if not url.startswith("data:") and url != "about:blank"]
    assert asked == [(folder / "run" / "report.html").as_uri()]
    assert page.errors == []
    with pytest.raises(RuntimeError):  # nor could it
        page.run("fetch('https://example.org/').then(() => 1)")


def test_what_recipes_fixed_and_broke(page):
    assert page.run(COUNT) == "5 of 8 questions"  # at first, those that differ
    assert [chip(page, show) for show in ("all", "fixed", "broke", "differ", "wrong")] == [
        "all (8)",
        "recipe fixed it (4)",
        "recipe broke it (1)",
        "differ (5)",
        "both wrong (0)",
    ]
    page.run("document.querySelector('#show input[value=broke]').click()")
    assert page.run(COUNT) == "1 of 8 questions"
    assert page.run(CHOSEN) == "random/1"
    text = page.run("document.querySelector('#detail').innerText")
    assert "✓ right" in text
    assert "✗ wrong" in text
    assert "no <script>alert(1)</script>" in text  # as text
    assert page.run("document.querySelectorAll('#detail script, #detail b').length") == 0


def test_the_keyboard_does_it_all(page):
    page.press("j")
    assert page.run(CHOSEN) == "random/1"
    page.press("k", "k")
    assert page.run(CHOSEN) == "random/0"
    page.press("/")
    assert page.run(FOCUS) == "query"
    page.press(*"alert")
    page.wait(f"{COUNT} === '1 of 8 questions'")
    page.press("Escape")
    assert page.run(FOCUS) == "list"
    page.run("document.querySelector('#query').value = ''")
    page.run("document.querySelector('#query').dispatchEvent(new Event('input'))")
    page.wait(f"{COUNT} === '5 of 8 questions'")
    page.press("Home", "ArrowDown", "ArrowDown")
    assert page.run(CHOSEN) == "random/2"
    page.press("End")
    assert page.run(CHOSEN) == "random/6"
    active = page.run("document.querySelector('#list').getAttribute('aria-activedescendant')")
    assert page.run(f"document.getElementById('{active}').getAttribute('aria-selected')") == "true"


def test_tab_reaches_every_control_and_shows_where_it_is(page):
    seen, unseen = [], []
    page.run("document.querySelector('#browser').previousElementSibling.tabIndex = -1")
    page.run("document.querySelector('#browser').previousElementSibling.focus()")
    for _ in range(7):
        page.press("Tab")
        name = page.run(
            "document.activeElement.id || document.activeElement.name || document.activeElement.tagName"
        )
        seen.append(name)
        drawn = page.run(
            "[document.activeElement, document.activeElement.nextSibling].some(e => e instanceof Element && "
            "getComputedStyle(e).outlineStyle === 'solid' && parseFloat(getComputedStyle(e).outlineWidth) >= 2)"
        )
        unseen += [] if drawn else [name]
    assert {"set", "recipe", "show", "label", "query", "list"} <= set(seen)
    assert unseen == []
    page.run("document.querySelector('#show input:checked').focus()")
    page.press("ArrowRight")
    assert page.run(COUNT) == "0 of 8 questions"  # from "differ" on to "both wrong"


def test_the_address_holds_what_is_shown(page, folder):
    page.run("document.querySelector('#show input[value=fixed]').click()")
    page.press("j")
    fragment = page.run("location.hash")
    assert "show=fixed" in fragment
    again = opened(page, folder / "run" / "report.html", fragment)
    assert again.run(COUNT) == "4 of 8 questions"
    assert again.run(CHOSEN) == "random/2"


def test_captions_are_marked_and_shown_with_their_picture(browser, folder):
    page = opened(
        browser, folder / "run" / "report.html", "#set=0-chair&show=all&q=bench&item=000000000003.jpg"
    )
    assert page.run(COUNT) == "8 of 8 captions"
    marks = "[...document.querySelectorAll('#detail mark')].map(m => m.className + ' ' + m.textContent)"
    assert page.run(marks) == ["right dog", "wrong cat", "right bench", "right dog"]
    assert "A dog <b>." in page.run("document.querySelector('#detail').innerText")
    assert page.run("document.querySelector('#detail img').decode().then(() => true)")
    assert page.run("document.querySelector('#detail img').naturalWidth") == 160
    assert "not in the image: cat" in page.run("document.querySelector('#detail').innerText")


def test_facts_filter(browser, folder):
    page = opened(browser, folder / "run" / "report.html", "#set=0-pope&show=all&f.label=yes")
    assert page.run(COUNT) == "4 of 8 questions"
    page.run("document.querySelector('#facets select').value = 'no'")
    page.run("document.querySelector('#facets select').dispatchEvent(new Event('change', {bubbles: true}))")
    assert page.run(COUNT) == "4 of 8 questions"
    assert page.run(CHOSEN) == "random/0"
    assert "f.label=no" in page.run("location.hash")


def test_tables_are_saved(page, folder, tmp_path):
    page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for place, name in ((0, "pope.csv"), (1, "pope.md")):
        page.run(f"document.querySelectorAll('[data-save=\"0-pope\"]')[{place}].click()")
        for _ in range(100):
            if (tmp_path / name).is_file():
                break
            page.run("new Promise((done) => setTimeout(done, 50))")
        assert (tmp_path / name).read_text() == (folder / "run" / "tables" / name).read_text()


def test_tables_and_examples_stand_without_a_script(browser, folder):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.call("Page.navigate", url="about:blank")
        browser.open(folder / "run" / "report.html", ready="true")
        seen = "[...document.querySelectorAll(%r)].filter(e => e.getClientRects().length).length"
        assert browser.run(seen % "table") >= 2
        assert browser.run(seen % ".example") >= 10
        assert browser.run(seen % "#browser, .export") == 0
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark_can_be_read(page, dark):
    """Every text has a contrast of 4.5 to 1 with what is behind it (WCAG 2.2, 1.4.3)."""
    page.shape(1180, 900, dark)
    poor = page.run(CONTRAST)
    page.shape(1280, 900)
    assert poor == []


CONTRAST = """(() => {
  const read = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const rgb = read(getComputedStyle(e).backgroundColor);
      if (rgb.length < 4 || rgb[3] > 0) return rgb;
    }
    return [255, 255, 255];
  };
  const poor = new Set();
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.getClientRects().length || e.disabled) continue;
    const style = getComputedStyle(e);
    const ink = light(read(e instanceof SVGElement ? style.fill : style.color));
    const [a, b] = [ink, light(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.add(e.tagName + "." + e.className + " " + e.textContent.slice(0, 20));
  }
  return [...poor];
})()"""


@pytest.mark.parametrize("width", [1180, 700, 360])
def test_nothing_is_wider_than_the_screen(page, width):
    page.shape(width, 800)
    wide = page.run("document.documentElement.scrollWidth")
    page.shape(1280, 900)
    assert wide <= width


def test_several_runs(browser, folder, tmp_path):
    runs = [Results.load(folder / name) for name in ("run", "other")]
    out = report.write_report(runs, out=tmp_path / "both.html")
    page = opened(browser, out, "#set=1-pope&show=fixed&recipe=var")
    assert page.errors == []
    assert page.run(COUNT) == "4 of 8 questions"
    options = page.run("[...document.querySelector('#set').options].map(o => o.textContent)")
    assert options == ["run: POPE", "run: CHAIR", "other: POPE", "other: CHAIR"]
    assert chip(page, "fixed") == "recipe fixed it (4)"
    page.run("document.querySelector('#recipe').value = ''")
    page.run("document.querySelector('#recipe').dispatchEvent(new Event('change', {bubbles: true}))")
    assert chip(page, "fixed") == "a recipe fixed it (4)"
    assert page.run("document.querySelectorAll('#detail .said > div').length") == 3
    assert "no picture on this page" in page.run("document.querySelector('#detail').innerText")


def test_a_run_of_the_baseline_alone(browser, folder):
    if not (folder / "alone").exists():
        record(folder / "alone", recipes=("none",))
        Results.load(folder / "alone").write()
    page = opened(browser, folder / "alone" / "report.html")
    assert page.errors == []
    assert page.run("[...document.querySelectorAll('#show input')].map(i => i.value)") == ["all", "wrong"]
    assert chip(page, "wrong") == "wrong (4)"
