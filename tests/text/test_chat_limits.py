"""Templates that take too much time or memory are stopped, whichever feature they use."""

from __future__ import annotations

import sys

import pytest

from exl_loader.text.chat import renderer
from exl_loader.text.chat.template import ChatTemplates
from exl_loader.utils.errors import InvalidTokenizer

MESSAGES = [{"role": "user", "content": "Hi 'you'"}]


def render(source: str, messages=MESSAGES, **variables) -> str:
    return ChatTemplates({"default": source}).render(messages, **variables)


def peak_bytes() -> int:
    resource = pytest.importorskip("resource")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@pytest.fixture
def little_time(monkeypatch):
    """Shorten the time after which a template is stopped."""
    monkeypatch.setattr(renderer, "MAX_RENDER_SECONDS", 0.5)


GROWING = "{% set ns = namespace(x=%START%) %}{% for i in range(200) %}{% set ns.x = %STEP% %}" \
          "{% endfor %}{{ %USE% }}"


def growing(start: str, step: str, use: str = "1") -> str:
    return GROWING.replace("%START%", start).replace("%STEP%", step).replace("%USE%", use)


HUGE = {
    "range as a list": "{{ range(10**12) | list | length }}",
    "string times": "{{ ('x' * 10**11) | length }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "center method": "{{ 'x'.center(10**10) }}",
    "method by name": "{{ ('x' | attr('center'))(10**10) }}",
    "format star": "{{ '%*d' | format(10**9, 1) }}",
    "format of long": "{% set a = 'x' * 1000000 %}{{ ('%(a)s' * 100000) % {'a': a} }}",
    "format method long": "{{ ('{0}' * 100000).format('x' * 1000000) }}",
    "replace method": "{{ ('x' * 1000000).replace('', 'y' * 100000) }}",
    "join of many": "{{ (['x' * 100000] * 99999) | join }}",
    "sum of lists": "{{ ([[1] * 9999] * 9999) | sum(start=[]) | length }}",
    "tojson indent deep": growing("[]", "[ns.x, ns.x[:0]]", "ns.x | tojson(indent=200000)"),
    "split": "{{ ('x ' * 5000000).split() | length }}",
    "integer bytes": "{{ (1).to_bytes(10**10, 'big') | length }}",
    "encoding": "{{ 'x'.encode('utf-16') }}",
    "translate": "{{ 'x'.translate({120: 'y'}) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "adding text": growing("'xx'", "ns.x + ns.x"),
    "shared lists in text": growing("[1]", "[ns.x, ns.x]", "ns.x ~ ''"),
    "shared dicts, called": growing("{}", "dict(a=ns.x, b=ns.x)", "ns.x"),
    "kept slices": "{% macro f(n, x) %}{{ f(n - 1, x[1:]) if n }}{% endmacro %}"
                   "{{ f(150, 'x' * 9999999) }}",
    "captured output": "{% set ns = namespace(x='xx') %}{% for i in range(99) %}"
                       "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}{% endfor %}",
    "output in a loop": "{% set x = 'x' * 9999999 %}{% for i in range(9999) %}{{ x }}{% endfor %}",
    "plain text in a loop": "{% for i in range(99999) %}" + "x" * 99999 + "{% endfor %}",
    "plain text in a macro": "{% macro f() %}" + "x" * 99999 + "{% endmacro %}"
                             "{% for i in range(99999) %}{{ f() }}{% endfor %}",
    "strftime_now": "{{ strftime_now('%999999999d' ~ ('a' * 8000000)) | length }}",
    "strftime_now of long text": "{{ strftime_now('%A%c%x' * 9000000) | length }}",
    "constants when compiling": "{{ 'a' * 999999999 }}",
    "constants that nest": "{{ " + " ~ ".join(["'a' * 99999999"] * 9) + " }}",
    "a number when compiling": "{{ 7 ** (7 ** (7 ** 7)) }}",
    "many names": "".join(f"{{% set a{i} = [0] * 999999 %}}" for i in range(900)),
    "a deep expression": "{{ " + "not " * 90_000 + "1 }}",
    "deep ifs": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "a long message": "{{ raise_exception('x' * 30000000) }}",
    "messages in a loop": "{% for i in range(99999) %}{{ raise_exception(['x' * 9999] * 99999) }}"
                          "{% endfor %}",
    "an undefined name of great length": "{{ messages['x' * 30000000].y }}",
    "a missing attribute with a long repr": "{{ (['x' * 999] * 99999).nothing.more }}",
    "a key error": "{{ '{x}'.format_map({}) }}",
    "sets of text": growing("[1]", "[ns.x | string, ns.x | string]"),
    "a dict of dicts": growing("{}", "dict(a=ns.x, b=ns.x)", "ns.x | tojson"),
    "emoji": "{{ ('🎉' * 9000000) ~ ('x' * 9000000) }}",
    "upper case that grows": "{{ ('ß' * 30000000).upper() | length }}",
    "escapes that grow": "{{ ('<' * 15000000) | escape | length }}",
    "urlencode": "{{ ('🎉' * 5000000) | urlencode | length }}",
    "urlize": "{{ ('www.example.org ' * 900000) | urlize | length }}",
    "wordwrap": "{{ ('x ' * 9000000) | wordwrap(1) | length }}",
    "pprint": "{{ ([[1] * 99] * 99999) | pprint | length }}",
    "xmlattr": "{{ dict.fromkeys(range(99999) | map('string'), 'x' * 9999) | xmlattr | length }}",
    "groupby": "{{ ([{'a': 1}] * 9000000) | groupby('a') | list | length }}",
    "unique": "{% for i in range(99999) %}{{ range(99999) | unique | list | length }}{% endfor %}",
    "a search": "{% for i in range(99999) %}{{ ('a' * 9999999) in ('a' * 9999998 ~ i) }}"
                "{% endfor %}",
    "counting": "{% for i in range(99999) %}{{ ('ab' * 5000000).count('ba') }}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}"
                                       "{% endif %}{% endmacro %}{{ f(99) }}",
    "generator that is never read": "{{ (range(99999) | map('string') | list) * 9999 | length }}",
    "division": "{{ (10 ** 99999) // (3 ** 9999) % (7 ** 99999) }}" * 999,
}


