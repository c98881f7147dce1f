"""JavaScript that has the browser keep conversations, so that they outlive the server.

A tab's conversation has a name in the tab's `sessionStorage`, which a reload keeps and another tab
does not see. The browser has a name in `localStorage`, by which a new tab finds the conversations
of closed ones that the server still has. The conversations themselves are in IndexedDB, which has
room for them, and not on the server's disk: who can read them is decided by the browser's profile.

Every drawing of the server brings the tab's conversation as a record (`OpenConversation.record`).
The tab writes it at once, but one in which the model writes at most once a second, and only over an
older one, because several tabs may show the same conversation. When a tab opens, the server adds
the conversations that have changed since their tabs were closed. A tab that opens sends the server
what is kept of its conversation, which the server takes if it does not know the conversation.

Every function here returns the source of a JavaScript function for Gradio's `js=`.
"""

from __future__ import annotations

import json

from .browser_script import CONVERSATION, MAX_FILE_BYTES, TYPED

BROWSER = "exl_loader_browser"
DATABASE, DATABASE_VERSION = "exl_loader", 1

# Most conversations that a browser keeps. The ones that were changed longest ago go first.
MAX_KEPT = 1000

# Time between two writes of a tab while the model writes.
WRITE_MS = 1000

# A storage that has not answered after this time counts as one that does not work.
ANSWER_MS = 15_000

# What the page says where a conversation is not kept, by the script's word for it.
PROBLEMS = {
    "off": "This browser keeps no conversations for this page. They end with exl_loader; Save "
           "makes a file of one.",
    "failed": "This browser's storage cannot be written. What is written now ends with "
              "exl_loader; Save makes a file of it.",
    "full": "This browser's storage is full. What is written now ends with exl_loader, unless "
            "you delete other conversations. Save makes a file of it.",
    "newer": "A newer exl_loader keeps conversations in this browser, and this one cannot read "
             "them. What is written now ends with exl_loader; Save makes a file of it.",
    "too long": "This conversation is too long for the browser to keep. What is written now ends "
                "with exl_loader; Save makes a file of it.",
}

# Why what is kept was not read, by `unread` of `open_tab`.
UNREAD = {
    "failed": "the browser's storage does not answer",
    "newer": "one that a newer exl_loader has stored",
    "too long": "one that is too long for a request",
}

