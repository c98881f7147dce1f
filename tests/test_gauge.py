"""The gauge's picture: what it says about a reservation, and how it says it."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from exl_loader.errors import KernelBuildError
from exl_loader.reservation import DeviceReservation, Reservation
from extension.gauge import (
    PICK_ELEM_ID,
    gauge_html,
    largest_choice,
    message_html,
    problem_html,
    task_html,
)

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
        largest_ctx_size={"fp16": 40960, "q8": 77056, "q6": 99072, "q4": 262144},
    )
    return replace(whole, **changes)


class Page(HTMLParser):
    """Tags, attributes and words of a piece of HTML; refuses tags that are not closed."""

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
        """Width of each part of the first bar, in percent."""
        found = {}
        start = [i for i, (_, attrs) in enumerate(self.tags) if attrs.get("role") == "img"][0]
        for tag, attrs in self.tags[start + 1 :]:
            if tag != "i":
                break
            width = re.fullmatch(r"width:([\d.]+)%", attrs["style"])
            found[attrs["class"].removeprefix("exl-")] = float(width[1])
        return found


def test_bar_is_to_scale_and_all_of_it_adds_up():
    plan = reservation(device(own=2 * GIB))
    (first,) = plan.devices
    bars = Page(gauge_html(plan)).bars()
    assert list(bars) == ["weights", "cache", "workspace", "outside", "own", "other"]
    expected = [first.weights_bytes, first.cache_bytes, first.workspace_bytes,
                first.overhead_bytes, 2 * GIB, first.other_bytes]
    assert list(bars.values()) == pytest.approx(
        [100 * nbytes / first.capacity_bytes for nbytes in expected], abs=0.001)
    free = 100 * first.spare_bytes / first.capacity_bytes
    assert sum(bars.values()) + free == pytest.approx(100, abs=0.01)


def test_what_fits_says_so_with_its_numbers_in_words():
    page = Page(gauge_html(reservation()))
    words = page.words
    assert "Fits" in words and "5.25 GiB stay free" in words and "8-bit cache" in words
    for part in ("Weights", "Cache", "Workspace", "Outside", "Other processes", "Free"):
        assert part in words
    assert "32,768 tokens of context" in words and "Large-24B" in words
    assert page.with_class("exl-good") and not page.with_class("exl-bad")


def test_what_does_not_fit_says_by_how_much_and_shows_it_beyond_the_line():
    plan = reservation(device(cache=14 * GIB), cache_type="fp16")
    page = Page(gauge_html(plan))
    assert "Does not fit" in page.words and "2.75 GiB missing on cuda:0" in page.words
    bars = page.bars()
    # The bar is then longer than the card; what is beyond is marked.
    used = plan.devices[0].capacity_bytes + plan.devices[0].missing_bytes
    assert bars.pop("over") == pytest.approx(100 * 2.75 * GIB / used, abs=0.001)
    assert sum(bars.values()) == pytest.approx(100, abs=0.01)


def test_every_device_has_its_bar_and_the_short_one_is_named():
    plan = reservation(device(cache=2 * GIB, capacity=16 * GIB),
                       device("cuda:1", cache=9 * GIB, capacity=16 * GIB))
    page = Page(gauge_html(plan))
    labels = [attrs["aria-label"] for _, attrs in page.tags if attrs.get("role") == "img"]
    assert [label.split(",")[0] for label in labels] == ["cuda:0", "cuda:1"]
    assert "5.75 GiB missing on cuda:1" in page.words and "layers 0 to 39" in page.words


def test_under_a_limit_what_lies_outside_the_buffers_is_told_apart():
    plan = reservation(device(limit=18 * GIB))
    page = Page(gauge_html(plan))
    assert "outside" not in page.bars() and "Outside the limit: 512.0 MiB" in page.words
    assert "of 18.00 GiB (the limit)" in page.words
    # A limit that the card could not give anyway does not rule.
    wide = Page(gauge_html(reservation(device(limit=24 * GIB - 1))))
    assert "outside" in wide.bars() and "(the limit)" not in wide.words


def test_largest_contexts_are_buttons_that_say_what_they_choose():
    page = Page(gauge_html(reservation()))
    picks = [button["data-pick"] for button in page.buttons()]
    # 4 bits would reach beyond the model's own length.
    assert picks == ["40960 fp16", "77056 q8", "131072 q4"]
    assert all(button["type"] == "button" for button in page.buttons())
    assert all(PICK_ELEM_ID in button["onclick"] for button in page.buttons())
    assert page.buttons()[2]["aria-label"] == "Choose 131,072 tokens of context, 4-bit cache"
    assert page.words.count("whole length") == 1


def test_a_stretched_length_raises_the_choice():
    page = Page(gauge_html(reservation(), own_length=200_000))
    assert page.buttons()[2]["data-pick"] == f"{200_000 // 256 * 256} q4"


def test_the_choice_in_use_is_marked_and_what_cannot_be_had_is_disabled():
    plan = reservation(ctx_size=77056, largest_ctx_size={"fp16": 0, "q8": 77056, "q4": 99072})
    none, chosen, other = Page(gauge_html(plan)).buttons()
    assert "disabled" in none and "data-pick" not in none
    assert (chosen["aria-pressed"], other["aria-pressed"]) == ("true", "false")


@pytest.mark.parametrize(
    ("most", "own_length", "expected"), [(1024, 4096, 1024), (8192, 4096, 4096),
                                         (8192, 4095, 3840), (8192, 100, 256), (0, 4096, 0)])
def test_choice_is_whole_pages_within_the_models_length(most, own_length, expected):
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
    # What is drawn twice is read out once.
    assert sum(attrs.get("role") == "img" for _, attrs in page.tags) == 1
    assert not Page(gauge_html(reservation())).with_class("exl-lens")


def test_main_memory_is_called_so():
    page = Page(gauge_html(reservation(device("cpu"))))
    assert "main memory" in page.words and "cuda" not in page.words


def test_a_reader_hears_the_verdict_and_every_number():
    page = Page(gauge_html(reservation()))
    groups = [attrs["aria-label"] for _, attrs in page.tags if attrs.get("role") == "group"]
    assert groups[0] == "Memory gauge: fits, 5.25 GiB stay free"
    (bar,) = [attrs["aria-label"] for _, attrs in page.tags if attrs.get("role") == "img"]
    for words in ("Weights 11.00 GiB", "Cache 6.00 GiB", "Outside 512.0 MiB",
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


@pytest.mark.parametrize(("done", "total", "percent"), [(0, 100, 0), (30, 100, 30), (9, None, 0),
                                                        (150, 100, 100)])
def test_progress_is_read_out_and_never_leaves_its_bar(done, total, percent):
    page = Page(task_html("loading weights", done, total, "some"))
    (bar,) = [attrs for _, attrs in page.tags if attrs.get("role") == "progressbar"]
    assert bar["aria-valuenow"] == str(percent)
    (filled,) = [attrs for tag, attrs in page.tags if tag == "i"]
    assert filled["style"] == f"width:{percent:.2f}%"


def luminance(colour):
    """Relative luminance of `#rrggbb` (WCAG 2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", ["_LIGHT", "_DARK"])
def test_both_themes_can_be_read(theme):
    from extension import gauge_style

    colours = dict(re.findall(r"--exl-([\w-]+): (#[0-9a-f]{6})", getattr(gauge_style, theme)))
    for text, back in (("text", "card"), ("soft", "card"), ("soft", "track"), ("good", "track"),
                       ("good", "good-back"), ("bad", "bad-back"), ("accent", "card")):
        assert contrast(colours[text], colours[back]) >= 4.5, (text, back)
    # Parts of a picture need 3:1 against what is behind them, other processes' hatch aside.
    for part in ("weights", "cache", "outside"):
        assert contrast(colours[part], colours["track"]) >= 3, part
    used = set(re.findall(r"var\(--exl-([\w-]+)\)", gauge_style.STYLE))
    assert used <= set(colours)