@pytest.mark.parametrize("name", HUGE)
def test_a_template_that_takes_much_memory_or_time_is_stopped(name, little_time):
    before = peak_bytes()
    with pytest.raises(InvalidTokenizer) as caught:
        render(HUGE[name])
    assert len(str(caught.value)) < 3000
    # The memory was not taken in this process.
    assert peak_bytes() - before < 100 << 20
    assert render("{{ 1 + 1 }}") == "2"


ENDLESS = {
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching macro": "{% macro f(n) %}{{ f(n-1) ~ f(n-1) if n }}{% endmacro %}{{ f(60) }}",
    "branching block": "{% block b %}{% if messages %}{{ self.b() }}{{ self.b() }}{% endif %}"
                       "{% endblock %}",
    "recursive loop": "{% for a in [1, 2] recursive %}{{ loop([a]) }}{% endfor %}",
    "branching loop": "{% for a in [40, 40] recursive %}{{ loop([a-1, a-1]) if a }}{% endfor %}",
    "caller": "{% macro f(n) %}{% if n %}{% call f(n-1) %}{% endcall %}{{ caller() }}"
              "{{ caller() }}{% endif %}{% endmacro %}"
              "{% for i in range(99999) %}{% for j in range(99999) %}"
              "{% call f(3) %}{% endcall %}{% endfor %}{% endfor %}",
    "filters": "{% for a in range(99999) %}{{ range(99999) | map('string') | list | length }}"
               "{% endfor %}",
    "tests": "{% set a = range(99999) | list %}{{ a | select('in', a) | list | length }}",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
                    "{% endfor %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_not_end_is_stopped(name, little_time):
    with pytest.raises(InvalidTokenizer):
        render(ENDLESS[name])


@pytest.mark.parametrize("source", [
    "{{ ''.__class__ }}", "{{ messages.__len__ }}", "{{ [].__class__.__base__ }}",
    "{{ ''|attr('__class__') }}", "{{ messages | map(attribute='__class__') | list }}",
    "{{ ['x'] | map('attr', '__class__') | list }}",
    "{{ '{0.__class__}'.format('') }}", "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ self.__init__ }}", "{{ self._TemplateReference__context }}",
    "{{ raise_exception.__globals__ }}", "{{ namespace.__init__.__globals__ }}",
    "{{ joiner.__init__ }}", "{{ strftime_now.__code__ }}", "{{ range.__globals__ }}",
    "{{ (messages | map('upper')).gi_frame }}", "{{ namespace(_a=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ messages.clear() }}", "{{ messages.sort() }}", "{{ messages[0].pop('role') }}",
    "{{ dict.update(messages[0], {'role': 'x'}) }}", "{{ dict.mro() }}", "{{ (1).real }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{% import 'os' as os %}", "{% extends 'x' %}",
])
def test_a_template_cannot_reach_attributes_of_python(source):
    with pytest.raises(InvalidTokenizer):
        render(source)


@pytest.mark.parametrize("source", [
    "x" * (1 << 20) + "x", "{% for a in x %}" * 40 + "{% endfor %}" * 40,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ " + "[" * 300 + "]" * 300 + " }}",
    "{{ " + "9" * 10000 + " + 1 }}" if sys.version_info >= (3, 11) else "{% x %}",
])
def test_a_template_that_does_not_compile_is_refused(source):
    with pytest.raises(InvalidTokenizer):
        render(source)


