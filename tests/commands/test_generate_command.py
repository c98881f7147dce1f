"""The subcommands `generate` and `chat`."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest

from exl_loader.commands import model_options
from exl_loader.commands.chat import Chat
from exl_loader.commands.cli import main
from exl_loader.generation.settings import SamplingSettings
from exl_loader.memory.reservation import plan
from exl_loader.text.tokenizer import Tokenizer
from exl_loader.utils.byte_counts import amount
from support.fake_model import fake_engine
from support.lora_folders import write_adapter
from support.tiny import write_tokenizer


@pytest.fixture(autouse=True)
def reference_operations(monkeypatch):
    """Use the reference operations, because compiling takes long."""
    monkeypatch.setenv("EXL_LOADER_REFERENCE", "1")


def generate(folder, *arguments: str) -> int:
    return main(["generate", str(folder), "--ctx-size", "256", "--max-new-tokens", "6",
                 *arguments])


def test_generate_streams_text_and_prints_its_statistics(tiny_model_dir, capsys):
    assert generate(tiny_model_dir, "--prompt", "hello", "--seed", "3", "--stats") == 0
    first = capsys.readouterr()
    assert first.out.endswith("\n") and not first.out.startswith("hello")
    for part in ("prompt 6 tokens", "tokens/s", "MiB"):
        assert part in first.err
    assert generate(tiny_model_dir, "--prompt", "hello", "--seed", "3") == 0
    assert capsys.readouterr().out == first.out


def test_memory_is_planned_before_and_measured_after(tiny_model_dir, capsys):
    assert generate(tiny_model_dir, "--prompt", "hello", "--cache-type", "q6", "--memory") == 0
    table, measured = capsys.readouterr().err.split("\n\n", 1)
    title, headings, *rows = table.splitlines()
    assert title.startswith(f"{tiny_model_dir}: ") and "256 tokens of context" in title
    assert [row.split()[0] for row in rows] == ["q6", "fp16", "q8", "q4"]
    planned = plan(tiny_model_dir, ctx_size=256, cache_type="q6")
    assert amount(planned.total_bytes) in rows[0] and "reserved" in headings
    assert f"{planned.largest_ctx_size['q6']:,} tokens" not in rows[1]
    total = measured.splitlines()[-1].split()
    assert total == ["bytes", "together"] + 2 * [f"{planned.total_bytes:,}"]
    lines = [line.split() for line in measured.splitlines()]
    assert ["cpu", "cache"] + 2 * [f"{planned.cache_bytes:,}"] in lines


def test_generate_as_json(tiny_model_dir, capsys):
    assert generate(tiny_model_dir, "--prompt", "hello", "--seed", "3", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["prompt"] == "hello" and result["prompt_tokens"] == 6
    assert result["seed"] == 3 and result["new_tokens"] <= 6
    assert result["finish_reason"] in ("length", "eos")
    assert result["allocated_bytes"] > 0 and result["tokens_per_s"] > 0
    assert (result["drafted_tokens"], result["skipped_drafts"]) == (0, 0)


def test_generate_prints_what_became_of_drafts(tiny_model_dir, capsys):
    """The model's own guesses are always right, so only the first passes are without them."""
    assert generate(tiny_model_dir, "--prompt", "hello", "--temperature", "0", "--stats",
                    "--model-draft", str(tiny_model_dir), "--max-new-tokens", "40") == 0
    error = capsys.readouterr().err
    assert "drafted tokens right" in error or "passes that are faster without" in error


