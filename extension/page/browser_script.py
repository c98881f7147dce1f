"""JavaScript of the text side: what is typed, files of conversations, and scrolling.

What is typed is in the tab's `sessionStorage`, because a reload may end the request that brings it
to the server; each text has the time at which it was typed, by which the server knows whether it
has it already. Files are read and written by the browser itself, so the server accepts no uploads
(`guard.py`) and keeps no copies of conversations in files. `browser_storage.py` has the
conversations that the browser keeps.

Every function here returns the source of a JavaScript function for Gradio's `js=`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from .guard import MAX_BODY_BYTES

CONVERSATION, TYPED = "exl_loader_conversation", "exl_loader_typed"

# A request has the text as JSON, in which a character may take twice its bytes.
MAX_FILE_BYTES = MAX_BODY_BYTES // 4

# A reader who is nearer to the end than this is following what is written.
NEAR_PIXELS = 40


# Reads what is stored of the tab's conversation: field -> [time, text].
_READ_TYPED = f"""
const conversation = sessionStorage.getItem("{CONVERSATION}");
let fields = {{}};
try {{
  const stored = JSON.parse(sessionStorage.getItem("{TYPED}"));
  if (stored.conversation === conversation) fields = stored.fields;
}} catch {{ }}
const store = () => sessionStorage.setItem("{TYPED}", JSON.stringify({{conversation, fields}}));
"""


def keep_typed(selectors: Mapping[str, str]) -> str:
    """Store what is typed, at once: `() -> nothing`, when the page opens.

    It is stored as JSON: the conversation, and for each field a time and its text.

    Args:
        selectors: name of a field -> selector of the element that has it.
    """
    return f"""() => {{
  if (window.exlKeepsTyped) return;
  window.exlKeepsTyped = true;
  document.addEventListener("input", event => {{
    for (const [name, selector] of Object.entries({json.dumps(dict(selectors))})) {{
      if (!event.target.closest?.(selector)) continue;
      try {{
        {_READ_TYPED}
        fields[name] = [Math.max(Date.now(), (fields[name]?.[0] ?? 0) + 1), event.target.value];
        store();
      }} catch {{ /* no storage, or it is full */ }}
    }}
  }}, true);
}}"""


def with_times(count: int) -> str:
    """Add to an event's inputs when its texts were typed: `(..., times) -> [..., times]`.

    Args:
        count: of the inputs, the hidden field for the times included, which is the last.
    """
    return f"""(...values) => {{
  let times = {{}};
  try {{
    {_READ_TYPED}
    for (const [name, [time]] of Object.entries(fields)) times[name] = time;
  }} catch {{ }}
  return [...values.slice(0, {count - 1}), JSON.stringify(times)];
}}"""


def forget_sent(name: str) -> str:
    """Forget what was typed into a field that the server has emptied: `text -> nothing`."""
    return f"""text => {{
  if (text) return;
  try {{
    {_READ_TYPED}
    if (fields["{name}"]) {{ fields["{name}"][1] = ""; store(); }}
  }} catch {{ }}
}}"""


def remember_tab() -> str:
    """Remember which conversation the tab shows now: `tab -> nothing`."""
    return f"""tab => {{
  try {{ if (tab) sessionStorage.setItem("{CONVERSATION}", tab.split("/")[1]); }} catch {{ }}
}}"""


def choose_file() -> str:
    """Let the user choose a file: `(tab, file) -> [tab, JSON with its name, size and text]`.

    The second value is empty if no file was chosen, and its text is empty if it is too long.
    """
    return f"""tab => new Promise(resolve => {{
  const input = document.createElement("input");
  input.type = "file";
  input.accept = ".json,application/json";
  input.addEventListener("cancel", () => resolve([tab, ""]));
  input.addEventListener("change", async () => {{
    const file = input.files[0];
    let text = "";
    try {{ if (file.size <= {MAX_FILE_BYTES}) text = await file.text(); }} catch {{ }}
    resolve([tab, JSON.stringify({{name: file.name, size: file.size, text}})]);
  }});
  input.click();
}})"""


def save_file(name: str) -> str:
    """Have the browser save a text as a file: `text -> nothing`. An empty text is not saved."""
    return f"""text => {{
  if (!text) return;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {{type: "application/json"}}));
  link.download = {json.dumps(name)};
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}}"""


# Follows the end of an element that scrolls. A hidden element has no height and keeps where it was
# scrolled, so what was written meanwhile is followed when it is shown.
_FOLLOWING = f"""
const following = element => element.exlFollowing ??= (() => {{
  // At first the end is shown, where the model writes.
  let height = 0, follows = true;
  const isShown = () => element.clientHeight > 0;
  // The height of the text at the last look says whether the reader was at its end.
  const look = () => {{
    if (isShown()) follows = element.scrollTop + element.clientHeight >= height - {NEAR_PIXELS};
  }};
  const isTyping = () => document.activeElement === element && element.matches("textarea:enabled")
    && !element.readOnly;
  const goOn = () => {{
    if (!isShown()) return;
    if (follows && !isTyping()) element.scrollTop = element.scrollHeight;
    height = element.scrollHeight;
  }};
  element.addEventListener("scroll", look);
  new ResizeObserver(goOn).observe(element);
  return {{look, goOn, restart() {{
    follows = true;
    element.scrollTop = height = element.scrollHeight;
  }}}};
}})();
"""


# Gradio makes the elements of a tab after it has been opened.
_FOUND = """
const found = async selector => {
  for (let frame = 0; frame < 600; frame++) {
    const element = document.querySelector(selector);
    if (element) return element;
    await new Promise(requestAnimationFrame);
  }
};
"""


def name_field(selector: str, name: str) -> str:
    """Give a text field a name for screen readers: `() -> nothing`, when its tab is opened.

    Gradio puts a field that has a button to copy it, and the button, into one `label`, which
    browsers take for that of the button.

    Args:
        selector: of the text field.
        name: its name.
    """
    return f"""async () => {{
  {_FOUND}
  (await found({json.dumps(selector)}))?.setAttribute("aria-label", {json.dumps(name)});
}}"""


def name_focused(fields: Mapping[str, str]) -> str:
    """Name for screen readers what Gradio makes without a name: `() -> nothing`, as a page opens.

    These are fields that get the focus as soon as they are made, and the list of a dropdown, which
    is made when its field gets the focus, and is named as the field.

    Args:
        fields: selector of a field -> its name.
    """
    return f"""() => {{
  if (window.exlNamesFocused) return;
  window.exlNamesFocused = true;
  document.addEventListener("focusin", ({{target}}) => {{
    for (const [selector, name] of Object.entries({json.dumps(dict(fields))}))
      if (target.matches(selector)) target.ariaLabel = name;
    if (target.matches("[role=combobox]")) requestAnimationFrame(() => {{
      const list = document.getElementById(target.getAttribute("aria-controls"));
      if (list) list.ariaLabel = target.ariaLabel;
    }});
  }});
}}"""


def follow_text(selector: str) -> str:
    """Scroll a text field with what is written at its end: `() -> nothing`.

    It is called after each change, and when the tab of the field is opened. A reader who has
    scrolled up stays where they are. Gradio's own `autoscroll` never scrolls a field that was not
    long enough to scroll when the text began.

    Args:
        selector: of the text field.
    """
    return f"""async () => {{
  {_FOLLOWING}{_FOUND}
  const area = await found({json.dumps(selector)});
  if (!area) return;
  following(area).look();
  requestAnimationFrame(following(area).goOn);
}}"""


def follow_log(selector: str) -> str:
    """Scroll an element with what is written in it: `() -> nothing`, as `follow_text`.

    A reader who has scrolled up stays where they are. Gradio's own `autoscroll` scrolls 300 ms
    after it has looked where the reader is, so while text is written nobody can scroll up.

    Args:
        selector: of the element.
    """
    return f"""async () => {{
  {_FOLLOWING}{_FOUND}
  const log = await found({json.dumps(selector)});
  if (!log || log.exlObserved) return;
  log.exlObserved = true;
  const {{look, goOn}} = following(log);
  new MutationObserver(() => {{ look(); goOn(); }}).observe(
    log, {{childList: true, subtree: true, characterData: true}});
}}"""


def scroll_to_end(selector: str) -> str:
    """Scroll an element to its end: `() -> nothing`, when the model begins to write there."""
    return f"""() => {{
  {_FOLLOWING}
  const element = document.querySelector({json.dumps(selector)});
  if (element) following(element).restart();
}}"""
