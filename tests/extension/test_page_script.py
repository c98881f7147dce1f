"""The page's JavaScript: toggles and cache type in step, drawings of the gauge in order."""

from __future__ import annotations

import itertools
import random
import threading

import pytest

from extension.page import browser_script
from extension.panel import page_script
from extension.panel.panel import CACHE_TYPE_ALIASES, plain_cache_type, toggles_for
from support.quick_clicks import (
    GAUGE_NAMES,
    LATE_ANSWERS,
    after_the_last_click,
    start_clicking,
    until_all_is_answered,
)
from support.webui_page import CHROMIUM

sync_api = pytest.importorskip("playwright.sync_api")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium")]

TYPES = ["fp16", "q8", "q6", "q4", "q3", "q8_q4", *CACHE_TYPE_ALIASES, " Q4 ", "toString",
         "q5<b>", ""]
KEEP = {"__type__": "update"}


@pytest.fixture(scope="module")
def blank(browser):
    page = browser.new_page()
    yield page
    page.close()


def run(page, source, *values):
    return page.evaluate(f"values => ({source})(...values)", list(values))


def after(answer, before):
    return [old if new == KEEP else new for new, old in zip(answer, before, strict=True)]


def in_step(on8, on4, cache_type):
    return (on8, on4) == toggles_for(plain_cache_type(cache_type or "fp16"))[:2]


SOURCES = {"cache_8bit": page_script.follow_toggle("cache_8bit"),
           "cache_4bit": page_script.follow_toggle("cache_4bit"),
           "cache_type": page_script.follow_cache_type()}


@pytest.mark.parametrize("name", SOURCES)
def test_fields_are_in_step_after_any_change(blank, name):
    for before in itertools.product((True, False), (True, False), [*TYPES, None]):
        answer = run(blank, SOURCES[name], *before)
        assert in_step(*after(answer, before)), (before, answer)
        # Values that are in step are left alone, so an answer causes no further event.
        assert (answer == [KEEP] * 3) == in_step(*before), (before, answer)


@pytest.mark.parametrize(("name", "before", "expected"), [
    ("cache_8bit", (True, False, "fp16"), [True, False, "q8"]),
    ("cache_8bit", (True, True, "q4"), [True, False, "q8"]),
    ("cache_4bit", (True, True, "q8_0"), [False, True, "q4"]),
    ("cache_4bit", (False, True, "q8_q4"), [False, True, "q4"]),
    ("cache_4bit", (False, False, "q4"), [False, False, "fp16"]),
    ("cache_8bit", (False, False, "fp8"), [False, False, "fp16"]),
    ("cache_type", (False, False, "q8_0"), [True, False, "q8_0"]),
    ("cache_type", (True, False, "q6"), [False, False, "q6"]),
    ("cache_type", (True, False, "q4_0"), [False, True, "q4_0"]),
])
def test_a_click_means_what_it_says(blank, name, before, expected):
    assert run(blank, SOURCES[name], *before) == expected


def test_only_a_pick_of_the_gauge_changes_the_fields(blank):
    source = page_script.follow_pick()
    assert run(blank, source, "4096 q8 1763800000000") == [4096, "q8"]
    assert run(blank, source, "0 q4 1763800000000") == [KEEP, "q4"]
    for text in ("", None, "4096", "x q4", "4096 q5", "-1 q4", "99999999999 q4", "1_000 q4",
                 "4096 <b> 1", "٣ q4", "4096 q4<b>"):
        assert run(blank, source, text) == [KEEP, KEEP], text


def test_one_drawing_at_a_time_and_the_last_one_after_the_last_change(browser):
    page = browser.new_page()
    ask, arrived = page_script.ask_for_drawing("gauge"), page_script.drawing_arrived()
    drawing, due, chosen = False, False, random.Random()
    for _ in range(200):
        if chosen.random() < 0.6:
            asked = run(page, ask) != KEEP
            assert asked != drawing, "no second drawing is asked for before the first arrives"
            drawing, due = True, due or not asked
        elif drawing:
            again = run(page, arrived) != KEEP
            assert again == due, "only a change since then is drawn again"
            drawing, due = again, False
    page.close()


