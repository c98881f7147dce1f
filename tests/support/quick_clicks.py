"""Quick clicks in a page whose server answers late and out of order."""

from __future__ import annotations

import random

# Delays every answer by a random time, so that answers overtake each other. Requests of timers,
# which never end, are not counted.
LATE_ANSWERS = """
window.unanswered = 0;
const ask = window.fetch;
const isByTimer = body => {
  const asks = JSON.parse(body ?? "{}").trigger_id;
  const parts = window.gradio_config?.components ?? [];
  return parts.some(part => part.id === asks && part.type === "timer");
};
window.fetch = async (...request) => {
  const counted = /predict|queue.join/.test(String(request[0]?.url ?? request[0]))
    && !isByTimer(request[1]?.body);
  window.unanswered += counted;
  try {
    const answer = await ask(...request);
    await new Promise(done => setTimeout(done, Math.random() * 400));
    return answer;
  } finally { window.unanswered -= counted; }
};
"""

# Clicks elements one after another, with a pause after each.
_CLICK = """clicks => { window.clicking = (async () => {
  for (const [selector, pause] of clicks) {
    document.querySelector(selector).click();
    await new Promise(done => setTimeout(done, pause));
  } })(); }"""

_STOPPED = """async () => { await window.clicking;
  for (let frame = 0; frame < 10; frame++) await new Promise(requestAnimationFrame); }"""

_QUIET = """async () => {
  for (let quiet = 0; quiet < 30; quiet++) {
    await new Promise(done => setTimeout(done, 20));
    if (window.unanswered) quiet = 0;
  } }"""

GAUGE_NAMES = {"fp16": "16-bit cache", "q8": "8-bit cache", "q4": "4-bit cache"}


def start_clicking(page, selectors, seed: int, count: int = 10) -> None:
    """Click some of the elements, without waiting for the last click."""
    chosen = random.Random(seed)
    page.evaluate(_CLICK, [
        [chosen.choice(selectors), chosen.choice((0, 5, 30, 90, 200))] for _ in range(count)])


def after_the_last_click(page) -> None:
    """Wait until the clicks are done and painted, but not for the server."""
    page.evaluate(_STOPPED)


def until_all_is_answered(page) -> None:
    page.evaluate(_QUIET)
