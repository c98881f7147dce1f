"""The process that renders chat templates: its start and end, its limits, and jinja2's output."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from exl_loader.text.chat import renderer, sandbox
from exl_loader.text.chat.renderer import Renderer, RenderError, TemplateRefusal
from exl_loader.text.chat.template import ChatTemplates
from exl_loader.utils.errors import ExlLoaderError
from support import REPO, in_threads, run_python, wait_for
from support.builds import is_running

MESSAGES = [{"role": "user", "content": "a\r\n\tb 🎉 \ud800 <i>'ß'</i>"}]

posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


@pytest.fixture
def fresh():
    """A renderer that no other test uses."""
    made = Renderer()
    yield made
    made.stop()


def child_pid(of: Renderer) -> int:
    assert of._child is not None
    return of._child._process.pid


# The same text as jinja2 and transformers


SAME = [
    "{{ messages[0].content }}",
    "{% for m in messages %}{{ m.content.replace('\\r\\n','\\n') }}{% endfor %}",
    "{% for m in messages %}{{ m.content.expandtabs(4) }}{{ m.content.expandtabs() }}{% endfor %}",
    "{% for m in messages %}{{ m.content.split('b') }}{{ m.content.center(9) }}{% endfor %}",
    "{% for m in messages %}{{ '{a}'.format_map({'a':1}) }}{{ m.content.partition('b') }}"
    "{{ m.content.rsplit(None, 1) }}{{ m.content.splitlines(true) }}{% endfor %}",
    "{% block b %}{{ 'aa'.replace('a','b', 1) }}{{ 'aXb'.swapcase() }}{% endblock %}",
    "{% macro f(x) %}{{ x.replace('a','b') }}{{ x.removeprefix('a') }}{% endmacro %}"
    "{% for m in messages %}{{ f(m.content) }}{{ m.content.translate is defined }}{% endfor %}"
    .replace("{{ m.content.translate is defined }}", ""),
    "{% for i in range(3) %}{{ loop.index }}{{ 'x'.zfill(i) }}{{ 'a b'.title() }}{% endfor %}",
    "{% set ns = namespace(a=1) %}{% for i in 'abc' %}{% set ns.a = ns.a + loop.index %}"
    "{% endfor %}{{ ns.a }}{{ [1, 2] + [3] }}{{ (1, 2) * 2 }}{{ 7 // 2 ** 2 % 3 }}",
    "{{ 'x' | urlize }}{{ 'https://example.org' | urlize }}{{ '<b>x</b>' | striptags }}",
    "{{ 'a b c d' | wordwrap(3) }}{{ {'a': 1} | xmlattr }}{{ [1, {'a': 2}] | pprint }}",
    "{{ [3, 1, 2] | sort | join('-') }}{{ ['a', 'b'] | map('upper') | list }}{{ 'x' | e }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{% set j = joiner(',') %}"
    "{{ j() }}{{ j() }}",
    "{{ 1.5 | round }}{{ 1e3 | int }}{{ '%05.1f' | format(2.25) }}{{ 'ab' | batch(1) | list }}",
    "{{ messages | tojson }}{{ messages | tojson(indent=1, ensure_ascii=true) }}"
    .replace("messages", "[{'a': 'ß', 'b': [1.5, none, true]}]"),
    "{{ undefined_name }}{{ messages[0].nothing }}{{ messages[9] is defined }}",
    "{{ lipsum(n=1, html=false, min=1, max=2) | length > 0 }}",
    "{% filter upper %}x{% endfilter %}{% set x %}y{% endset %}{{ x }}{% raw %}{{ }}{% endraw %}",
    "{% for k in {'b': 1, 'a': 2} | dictsort %}{{ k }}{% endfor %}{% if 1 is odd %}odd{% endif %}",
    "{%- generation %}{{ messages[0].role }}{% endgeneration %} \n  {%- break_ is defined %}"
    .replace("{%- break_ is defined %}", ""),
]


@pytest.mark.parametrize("source", SAME)
def test_renders_as_jinja2_does(source):
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols",
                                                          sandbox._GenerationTag])
    environment.filters["tojson"] = sandbox._tojson
    expected = environment.from_string(source).render(messages=MESSAGES)
    assert ChatTemplates({"default": source}).render(MESSAGES) == expected


def test_every_filter_and_test_of_jinja2_is_there():
    import jinja2

    environment, plain = sandbox.make_environment(), jinja2.Environment()
    assert set(environment.filters) == set(plain.filters)
    assert set(environment.tests) == set(plain.tests)
    assert set(plain.globals) <= set(environment.globals)


def test_the_process_imports_no_more_than_jinja2():
    code = ("import sys; sys.argv[1:] = [__import__('json').dumps(sys.path)]\n"
            f"exec(compile(open({sandbox.__file__!r}).read().replace("
            "'if __name__ == \"__main__\":\\n    serve()', ''), 'x', 'exec'))\n"
            "print(sorted(name for name in ('torch', 'numpy', 'exl_loader', 'tokenizers') "
            "if name in sys.modules))")
    assert run_python(code) == "[]\n"


# Limits


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_counted_in_bytes(fresh):
    """One emoji makes every character of a string take four bytes."""
    assert fresh.render("{{ ('x' * 12000000)[0] }}", {}) == "x"
    with pytest.raises(RenderError, match="too much memory"):
        fresh.render("{{ ('🎉' * 20000000)[0] }}", {})
    assert fresh.render("{{ 1 }}", {}) == "1"
    status = Path(f"/proc/{child_pid(fresh)}/status").read_text()
    peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    assert int(peak) << 10 < 128 << 20


def test_memory_grows_with_the_conversation(fresh):
    text = "wörd 🎉 " * 400_000
    prompt = fresh.render("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}",
                          {"messages": [{"content": text}] * 3})
    assert prompt == f"<{text.strip()}>" * 3


def test_prompts_are_bounded(fresh, monkeypatch):
    text = "x" * (sandbox.MAX_PROMPT_CHARS // 2)
    assert len(fresh.render("{{ t }}{{ t }}", {"t": text})) == sandbox.MAX_PROMPT_CHARS
    with pytest.raises(RenderError, match="writes more than"):
        fresh.render("{{ t }}{{ t }}.", {"t": text})


@posix
def test_time_is_processor_time(fresh, monkeypatch):
    """A process that waits longer than the limit but computes for less is not stopped."""
    monkeypatch.setattr(renderer, "MAX_RENDER_SECONDS", 1.0)
    fresh.render("{{ 1 }}", {})
    pid = child_pid(fresh)
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(3.0, os.kill, (pid, signal.SIGCONT))
    timer.start()
    assert fresh.render("{{ 2 }}", {}) == "2"
    timer.join()
    assert child_pid(fresh) == pid


@posix
def test_a_process_that_never_answers_is_ended(fresh, monkeypatch):
    fresh.render("{{ 1 }}", {})
    pid = child_pid(fresh)
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(renderer, "MAX_WAIT_SECONDS", 0.5)
    # It had not begun, so that another one answers.
    monkeypatch.setattr(renderer._Child, "has_ended", lambda self: False)
    assert fresh.render("{{ 2 }}", {}) == "2"
    assert child_pid(fresh) != pid


# Its life


def test_one_process_renders_everything(fresh):
    pids = set()
    for number in range(5):
        assert fresh.render("{{ n }}", {"n": number}) == str(number)
        with pytest.raises(RenderError):
            fresh.render("{{ 1 / 0 }}", {})
        with pytest.raises(TemplateRefusal, match="not you"):
            fresh.render("{{ raise_exception('not you') }}", {})
        pids.add(child_pid(fresh))
    assert len(pids) == 1


@posix
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_killed_process_is_replaced(fresh, number):
    assert fresh.render("{{ 1 }}", {}) == "1"
    pid = child_pid(fresh)
    os.kill(pid, number)
    assert fresh.render("{{ 2 }}", {}) == "2"
    assert child_pid(fresh) != pid


@posix
def test_the_process_ends_with_its_parent(tmp_path):
    code = ("import sys, time\nfrom exl_loader.text.chat.renderer import RENDERER\n"
            "RENDERER.render('{{ 1 }}', {})\n"
            "print(RENDERER._child._process.pid, flush=True)\n"
            "if sys.argv[1] == 'busy':\n"
            "    RENDERER.render('{% for a in range(99999) %}{% for b in range(99999) %}"
            "{% endfor %}{% endfor %}', {})\n"
            "time.sleep(600)\n")
    for kind in ("idle", "busy"):
        parent = subprocess.Popen([sys.executable, "-c", code, kind], cwd=REPO, text=True,
                                  stdout=subprocess.PIPE)
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
        parent.communicate()
        wait_for(lambda pid=pid: not is_running(pid), 300)


def test_the_process_ends_with_the_interpreter():
    code = ("from exl_loader.text.chat.renderer import RENDERER\n"
            "print(RENDERER.render('{{ 1 }}', {}), RENDERER._child._process.pid)\n")
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=REPO, text=True,
                          capture_output=True)
    text, pid = done.stdout.split()
    assert (text, done.stderr, done.returncode) == ("1", "", 0)
    assert os.name == "nt" or not is_running(int(pid))


def test_threads_render_one_after_the_other(fresh):
    def run(number):
        return [fresh.render("{{ n }}-{{ i }}", {"n": number, "i": i}) for i in range(20)]

    assert in_threads(run, range(6)) == [[f"{n}-{i}" for i in range(20)] for n in range(6)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_starts_its_own_child():
    code = """
