"""Conversations that are longer than the context: left out messages, and the notice."""

import random

import pytest

from exl_loader.text.chat.fitting import fit_messages


def words(messages):
    """A prompt of one token a word and one a message."""
    return [0 for m in messages for _ in range(len(m["content"].split()) + 1)]


def talk(*lengths):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": "w " * n} for i, n in enumerate(lengths)]


def fit(messages, ctx_size, max_new_tokens):
    return fit_messages(messages, words, ctx_size, max_new_tokens)


def test_a_conversation_that_fits_is_kept_without_a_notice():
    fitted = fit(talk(9, 9, 9), 50, 20)
    assert (len(fitted.ids), fitted.dropped, fitted.notice) == (30, 0, "")


def test_questions_are_left_out_together_with_their_answers():
    fitted = fit(talk(9, 9, 9, 9, 9), 50, 20)
    assert (len(fitted.ids), fitted.dropped) == (30, 2)
    assert "the 2 oldest messages were left out" in fitted.notice and "50" in fitted.notice


def test_the_last_question_always_stays():
    fitted = fit(talk(9, 9, 99), 50, 20)
    assert (len(fitted.ids), fitted.dropped) == (100, 2)


def test_half_of_the_context_is_kept_for_an_answer_that_never_fits():
    fitted = fit(talk(9, 9, 9), 64, 500)
    assert (len(fitted.ids), fitted.dropped) == (30, 0)
    assert fit(talk(9, 9, 9, 9, 9), 64, 500).dropped == 2


def test_an_answer_that_is_continued_stays_with_its_question():
    fitted = fit_messages(talk(9, 9, 9, 9), words, 50, 20, kept=2)
    assert (len(fitted.ids), fitted.dropped) == (20, 2)
    fitted = fit_messages(talk(9, 9, 99, 9), words, 50, 20, kept=2)
    assert (len(fitted.ids), fitted.dropped) == (110, 2)
    alone = fit_messages(talk(9)[:1], words, 50, 20, kept=2)
    assert (len(alone.ids), alone.dropped) == (10, 0)


@pytest.mark.parametrize("seed", range(4))
def test_as_little_as_possible_is_left_out(seed):
    numbers = random.Random(seed)
    for _ in range(300):
        messages = talk(*(numbers.randint(0, 30) for _ in range(numbers.randrange(1, 12, 2))))
        ctx_size, asked = numbers.randint(40, 300), numbers.randint(1, 20)
        fitted = fit(messages, ctx_size, asked)
        assert fitted.dropped % 2 == 0
        assert fitted.ids == words(messages[fitted.dropped :])
        assert len(fitted.ids) + asked <= ctx_size or fitted.dropped == len(messages) - 1
        if fitted.dropped:
            assert len(words(messages[fitted.dropped - 2 :])) + asked > ctx_size
