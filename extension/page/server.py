"""The standalone page, the loader's panel with a chat: `python -m extension.page.server [MODEL]`.

One page and one model on this machine. It listens on 127.0.0.1 only, answers no page of another
site (`guard.py`), asks other machines for nothing but a model that a person downloads, and makes a
public link only if `--share` asks for one. Needs Gradio 6.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

# Gradio reads this when it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

try:
    import gradio as gr
except KeyboardInterrupt:  # the import takes seconds
    sys.exit(130)

from exl_loader.commands.model_options import DEMO_MODEL

from ..panel.panel import ModelChoice
from .connection import HeadScript, Repeats, head_html
from .downloads import Downloads
from .guard import AllowedHosts, Guard, host_name
from .model_view import ModelView
from .session import Session
from .text_view import TAB_ELEM_ID, TextView
from .watch import PATH, Watch
from .widgets import html_block

if TYPE_CHECKING:
    from fastapi import FastAPI

TITLE = "exl_loader"
HOST = "127.0.0.1"

# How often Gradio looks into its queues, which have nothing (`widgets.QUICK`).
QUEUE_S = 1.0

# System fonts, because the theme's own would be fetched from the internet.
FONTS = ("system-ui", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO_FONTS = ("ui-monospace", "Cascadia Code", "Consolas", "DejaVu Sans Mono", "monospace")

PAGE_STYLE = """\
.exl-title { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 1em; }
.exl-title > h1.exl-name { font-size: 1.35rem; margin: 0; font-weight: 680; }
.exl-title > p.exl-about { margin: 0; color: var(--body-text-color-subdued); }
.exl-text textarea { font-family: var(--font-mono); font-size: 0.86rem; line-height: 1.5; }
.exl-hidden { display: none !important; }
.exl-buttons { gap: 0.5rem !important; flex-wrap: nowrap !important; align-items: center; }
.exl-buttons > button { min-width: 0 !important; padding-inline: 0.4rem !important; }
#exl_conversations { align-items: stretch !important; }
@media (max-width: 480px) { #exl_conversations { flex-wrap: wrap !important; }
  #exl_picker { flex: 1 0 100% !important; } }
@media (max-width: 480px) { .exl-buttons > button { font-size: 0.8rem !important;
  padding-inline: 0.25rem !important; flex: 1 1 auto !important; width: auto; } }
:is(#exl_picker, #exl_model_dir) input { text-overflow: ellipsis; padding-right: 1.6rem; }
#exl_line code { white-space: nowrap; }
#exl_stats, #exl_line { color: var(--body-text-color-subdued); font-size: 0.92rem; }
#exl_line .exl-opening { color: inherit; }
#exl_line b { color: var(--body-text-color); }
#exl_stats { font-variant-numeric: tabular-nums; min-height: 1.4em; }
:is(#exl_notice, #exl_unkept) p { margin: 0; padding: 0.4em 0.8em;
  border-left: 3px solid var(--color-accent); background: var(--background-fill-secondary); }
.exl-found p, .exl-found ul { margin: 0.3em 0; font-size: 0.9rem; overflow-wrap: anywhere; }
.exl-found ul { padding-left: 1.2em; }
.exl-bare, .exl-bare > div { padding: 0 !important; }
.exl-field-row { align-items: end !important; }
#exl_download table.exl-plan { width: 100%; margin: 0.3em 0 0; border-collapse: collapse;
  border: 0; overflow-wrap: normal; }
#exl_download table.exl-plan tr { border: 0; }
#exl_download table.exl-plan :is(th, td) { padding: 0.15em 0.8em 0.15em 0; text-align: left;
  border: 0; font-weight: 400; background: none; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
#exl_download table.exl-plan thead th { color: var(--exl-soft); white-space: normal;
  vertical-align: bottom; }
