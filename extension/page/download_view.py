"""The fields of a download from the hub: its name, its plan, and how far it is."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from exl_loader import Reservation
from exl_loader.utils.byte_counts import amount

from ..panel.gauge import CACHE_BITS, card_html, largest_choice
from .downloads import (
    BUSY,
    COMPLETE,
    FETCHING,
    LOOKING,
    PLANNED,
    STOPPING,
    Downloads,
    ShownDownload,
)
from .watch import Watch, connect_drawing
from .widgets import QUICK, button, hidden_field, html_block, if_any

# Stage -> its name for people, and whether that is good news.
STAGES = {
    LOOKING: ("Looking it up", "exl-soft"), PLANNED: ("Ready", "exl-good"),
    FETCHING: ("Downloading", "exl-good"), STOPPING: ("Stopping", "exl-soft"),
    COMPLETE: ("Complete", "exl-good"),
}

# A plan that cannot be carried out; an error below says why.
NOT_READY = ("Not ready", "exl-bad")


class DownloadView:
    """The components, made in the current block of Gradio, and their events."""

    def __init__(self, downloads: Downloads, watch: Watch) -> None:
        self._downloads = downloads
        with gr.Accordion("Download a model", open=False, elem_id="exl_download_fold"):
            with gr.Row(elem_classes="exl-field-row"):
                self.repo = gr.Textbox(
                    "", label="Repository of the Hugging Face Hub", max_lines=1, min_width=200,
                    scale=3, elem_id="exl_repo", placeholder="OWNER/NAME or OWNER/NAME:4.0bpw",
                    info="EXL2 repositories keep each size in a branch, which follows the colon")
                self.look_up = gr.Button(
                    "Look up", elem_id="exl_look_up", size="md", min_width=100, scale=1)
            self.plan = html_block("exl_download")
            self.progress = html_block("exl_download_progress")
            self.problem = html_block("exl_download_problem")
            with gr.Row(elem_classes="exl-buttons"):
                self.start = button("Download", "exl_download_start", variant="primary",
                                    visible=False)
                self.stop = button("Stop", "exl_download_stop", visible=False)
                self.choose = button("Choose this model", "exl_download_choose",
                                     variant="primary", visible=False)
        # The number of completed downloads, after which the picker has a model more.
        self.completed = hidden_field("exl_downloaded", "0")
        self.changed = watch.add("download", lambda tab: downloads.version,
                                 lambda tab: downloads.is_busy)

    def connect(self, page: gr.Blocks, models_dir: gr.Textbox) -> None:
        """Wire the components.

        Args:
            page: the page.
            models_dir: the field with the folder of model folders.
        """
        shown = [self.plan, self.progress, self.problem, self.look_up, self.start, self.stop,
                 self.choose, self.completed]
        for trigger in (self.look_up.click, self.repo.submit):
            trigger(self._look_up, [self.repo, models_dir], shown, **QUICK)
        for component, action in ((self.start, self._downloads.start),
                                  (self.stop, self._downloads.stop)):
            component.click(lambda action=action: self._after(action), None, shown, **QUICK)
        page.load(self._draw, None, shown, **QUICK)
        connect_drawing(self.changed, self._draw, [], shown, **QUICK)

    def folder(self) -> Any:
        """Return the folder of the completed download, as a value for a field."""
        model = self._downloads.shown().model
        return gr.skip() if model is None else str(model.target)

    def _look_up(self, repo: str, models_dir: str) -> tuple[Any, ...]:
        self._downloads.look_up(repo or "", models_dir or "")
        return self._draw()

    def _after(self, action: Any) -> tuple[Any, ...]:
        action()
        return self._draw()

    def _draw(self) -> tuple[Any, ...]:
        shown = self._downloads.shown()
        resumes = shown.model is not None and shown.missing_bytes < shown.model.total_bytes
        label = "Go on with the download" if resumes else "Download"
        return (
            if_any(plan_html(shown)), if_any(shown.progress), if_any(shown.problem),
            gr.update(interactive=shown.stage not in BUSY),
            gr.update(value=label, visible=shown.stage == PLANNED, interactive=shown.may_start),
            gr.update(value="Stop" if shown.stage in (FETCHING, STOPPING) else "Cancel",
                      visible=shown.stage in STAGES and shown.stage != COMPLETE,
                      interactive=shown.stage != STOPPING),
            gr.update(visible=shown.stage == COMPLETE), str(self._downloads.completed),
        )


def plan_html(shown: ShownDownload) -> str:
    """Draw what is going to be downloaded, and the memory it takes; empty without a model."""
    if shown.stage not in STAGES:
        return ""
    stage, kind = STAGES[shown.stage]
    if shown.stage == PLANNED and not shown.may_start:
        stage, kind = NOT_READY
    badge = f'<span class="exl-badge {kind}">{stage}</span>'
    parts = [f'<p class="exl-verdict" role="status">{badge} <b>{escape(shown.name)}</b></p>']
    model = shown.model
    if model is not None:
        count = len(model.files)
        words = [f"{amount(model.total_bytes)} in {count} {'file' if count == 1 else 'files'}"]
        if shown.stage == COMPLETE:
            words.append(f"in {model.target}")
        else:
            here = model.total_bytes - shown.missing_bytes
            if here:
                words.append(f"{amount(here)} of it here already")
            words += [f"{amount(shown.free_bytes)} free on the disk", f"goes to {model.target}"]
        files = "".join(f"<li>{escape(file.name)}: {amount(file.size)}</li>"
                        for file in model.files)
        parts += [
            f'<p class="exl-model">{escape(" · ".join(words))}</p>', memory_html(model.reservation),
            f'<details data-name="files"><summary>Files</summary><ul>{files}</ul></details>',
        ]
    return card_html(f"{stage}: {shown.name}", parts)


def memory_html(reservation: Reservation) -> str:
    """Draw a table of what a model takes at each cache type, and of the contexts that fit.

    They fit in place of the model that is loaded now.
    """
    rows = []
    for cache_type, nbytes in reservation.bytes_by_cache_type.items():
        most = reservation.largest_ctx_size[cache_type]
        kind = "exl-good" if most >= reservation.ctx_size else "exl-bad"
        tokens = largest_choice(most, reservation.stretched_length) if most else 0
        rows.append(
            f"<tr><th>{escape(CACHE_BITS.get(cache_type, cache_type))}</th>"
            f'<td title="{nbytes:,} bytes">{amount(nbytes)}</td>'
            f'<td><span class="exl-badge {kind}">{tokens:,} tokens</span></td></tr>')
    return (
        '<table class="exl-plan"><thead><tr><th>Cache</th>'
        f"<th>Memory with {reservation.ctx_size:,} tokens</th><th>Largest context that fits</th>"
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )
