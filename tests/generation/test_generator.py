"""Generation on a scripted model: text, stops, cancellation, errors, threads."""

from __future__ import annotations

import _thread
import gc
import threading
import time
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import support.tokenizer_folders as make
from exl_loader.generation.text_stream import StopStrings
from exl_loader.text.tokenizer import Tokenizer
from exl_loader.utils.errors import (
    CacheFull,
    InsufficientMemory,
    InvalidCheckpoint,
    InvalidSettings,
    InvalidTokenizer,
    ModelUnloaded,
    PromptTooLong,
)
from support.fake_model import fake_engine, settle
from support.tiny import write_tokenizer

GREEDY = {"temperature": 0, "max_new_tokens": 20}


def count_up(text: list[int]) -> int:
    """Each token is the last one plus one."""
    return text[-1] + 1


def spell(tokenizer: Tokenizer, answer: str):
    """A script that answers any prompt of one token with this text, then ends it."""
    ids = [*tokenizer.encode(answer, add_bos=False), tokenizer.eos_token_ids[0]]

    def script(text: list[int]) -> int:
        return ids[min(len(text) - 1, len(ids) - 1)]

    return script


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory) -> Tokenizer:
    """One token a byte: every character beyond ASCII takes several."""
    folder = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder, 300)
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def spm_tokenizer(tmp_path_factory) -> Tokenizer:
    folder = make.write_folder(tmp_path_factory.mktemp("spm"), None)
    make.train_sentencepiece(folder / "tokenizer.model", "bpe", vocab_size=500)
    return Tokenizer.from_dir(folder)


def talk(tokenizer, answer, vocab_size=600, **options):
    engine, model, cache = fake_engine(spell(tokenizer, answer), vocab_size, tokenizer)
    generation = engine.generate([5], GREEDY | {"max_new_tokens": 200} | options)
    pieces = list(generation)
    assert cache.num_free_pages == cache.num_pages
    assert all(pieces)
    return pieces, generation


# Text


ANSWER = "naïve 🎉👩‍👩‍👧 你好\n    return x  "


@pytest.mark.parametrize("kind", ["byte_tokenizer", "spm_tokenizer"])
def test_text_streams_in_whole_characters(kind, request):
    tokenizer = request.getfixturevalue(kind)
    pieces, generation = talk(tokenizer, ANSWER)
    assert "".join(pieces) == ANSWER
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 10
    assert generation.finish_reason == "eos"
    assert generation.token_ids == tokenizer.encode(ANSWER, add_bos=False)


def test_half_a_character_at_the_end_is_marked(byte_tokenizer):
    pieces, generation = talk(byte_tokenizer, "ab🎉", max_new_tokens=4)
    assert "".join(pieces) == "ab\ufffd"
    assert generation.finish_reason == "length"