#exl_download ul { margin: 0.3em 0; padding-left: 1.2em; }
footer { display: none !important; }
/* The controls that the browser draws itself, such as scroll bars, follow the page's theme. */
:root:has(body.dark), .dark { color-scheme: dark; }
.dark [role=tab][aria-selected=true] { color: var(--primary-300) !important; }
/* While the page opens the text has the room that it will take, so that nothing jumps. */
:root:has(.exl-opening) #exl_tabs { min-height: calc(max(16rem, 100vh - 27rem) + 11.5rem); }
/* Targets for fingers: 24 px and more. */
button.label-wrap { padding-block: 0.6rem !important; margin-block: -0.6rem !important; }
button.label-wrap.open { margin-bottom: 0 !important; }
:is(#exl_chatbot, #exl_text) button.icon-button { min-width: 1.75rem; min-height: 1.75rem;
  justify-content: center; }
:is(#exl_picker, #exl_model_dir, #exl_cache_type) input { margin-block: 0 !important;
  padding-block: 0.25rem; min-height: 1.5rem; }
.tab-like-container > :is(input, button), label.checkbox-container { min-height: 1.5rem; }
input[type=range] { height: 1.5rem; }
input[type=range]::-webkit-slider-thumb { background-color: var(--slider-color) !important; }
input[type=range]::-moz-range-thumb { background-color: var(--slider-color) !important; }
.dark input[type=range] { --neutral-200: var(--neutral-600); }
#exl_chatbot textarea { min-width: min(24rem, 60vw); min-height: 6rem !important; max-height: 50vh;
  field-sizing: content; }
/* New and Delete are beside the list. */
#exl_chatbot button[aria-label=Clear] { display: none; }
"""

HEADING = (
    f"<style>{PAGE_STYLE}</style>"
    '<div class="exl-title"><h1 class="exl-name">exl_loader</h1>'
    '<p class="exl-about">EXL2 and GPTQ models, their memory reserved before they load</p></div>'
)


def make_page(
    session: Session, first: ModelChoice, watch: Watch, models_dir: str = ".",
    downloads: Downloads | None = None,
) -> gr.Blocks:
    """Lay out the page and connect its events.

    The text comes first, so that it is above the options on a narrow screen.

    Args:
        session: the page's model, which every tab of the browser shares.
        first: the options that the page shows at first.
        watch: for `launch` too.
        models_dir: the folder whose models the page lists at first.
        downloads: None for a page that downloads no models.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        html_block("exl_heading", HEADING)
        with gr.Row():
            with gr.Column(scale=7, min_width=320):
                text = TextView(session, first, watch)
            with gr.Column(scale=5, min_width=320):
                panel = ModelView(session, first, models_dir, watch, downloads)
        text.connect(page)
        panel.connect(page)
    return page


def _theme() -> gr.themes.Base:
    theme = gr.themes.Default(
        primary_hue="indigo", neutral_hue="zinc", radius_size="md",
        font=list(FONTS), font_mono=list(MONO_FONTS),
    )
    # The theme's own greys for hints and frames are hardly visible.
    return theme.set(
        body_text_color_subdued="*neutral_500",
        input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
        checkbox_border_color="*neutral_500", checkbox_border_color_dark="*neutral_400",
    )


def launch(
    page: gr.Blocks, watch: Watch, *, port: int | None = None, share: bool = False,
    allowed_hosts: Iterable[str] = (),
) -> str:
    """Serve a page in the background and return its address.

    Args:
        page, watch: of `make_page`.
        port: None takes the first free one from 7860 on.
        share: make a public link through Gradio.
        allowed_hosts: host names that requests may use besides this machine's own.
    """
    # Gradio looks into its queues 1,100 times a second, 6 % of a core. The page has none.
    page._queue.sleep_when_free = page._queue.progress_update_sleep_when_free = QUEUE_S
    allowed = AllowedHosts(allowed_hosts)
    # Without `_frontend` Gradio does not ask the page for an answer first, and does not give up
    # where a busy machine takes longer than 3 s for it.
    _, address, shared = page.launch(
        server_name=HOST, server_port=port, share=share, inbrowser=False, quiet=True,
        prevent_thread_lock=True, ssr_mode=False, show_error=True, max_file_size=1,
        app_kwargs={"lifespan": _lifespan(watch, allowed)}, theme=_theme(), _frontend=False,
    )
    if shared:
        allowed.add(urlsplit(shared).hostname or "")
    return shared or address