@pytest.mark.parametrize(("source", "text"), [
    ("{{ '%s **%5.2f** %03d%%' % ('a', 1.5, 7) }}", "a ** 1.50** 007%"),
    ("{{ '%(a)s' | format(a='b') }}", "b"),
    ("{{ '{0} {a!r:>4} {0[0]} {1:{2}}'.format('x', 1, 3, a='y') }}", "x  'y' x   1"),
    ("{{ '{a}{b}'.format_map({'a': 1, 'b': [2]}) }}", "1[2]"),
    ("{{ ('<{}>' | safe).format('<') }}", "<&lt;>"),
    ("{{ 'x' | center(5) }}|{{ 'x'.ljust(3) }}|{{ '7'.zfill(3) }}", "  x  |x  |007"),
    ("{{ 'a\\nb' | indent(2, true) }}", "  a\n  b"),
    ("{{ 'a-b'.replace('-', '+') }}{{ 'a-b' | replace('-', '+') }}", "a+ba+b"),
    ("{{ 'a b\\nc'.split() }}{{ 'a-b'.split('-', 1)[1] }}", "['a', 'b', 'c']b"),
    ("{{ [1, 2] | join('-') }}{{ messages | join(',', attribute='role') }}", "1-2user"),
    ("{{ '-'.join(['a', 'b']) }}{{ range(5) | batch(2, 'x') | list }}",
     "a-b[[0, 1], [2, 3], [4, 'x']]"),
    ("{{ {'b': [1, 'ß<'], 'a': none} | tojson(indent=2, sort_keys=true) }}",
     '{\n  "a": null,\n  "b": [\n    1,\n    "ß<"\n  ]\n}'),
    ("{{ [[1, 2], 3.5, true] | tojson(separators=(',', ':')) }}", "[[1,2],3.5,true]"),
    ("{{ [1, 2, 3] | sum }} {{ 2.567 | round(1) }} {{ 7 // 2 }} {{ 2 ** 10 }}", "6 2.6 3 1024"),
    ("{% set a, b = 1, (2, 3) %}{{ a }}{{ b }}{{ dict(x=1) }}{{ dict.fromkeys('ab') }}",
     "1(2, 3){'x': 1}{'a': None, 'b': None}"),
    ("{% macro m(x, y=[1]) %}<{{ caller() }}{{ x }}{{ y }}>{% endmacro %}"
     "{% call m('a') %}b{% endcall %}", "<ba[1]>"),
    ("{% for k, v in {'a': 1}.items() %}{{ loop.index }}{{ k }}={{ v }}{% else %}-{% endfor %}",
     "1a=1"),
    ("{% block b %}{{ 'x' in ['x'] }}{% endblock %}{{ self.b() }}", "TrueTrue"),
])
def test_ordinary_filters_methods_and_macros_work(source, text):
    assert render(source) == text


def test_a_long_conversation_fits():
    """A million tokens in 400 messages; for each message the template reads all messages."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": "word " * 2000}
                for i in range(400)]
    source = (
        "{% set ns = namespace(roles=[]) %}{% for message in messages %}"
        "{% set ns.roles = ns.roles + [message.role] %}"
        "{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
        "{{ '<|' ~ message.role ~ '|>' + message.content | trim }}{% endfor %}"
        "{{ ns.roles | length }}"
    )
    prompt = render(source, messages)
    assert prompt.endswith("400") and len(prompt) > 400 * 9999