@pytest.mark.parametrize("kind", ["byte_tokenizer", "spm_tokenizer"])
@pytest.mark.parametrize(("stop", "shown"), [
    (["<end>"], "one <e two "),
    ("<end>", "one <e two "),
    (["<end>", "two"], "one <e "),
    (["three"], "one <e two <end> "),
    (["🎉"], "one <e two <end> three "),
    (["never"], "one <e two <end> three 🎉 <en"),
    (["one"], ""),
])
def test_stop_strings(kind, stop, shown, request):
    tokenizer = request.getfixturevalue(kind)
    answer = "one <e two <end> three 🎉 <en"
    pieces, generation = talk(tokenizer, answer, stop_strings=stop)
    assert "".join(pieces) == shown
    assert generation.finish_reason == ("eos" if stop == ["never"] else "stop")


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory) -> Tokenizer:
    """Byte-level, with control tokens that are left out of shown text."""
    folder = tmp_path_factory.mktemp("chat")
    make.write_folder(folder, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    make.train_byte_level(folder / "tokenizer.json", bos=True)
    return Tokenizer.from_dir(folder)


@pytest.fixture(scope="module")
def spm_chat_tokenizer(tmp_path_factory) -> Tokenizer:
    """Sentencepiece, with control tokens that are left out of shown text."""
    added = {str(500 + i): make.added_token(t) for i, t in enumerate([*make.CHAT_TOKENS, "<a▁b>"])}
    folder = tmp_path_factory.mktemp("spm_chat")
    make.write_folder(folder, {
        "tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "legacy": False,
        "added_tokens_decoder": added,
    })
    make.train_sentencepiece(folder / "tokenizer.model", "bpe", vocab_size=500)
    return Tokenizer.from_dir(folder)


CONTROL_ANSWER = "one <|user|>two<|end|>\nthree <|assistant|>🎉<|end|><|user|> four"


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("stop", "shown"), [
    # One token; one token and text; several control tokens; text and a control token.
    ("<|end|>", "one <|user|>two"),
    ("<|end|>\n", "one <|user|>two"),
    ("<|end|>\nthree", "one <|user|>two"),
    ("<|end|><|user|>", "one <|user|>two<|end|>\nthree <|assistant|>🎉"),
    ("<|end|><|user|> four", "one <|user|>two<|end|>\nthree <|assistant|>🎉"),
    ("two<|end|>", "one <|user|>"),
    ("o<|end|>\nth", "one <|user|>tw"),
    ("<|user|>", "one "),
    ("end|>", "one <|user|>two<|"),
    ("<|end|>never", CONTROL_ANSWER),
    ("two\n", CONTROL_ANSWER),
])
@pytest.mark.parametrize("kind", ["chat_tokenizer", "spm_chat_tokenizer"])
def test_stop_strings_with_control_tokens(kind, stop, shown, skip, request):
    """They end the text whether or not control tokens are shown, and are never shown."""
    tokenizer = request.getfixturevalue(kind)
    if skip:
        for token in make.CHAT_TOKENS:
            shown = shown.replace(token, "")
        shown = shown.removesuffix("<|")
        # The stop is not in the answer, but it is in what is shown of it.
        shown = shown.partition(stop)[0]
    pieces, generation = talk(
        tokenizer, CONTROL_ANSWER, vocab_size=720, stop_strings=[stop], skip_special_tokens=skip,
    )
    assert "".join(pieces) == shown
    found = stop != "<|end|>never" and (skip or stop != "two\n")
    assert generation.finish_reason == ("stop" if found else "eos")
    if stop == "<|user|>":
        ids = tokenizer.encode(CONTROL_ANSWER.split(stop)[0], add_bos=False)
        assert generation.stats.new_tokens == len(ids) + 1


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("stop", ["<a▁b>", "<a b>", "<a▁b> z"])
def test_a_stop_string_with_the_space_mark_of_a_control_token(stop, skip, spm_chat_tokenizer):
    pieces, generation = talk(
        spm_chat_tokenizer, "x y<a▁b> z", stop_strings=[stop], skip_special_tokens=skip
    )
    assert ("".join(pieces), generation.finish_reason) == ("x y", "stop")