def test_a_lost_drawing_does_not_stop_later_ones(browser):
    page = browser.new_page()
    page.evaluate("Date.now = () => window.now ?? 1e12")
    ask = page_script.ask_for_drawing("gauge")
    assert run(page, ask) == "1" and run(page, ask) == KEEP
    page.evaluate(f"window.now = 1e12 + {page_script.LOST_AFTER_MS} + 1")
    assert run(page, ask) == "2"
    page.close()


PROBLEM = "<details><summary>Details</summary><pre {style}>{text}</pre></details>"
SCROLLS = "style='height: 40px; overflow: auto; white-space: pre-wrap'"


def drawn(buttons=("one", "two"), problem="", name="reservation"):
    shown = "".join(f"<button>{text}</button>" for text in buttons)
    text = problem and PROBLEM.format(style=SCROLLS, text=f"{problem} " + "line<br>" * 50)
    more = "<button>inside</button>"
    return (f"<section>{text}{shown}<details data-name='{name}'><summary>Details</summary>"
            f"{more}</details></section>")


@pytest.fixture
def kept(browser):
    """A page with a gauge whose state is kept; `draw` replaces the gauge's elements."""
    page = browser.new_page()
    page.set_content("<input id='other'><div id='gauge'><div id='inner'></div></div>")
    page.evaluate("""() => {
        window.draw = html => { document.querySelector("#inner").innerHTML = html; };
        window.unfolded = () => [...document.querySelectorAll("details")].map(each => each.open);
        window.focused = () => document.activeElement.textContent; }""")
    page.evaluate("draw", drawn())
    for _ in range(2):
        run(page, page_script.keep_state("gauge"))
    yield page
    page.close()


def test_what_is_unfolded_or_folded_just_before_a_drawing_stays_so(kept):
    for state in (True, False, True):
        # In one task, so that the event `toggle` comes after the drawings.
        kept.evaluate("""html => { document.querySelector("summary").click();
                         draw(html); draw(html); }""", drawn())
        assert kept.evaluate("unfolded()") == [state]
    # Gradio 6 changes the elements in place.
    kept.evaluate("document.querySelector('details').removeAttribute('open')")
    assert kept.evaluate("unfolded()") == [True]
    # What the page shows in between has no details.
    kept.evaluate("draw('<section>No model</section>')")
    kept.evaluate("draw", drawn(["three"]))
    assert kept.evaluate("unfolded()") == [True]
    kept.evaluate("draw", drawn(name="another"))
    assert kept.evaluate("unfolded()") == [False]
    # As a search in the page does.
    kept.evaluate("document.querySelector('details').open = true")
    kept.evaluate("draw", drawn(name="another"))
    assert kept.evaluate("unfolded()") == [True]


def test_the_details_of_a_problem_stay_unfolded_and_scrolled_until_it_is_another(kept):
    kept.evaluate("draw", drawn(problem="first"))
    kept.locator("summary").first.click()
    kept.locator("pre").evaluate("text => { text.scrollTop = 70; }")
    scrolled = "document.querySelector('pre').scrollTop"
    kept.evaluate("() => new Promise(done => setTimeout(done, 100))")
    kept.evaluate("draw", drawn(["three"], problem="first"))
    assert kept.evaluate("unfolded()") == [True, False] and kept.evaluate(scrolled) == 70
    kept.evaluate("draw", drawn(problem="second"))
    assert kept.evaluate("unfolded()") == [False, False]


def test_the_focus_stays_on_a_button_that_is_drawn_again(kept):
    kept.get_by_role("button", name="two").focus()
    kept.evaluate("draw", drawn(["new one", "new two"], problem="any"))
    assert kept.evaluate("focused()") == "new two"
    # A button that is folded now leaves the focus to what unfolds it.
    kept.locator("summary").last.click()
    kept.get_by_role("button", name="inside").focus()
    kept.evaluate("draw", drawn(name="another"))
    assert kept.evaluate("focused()") == "Details"
    kept.evaluate("draw", drawn(["three"], name="another"))
    assert kept.evaluate("focused()") == "Details"


