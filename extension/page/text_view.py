"""The side of the page that has the text: conversations, chat, notebook and settings.

The server holds all of it (`conversation_list.py`, `writing.py`). A tab names its conversation and
what it has seen of it, and asks for what is new (`watch.py`). So a tab that is reloaded shows the
same as before, and whatever another tab loads or unloads. The browser keeps it too, for another
server (`browser_storage.py`).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from exl_loader import InvalidSettings
from exl_loader.commands.generate import DEMO_PROMPT
from exl_loader.commands.model_options import DEMO_MODEL
from exl_loader.utils.byte_counts import amount
from exl_loader.utils.json_keys import InvalidJson, parse_json

from ..panel.panel import ModelChoice
from .browser_script import (
    MAX_FILE_BYTES,
    choose_file,
    follow_log,
    follow_text,
    forget_sent,
    keep_typed,
    name_field,
    name_focused,
    remember_tab,
    save_file,
    with_times,
)
from .browser_storage import (
    UNREAD,
    delete_kept,
    keep_record,
    list_kept,
    open_chosen,
    open_tab,
)
from .chat_view import EDITED, LOG, ChatView
from .conversation import Conversation
from .conversation_list import Conversations, KeptTitle, new_key
from .model_folders import folder_bytes
from .notebook_view import FIELD, NotebookView
from .session import Session
from .settings_view import FIRST_SETTINGS, SettingsView, read_fields, write_fields
from .watch import Watch, connect_drawing
from .widgets import QUICK, button, hidden_field, html_block, if_any
from .writing import KEPT, NOT_DELETED, OpenConversation, Shown

SAVED_NAME = "conversation.json"

# Id of the hidden field with the tab's name, which is empty until the page is open.
TAB_ELEM_ID = "exl_tab"

# The fields of `Conversation` that a person types into, and where the page has them.
TYPED_FIELDS = {"draft": "#exl_message", "text": "#exl_text", "system": "#exl_system"}

Updates = dict[Any, Any]


class TextView:
    """Chat and notebook, made in the current block of Gradio, and their events."""

    def __init__(self, session: Session, first: ModelChoice, watch: Watch) -> None:
        self._session = session
        self._watch = watch
        text = DEMO_PROMPT if _is_demo(first) else ""
        self._conversations = Conversations(
            session, Conversation(text=text, settings=dict(FIRST_SETTINGS)))
        self._greeted = False
        self.line = html_block("exl_line", '<span class="exl-opening">Opening …</span>')
        with gr.Row(elem_classes="exl-buttons", elem_id="exl_conversations"):
            self.picker = gr.Dropdown(
                [], label="Conversation", show_label=False, container=False, filterable=False,
                scale=5, elem_id="exl_picker", min_width=100)
            self.new = button("New", "exl_new")
            self.save = button("Save", "exl_save")
            self.open = button("Open", "exl_open")
            self.delete = button("Delete", "exl_delete")
        self.unkept = html_block("exl_unkept")
        with gr.Tabs(elem_id="exl_tabs") as self.tabs:
            with gr.Tab("Chat", id="chat", visible=False) as self.chat_tab:
                self.chat = ChatView()
            with gr.Tab("Notebook", id="text") as self.text_tab:
                self.notebook = NotebookView()
        self.problem = html_block("exl_problem")
        self.notice = html_block("exl_notice")
        self.stats = html_block("exl_stats")
        self.chat.make_system()
        self.settings = SettingsView()
        # `BROWSER/CONVERSATION`, what the tab shows of it and of the model, a file's text, and
        # what the browser has to keep.
        self.tab = hidden_field(TAB_ELEM_ID)
        self.seen = hidden_field("exl_seen")
        self.seen_model = hidden_field("exl_seen_by_text")
        self.file = hidden_field("exl_file")
        self.record = hidden_field("exl_record")
        # By which the server knows what the picker lists.
        self.listed = hidden_field("exl_listed")
        # What `open_tab` has found, and `with_times`.
        self.typed = hidden_field("exl_typed")
        self.kept = hidden_field("exl_kept")
        self.others = hidden_field("exl_others")
        self.times = hidden_field("exl_times")
        self.changed = watch.add("text", self._version, self._is_busy,
                                 [self.seen, self.seen_model])

    def connect(self, page: gr.Blocks) -> None:
        """Wire the components."""
        chat, notebook = self.chat, self.notebook
        self._written = [
            self.seen, self.record, self.stats, self.notice, self.problem,
            chat.chatbot, chat.send, chat.stop, chat.regenerate, chat.go_on,
            notebook.text, notebook.write, notebook.stop, notebook.again, notebook.undo,
        ]
        drawn = [*self._written, self.tabs, self.chat_tab, chat.system_fold, notebook.starters,
                 self.line, self.seen_model]
        everything = [*drawn, self.tab, self.picker, self.listed, chat.message, chat.system,
                      *self.settings.fields]
        opening = [self.typed, self.kept, self.others]
        page.load(self._open, [self.tab, *opening], everything, js=open_tab(), **QUICK)
        page.load(None, None, None, js=keep_typed(TYPED_FIELDS), **QUICK)
        page.load(None, None, None, js=name_focused({EDITED: "Edited message"}), **QUICK)
        connect_drawing(self.changed, self._draw_changes, [self.tab, self.seen, self.seen_model],
                        drawn, **QUICK)
        self._watch.connect(page, self.tab)
        self.tab.change(None, self.tab, None, js=remember_tab(), **QUICK)
        # Gradio would check the choice against the list that the page began with.
        self.picker.input(self._choose, [self.picker, *opening, self.tab], everything,
                          js=open_chosen(), preprocess=False, trigger_mode="always_last", **QUICK)
        self.picker.focus(self._list, [self.tab, self.others, self.listed],
                          [self.picker, self.listed], js=list_kept(), **QUICK)
        self.record.change(None, self.record, self.unkept, js=keep_record(), **QUICK)
        self.delete.click(self._delete, self.tab, everything, js=delete_kept(), **QUICK)
        self.new.click(self._new, self.tab, everything, **QUICK)
        saved = self.save.click(self._save, self.tab, self.file, **QUICK)
        saved.then(None, self.file, None, js=save_file(SAVED_NAME), **QUICK)
        # A browser that does not report a cancelled choice would leave a single event open.
        self.open.click(self._load, [self.tab, self.file], everything, js=choose_file(),
                        trigger_mode="multiple", **QUICK)
        for component in self.settings.fields:
            component.change(
                lambda tab, *values: self._keep(tab, settings=read_fields(values)),
                [self.tab, *self.settings.fields], None, trigger_mode="always_last", **QUICK)
        self.text_tab.select(None, None, None, js=follow_text(FIELD), **QUICK)
        for trigger in (page.load, self.text_tab.select):
            trigger(None, None, None, js=name_field(FIELD, str(notebook.text.label)), **QUICK)
        self.chat_tab.select(None, None, None, js=follow_log(LOG), **QUICK)
        chat.connect(self._act, self._keep_typed)
        chat.chatbot.edit(self._edit, self._inputs(),
                          [*self._written, self.picker, self.listed], **QUICK)
        notebook.connect(self._act, self._keep_typed)

    def _inputs(self) -> list[Any]:
        """The inputs of everything that lets the model write."""
        return [self.tab, self.chat.system, *self.settings.fields]

    def _act(
        self, triggers: Sequence[Any], action: Callable[..., None], inputs: Sequence[Any] = (),
        *, constants: Sequence[Any] = (), keeps: str = "", clears: Any = None,
    ) -> None:
        """Wire a method of `OpenConversation`.

        Args:
            triggers: the events that call it.
            action: the method.
            inputs: components whose values are its arguments.
            constants: further arguments.
            keeps: the field of `Conversation` that keeps the input, also after an error.
            clears: a text field to empty after a call without an error.
        """

        def call(tab: str, system: str, *values: Any) -> Updates:
            fields = len(self.settings.fields)
            given, times = values[fields:-1], _times(values[-1])
            opened = self._conversations.get(tab)
            opened.keep(times, system=system or "", settings=read_fields(values[:fields]))
            if keeps:
                opened.keep(times, **{keeps: given[-1] or ""})
            before = opened.shown().text_version
            done = opened.attempt(action, *given, *constants)
            updates = self._after(tab, opened, before)
            if clears is not None and done:
                updates[clears] = ""
            return updates

        outputs = [*self._written, self.picker, self.listed]
        if clears is not None:
            outputs.append(clears)
        every_input = [*self._inputs(), *inputs, self.times]
        done = gr.on(list(triggers), call, every_input, outputs, js=with_times(len(every_input)),
                     **QUICK)
        if clears is not None:
            done.then(None, clears, None, js=forget_sent(keeps), **QUICK)

    def _edit(self, event: gr.EditData, tab: str, system: str, *values: Any) -> Updates:
        opened = self._conversations.get(tab)
        opened.keep(system=system or "", settings=read_fields(values))
        index = event.index if isinstance(event.index, int) else event.index[0]
        before = opened.shown().text_version
        opened.attempt(OpenConversation.edit, index, str(event.value))
        return self._after(tab, opened, before)

    def _after(self, tab: str, opened: OpenConversation, text_version: int) -> Updates:
        """Draw a conversation after an action that began with this version of its text."""
        shown = opened.shown()
        return {**self._draw(tab, opened, shown, shown.text_version != text_version),
                **self._draw_list(tab, value=tab)}

    def _keep_typed(self, component: Any, name: str) -> None:
        """Keep what is typed into a text field, as the field `name` of the conversation."""
        component.input(
            lambda tab, text, times: self._keep(tab, _times(times), **{name: text or ""}),
            [self.tab, component, self.times], None, js=with_times(3),
            trigger_mode="always_last", **QUICK)

    def _keep(self, tab: str, times: dict[str, float] | None = None, **values: Any) -> None:
        # Fields change while the page opens, before the tab has a name. A server that does not
        # know the conversation has the tab reload.
        opened = self._conversations.find(tab) if tab else None
        if opened is not None:
            opened.keep(times, **values)

    # Conversations

    def _open(self, tab: str, typed: str = "", kept: str = "", others: str = "") -> Updates:
        """Show a conversation in a tab.

        Args:
            tab: its name.
            typed, kept, others: see `open_tab`.
        """
        found = _object(others)
        self._conversations.note_kept(tab, KeptTitle.read(found.get("listed")))
        unread = found.get("unread")
        try:
            if unread and self._conversations.find(tab) is None:
                raise InvalidSettings(KEPT, actual=UNREAD.get(str(unread), UNREAD["failed"]),
                                      remedy=NOT_DELETED)
            opened = self._conversations.open(tab, kept, found.get("before"))
        except InvalidSettings as error:
            # Another name, so that nothing is written over what is kept.
            tab = f"{tab.partition('/')[0]}/{new_key()}"
            opened = self._conversations.open(tab)
            opened.say(error)
        opened.restore(_typed(tab, typed))
        self._greet(opened)
        updates = self._everything(tab, opened)
        if others and not (unread or found.get("isOff")):
            updates[self.record] = "\n".join(
                [updates[self.record], *self._conversations.unkept(tab)])
        return updates

    def _everything(self, tab: str, opened: OpenConversation) -> Updates:
        shown = opened.shown()
        conversation = shown.conversation
        fields = zip(self.settings.fields, write_fields(conversation.settings), strict=True)
        return {
            **self._draw(tab, opened, shown, True), **self._draw_model(shown, not shown.in_text),
            **self._draw_list(tab, value=tab), self.tab: tab, **dict(fields),
            self.chat.message: conversation.draft, self.chat.system: conversation.system,
        }

    def _new(self, tab: str) -> Updates:
        return self._open(f"{tab.partition('/')[0]}/{new_key()}")

    def _delete(self, tab: str) -> Updates:
        """Delete a tab's conversation, and show a new one. Without a tab it was not confirmed."""
        if not tab:
            return {self.seen: gr.skip()}
        self._conversations.delete(tab)
        return self._new(tab)

    def _choose(self, chosen: str, typed: str, kept: str, others: str, tab: str) -> Updates:
        """Show the conversation that was chosen, as `_open`.

        Gradio sends this event also when the picker loses the focus and nothing was chosen.
        """
        if chosen == tab:
            return {self.seen: gr.skip()}
        updates = self._open(chosen, typed, kept, others)
        if updates[self.tab] == chosen:
            # Without the value, because another conversation may have been chosen meanwhile.
            updates |= self._draw_list(chosen)
        return updates

    def _list(self, tab: str, others: str, listed: str) -> Updates:
        """Update the list that is being opened. A click is lost in a list that is drawn again."""
        self._conversations.note_kept(tab, KeptTitle.read(_object(others).get("listed")))
        updates = self._draw_list(tab)
        return {self.listed: gr.skip()} if updates[self.listed] == listed else updates

    def _draw_list(self, tab: str, **more: Any) -> Updates:
        """Draw the picker's list; more are other properties of it."""
        choices = self._conversations.listed(tab)
        return {self.picker: gr.update(choices=choices, **more),
                self.listed: str(zlib.crc32(json.dumps(choices).encode()))}

    def _save(self, tab: str) -> str:
        return self._conversations.get(tab).shown().conversation.to_json()

    def _load(self, tab: str, file: str) -> Updates:
        """Show the conversation of a file that the browser has read."""
        if not file:
            return {self.seen: gr.skip()}
        opened = self._conversations.get(tab)
        if not opened.attempt(_replace, file):
            return self._draw(tab, opened, opened.shown(), False)
        return self._everything(tab, opened)

    # Drawing

    def _version(self, tab: str) -> str:
        opened = self._conversations.get(tab)
        # Two conversations of a tab may have the same number.
        return f"{tab} {opened.version} {opened.record_version} {self._session.version}"

    def _is_busy(self, tab: str) -> bool:
        return self._conversations.get(tab).is_writing

    def _draw_changes(self, tab: str, seen: str, seen_model: str) -> Updates:
        """Draw what a tab has not seen yet."""
        if not tab:
            return {self.seen: gr.skip()}
        opened = self._conversations.get(tab)
        text_version = seen.rpartition(" ")[2]
        updates: Updates = {}
        is_new = seen_model != self._session.version
        if is_new:
            self._greet(opened)
        shown = opened.shown()
        if is_new:
            updates |= self._draw_model(shown, True)
        state = _state(tab, shown)
        if updates or seen.split(" ")[1:] != state.split(" ")[1:]:
            updates |= self._draw(tab, opened, shown, text_version != str(shown.text_version))
        elif seen != state:
            updates = self._keep_again(tab, opened, shown)
        return updates or {self.seen: gr.skip()}

    def _keep_again(self, tab: str, opened: OpenConversation, shown: Shown) -> Updates:
        """Have the browser keep the conversation, without drawing it."""
        return {self.seen: _state(tab, shown),
                self.record: opened.record(tab.partition("/")[2])}

    def _draw(self, tab: str, opened: OpenConversation, shown: Shown, with_text: bool) -> Updates:
        notice = f'<p role="status">{escape(shown.notice)}</p>' if shown.notice else ""
        return {
            **self._keep_again(tab, opened, shown),
            self.stats: if_any(escape(shown.stats)), self.notice: if_any(notice),
            self.problem: if_any(shown.problem),
            **self.chat.draw(shown), **self.notebook.draw(shown, with_text),
        }

    def _draw_model(self, shown: Shown, prefers_chat: bool) -> Updates:
        """Draw what the loaded model can do. Without a model a chat can still be read."""
        is_read = self._session.model is None and bool(shown.conversation.turns)
        version, chats = self._session.version, self._session.has_template or is_read
        selected = gr.update(selected="chat" if chats and prefers_chat else "text")
        return {
            self.seen_model: version,
            self.tabs: gr.update() if is_read else selected,
            self.chat_tab: gr.update(visible=chats),
            self.chat.system_fold: gr.update(visible=chats),
            self.notebook.starters: gr.update(visible=_is_demo(self._session.options)),
            self.line: self._model_line(),
        }

    def _model_line(self) -> str:
        session = self._session
        model, options = session.model, session.options
        if session.loading:
            return "A model is being loaded …"
        if model is None or options is None:
            return "No model is loaded. Choose one and press Load."
        name = f"<b>{escape(Path(options.model_dir).name)}</b>"
        if _is_demo(self._session.options):
            size = folder_bytes(options.model_dir) / 1e6
            return (f"{name} is the model that comes with exl_loader. It has {size:.1f} MB and has "
                    "read only Python: it shows the engine, not what a language model can do. "
                    "<code>python install.py --demo smollm2</code> makes a real one to talk to.")
        if not model.has_tokenizer:
            return f"{name}: {escape(model.tokenizer_warning)}"
        kind = "" if session.has_template else (
            " It has no chat template, so it continues texts.")
        return f"{name} is loaded, with {model.ctx_size:,} tokens of context.{kind}"

    def _greet(self, opened: OpenConversation) -> None:
        """Let the included model write once without a click, so that a new user sees text."""
        if self._greeted or not _is_demo(self._session.options):
            return
        shown = opened.shown()
        if shown.conversation.text == DEMO_PROMPT and not shown.writing:
            self._greeted = True
            opened.attempt(OpenConversation.write, DEMO_PROMPT)