@settings(max_examples=200)
@given(
    segments=st.lists(st.tuples(st.text("ab<>", max_size=4), st.text("ab<>", max_size=4))),
    stops=st.lists(st.text("ab<>", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_are_found_across_hidden_text(segments, stops):
    found, shown, seen, visible, stopped = StopStrings(stops), "", "", "", False
    for hidden, piece in segments:
        before = visible
        more, stopped = found.push(piece, hidden)
        shown, seen, visible = shown + more, seen + hidden + piece, visible + piece
        assert stopped == any(stop in text for stop in stops for text in (seen, visible))
        assert visible.startswith(shown)
        assert not any(stop in shown for stop in stops)
        if stopped:
            assert len(shown) >= len(before) - max(map(len, stops)) + 1
            return
    assert shown + found.flush() == visible


@settings(max_examples=200)
@given(
    text=st.text("ab<>", max_size=30), cuts=st.lists(st.integers(0, 30), max_size=8),
    stops=st.lists(st.text("ab<>", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_cut_the_text_where_the_first_one_is_complete(text, cuts, stops):
    """However the text is cut into pieces: nothing of a stop is shown, nothing else is lost."""
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    found, shown, start, stopped = StopStrings(stops), "", 0, False
    for end in ends:
        piece, stopped = found.push(text[start:end])
        shown, start = shown + piece, end
        seen = text[:end]
        assert stopped == any(stop in seen for stop in stops)
        if stopped:
            assert shown == seen[: min(seen.find(s) for s in stops if s in seen)]
            return
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
    assert shown + found.flush() == text


def test_stop_token_ids(byte_tokenizer):
    semicolon = byte_tokenizer.encode(";", add_bos=False)
    pieces, generation = talk(byte_tokenizer, "a;b", stop_token_ids=semicolon)
    assert ("".join(pieces), generation.finish_reason) == ("a", "stop")


def test_special_tokens_are_shown_on_request(byte_tokenizer):
    assert "".join(talk(byte_tokenizer, "a<s>b")[0]) == "ab"
    shown = talk(byte_tokenizer, "a<s>b", skip_special_tokens=False)[0]
    assert "".join(shown) == "a<s>b"


def test_generate_ids_gives_the_ids_of_the_text(byte_tokenizer):
    engine, _, _ = fake_engine(spell(byte_tokenizer, "hello; world"), 300, byte_tokenizer)
    ids = list(engine.generate_ids([5], GREEDY))
    assert byte_tokenizer.decode(ids) == "hello; world"
    ids = list(engine.generate_ids([5], GREEDY | {"stop_strings": ["; w"]}))
    assert byte_tokenizer.decode(ids) == "hello; w"


# Ends


def test_max_new_tokens_and_the_context_end_a_text():
    engine, model, _ = fake_engine(count_up, 600)
    generation = engine.generate_ids([5, 6, 7], {"temperature": 0, "max_new_tokens": 4})
    assert list(generation) == [8, 9, 10, 11]
    assert generation.finish_reason == "length"
    prompt = list(range(10, 262))
    generation = engine.generate_ids(prompt, {"temperature": 0})
    assert list(generation) == [262, 263, 264, 265]
    assert generation.finish_reason == "context"
    # The last token needs no place in the cache, so the prompt may leave room for one only.
    generation = engine.generate_ids([5] * 255, {"temperature": 0})
    assert (list(generation), generation.finish_reason) == ([6], "context")


def test_the_end_token_is_not_given_out_and_can_be_banned():
    engine, _, _ = fake_engine(lambda text: 0 if len(text) == 3 else 9)
    generation = engine.generate_ids([5], GREEDY)
    assert (list(generation), generation.finish_reason) == ([9, 9], "eos")
    assert generation.stats.new_tokens == 3
    banned = engine.generate_ids([5], GREEDY | {"ban_eos_token": True})
    assert len(list(banned)) == 20 and banned.finish_reason == "length"


def test_a_tokenizers_end_token_counts_as_well(byte_tokenizer):
    engine, _, _ = fake_engine(count_up, 300, byte_tokenizer)
    assert engine.eos_token_ids == (0, 2)


def test_padding_of_the_vocabulary_is_never_sampled(byte_tokenizer):
    """Ids that the tokenizer does not know are padding."""
    known = byte_tokenizer.vocab_size
    engine, _, _ = fake_engine(lambda text: known + 3, known + 10, byte_tokenizer)
    assert max(engine.generate_ids([5], {"max_new_tokens": 50, "ban_eos_token": True})) < known


# Prompts


def test_a_prompt_is_prefilled_in_chunks_and_progress_is_told():
    class Recorder:
        def __init__(self):
            self.events = []

        def start(self, task, total, unit):
            self.events.append(("start", total, unit))

        def advance(self, task, n=1):
            self.events.append(n)

        def finish(self, task):
            self.events.append("finish")

    engine, model, _ = fake_engine(count_up)
    progress = Recorder()
    generation = engine.generate_ids(range(1, 41), {"temperature": 0, "max_new_tokens": 3},
                                     progress=progress)
    assert list(generation) == [41, 42, 43]
    assert model.calls == [[16], [16], [8], [1], [1]]
    assert progress.events == [("start", 40, "tokens"), 16, 16, 8, "finish"]
    assert generation.stats.prompt_tokens == 40 and generation.stats.new_tokens == 3
    assert generation.stats.prompt_tokens_per_s > 0 and generation.stats.tokens_per_s > 0


def test_prompt_logits_are_chunked_and_complete():
    engine, model, cache = fake_engine(count_up)
    logits = engine.prompt_logits(range(1, 22))
    assert logits.shape == (21, 300)
    assert logits.argmax(dim=1).tolist() == list(range(2, 23))
    assert model.calls == [[8], [8], [5]]
    assert cache.num_free_pages == cache.num_pages


def test_text_prompts_get_the_bos_token_as_the_folder_says(byte_tokenizer):
    engine, _, _ = fake_engine(count_up, 300, byte_tokenizer)
    assert engine.generate("hi", GREEDY).prompt_ids == byte_tokenizer.encode("hi")
    assert engine.generate("hi", GREEDY).prompt_ids[0] == byte_tokenizer.bos_token_id
    assert engine.generate("<s>hi", GREEDY).prompt_ids == byte_tokenizer.encode("hi")
    assert engine.generate("", GREEDY).prompt_ids == [byte_tokenizer.bos_token_id]


def test_prompts_that_cannot_be(byte_tokenizer):
    engine, _, cache = fake_engine(count_up, 300, byte_tokenizer)
    with pytest.raises(InvalidSettings, match="at least one token"):
        engine.generate_ids([])
    with pytest.raises(InvalidSettings, match="expected 0 to 299, found 5 to 300"):
        engine.generate_ids([5, 300])
    with pytest.raises(InvalidSettings, match="token ids"):
        engine.generate_ids([-1])
    with pytest.raises(InvalidSettings, match="text or token ids"):
        engine.generate_ids([None])
    with pytest.raises(InvalidSettings, match="stop_token_ids"):
        engine.generate_ids([5], {"stop_token_ids": [300]})
    with pytest.raises(PromptTooLong, match="at most 255 tokens and a new one.*found 256"):
        engine.generate_ids([5] * 256)
    with pytest.raises(PromptTooLong, match="found 257 tokens"):
        engine.prompt_logits([5] * 257)
    with pytest.raises(InvalidSettings, match="temperature"):
        engine.generate("hi", {"temperature": float("nan")})
    assert cache.num_free_pages == cache.num_pages


def test_without_a_tokenizer_ids_work_and_text_does_not():
    engine, _, _ = fake_engine(count_up)
    assert list(engine.generate_ids([5], GREEDY | {"max_new_tokens": 2})) == [6, 7]
    assert not engine.has_tokenizer
    for needs_text in (
        lambda: engine.generate([5]),
        lambda: engine.generate_ids("hi"),
        lambda: engine.generate_ids([5], {"stop_strings": ["x"]}),
        lambda: engine.encode("hi"),
        lambda: engine.decode([5]),
        lambda: engine.apply_chat_template([{"role": "user", "content": "hi"}]),
    ):
        with pytest.raises(InvalidTokenizer, match="Copy the tokenizer files"):
            needs_text()


# Ending early


def endless(text: list[int]) -> int:
    return 7


LONG = {"temperature": 0, "max_new_tokens": 200}


def test_closing_gives_the_pages_back():
    engine, _, cache = fake_engine(endless)
    generation = engine.generate_ids([5], LONG)
    assert cache.num_free_pages == 1, "nothing is taken before the first token is asked for"
    next(generation)
    assert cache.num_free_pages == 0
    generation.close()
    assert cache.num_free_pages == 1
    assert list(generation) == [] and generation.finish_reason == "cancelled"
    with engine.generate_ids([5], LONG) as generation:
        next(generation)
    assert cache.num_free_pages == 1


def test_dropping_gives_the_pages_back():
    engine, _, cache = fake_engine(endless)
    for _ in engine.generate_ids([5], LONG):
        break
    gc.collect()
    settle(engine)
    assert cache.num_free_pages == 1


def test_stop_ends_the_text_and_keeps_what_was_shown(byte_tokenizer):
    engine, _, cache = fake_engine(spell(byte_tokenizer, "abc" * 50), 300, byte_tokenizer)
    generation = engine.generate([5], LONG)
    text = next(generation)
    generation.stop()
    text += "".join(generation)
    assert text == "a"
    assert generation.finish_reason == "cancelled"
    assert cache.num_free_pages == 1


@pytest.mark.parametrize("whole_model", [True, False])
def test_stop_from_another_thread(whole_model):
    engine, model, cache = fake_engine(endless)
    generation = engine.generate_ids([5], LONG)
    started = threading.Event()
    model.before_call = lambda: started.set() if len(model.calls) > 5 else None

    def stop():
        started.wait(300)
        (engine if whole_model else generation).stop()

    stopper = threading.Thread(target=stop)
    stopper.start()
    model_calls_before_stop = 0
    for _ in generation:
        if started.is_set():
            stopper.join(300)
            model_calls_before_stop = model_calls_before_stop or len(model.calls)
    assert generation.finish_reason == "cancelled"
    assert len(model.calls) == model_calls_before_stop
    assert cache.num_free_pages == 1


def test_stop_during_the_prompt():
    engine, model, cache = fake_engine(endless)
    generation = engine.generate_ids([5] * 100, LONG)
    model.before_call = lambda: engine.stop() if len(model.calls) == 2 else None
    assert list(generation) == []
    assert model.calls == [[16], [16]]
    assert cache.num_free_pages == 1


@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_an_error_in_the_model_gives_the_pages_back(fail_at):
    engine, model, cache = fake_engine(endless)
    model.fail_at = fail_at
    with pytest.raises(RuntimeError, match="injected"):
        list(engine.generate_ids([5] * 20, LONG))
    assert cache.num_free_pages == 1
    with pytest.raises(RuntimeError, match="injected"):
        engine.prompt_logits([5])
    assert cache.num_free_pages == 1
    model.fail_at = None
    assert len(list(engine.generate_ids([5], GREEDY))) == 20


def test_an_interrupt_ends_the_answer_and_not_the_model():
    engine, model, cache = fake_engine(endless)
    model.before_call = lambda: _thread.interrupt_main() if len(model.calls) == 4 else None
    generation = engine.generate_ids([5], LONG)
    with pytest.raises(KeyboardInterrupt):
        list(generation)
    settle(engine)
    assert cache.num_free_pages == 1 and generation.finish_reason == "cancelled"
    assert len(list(generation)) <= 1, "more than the step that was running brought"
    assert len(list(engine.generate_ids([5], GREEDY))) == 20


def test_damaged_logits_end_one_text():
    engine, model, cache = fake_engine(endless)
    whole_row = model._row
    model._row = lambda text: whole_row(text) * (float("nan") if len(text) > 3 else 1)
    with pytest.raises(InvalidCheckpoint):
        list(engine.generate_ids([5], LONG))
    assert cache.num_free_pages == 1


# Several at once


def test_interleaved_generations_share_forward_passes():
    engine, model, cache = fake_engine(count_up, pages=4)
    first = engine.generate_ids([10], GREEDY)
    second = engine.generate_ids([50], GREEDY)
    pairs = list(zip(first, second, strict=True))
    assert pairs == [(11 + i, 51 + i) for i in range(20)]
    assert [1, 1] in model.calls
    assert len(model.calls) < 40
    assert cache.num_free_pages == 4


def test_threads_get_their_own_texts():
    engine, model, cache = fake_engine(count_up, 3000, pages=4, max_batch_size=3)
    results: dict[int, list[int]] = {}

    def work(start: int) -> None:
        prompt = list(range(start, start + 20))
        results[start] = list(engine.generate_ids(prompt, GREEDY))

    threads = [threading.Thread(target=work, args=(200 * i + 1,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert len(results) == 8
    for start, ids in results.items():
        assert ids == list(range(start + 20, start + 40))
    assert cache.num_free_pages == 4


def test_a_request_waits_for_pages():
    """One page: the second request starts when the first, which nobody reads, has ended."""
    engine, model, cache = fake_engine(count_up)
    first = engine.generate_ids([10], {"temperature": 0, "max_new_tokens": 50})
    assert next(first) == 11
    second = engine.generate_ids([60], GREEDY)
    assert list(second) == list(range(61, 81))
    assert list(first) == list(range(12, 61))


def test_what_nobody_reads_is_not_computed():
    engine, model, cache = fake_engine(count_up, pages=4)
    idle = engine.generate_ids([10], {"temperature": 0, "max_new_tokens": 100})
    next(idle)
    assert len(list(engine.generate_ids([50], {"temperature": 0, "max_new_tokens": 60}))) == 60
    assert idle.stats.new_tokens < 30
    assert list(idle) == list(range(12, 111))


def test_prompt_logits_beside_a_generation():
    engine, model, cache = fake_engine(count_up, pages=2)
    generation = engine.generate_ids([10], GREEDY)
    next(generation)
    assert engine.prompt_logits([3, 4]).argmax(dim=1).tolist() == [4, 5]
    other = engine.generate_ids([20], GREEDY)
    next(other)
    with pytest.raises(CacheFull):
        engine.prompt_logits([3])
    assert list(generation) == list(range(12, 31))


def test_a_request_waits_for_the_pages_of_an_evaluation():
    """And costs nothing meanwhile: every step runs a chunk of the evaluation."""
    engine, model, cache = fake_engine(endless)
    answers: list[list[int]] = []
    worker = threading.Thread(target=lambda: answers.append(list(engine.generate_ids([5], LONG))))
    scheduler = engine._generator._scheduler
    steps, decode = [], scheduler.decode

    def counted():
        steps.append(len(model.calls))
        return decode()

    def begin_another():
        if len(model.calls) == 1:
            scheduler.decode = counted
            worker.start()
            while engine._generator._thread._inbox.empty():
                worker.join(0.001)
        if 1 < len(model.calls) < 20:
            assert scheduler.waiting and not scheduler.active

    model.before_call = begin_another
    assert len(engine.prompt_logits([5] * 200)) == 200
    worker.join(300)
    assert answers == [[7] * 200]
    assert len([calls for calls in steps if calls < 25]) <= 25
    assert cache.num_free_pages == cache.num_pages and not scheduler.evaluations


def test_a_cache_too_small_for_one_request_is_an_error_and_not_a_hang():
    engine, model, cache = fake_engine(count_up, ctx_size=512, pages=1)
    with pytest.raises(CacheFull):
        list(engine.generate_ids([10], {"max_new_tokens": 500}))
    assert len(list(engine.generate_ids([10], GREEDY))) == 20


# Unloading


def test_unload_is_final_and_can_be_repeated(byte_tokenizer):
    engine, model, cache = fake_engine(endless, 300, byte_tokenizer)
    running = engine.generate_ids([5], LONG)
    next(running)
    ready = engine.generate_ids([5], LONG)
    assert engine.allocated_bytes() == 1000
    engine.unload()
    engine.unload()
    assert engine.allocated_bytes() == 0
    assert cache.num_free_pages == 1
    for use in (
        lambda: list(running), lambda: list(ready), lambda: engine.generate_ids([5]),
        lambda: engine.generate("hi"), lambda: engine.prompt_logits([5]),
    ):
        with pytest.raises(ModelUnloaded):
            use()


def test_unload_waits_for_the_step_that_is_running():
    engine, model, _ = fake_engine(endless)
    inside, go_on = threading.Event(), threading.Event()

    def pause():
        inside.set()
        assert go_on.wait(300)

    model.before_call = pause
    failures = []

    def work():
        try:
            list(engine.generate_ids([5], LONG))
        except ModelUnloaded as error:
            failures.append(error)

    worker = threading.Thread(target=work)
    worker.start()
    inside.wait(300)
    unloader = threading.Thread(target=engine.unload)
    unloader.start()
    unloader.join(0.05)
    assert unloader.is_alive()
    go_on.set()
    unloader.join(300)
    worker.join(300)
    assert len(failures) == 1 and not unloader.is_alive()


def test_unload_and_dropping_let_go_of_the_model():
    engine, model, cache = fake_engine(endless)
    watched = weakref.ref(model)
    with engine:
        list(engine.generate_ids([5], GREEDY))
    del model
    assert watched() is None
    engine, model, cache = fake_engine(endless)
    watched_engine, watched = weakref.ref(engine), weakref.ref(model)
    list(engine.generate_ids([5], GREEDY))
    del engine, model
    assert watched_engine() is None
    # The model's thread may be between its last step and its sleep.
    deadline = time.monotonic() + 300
    while watched() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert watched() is None


def test_behind_a_text_the_space_between_two_words_is_kept(spm_tokenizer):
    prompt = spm_tokenizer.encode("two")
    answer = [*spm_tokenizer.encode("words", add_bos=False), spm_tokenizer.eos_token_ids[0]]
    engine, _, _ = fake_engine(lambda ids: answer[len(ids) - len(prompt)], 600, spm_tokenizer)
    assert "".join(engine.generate("two", GREEDY)) == " words"
    assert "".join(engine.generate("two", GREEDY | {"stop_strings": [" words"]})) == ""
    # What follows ids, as in a conversation, is a text of its own.
    assert "".join(engine.generate(prompt, GREEDY)) == "words"


# What an error keeps


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("ask", ["generate_ids", "prompt_logits"])
def test_an_error_that_a_host_keeps_does_not_keep_the_model(kind, ask):
    engine, model, cache = fake_engine(endless)
    model.fail_at, model.error = 2, kind("injected")
    with pytest.raises(kind) as kept:
        list(getattr(engine, ask)([5] * 40))
    watched = weakref.ref(model), weakref.ref(cache)
    del model, cache
    engine.unload()
    gc.collect()
    assert [reference() for reference in watched] == [None, None]
    assert "_forward" in [entry.name for entry in kept.traceback]


def test_memory_that_a_step_does_not_get_is_named():
    engine, model, cache = fake_engine(endless)
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8")):
        model.fail_at, model.error = len(model.calls) + 3, error
        generation = engine.generate_ids([5], LONG)
        with pytest.raises(InsufficientMemory, match="memory.*step.*refused"):
            list(generation)
        assert generation.finish_reason == "failed" and len(generation.token_ids) == 3
    model.fail_at = None
    job = engine.generate_ids([5], GREEDY)
    model._row = raise_memory_error
    with pytest.raises(InsufficientMemory, match="memory"):
        list(job)
    with pytest.raises(InsufficientMemory, match="memory"):
        engine.prompt_logits([5])
    assert cache.num_free_pages == cache.num_pages


def raise_memory_error(text):
    raise MemoryError


@pytest.mark.parametrize("how", ["not free", "refused"])
def test_logits_that_do_not_fit_are_refused_before_a_pass(how, machine, monkeypatch):
    engine, model, _ = fake_engine(endless)
    nbytes = 4 * 20 * 300
    machine(free_bytes=nbytes - (how == "not free"))
    if how == "refused":
        message = "[enforce fail] DefaultCPUAllocator: can't allocate memory"
        monkeypatch.setattr(torch, "empty", lambda *shape: raise_runtime_error(message))
    with pytest.raises(InsufficientMemory, match=f"20 tokens: expected {nbytes} bytes"):
        engine.prompt_logits([5] * 20)
    assert not model.calls
    monkeypatch.undo()
    assert len(engine.prompt_logits([5] * 20)) == 20


def raise_runtime_error(message):
    raise RuntimeError(message)