def test_a_click_counts_although_a_drawing_comes_before_the_mouse_is_released(kept):
    for state in (True, False):
        kept.locator("summary").hover()
        kept.mouse.down()
        kept.evaluate("draw", drawn())
        kept.mouse.up()
        assert kept.evaluate("unfolded()") == [state]
    kept.evaluate("""window.clicked = []; document.addEventListener("click", event => {
        if (event.target.tagName === "BUTTON") clicked.push(event.target.textContent); })""")
    kept.get_by_role("button", name="two").hover()
    kept.mouse.down()
    kept.evaluate("draw", drawn(["one", "2"]))
    kept.mouse.up()
    kept.get_by_role("button", name="one").click()
    # Released elsewhere, or pressed elsewhere, it is no click.
    for first, last in (("2", "one"), ("one", "2")):
        kept.get_by_role("button", name=first).hover()
        kept.mouse.down()
        kept.evaluate("draw", drawn(["one", "2"]))
        kept.get_by_role("button", name=last).hover()
        kept.mouse.up()
    # Moved away from under the mouse it is one, and none of what is there now.
    for redrawn in (["one", "2"], ["one", "3"]):
        kept.get_by_role("button", name="one").hover()
        kept.mouse.down()
        kept.evaluate("draw", drawn(redrawn).replace("<button>", "<p>a line</p><button>", 1))
        kept.mouse.up()
    kept.evaluate("draw", drawn(["one", "2"]))
    kept.get_by_role("button", name="2").hover()
    kept.mouse.down()
    kept.evaluate("document.body.prepend(document.createElement('h1'), 'a line')")
    kept.mouse.up()
    assert kept.evaluate("clicked") == ["2", "one", "one", "one", "2"]


def test_a_drawing_takes_no_focus_that_is_elsewhere(kept):
    button, other = kept.get_by_role("button", name="two"), kept.locator("#other")
    button.focus()
    other.focus()
    kept.evaluate("draw", drawn())
    assert kept.evaluate("document.activeElement.id") == "other"
    button.focus()
    button.blur()
    kept.evaluate("draw", drawn())
    assert kept.evaluate("document.activeElement.tagName") == "BODY"
    # Nor does a button that is gone take it when it comes back.
    button.focus()
    kept.evaluate("draw", drawn(["one"]).replace("<button>inside</button>", ""))
    kept.evaluate("draw", drawn())
    assert kept.evaluate("document.activeElement.tagName") == "BODY"


FIELD = "<textarea id='it' style='height: 100px'></textarea>"
LOG = "<div id='it' style='height: 100px; overflow: auto; white-space: pre'></div>"


@pytest.mark.parametrize(("element", "follow"), [
    (FIELD, browser_script.follow_text("#it")), (LOG, browser_script.follow_log("#it"))])