def _lifespan(
    watch: Watch, allowed: AllowedHosts
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Return what adds our route and middleware to Gradio's application.

    It runs before the server listens. A tab that waits for a server that starts again asks it at
    once, and must not get a page without our script.
    """
    from starlette.middleware import Middleware

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Gradio begins once more with the next port where one is taken.
        if all(each.cls is not Guard for each in app.user_middleware):
            app.router.routes.insert(0, watch.route())
            # Outside of Gradio's, which would answer some requests first.
            app.user_middleware[:0] = [Middleware(Guard, allowed=allowed), Middleware(Repeats)]
            # Inside of Gradio's, which compresses.
            html = head_html(TAB_ELEM_ID, PATH)
            app.user_middleware.append(Middleware(HeadScript, html=html))
            app.middleware_stack = app.build_middleware_stack()
        yield

    return lifespan


def port_number(text: str) -> int:
    """Read `--port`; argparse reports the error."""
    if text.isascii() and text.isdecimal() and 0 < int(text) < 1 << 16:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number from 1 to 65535, found {text!r}")


def allowed_host(text: str) -> str:
    """Read `--allow-host`; argparse reports the error."""
    try:
        return host_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def has_browser() -> bool:
    """Return whether this machine can open a window: it has a display and a browser."""
    if sys.platform.startswith("linux") and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    ):
        return False
    try:
        webbrowser.get()
    except webbrowser.Error:
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """Serve the page until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m extension.page.server",
                                     description="Load a model and chat with it in a web page.")
    parser.add_argument("model", nargs="?", metavar="MODEL", default=str(DEMO_MODEL),
                        help="model folder; without it the small model that ships with exl_loader")
    parser.add_argument("--models-dir", metavar="FOLDER",
                        help="folder below which the page looks for models; without it that of "
                        "MODEL, or the current one")
    parser.add_argument("--port", type=port_number, metavar="N",
                        help="port on 127.0.0.1; without it the first free one from 7860 on")
    parser.add_argument("--share", action="store_true",
                        help="make a public link through Gradio's servers; such a page downloads "
                        "no models")
    parser.add_argument("--allow-host", action="append", default=[], type=allowed_host,
                        metavar="NAME", help="another host name that requests may use, such as "
                        "that of a proxy; may be given several times")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    args = parser.parse_args(arguments)
    session = Session()
    # Shells let programs that a script starts in the background ignore this signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return serve(session, args)
    except KeyboardInterrupt:
        # Ending takes only a moment from here on, and a second Ctrl-C would disturb it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(file=sys.stderr)
    if not session.loading:
        session.unload()
    return 0


def models_dir(args: argparse.Namespace) -> str:
    """Return the folder whose models the page lists."""
    if args.models_dir is not None:
        return os.path.abspath(os.path.expanduser(args.models_dir))
    is_demo = args.model == str(DEMO_MODEL)
    return os.getcwd() if is_demo else os.path.dirname(os.path.abspath(args.model))


def serve(session: Session, args: argparse.Namespace) -> int:
    """Load the model and serve the page until interrupted; return an exit code on failure."""
    options = ModelChoice.from_values({"model_dir": args.model})
    session.start_load(options)
    try:
        watch = Watch()
        # Whoever has a public link could fill the disk.
        downloads = None if args.share else Downloads()
        page = make_page(session, options, watch, models_dir(args), downloads)
        address = launch(page, watch, port=args.port, share=args.share,
                         allowed_hosts=args.allow_host)
    except OSError as error:
        why = f"port {args.port} of {HOST} is in use; choose another, or leave --port out"
        print(f"error: the page cannot be served: {why if args.port else error}", file=sys.stderr)
        return 1
    print(f"{TITLE} is at {address}  (Ctrl-C ends it)", flush=True)
    if not args.no_browser and has_browser():
        webbrowser.open(address)
    while True:
        # Not `Event.wait`, which Ctrl-C does not end on Windows.
        time.sleep(3600)


if __name__ == "__main__":
    sys.exit(main())