import os
from exl_loader.text.chat.renderer import RENDERER
RENDERER.render("{{ 1 }}", {})
pid = RENDERER._child._process.pid
RENDERER._lock.acquire()
child = os.fork()
if child == 0:
    text = RENDERER.render("{{ 2 }}", {})
    other = RENDERER._child._process.pid
    RENDERER.stop()
    os._exit(0 if (text, other != pid) == ("2", True) else 1)
RENDERER._lock.release()
_, status = os.waitpid(child, 0)
print(status, RENDERER.render("{{ 3 }}", {}), RENDERER._child._process.pid == pid)
"""
    assert run_python(code) == "0 3 True\n"


@posix
def test_the_answer_to_an_interrupted_request_is_not_read_by_the_next(fresh, monkeypatch):
    read = renderer._Child._read

    def interrupted(self, count, began):
        if began:
            raise KeyboardInterrupt
        return read(self, count, began)

    assert fresh.render("{{ 1 }}", {}) == "1"
    pid = child_pid(fresh)
    with monkeypatch.context() as patch:
        patch.setattr(renderer._Child, "_read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fresh.render("{{ 'old' }}", {})
    assert not is_running(pid)
    assert fresh.render("{{ 'new' }}", {}) == "new"


@posix
def test_ctrl_c_in_a_terminal_does_not_reach_the_process(fresh):
    fresh.render("{{ 1 }}", {})
    assert os.getsid(child_pid(fresh)) != os.getsid(0)


@posix
def test_the_time_limit_works_if_the_parent_ignores_or_blocks_its_signal():
    code = """