def _is_demo(options: ModelChoice | None) -> bool:
    return options is not None and Path(options.model_dir).resolve() == DEMO_MODEL.resolve()


def _state(tab: str, shown: Shown) -> str:
    return f"{shown.record_version} {tab} {shown.version} {shown.text_version}"


def _object(stored: str) -> dict[str, Any]:
    """Read JSON of the page's script; anything but an object is an empty one."""
    try:
        found = parse_json(stored or "{}")
    except InvalidJson:
        return {}
    return found if isinstance(found, dict) else {}


def _times(stored: str) -> dict[str, float]:
    """Read what `with_times` has added."""
    found = parse_json(stored or "{}")
    return {name: found[name] for name in TYPED_FIELDS if _is_time(found.get(name))}


def _typed(tab: str, stored: str) -> dict[str, tuple[float, str]]:
    """Read what `keep_typed` has stored of a tab's conversation; anything else is left out."""
    try:
        found = parse_json(stored or "{}")
        if found.get("conversation") != tab.partition("/")[2]:
            return {}
        return {name: (time, text) for name, (time, text) in found["fields"].items()
                if name in TYPED_FIELDS and _is_time(time) and isinstance(text, str)}
    except (InvalidJson, AttributeError, KeyError, TypeError, ValueError):
        return {}


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _replace(opened: OpenConversation, file: str) -> None:
    """Open a file as `choose_file` has read it."""
    read = parse_json(file)
    if read["size"] > MAX_FILE_BYTES:
        raise InvalidSettings(
            f"{read['name']} is not opened", expected=f"a file of at most {amount(MAX_FILE_BYTES)}",
            actual=amount(read["size"]))
    opened.replace(read["text"])