_SCRIPT = f"""
window.exlStorage ??= (() => {{
  const gone = new Set(), pending = new Map();
  const channel = window.BroadcastChannel ? new BroadcastChannel("exl_loader") : null;
  let opening = null, writing = null, wroteAt = 0, told = "";
  const within = (promise, ms) => Promise.race([promise, new Promise((_, reject) =>
    setTimeout(() => reject(new DOMException("no answer", "TimeoutError")), ms))]);
  const connect = () => new Promise((resolve, reject) => {{
    const asked = indexedDB.open("{DATABASE}", {DATABASE_VERSION});
    asked.onupgradeneeded = () => {{
      asked.result.createObjectStore("titles", {{keyPath: "key"}});
      asked.result.createObjectStore("texts");
    }};
    asked.onsuccess = () => {{
      const database = asked.result;
      database.onversionchange = () => {{ database.close(); opening = null; }};
      database.onclose = () => {{ opening = null; }};
      resolve(database);
    }};
    asked.onerror = () => reject(asked.error);
  }});
  const database = () => {{
    // Another try would wait as long.
    opening ??= within(connect(), {ANSWER_MS}).catch(error => {{
      if (error.name !== "TimeoutError") opening = null;
      throw error;
    }});
    return opening;
  }};
  // Runs `work(titles, texts, answer)` in one transaction, and returns what it has answered.
  const transact = async (mode, work) => {{
    const transaction = (await database()).transaction(["titles", "texts"], mode);
    return within(new Promise((resolve, reject) => {{
      let found;
      transaction.oncomplete = () => resolve(found);
      transaction.onabort = () => reject(transaction.error);
      work(transaction.objectStore("titles"), transaction.objectStore("texts"),
           value => {{ found = value; }});
    }}), {ANSWER_MS});
  }};
  const result = (request, then) => {{ request.onsuccess = () => then(request.result); }};
  const newest = titles => titles.sort((one, other) => other.changed - one.changed);

  const isOff = () => {{ try {{ return !window.indexedDB; }} catch {{ return true; }} }};
  const why = error => isOff() || error?.name === "SecurityError" || error?.name ===
    "InvalidStateError" ? "off" : {{QuotaExceededError: "full", VersionError: "newer"}}[
    error?.name] ?? "failed";

  // Writes a record; returns the conversations that had to go.
  const put = ([key, changed, title, isEmpty], text) => transact(
    "readwrite", (titles, texts, answer) => result(titles.get(key), found => {{
      if (found ? found.changed >= changed : isEmpty) return;
      titles.put({{key, title, changed}});
      texts.put(text, key);
      if (!found) result(titles.count(), count => count > {MAX_KEPT} &&
        result(titles.getAll(), all => {{
          const oldest = newest(all).slice({MAX_KEPT});
          for (const each of oldest) {{ titles.delete(each.key); texts.delete(each.key); }}
          answer(oldest);
        }}));
    }}));
  const write = async () => {{
    wroteAt = Date.now();
    let problem = "";
    for (const [key, [head, text]] of [...pending]) {{
      pending.delete(key);
      if (isOff()) {{ problem ||= head[3] ? "" : "off"; continue; }}
      if (new Blob([text]).size > {MAX_FILE_BYTES}) {{ problem = "too long"; continue; }}
      try {{
        const oldest = await put(head, text);
        if (oldest?.length) problem = `This browser keeps {MAX_KEPT:,} conversations. The oldest ` +
          `has been deleted: ${{oldest.map(each => each.title || "no title").join(", ")}}`;
      }} catch (error) {{
        problem = head[3] ? "" : why(error);
        if (!pending.has(key)) pending.set(key, [head, text]);
      }}
    }}
    return problem;
  }};
  // Notes records, and returns after they have been written what the page has to say.
  const keep = records => {{
    const lines = records ? records.split("\\n") : [];
    let isWriting = true;
    for (let i = 0; i + 1 < lines.length; i += 2) {{
      const head = JSON.parse(lines[i]);
      isWriting &&= head[4];
      // Answers may arrive in another order.
      const isNewer = head[1] >= (pending.get(head[0])?.[0][1] ?? -1);
      if (isNewer && !gone.has(head[0])) pending.set(head[0], [head, lines[i + 1]]);
    }}
    if (!isWriting) return write();
    return writing ??= new Promise(done => setTimeout(async () => {{
      writing = null;
      done(await write());
    }}, Math.max(0, wroteAt + {WRITE_MS} - Date.now())));
  }};
  addEventListener("pagehide", write);

  // Records of a deleted conversation may still be under way. A tab that shows it reloads.
  const drop = key => {{
    gone.add(key);
    pending.delete(key);
    try {{
      const typed = JSON.parse(sessionStorage.getItem("{TYPED}"));
      if (typed?.conversation === key) sessionStorage.removeItem("{TYPED}");
    }} catch {{ /* no storage, or nothing typed */ }}
  }};
  channel?.addEventListener("message", ({{data}}) => drop(data));
  const forget = async key => {{
    drop(key);
    channel?.postMessage(key);
    if (!isOff()) await transact("readwrite", (titles, texts) => {{
      titles.delete(key);
      texts.delete(key);
    }});
  }};

  const list = () => transact("readonly", (titles, texts, answer) => result(titles.getAll(), all =>
    answer(newest(all).map(each => [each.key, each.title, each.changed]))));
  const textOf = key => transact("readonly", (titles, texts, answer) =>
    result(texts.get(key), text => answer(text ?? "")));
  // Returns the text of a conversation, and what else the server has to know.
  const find = async key => {{
    const others = {{listed: [], before: null, unread: "", isOff: false}};
    gone.delete(key);
    others.isOff = isOff();
    if (others.isOff) return ["", others];
    try {{
      others.listed = await list();
      const isKept = others.listed.some(each => each[0] === key);
      const text = await textOf(isKept ? key : others.listed[0]?.[0] ?? key);
      if (isKept && new Blob([text]).size > {MAX_FILE_BYTES}) others.unread = "too long";
      else if (isKept) return [text, others];
      else if (text) try {{
        const {{settings, messages}} = JSON.parse(text);
        others.before = {{settings, messages: messages.filter(({{role}}) => role === "system")}};
      }} catch {{ /* the page says so when that conversation is opened */ }}
    }} catch (error) {{ others.unread = why(error) === "off" ? "" : why(error); }}
    return ["", others];
  }};
  const tell = problem => {{
    if (problem === told) return {{__type__: "update"}};
    told = problem;
    const span = document.createElement("span");
    span.textContent = ({json.dumps(PROBLEMS)})[problem] ?? problem;
    return {{__type__: "update", value: problem && `<p role="alert">${{span.innerHTML}}</p>`,
             visible: !!problem}};
  }};
  return {{find, list, keep, forget, tell}};
}})();
"""