def test_generate_with_loras(tiny_model_dir, tmp_path, capsys):
    shapes = {f"model.layers.{i}.self_attn.o_proj": (64, 64) for i in range(2)}
    write_adapter(tmp_path / "a", shapes, rank=8)
    write_adapter(tmp_path / "b", shapes, rank=8, seed=1)
    texts, allocated = [], []
    for arguments in ([], ["--loras", f"{tmp_path / 'a'}"],
                      ["--loras", f"{tmp_path / 'a'}=0,{tmp_path / 'b'}=0"],
                      ["--max-lora-bytes", "1MiB"]):
        assert generate(tiny_model_dir, "--prompt", "hello", "--temperature", "0", "--json",
                        *arguments) == 0
        result = json.loads(capsys.readouterr().out)
        texts.append(result["text"])
        allocated.append(result["allocated_bytes"])
    assert texts[1] != texts[0] == texts[2] == texts[3]
    assert allocated[0] < allocated[1] < allocated[2] < allocated[3] == allocated[0] + (1 << 20)
    assert main(["plan", str(tiny_model_dir), "--loras", str(tmp_path / "a")]) == 0
    assert "LoRAs" in capsys.readouterr().out
    assert generate(tiny_model_dir, "--loras", str(tmp_path / "none")) == 1
    assert "adapter_config.json" in capsys.readouterr().err


