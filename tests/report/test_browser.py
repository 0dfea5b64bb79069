"""report.html in a real browser: it runs without an error, sorts, filters, fits, and asks nothing of the network."""

import json
import shutil

import pytest

from helpers.report_folders import a_study, full_report, write_validated
from qexport.report import compare
from qexport.report.html import write_html
from qexport.report.sampling import sampled
from qexport.validation.verdict import with_verdict

pytest.importorskip("selenium")
from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import WebDriverException  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium with a chromedriver")

OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
# Names that would do something if they were markup, or would not break where a line is too narrow.
HOSTILE = "<script>document.title = 'owned'</script><img src=http://127.0.0.1:9/x>" + "x" * 120


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    try:
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    except WebDriverException as error:
        pytest.skip(f"chromium does not start: {error.msg.splitlines()[0]}")
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with everything in it, one value that is broken, one without a cost, and one hostile name."""
    report = full_report(30)
    first, second, third, *others = report.layers.linears
    linears = (
        first.model_copy(update=dict(kl_cost=None)),
        second.model_copy(update=dict(own_sqnr_db=None, sqnr_db=None, max_abs_error=None)),
        third.model_copy(update=dict(name=HOSTILE)), *others,
    )  # fmt: skip
    report = report.model_copy(update=dict(layers=report.layers.model_copy(update=dict(linears=linears)), text=HOSTILE))
    exported = write_validated(tmp_path_factory.mktemp("export") / "mine", with_verdict(report))
    study = a_study(("mine", HOSTILE, *"abcdefg"), top_ks=(0, 50), conclusions=(HOSTILE, "mine"))
    return write_html(exported, sampled(study, exported.folder))


@pytest.fixture
def opened(browser, page):
    browser.get_log("performance")
    browser.get(page.as_uri())
    # On a busy machine the driver comes back while rows of the table are still being read.
    WebDriverWait(browser, 30).until(lambda b: b.execute_script("return document.readyState") == "complete")
    yield browser
    errors = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert errors == []


def column(browser, name: str, table: str = "rows") -> list[str]:
    """The visible cells of a column, from the top."""
    return browser.execute_script(
        """const table = document.getElementById(arguments[1]);
        const at = [...table.tHead.rows[0].cells].findIndex(c => c.textContent === arguments[0]);
        return [...table.tBodies[0].rows].filter(r => r.offsetParent !== null).map(r => r.cells[at].textContent)""",
        name,
        table,
    )  # fmt: skip


def click(browser, name: str) -> None:
    browser.find_element(By.XPATH, f"//table[@id='rows']//th/button[text()='{name}']").click()


def test_nothing_but_the_file_is_asked_for(opened, page):
    sent = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [m["params"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    # The browser's own start page asks for its parts while this one is opened.
    urls = [a["request"]["url"] for a in asked if a["documentURL"] == page.as_uri()]
    assert urls == [page.as_uri()]
    assert opened.title != "owned" and opened.find_elements(By.TAG_NAME, "img") == []


def test_sorting_numbers(opened):
    before = column(opened, "KL cost")
    assert before.count("") >= 2, "blocks and one linear have no cost"
    for descending in (False, True):
        click(opened, "KL cost")
        found = column(opened, "KL cost")
        numbers = [float(text) for text in found if text]
        assert numbers == sorted(numbers, reverse=descending) and len(found) == len(before)
        assert found[len(numbers) :] == [""] * (len(found) - len(numbers)), "empty ones are last"
    head = opened.find_element(By.XPATH, "//table[@id='rows']//th[button[text()='KL cost']]")
    assert head.get_attribute("aria-sort") == "descending"


def test_sorting_names_by_the_numbers_in_them(opened):
    click(opened, "name")
    names = [n for n in column(opened, "name") if n.endswith(".self_attn.q_proj")]
    assert names == [f"model.layers.{i}.self_attn.q_proj" for i in range(30)]


def test_filtering(opened):
    box = opened.find_element(By.CSS_SELECTOR, "input[data-filters=rows]")
    count = opened.find_element(By.CSS_SELECTOR, ".filter output[for=rows]")
    whole = len(column(opened, "name"))
    box.send_keys("DOWN_proj layers.1")
    found = column(opened, "name")
    assert len(found) == 11 and all("down_proj" in n and "layers.1" in n for n in found)
    assert count.text == f"11 of {whole} rows"
    click(opened, "own SQNR")
    assert len(column(opened, "name")) == 11, "what is filtered stays so"
    box.clear()
    box.send_keys(" ")
    assert len(column(opened, "name")) == whole and count.text == f"{whole} rows"


def test_maps_take_turns(opened):
    def shown():
        return [m.get_attribute("id") for m in opened.find_elements(By.CSS_SELECTOR, "figure.map") if m.is_displayed()]

    assert shown() == ["panel-own"]
    for key in ("inherited", "cost"):
        opened.find_element(By.CSS_SELECTOR, f"label[for=map-{key}]").click()
        assert shown() == [f"panel-{key}"]


def test_copying_shows_that_it_was_done(opened):
    button = opened.find_element(By.CSS_SELECTOR, "button[data-copies=overrides]")
    button.click()
    assert opened.execute_async_script(
        """const [button, done] = arguments;
        const look = () => button.textContent === "Copy" ? setTimeout(look, 10) : done(button.textContent);
        look();""",
        button,
    ) in ("Copied", "Selected")  # fmt: skip


@pytest.mark.each_value_once
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_follows_the_colour_scheme(opened, width, scheme):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    feature = {"name": "prefers-color-scheme", "value": scheme}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    for details in opened.find_elements(By.TAG_NAME, "details"):
        opened.execute_script("arguments[0].open = true", details)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    red, green, blue = opened.execute_script(
        "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    )
    assert (red + green + blue > 600) == (scheme == "light")
    assert opened.execute_script(CUT) == []
    faint = opened.execute_script(CONTRAST)
    assert faint == [], "text that is hard to read"


@pytest.mark.each_value_once
@pytest.mark.parametrize("width", [1400, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_table_of_two_exports_is_cut(browser, page, tmp_path, width, scheme):
    compare(page.parent, page.parent, tmp_path / "both.html")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get((tmp_path / "both.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script(CUT) == [] and browser.execute_script(CONTRAST) == []


# Tables and images that end beyond the window and cannot be scrolled to.
CUT = """return [...document.querySelectorAll("table, svg, dl")].filter(e => !e.closest(".scroll")
  && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"""

# Every text of the page whose contrast to what is behind it is below 4.5 (WCAG AA), labels of axes below 3.
CONTRAST = """
const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255)
  .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const solid = (c) => !/rgba\\(.*, 0\\)|transparent/.test(c);
const behind = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  if (solid(c)) return c; } return "rgb(255, 255, 255)"; };
const faint = new Set();
for (const e of document.querySelectorAll("body *")) {
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.checkVisibility()) continue;
  if (["SCRIPT", "STYLE", "title"].includes(e.tagName)) continue;
  const cell = e.closest("g.cell"), style = getComputedStyle(e);
  const ink = light(e.closest("svg") ? style.fill : style.color);
  const page = light(cell ? getComputedStyle(cell.querySelector("rect")).fill : behind(e.closest("svg") || e));
  const ratio = (Math.max(ink, page) + 0.05) / (Math.min(ink, page) + 0.05);
  if (ratio < (e.classList.contains("label") ? 3 : 4.5))
    faint.add(`${e.tagName}.${e.getAttribute("class")} ${cell ? cell.getAttribute("class") : ""} ${ratio.toFixed(2)}`);
}
return [...faint];
"""
