import io
import threading

import pytest

from exl_loader.utils.progress import (
    HEARTBEAT_S,
    Heartbeat,
    NullProgress,
    PlainProgress,
    RichProgress,
    default_progress,
    format_count,
    format_remaining,
    task,
)


class FakeClock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_format_of_counts():
    assert format_count(3, 8, "units") == "3/8 units"
    assert format_count(3, None, "tokens") == "3 tokens"
    assert format_count(3 << 20, 96 << 20, "bytes") == "3.0/96.0 MiB"
    assert format_count(3 << 19, None, "bytes") == "1.5 MiB"


def test_format_of_remaining_times():
    assert format_remaining(0.4) == "0 s left" and format_remaining(99) == "99 s left"
    assert format_remaining(100) == "2 min left" and format_remaining(3600) == "60 min left"
    assert format_remaining(6000) == "1.7 h left"


def test_a_long_step_shows_that_it_is_going_on():
    stream, clock = io.StringIO(), FakeClock()
    progress = PlainProgress(stream, clock)
    progress.start("measuring", 4, "steps")
    for _ in range(12):
        clock.now += 1
        progress.advance("measuring", 0)
    assert stream.getvalue().splitlines() == ["measuring: 0/4 steps"] * 3


class FakeWait:
    """Waits by moving a clock; after so many times the work has ended."""

    def __init__(self, clock, times):
        self.clock, self.left = clock, times
        self.done = threading.Event()

    def __call__(self, seconds):
        if not self.left:
            self.done.set()
            return True
        self.left -= 1
        self.clock.now += seconds
        return False


def test_a_heartbeat_writes_lines_while_a_step_is_silent():
    stream, clock = io.StringIO(), FakeClock()
    wait = FakeWait(clock, times=round(40 / HEARTBEAT_S))
    progress = PlainProgress(stream, clock)
    heartbeat = Heartbeat(progress, wait)
    heartbeat.start("measuring", 4, "steps")
    clock.now += 5
    heartbeat.advance("measuring")
    heartbeat.start("layer 2 of 7", None, "")
    heartbeat.start("ended", None, "")
    heartbeat.finish("ended")
    with heartbeat:
        assert wait.done.wait(60)
    lines = stream.getvalue().splitlines()
    steps = [line for line in lines if line.startswith("measuring: 1/4 steps, ")]
    layers = [line for line in lines if line.startswith("layer 2 of 7: ")]
    assert len(steps) + len(layers) == len(lines)
    # No more than 10 s between two lines of 40 s.
    assert len(steps) >= 4 and len(layers) >= 4
    assert steps[-1].endswith("min left") and layers[0].endswith(" s so far")


def test_no_heartbeat_after_the_work():
    progress = Heartbeat(NullProgress())
    with progress:
        progress.start("measuring", 4, "steps")
    assert not progress._thread.is_alive()


def test_plain_progress_writes_nothing_about_short_work():
    stream, clock = io.StringIO(), FakeClock()
    progress = PlainProgress(stream, clock)
    progress.start("loading", 10, "bytes")
    progress.advance("loading", 10)
    clock.now += 0.9
    progress.finish("loading")
    assert stream.getvalue() == ""


def test_plain_progress_writes_few_lines_about_long_work():
    stream, clock = io.StringIO(), FakeClock()
    progress = PlainProgress(stream, clock)
    progress.start("prefill", 1000, "tokens")
    for _ in range(1000):
        clock.now += 0.02
        progress.advance("prefill")
    progress.finish("prefill")
    lines = stream.getvalue().splitlines()
    # 20 s of work: lines after 1, 6, 11 and 16 s, and the last one.
    assert len(lines) == 5
    assert lines[0].startswith("prefill: ") and lines[0].endswith("/1000 tokens, 19 s left")
    assert lines[-1] == "prefill: 1000/1000 tokens in 20.0 s"


@pytest.mark.parametrize("make", [NullProgress, PlainProgress, RichProgress])
def test_unknown_tasks_are_ignored(make):
    progress = make()
    assert progress.advance("never started", 3) is None
    assert progress.finish("never started") is None


def test_bars_are_removed_after_the_last_task(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    progress = RichProgress(stream)
    progress.start("compiling", 4, "units")
    progress.advance("compiling", 2)
    progress.start("compiling", 4, "units")
    progress.advance("compiling", 3)
    progress._display.refresh()
    progress.finish("compiling")
    assert "3/4 units" in stream.getvalue()
    assert progress._display is None


def test_task_finishes_on_errors():
    stream, clock = io.StringIO(), FakeClock()
    progress = PlainProgress(stream, clock)
    with pytest.raises(ValueError), task(progress, "loading", 4 << 20, "bytes") as advance:
        clock.now += 3.0
        advance(1 << 20)
        raise ValueError
    assert stream.getvalue().splitlines()[-1] == "loading: 1.0/4.0 MiB in 3.0 s"


def test_the_stream_decides_between_bars_and_lines():
    assert isinstance(default_progress(Terminal()), RichProgress)
    assert isinstance(default_progress(io.StringIO()), PlainProgress)