def test_the_prompt_may_come_from_a_file_or_stdin(tiny_model_dir, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompt.txt").write_text("größe", encoding="utf-8-sig")
    assert generate(tiny_model_dir, "--prompt-file", str(tmp_path / "prompt.txt"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "größe"
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin"))
    assert generate(tiny_model_dir, "--prompt-file", "-", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "from stdin"


def test_without_a_prompt_a_default_prompt_is_used_and_shown(tiny_model_dir, capsys):
    assert generate(tiny_model_dir) == 0
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_any_setting_can_be_set_by_its_name(tiny_model_dir, capsys):
    plain = ["--prompt", "hello", "--temperature", "0", "--json"]
    token = Tokenizer.from_dir(tiny_model_dir).encode("x", add_bos=False)[-1]
    for written, text in ((f"allowed_tokens=[{token}]", "xxxxxx"),
                          (f"allowed_tokens={token}", "xxxxxx"),
                          ("stop_strings=xxx", ""), ('stop_strings=["y", "xxx"]', "")):
        assert generate(tiny_model_dir, *plain, "--set", f"allowed_tokens={token}", "--set",
                        written) == 0
        assert json.loads(capsys.readouterr().out)["text"] == text
    # The same as the option of its own, which it overrides.
    assert generate(tiny_model_dir, *plain, "--set", "max_new_tokens=2") == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 2
    # A text stays a text, even one that is valid JSON.
    assert generate(tiny_model_dir, *plain, "--set", "negative_prompt=17") == 0
    with pytest.raises(SystemExit):
        generate(tiny_model_dir, "--set", "skew")
    assert "expected NAME=VALUE, got 'skew'" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "words"), [
    (["--set", "skew=much"], "skew: expected a number"),
    (["--set", "skwe=1"], "skwe"),
    (["--temperature", "nan"], "temperature: expected a number"),
    (["--top-k", "-1"], "top_k"),
    (["--prompt-file", "/no/such/file"], "--prompt-file"),
    (["--prompt-file", "/"], "/: expected a regular file, found a folder. Give --prompt-file"),
    (["--prompt", "x" * 300], "at most 255 tokens and a new one in a ctx_size of 256"),
    (["--cache-type", "q5"], "cache_type"),
])
def test_errors_are_one_line(arguments, words, tiny_model_dir, capsys):
    assert generate(tiny_model_dir, *arguments) == 1
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and error.count("\n") == 1


def test_the_shipped_model_is_the_default(monkeypatch, capsys, tiny_model_dir):
    monkeypatch.setattr(model_options, "DEMO_MODEL", tiny_model_dir)
    assert main(["generate", "--ctx-size", "256", "--max-new-tokens", "2", "--prompt", "a"]) == 0
    assert capsys.readouterr().out


# Chat


def chat(folder, text: str, monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return main(["chat", str(folder), "--ctx-size", "256", "--max-new-tokens", "4", *arguments])


def test_chat_reads_lines_and_answers_each(tiny_model_dir, monkeypatch, capsys):
    assert chat(tiny_model_dir, "hi\n\n/reset\nyou\n", monkeypatch) == 0
    captured = capsys.readouterr()
    assert captured.out.count("model> ") == 2
    assert "you> hi" in captured.out
    assert "no chat template" in captured.err


@pytest.fixture
def talk(tmp_path):
    """Return a maker of conversations with a model that always answers `ok`."""
    write_tokenizer(tmp_path, 300)

    def make(template: str | None = None, ctx_size: int = 256, system: str | None = None):
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        if template is not None:
            config["chat_template"] = template
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = Tokenizer.from_dir(tmp_path)
        answer = [*tokenizer.encode("ok", add_bos=False), *tokenizer.eos_token_ids]

        def script(text: list[int]) -> int:
            last = text[-1]
            return answer[answer.index(last) + 1] if last in answer[:-1] else answer[0]

        engine, model, cache = fake_engine(script, 300, tokenizer, ctx_size)
        settings = SamplingSettings(temperature=0, max_new_tokens=8)
        return Chat(engine, settings, system), model, cache

    return make


TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>"


def test_a_conversation_uses_the_chat_template(talk):
    chat, model, _ = talk(TEMPLATE, system="be brief")
    assert chat.has_template
    assert "".join(chat.ask("hi")) == "ok"
    "".join(chat.ask("and?"))
    asked = "[system]be brief[user]hi[assistant]ok[user]and?>"
    assert sum(length for [length] in model.calls if length > 1) >= len(asked)
    assert [m["content"] for m in chat.messages] == ["hi", "ok", "and?", "ok"]
    chat.reset()
    assert chat.messages == []


def test_a_conversation_without_a_template(talk):
    chat, _, _ = talk()
    assert not chat.has_template
    assert "".join(chat.ask("hi")) == "ok"
    assert chat.messages[-1] == {"role": "assistant", "content": "ok"}


def test_old_messages_are_dropped_when_the_context_is_full(talk):
    chat, _, _ = talk(TEMPLATE)
    for i in range(12):
        assert "".join(chat.ask(f"question {i} " + "x" * 20)) == "ok"
    assert 2 <= len(chat.messages) < 24
    assert chat.messages[0]["role"] == "user"


def test_old_messages_are_dropped_until_the_answer_fits(talk):
    chat, _, _ = talk(TEMPLATE)
    chat._settings = replace(chat._settings, max_new_tokens=100)
    said = 0
    for i in range(8):
        assert "".join(chat.ask(f"question {i} " + "x" * 20)) == "ok"
        assert len(chat._prompt_ids(chat.messages[:-1])) + 100 <= 256
        said += sum("left out, so that the answer has room" in n for n in chat.notices)
        chat.notices.clear()
    assert said > 2


def test_a_full_context_is_reported(tiny_model_dir, monkeypatch, capsys):
    options = ["--max-new-tokens", "400", "--ban-eos-token"]
    assert chat(tiny_model_dir, "x" * 200 + "\n", monkeypatch, *options) == 0
    said = capsys.readouterr()
    assert "[the context of 256 tokens is full: the answer ends after" in said.err
    assert "is full" not in said.out
    assert generate(tiny_model_dir, "--prompt", "x" * 200, *options) == 0
    assert "warning: the context of 256 tokens is full" in capsys.readouterr().err
    assert generate(tiny_model_dir, "--prompt", "x", "--max-new-tokens", "3") == 0
    assert "is full" not in capsys.readouterr().err


def test_an_interrupted_answer_stays_in_the_conversation(talk):
    chat, _, cache = talk(TEMPLATE)
    pieces = chat.ask("hi")
    assert next(pieces) == "o"
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": "o"}
    assert cache.num_free_pages == cache.num_pages


def test_a_refused_message_leaves_the_conversation_as_it_was(talk):
    refusing = "{% if messages | length > 2 %}{{ raise_exception('enough') }}{% endif %}x"
    chat, _, _ = talk(refusing)
    "".join(chat.ask("one"))
    before = list(chat.messages)
    with pytest.raises(Exception, match="enough"):
        next(chat.ask("two"))
    assert chat.messages == before
