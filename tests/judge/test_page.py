"""The report in a real browser: nothing fails in it, every clip plays, the filters filter.

Debian and Ubuntu: ``apt-get install chromium chromium-driver``.
"""

from __future__ import annotations

import shutil
from functools import partial
from itertools import pairwise

import pytest

from tests.judge.worlds import Counter, examined
from vlmrb_torchrl.judge.report import write
from vlmrb_torchrl.judge.settings import Settings
from vlmrb_torchrl.scorers import NoisyScorer, PrivilegedScorer

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
)
PATIENCE_S = 30
PER_OUTCOME = 4

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER),
        reason="no Chromium here: apt-get install chromium chromium-driver",
    ),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    browser.set_script_timeout(PATIENCE_S)
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two noisy judges of a counter whose frames are all different greys."""
    privileged = PrivilegedScorer(("end", "third"), ("end",))
    settings = Settings(
        Counter(length=24, prompts={"end": "Over </script><b>now</b>?"}),
        [NoisyScorer(privileged, 0.5, 0.5), NoisyScorer(privileged, 0.7, 0.3, seed=1)],
        policy="random",
        clips=60,
        clip_transitions=8,
        frames_per_clip=8,
        gallery=PER_OUTCOME,
        out=tmp_path_factory.mktemp("report"),
    )
    return write(examined(settings), {}, "judge </script><b>this</b>")


@pytest.fixture
def page(browser, report):
    browser.get_log("browser")
    browser.get(report.as_uri())
    wait(browser, "return cards().every((card) => card.dataset.frame !== undefined)")
    yield browser
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


HELPERS = """
const cards = () => [...document.querySelectorAll("article")];
const texts = (name) => cards().map((card) => card.querySelector(name).textContent);
const change = (name, value) => {
  const control = document.querySelector(name);
  control.value = value;
  control.dispatchEvent(new Event("input", {bubbles: true}));
};
"""


def ask(browser, script, *arguments):
    return browser.execute_script(HELPERS + script, *arguments)


def wait(browser, script, *arguments):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, PATIENCE_S).until(lambda b: ask(b, script, *arguments))


def test_every_clip_plays_and_shows_its_frames(page):
    """Each card goes through all 8 frames; what its canvas holds is another grey each time."""
    assert len(ask(page, "return cards()")) == 4 * PER_OUTCOME
    script = """
    const done = arguments[arguments.length - 1], seen = new Map();
    change("#speed", 30);
    requestAnimationFrame(function look() {
      for (const card of cards()) {
        const canvas = card.querySelector("canvas");
        const grey = canvas.getContext("2d").getImageData(0, 0, 1, 1).data[0];
        if (!seen.has(card)) seen.set(card, new Map());
        seen.get(card).set(card.dataset.frame, grey);
      }
      const frames = [...seen.values()];
      if (!frames.every((greys) => greys.size === 8)) return requestAnimationFrame(look);
      done(frames.map((greys) => [...greys].sort().map(([, grey]) => grey)));
    });
    """
    for greys in page.execute_async_script(HELPERS + script):
        assert [b - a for a, b in pairwise(greys)] == [1] * 7


def test_a_clip_stops_steps_and_goes_on(page):
    first = page.find_element("css selector", "article")
    button = first.find_element("css selector", ".play")
    assert button.get_attribute("aria-label") == "pause"
    button.click()
    assert button.get_attribute("aria-label") == "play"
    ask(page, 'change("article .scrub", 5)')
    assert first.get_attribute("data-frame") == "5"
    assert first.find_element("css selector", ".frame").text == "6/8"
    button.click()
    wait(page, 'return cards()[0].dataset.frame !== "5"')
    page.find_element("id", "all").click()
    labels = ask(page, 'return cards().map((c) => c.querySelector(".play").ariaLabel)')
    assert set(labels) == {"play"}


def test_filters_show_what_they_name(page):
    boxes = page.find_elements("css selector", "#outcomes input")
    assert [box.get_attribute("value") for box in boxes] == [
        "false positive",
        "false negative",
        "true positive",
        "true negative",
    ]
    for box in boxes[1:]:
        box.click()
    assert ask(page, 'return texts(".outcome")') == ["false positive"] * PER_OUTCOME
    assert page.find_element("id", "count").text == f"{PER_OUTCOME} of {4 * PER_OUTCOME} clips"
    ask(page, 'change("#high", 0.5)')  # a false positive scored 1
    assert ask(page, 'return texts(".outcome")') == []
    boxes[3].click()
    assert ask(page, 'return texts(".score")') == ["0.000"] * PER_OUTCOME


def test_cards_are_sorted_by_score(page):
    for order, descending in (("down", True), ("up", False)):
        ask(page, 'change("#sort", arguments[0])', order)
        scores = ask(page, 'return texts(".score").map(Number)')
        assert scores == sorted(scores, reverse=descending)


def test_each_judge_has_its_own_clips(page):
    names = ask(page, 'return [...document.querySelectorAll("#judge option")].map((o) => o.text)')
    assert names == ["NoisyScorer: end", "NoisyScorer #2: end"]
    before = ask(page, "return cards().map((card) => card.dataset.clip)")
    ask(page, 'change("#judge", 1)')
    assert ask(page, "return cards().map((card) => card.dataset.clip)") != before


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
def test_page_fits_its_window_in_both_schemes(page, scheme, width):
    send = partial(page.execute_cdp_cmd)
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    send("Emulation.setDeviceMetricsOverride", size)
    media = {"name": "prefers-color-scheme", "value": scheme}
    send("Emulation.setEmulatedMedia", {"features": [media]})
    try:
        assert ask(page, "return document.documentElement.scrollWidth <= innerWidth")
        shade = ask(page, "return getComputedStyle(document.body).backgroundColor")
        assert (int(shade.strip("rgb()").split(",")[0]) < 128) == (scheme == "dark")
    finally:
        send("Emulation.clearDeviceMetricsOverride", {})
        send("Emulation.setEmulatedMedia", {"features": []})


def test_nothing_is_fetched(page, report):
    names = ask(page, 'return performance.getEntriesByType("resource").map((e) => e.name)')
    assert all(name.startswith("data:") for name in names)
    assert not ask(page, 'return document.querySelector("b:not(.outcome)")')