import signal
from exl_loader.text.chat import renderer
signal.signal(signal.SIGPROF, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF, signal.SIGTERM})
renderer.MAX_RENDER_SECONDS = 0.3
try:
    renderer.RENDERER.render("{{ 9 ** (9 ** 9) }}", {})
except renderer.RenderError as error:
    print(error)
"""
    assert run_python(code) == "it did not end within 0.3 s of processor time\n"


def test_a_process_that_does_not_start_is_an_error(fresh, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(REPO / "no such python"))
    with pytest.raises(RenderError, match="does not start"):
        fresh.render("{{ 1 }}", {})


def test_a_missing_jinja2_is_an_error(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(RenderError, match="process that renders it"):
        fresh.render("{{ 1 }}", {})


def test_a_conversation_that_nests_too_deeply_is_an_error(fresh):
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(RenderError, match="nests too deeply"):
        fresh.render("{{ 1 }}", {"messages": nested})
    for depth in range(900, 1000):
        value: list = []
        for _ in range(depth):
            value = [value]
        try:
            assert ChatTemplates({"default": "{{ 1 }}"}).render(
                [{"role": "user", "content": value}]) == "1"
        except ExlLoaderError:
            continue


def test_requests_are_json():
    request = {"source": "{{ x }}", "context": {"x": "\ud83d \u2028 \x00 🎉"}}
    kind, text = sandbox.Templates().answer(json.dumps(request).encode("ascii"))
    assert (kind, text) == (sandbox.TEXT, request["context"]["x"])


@pytest.mark.skipif(sys.platform == "win32", reason="a double of Windows' own functions")
def test_windows_bounds_the_process_by_a_job(monkeypatch):
    import ctypes
    from types import SimpleNamespace

    from exl_loader.utils.system import windows

    calls = []

    class Kernel:
        CreateJobObjectW = SimpleNamespace()

        def __getattr__(self, name):
            def call(*arguments):
                calls.append((name, arguments))
                if name == "SetInformationJobObject":
                    limits = arguments[2]._obj
                    calls.append((limits.flags, limits.process_memory, limits.process_time))
                return 1

            return call

    kernel = Kernel()
    create = lambda *_: 7  # noqa: E731
    kernel.CreateJobObjectW = create
    monkeypatch.setattr(windows, "_kernel32", lambda: kernel)
    # As the 64-bit headers lay it out.
    assert ctypes.sizeof(windows._JobLimits) == 144
    job = windows.Job(SimpleNamespace(_handle=5))
    job.limit(1 << 20, 2.0)
    assert [call[0] for call in calls if isinstance(call[0], str)] == [
        "SetInformationJobObject", "AssignProcessToJobObject", "GetProcessTimes",
        "SetInformationJobObject",
    ]
    assert calls[-1] == (0x2 | 0x8 | 0x100 | 0x2000, 1 << 20, 2 * 10**7)
    del job
    assert calls[-1][0] == "CloseHandle"
