"""The gauge: what it shows of a reservation, and how."""

import io
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import exl_loader
from exl_loader.memory.reservation import DeviceReservation, Reservation
from exl_loader.utils.byte_counts import amount
from exl_loader.utils.errors import KernelBuildError
from exl_loader.utils.progress import PlainProgress
from extension.panel.gauge import (
    PICK_ELEM_ID,
    gauge_html,
    largest_choice,
    message_html,
    problem_html,
    task_html,
)
from extension.panel.loads import WatchedProgress

GIB = 1 << 30


def device(name="cuda:0", *, cache=6 * GIB, limit=None, other=GIB, own=0, capacity=24 * GIB,
           overhead=GIB // 2):
    buffers = (11 * GIB, cache, GIB // 4)
    free = capacity - other - own
    spare = free - sum(buffers) - overhead
    if limit is not None:
        spare = min(spare, limit - sum(buffers))
        capacity, free = limit, min(limit, free)
        other = capacity - free
    return DeviceReservation(name, 0, 40, *buffers, overhead, True, capacity, free, other, limit,
                             spare)


def reservation(*devices, **changes):
    whole = Reservation(
        model_dir="/models/Large-24B", architecture="MistralForCausalLM", format="exl2",
        num_layers=40, own_length=131072, alpha_value=1.0, compress_pos_emb=1.0,
        ctx_size=32768, cache_type="q8",
        chunk_size=256, max_batch_size=1, devices=devices or (device(),),
        largest_ctx_size={"fp16": 40960, "q8": 77056, "q6": 99072, "q4": 262144,
                          "q3": 262144},
        bytes_by_cache_type={"fp16": 22 * GIB, "q8": 17 * GIB, "q6": 16 * GIB, "q4": 14 * GIB,
                             "q3": 13 * GIB},
    )
    return replace(whole, **changes)


class Page(HTMLParser):
    """Tags, attributes and text of a piece of HTML; tags that are not closed are refused."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.words = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1] != "style":
            self.words += f" {data}"

    def with_class(self, name):
        return [attrs for _, attrs in self.tags if name in (attrs.get("class") or "").split()]

    def buttons(self):
        return [attrs for tag, attrs in self.tags if tag == "button"]

    def bars(self):
        """Return the width of each part of the first bar, in percent."""
        found = {}
        start = [i for i, (_, attrs) in enumerate(self.tags) if attrs.get("role") == "img"][0]
        for tag, attrs in self.tags[start + 1 :]:
            if tag != "i":
                break
            width = re.fullmatch(r"width:([\d.]+)%", attrs["style"])
            found[attrs["class"].removeprefix("exl-")] = float(width[1])
        return found


def test_the_bar_is_to_scale_and_its_parts_add_up():
    plan = reservation(device(own=2 * GIB))
    (first,) = plan.devices
    bars = Page(gauge_html(plan)).bars()
    # Memory in use comes first.
    assert list(bars) == ["other", "own", "weights", "cache", "workspace", "overhead"]
    expected = [first.other_bytes, 2 * GIB, first.weights_bytes, first.cache_bytes,
                first.workspace_bytes, first.overhead_bytes]
    assert list(bars.values()) == pytest.approx(
        [100 * nbytes / first.capacity_bytes for nbytes in expected], abs=0.001)
    free = 100 * first.headroom_bytes / first.capacity_bytes
    assert sum(bars.values()) + free == pytest.approx(100, abs=0.01)


def end_of_memory(page):
    """Return where the line at the end of the memory is, in percent of the bar."""
    (line,) = page.with_class("exl-end")
    return float(re.fullmatch(r"left:([\d.]+)%", line["style"])[1])


def test_a_model_that_fits_is_one_sentence():
    page = Page(gauge_html(reservation()))
    words = page.words
    assert "Fits" in words and "needs 17.8 GiB, 23.0 GiB free" in words
    assert "cuda:0 ends at 24.00 GiB" in words
    assert end_of_memory(page) == 100
    for part in ("Weights", "Cache", "Workspace", "Overhead", "Other processes", "Free"):
        assert part in words
    assert "32,768 tokens of context" in words and "Large-24B" in words
    assert page.with_class("exl-good") and not page.with_class("exl-bad")


def test_a_model_that_does_not_fit_shows_what_is_missing_beyond_the_line():
    plan = reservation(device(cache=14 * GIB), cache_type="fp16")
    page = Page(gauge_html(plan))
    assert "Does not fit" in page.words and "needs 25.8 GiB, 23.0 GiB free" in page.words
    bars = page.bars()
    # The bar is then longer than the card's memory, and the rest is marked.
    used = plan.devices[0].capacity_bytes + plan.devices[0].missing_bytes
    assert bars.pop("over") == pytest.approx(100 * 2.75 * GIB / used, abs=0.001)
    assert sum(bars.values()) == pytest.approx(100, abs=0.01)
    assert end_of_memory(page) == pytest.approx(100 * 24 * GIB / used, abs=0.001)
    # The largest contexts are then outside the details.
    tags = [(tag, attrs.get("data-pick", "")) for tag, attrs in page.tags]
    assert tags.index(("button", "40960 fp16")) < tags.index(("details", ""))


@pytest.mark.parametrize("over", [1, 1000, 30 << 20])
def test_needed_and_free_bytes_are_written_differently_if_the_model_does_not_fit(over):
    short = device(cache=24 * GIB - GIB - 11 * GIB - GIB // 4 - GIB // 2 + over)
    assert short.missing_bytes == over
    words = Page(gauge_html(reservation(short))).words
    needed, free = re.search(r"needs ([\d.,]+ \w+), ([\d.,]+ \w+) free", words).groups()
    assert needed != free


def test_each_cache_type_shows_what_it_saves():
    page = Page(gauge_html(reservation()))
    found = {attrs["data-pick"]: attrs for attrs in page.buttons()
             if attrs["data-pick"].startswith("0 ")}
    assert list(found) == ["0 fp16", "0 q8", "0 q6", "0 q4", "0 q3"]
    assert [attrs["aria-label"] for attrs in found.values()] == [
        "Choose 16-bit cache, saves nothing", "Choose 8-bit cache, saves 5.00 GiB",
        "Choose 6-bit cache, saves 6.00 GiB", "Choose 4-bit cache, saves 8.00 GiB",
        "Choose 3-bit cache, saves 9.00 GiB"]
    assert [attrs["aria-pressed"] for attrs in found.values()] == [
        "false", "true", "false", "false", "false"]
    for text in ("saves 5.00 GiB", "saves 6.00 GiB", "saves 8.00 GiB", "saves 9.00 GiB"):
        assert page.words.count(text) == 1


@pytest.mark.parametrize(("ctx_size", "alpha_value"), [(131_073, 1.0), (300_000, 2.0)])
def test_a_context_beyond_the_models_length_is_a_warning_in_its_colour(ctx_size, alpha_value):
    plan = reservation(ctx_size=ctx_size, alpha_value=alpha_value)
    page = Page(gauge_html(plan))
    (warned,) = page.with_class("exl-warning")
    assert warned["role"] == "alert"
    assert plan.length_warning.remedy in page.words and "compress_pos_emb" in page.words
    assert f"{ctx_size:,} tokens is beyond" in page.words
    for within in (ctx_size - 1, 256):
        html = gauge_html(replace(plan, ctx_size=min(within, plan.stretched_length)))
        assert not Page(html).with_class("exl-warning")


def test_details_are_drawn_folded_with_the_name_by_which_the_page_finds_them():
    page = Page(gauge_html(reservation()))
    (details,) = [attrs for tag, attrs in page.tags if tag == "details"]
    assert details == {"data-name": "reservation"}


def test_every_device_has_its_bar_and_the_short_one_is_named():
    plan = reservation(device(cache=2 * GIB, capacity=16 * GIB),
                       device("cuda:1", cache=9 * GIB, capacity=16 * GIB))
    page = Page(gauge_html(plan))
    labels = [attrs["aria-label"] for _, attrs in page.tags if attrs.get("role") == "img"]
    assert [label.split(",")[0] for label in labels] == ["cuda:0", "cuda:1"]
    # 11 + 9 + 0.25 + 0.5 GiB of weights, cache, workspace and overhead, beside 1 GiB of others.
    assert "Does not fit" in page.words and page.words.count("cuda:1 needs 20.8 GiB, ") == 1
    assert "15.0 GiB free" in page.words and "cuda:0 needs" not in page.words
    assert "layers 0 to 39" in page.words


def test_with_a_limit_the_overhead_is_listed_apart():
    plan = reservation(device(limit=18 * GIB))
    page = Page(gauge_html(plan))
    assert "overhead" not in page.bars() and "Overhead: 512.0 MiB outside the limit" in page.words
    assert "the limit is at 18.00 GiB" in page.words
    assert "needs 17.2 GiB, 18.0 GiB free" in page.words
    # A limit above the card's free memory has no effect.
    wide = Page(gauge_html(reservation(device(limit=24 * GIB - 1))))
    assert "overhead" in wide.bars() and "the limit" not in wide.words


def largest(page):
    return [attrs for attrs in page.buttons() if not attrs.get("data-pick", "").startswith("0 ")]


def test_largest_contexts_are_labelled_buttons():
    page = Page(gauge_html(reservation()))
    picks = [button["data-pick"] for button in largest(page)]
    # With 4 and 3 bits a context beyond the model's own length would fit.
    assert picks == ["40960 fp16", "77056 q8", "99072 q6", "131072 q4", "131072 q3"]
    assert all(button["type"] == "button" for button in page.buttons())
    assert all(PICK_ELEM_ID in button["onclick"] for button in page.buttons())
    assert largest(page)[3]["aria-label"] == "Choose 131,072 tokens of context, 4-bit cache"
    assert page.words.count("own length is") == 1


def test_rope_scaling_raises_the_largest_context():
    page = Page(gauge_html(reservation(alpha_value=1.6)))
    assert largest(page)[3]["data-pick"] == f"{int(131072 * 1.6) // 256 * 256} q4"


def test_the_current_choice_is_marked_and_impossible_ones_are_disabled():
    plan = reservation(
        ctx_size=77056, largest_ctx_size={"fp16": 0, "q8": 77056, "q6": 0, "q4": 99072})
    none, chosen, six, other, _ = largest(Page(gauge_html(plan)))
    assert "disabled" in none and "data-pick" not in none and "disabled" in six
    assert (chosen["aria-pressed"], other["aria-pressed"]) == ("true", "false")


@pytest.mark.parametrize(
    ("most", "own_length", "expected"), [(1024, 4096, 1024), (8192, 4096, 4096),
                                         (8192, 4095, 3840), (8192, 100, 256), (0, 4096, 0)])
def test_a_choice_is_whole_pages_within_the_models_length(most, own_length, expected):
    assert largest_choice(most, own_length) == expected


def test_loaded_shows_reserved_beside_measured():
    plan = reservation()
    page = Page(gauge_html(plan, measured_bytes=plan.total_bytes))
    assert "Loaded" in page.words and page.words.count(f"{plan.total_bytes:,} bytes") == 2
    assert "to the byte" in page.words
    page = Page(gauge_html(plan, measured_bytes=plan.total_bytes + 4096))
    assert "They differ by 4,096 bytes" in page.words and "to the byte" not in page.words


def test_a_small_model_is_enlarged():
    small = device(cache=GIB, capacity=512 * GIB)
    page = Page(gauge_html(reservation(small)))
    assert len(page.with_class("exl-lens")) == 1 and len(page.with_class("exl-bar")) == 2
    # A screen reader gets once what is drawn twice.
    assert sum(attrs.get("role") == "img" for _, attrs in page.tags) == 1
    assert not Page(gauge_html(reservation())).with_class("exl-lens")


def test_the_cpu_device_is_called_main_memory():
    page = Page(gauge_html(reservation(device("cpu"))))
    assert "main memory" in page.words and "cuda" not in page.words


def test_a_screen_reader_gets_the_verdict_and_every_number():
    page = Page(gauge_html(reservation()))
    groups = [attrs["aria-label"] for _, attrs in page.tags if attrs.get("role") == "group"]
    assert groups[0] == "Memory gauge: fits, needs 17.8 GiB, 23.0 GiB free"
    (bar,) = [attrs["aria-label"] for _, attrs in page.tags if attrs.get("role") == "img"]
    for words in ("Weights 11.00 GiB", "Cache 6.00 GiB", "Overhead 512.0 MiB",
                  "Other processes 1.00 GiB", "Free 5.25 GiB"):
        assert words in bar
    assert sum(attrs.get("role") == "status" for _, attrs in page.tags) == 1


BAD = "<script>alert('x')</script>\"&"


def test_text_from_outside_is_escaped():
    texts = [
        gauge_html(reservation(model_dir=f"/m/{BAD}", architecture=BAD, format=BAD,
                               cache_type=BAD)),
        problem_html(KernelBuildError(BAD, remedy=BAD, details=BAD), heading=BAD),
        message_html(BAD, BAD),
        task_html(BAD, 1, 2, BAD),
    ]
    for html in texts:
        page = Page(html)
        assert "script" not in {tag for tag, _ in page.tags}
        assert "alert('x')" in page.words or "alert('x')" in str(page.tags)


def test_an_error_is_one_line_with_its_details_folded():
    page = Page(problem_html(KernelBuildError("the kernels", actual="g++ not found",
                                              remedy="apt install g++", details="line 1\nline 2")))
    tags = [tag for tag, _ in page.tags]
    assert "the kernels: g++ not found. apt install g++" in page.words
    assert tags.index("details") < tags.index("pre") and "line 2" in page.words
    assert "details" not in [tag for tag, _ in Page(problem_html("short")).tags]
    assert "KeyError" in Page(problem_html(KeyError())).words


@pytest.mark.parametrize(("done", "total", "percent"), [(0, 100, 0), (30, 100, 30),
                                                        (150, 100, 100)])
def test_progress_is_accessible_and_never_exceeds_its_bar(done, total, percent):
    page = Page(task_html("loading weights", done, total, "some"))
    (bar,) = [attrs for _, attrs in page.tags if attrs.get("role") == "progressbar"]
    assert bar["aria-valuenow"] == str(percent)
    assert f"some · {percent} %" in page.words
    (filled,) = [attrs for tag, attrs in page.tags if tag == "i"]
    assert filled["style"] == f"width:{percent:.2f}%"


def test_progress_without_an_end_is_indeterminate():
    page = Page(task_html("importing PyTorch", 9, None, ""))
    (bar,) = [attrs for _, attrs in page.tags if attrs.get("role") == "progressbar"]
    assert "aria-valuenow" not in bar and bar["aria-valuetext"] == "importing PyTorch"
    assert "%" not in page.words and page.with_class("exl-busy")


def test_pages_and_log_show_the_sampling_of_keys(tiny_model_dir, monkeypatch):
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")
    pages, log, seconds = [], io.StringIO(), itertools.count(step=2)

    class Looked(WatchedProgress):
        def advance(self, task, n=1):
            super().advance(task, n)
            pages.append(Page(self.html()).words)

    progress = Looked(PlainProgress(log, lambda: next(seconds)))
    with exl_loader.load(tiny_model_dir, ctx_size=600, cache_type="q4", progress=progress):
        pass
    words, lines = " ".join(pages), log.getvalue()
    assert "Sampling keys" in words and "1/2 layers · 50 %" in words
    assert "sampling keys: 1/2 layers, " in lines
    assert "sampling keys: 2/2 layers in " in lines


def luminance(colour):
    """Return the relative luminance of `#rrggbb` (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", ["_LIGHT", "_DARK"])
def test_both_themes_have_enough_contrast(theme):
    from extension.panel import gauge_style

    colours = dict(re.findall(r"--exl-([\w-]+): (#[0-9a-f]{6})", getattr(gauge_style, theme)))
    for text, back in (("text", "card"), ("soft", "card"), ("soft", "track"), ("good", "track"),
                       ("good", "good-back"), ("bad", "bad-back"), ("accent", "card"),
                       ("warn", "warn-back")):
        assert contrast(colours[text], colours[back]) >= 4.5, (text, back)
    # Parts need a contrast of 3:1 to their background, except the hatch of other processes.
    for part in ("weights", "cache", "overhead"):
        assert contrast(colours[part], colours["track"]) >= 3, part
    used = set(re.findall(r"var\(--exl-([\w-]+)\)", gauge_style.STYLE))
    assert used <= set(colours)


def test_the_embedding_of_a_model_on_a_card_has_a_bar_of_main_memory():
    main_memory = DeviceReservation(
        device="cpu", first_layer=40, end_layer=40, weights_bytes=0, cache_bytes=0,
        workspace_bytes=0, overhead_bytes=GIB // 8, overhead_measured=True,
        capacity_bytes=32 * GIB, free_bytes=20 * GIB, other_bytes=12 * GIB, limit_bytes=None,
        headroom_bytes=20 * GIB - GIB - GIB // 8, embedding_bytes=GIB,
    )
    page = Page(gauge_html(reservation(device(), main_memory)))
    assert "main memory, the embedding" in page.words and "Embedding" in page.words
    # The verdict is about the card.
    assert page.words.index("needs 17.8 GiB, 23.0 GiB free") < page.words.index("main memory")
    assert page.with_class("exl-embedding")
    styles = [bar["style"] for bar in page.with_class("exl-embedding") if "title" in bar]
    assert styles[0] == "width:3.125%"


def test_each_device_of_each_machine_has_a_bar():
    here = replace(device(), host="<node-a>", end_layer=20)
    there = replace(device(cache=30 * GIB), machine=1, rank=3, host="node-b", first_layer=20)
    memory = replace(
        there, device="cpu", first_layer=40, weights_bytes=0, cache_bytes=0, workspace_bytes=0,
        headroom_bytes=GIB,
    )
    plan = reservation(here, there, memory, hosts=("<node-a>", "node-b"))
    page = Page(gauge_html(plan))
    words = " ".join(page.words.split())
    assert "the first machine (<node-a>), cuda:0, layers 0 to 19" in words
    assert "machine 3 (node-b), cuda:0, layers 20 to 39" in words
    assert "machine 3 (node-b), main memory, the connection" in words
    bars = [attrs for _, attrs in page.tags if attrs.get("role") == "img"]
    assert len(bars) == 3 and "machine 3 (node-b), cuda:0, 24.00 GiB" in bars[1]["aria-label"]
    # The verdict names the machine whose memory is missing.
    assert "machine 3 (node-b), cuda:0 needs 41.8 GiB, 23.0 GiB free" in words
    assert "the first machine (<node-a>), cuda:0 needs" not in words


def test_the_newest_tokens_are_a_part_of_their_own():
    """They are planned in the workspace, and are worth more than it to a person."""
    opened = replace(device(), open_page_bytes=3 * GIB // 16)
    words = Page(gauge_html(reservation(opened))).words
    for name, nbytes in (("Newest tokens", 3 * GIB // 16), ("Workspace", GIB // 16)):
        assert f"{name} {amount(nbytes)}" in " ".join(words.split()), words
    assert "Newest tokens" not in Page(gauge_html(reservation())).words