def open_tab() -> str:
    """Name the tab, and find its conversation: `() -> [tab, typed, kept, others]`.

    The tab is `BROWSER/CONVERSATION`; a browser without storage gets new names. What was typed is
    as `keep_typed` has stored it. What is kept is a record without its first line, or empty. The
    others are JSON: `listed` with `[key, title, changed]` of each conversation that the browser
    keeps, `before` with the system prompt and the settings of the newest one, `unread`, which says
    why the tab's own could not be read, and `isOff`, true for a browser that keeps nothing.
    """
    return f"""async () => {{
  {_SCRIPT}
  const name = () => [...crypto.getRandomValues(new Uint8Array(16))]
    .map(byte => byte.toString(16).padStart(2, "0")).join("");
  const named = (storage, key) => {{
    try {{
      const found = window[storage].getItem(key);
      if (/^[0-9a-f]{{32}}$/.test(found ?? "")) return found;
      const made = name();
      window[storage].setItem(key, made);
      return made;
    }} catch {{ return name(); }}
  }};
  let typed = "";
  try {{ typed = sessionStorage.getItem("{TYPED}") ?? ""; }} catch {{ }}
  const key = named("sessionStorage", "{CONVERSATION}");
  const [kept, others] = await window.exlStorage.find(key);
  return [`${{named("localStorage", "{BROWSER}")}}/${{key}}`, typed, kept, JSON.stringify(others)];
}}"""


def open_chosen() -> str:
    """Find the conversation that was chosen, as `open_tab`.

    `(chosen, typed, kept, others, tab) -> [chosen, "", kept, others, tab]`.
    """
    return """async (chosen, typed, kept, others, tab) => {
  if (chosen === tab) return [chosen, "", "", "", tab];
  const [found, more] = await window.exlStorage.find(chosen.split("/")[1]);
  return [chosen, "", found, JSON.stringify(more), tab];
}"""


def list_kept() -> str:
    """List what the browser keeps: `(tab, others, seen) -> [tab, JSON with listed, seen]`."""
    return """async (tab, others, seen) => {
  let listed = [];
  try { listed = await window.exlStorage.list(); } catch { }
  return [tab, JSON.stringify({listed}), seen];
}"""


def keep_record() -> str:
    """Keep records: `records -> update of the block that says what is not kept`."""
    return "async records => window.exlStorage.tell(await window.exlStorage.keep(records))"


def delete_kept() -> str:
    """Ask, and delete what the browser keeps: `tab -> tab`, or an empty text after a No."""
    question = "Delete this conversation, and everything in it? It cannot be taken back."
    return f"""async tab => {{
  if (!tab || !confirm({json.dumps(question)})) return "";
  await window.exlStorage.forget(tab.split("/")[1]);
  return tab;
}}"""