def test_a_text_is_at_its_end_also_if_it_was_hidden_while_it_was_written(
    browser, element, follow
):
    page = browser.new_page()
    page.set_content(f"<div id='box' style='display: none'>{element}</div>")
    page.evaluate("""() => {
        const it = document.querySelector("#it"), box = document.querySelector("#box");
        window.write = lines => { it["value" in it ? "value" : "textContent"] =
          Array.from({length: lines}, (_, line) => `line ${line}`).join("\\n"); };
        window.show = on => { box.style.display = on ? "" : "none"; };
        window.scroll = top => { it.scrollTop = top; };
        window.frames = async () => {
          for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame); };
        window.position = async () => { await window.frames();
          return [it.scrollTop, it.scrollHeight - it.clientHeight - it.scrollTop]; }; }""")

    def write(lines):
        page.evaluate("lines => write(lines)", lines)
        run(page, follow)
        page.evaluate("frames()")

    def position():
        return page.evaluate("position()")

    # As when Send is clicked before there is any text.
    run(page, browser_script.scroll_to_end("#it"))
    write(100)
    page.evaluate("show(true)")
    assert position()[0] > 0 and position()[1] == 0
    write(110)
    assert position()[1] == 0
    page.evaluate("show(false)")
    write(120)
    write(130)
    page.evaluate("show(true)")
    assert position()[1] == 0
    # A reader who has scrolled up stays there, whatever is written, hidden and shown.
    page.evaluate("scroll(10)")
    position()
    write(140)
    assert position()[0] == 10
    page.evaluate("show(false)")
    write(150)
    page.evaluate("show(true)")
    assert position()[0] in (0, 10)
    run(page, browser_script.scroll_to_end("#it"))
    write(160)
    assert position()[1] == 0
    page.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The standalone page with two models to choose from, served in this process."""
    pytest.importorskip("gradio")
    from extension.page.server import launch, make_page
    from extension.page.session import Session
    from extension.page.watch import Watch
    from extension.panel.panel import ModelChoice
    from support.tiny import write_tiny_model

    folder = tmp_path_factory.mktemp("models")
    for name in ("one", "another"):
        write_tiny_model(folder / name)
    page = make_page(Session(), ModelChoice(str(folder / "one")), watch := Watch())
    yield launch(page, watch), folder
    page.close()


def test_quick_clicks_and_another_model_leave_fields_and_gauge_in_agreement(browser, address):
    url, folder = address
    page = browser.new_page()
    page.add_init_script(LATE_ANSWERS)
    page.goto(url)
    page.locator("#exl_gauge .exl-gauge").wait_for()
    until_all_is_answered(page)
    toggles = [f"#exl_cache_{bits}bit input" for bits in (8, 4)]
    field = page.locator("#exl_model_dir textarea, #exl_model_dir input")
    seed = random.randrange(1 << 30)
    for turn in range(8):
        start_clicking(page, toggles, seed + turn)
        name = ("another", "one")[turn % 2]
        field.fill(str(folder / name))
        field.press("Enter")
        after_the_last_click(page)
        on8, on4 = (page.locator(selector).is_checked() for selector in toggles)
        cache_type = page.locator("#exl_cache_type input").input_value()
        assert (on8, on4, cache_type) == toggles_for(cache_type), f"seed {seed}, turn {turn}"
        until_all_is_answered(page)
        shown = page.locator("#exl_gauge .exl-model").inner_text()
        assert page.locator("#exl_cache_type input").input_value() == cache_type
        assert GAUGE_NAMES[cache_type] in shown and name in shown, f"seed {seed}, turn {turn}"
    page.close()


def test_details_that_are_unfolded_while_a_drawing_is_under_way_stay_unfolded(
    browser, address, monkeypatch
):
    from extension.page.session import Session

    url, _ = address
    drawing, released = threading.Semaphore(0), threading.Semaphore(0)
    draw = Session.gauge

    def draw_late(*args, **kwargs):
        html = draw(*args, **kwargs)
        drawing.release()
        assert released.acquire(timeout=60)
        return html

    page = browser.new_page()
    page.add_init_script(LATE_ANSWERS)
    page.goto(url)
    gauge = page.locator("#exl_gauge .exl-gauge")
    gauge.wait_for()
    until_all_is_answered(page)
    monkeypatch.setattr(Session, "gauge", draw_late)
    for cache_type, state in (("q4", True), ("fp16", False), ("q4", True), ("fp16", True)):
        page.locator("#exl_cache_4bit input").click()
        assert drawing.acquire(timeout=60)
        if gauge.locator("details").evaluate("details => details.open") != state:
            gauge.locator("summary").click()
        released.release()
        sync_api.expect(gauge.locator(".exl-model")).to_contain_text(GAUGE_NAMES[cache_type])
        assert gauge.locator("details").evaluate("details => details.open") == state
    # The focus stays on a button that the keyboard has pressed.
    gauge.get_by_role("button", name="Choose 8-bit cache, saves").press("Enter")
    assert drawing.acquire(timeout=60)
    released.release()
    sync_api.expect(gauge.locator(".exl-model")).to_contain_text("8-bit cache")
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label.startswith("Choose 8-bit cache, saves")
    page.close()
