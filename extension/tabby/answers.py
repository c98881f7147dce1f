"""What TabbyAPI reads of an answer: its pieces, its end, its log probabilities.

A piece has text with the ids of its tokens. The end has counts, seconds and the reason; the key
`finish_reason` marks it.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .request import Request
from .stream import TokenStream

if TYPE_CHECKING:
    from exl_loader import LoadedModel

# What TabbyAPI writes for a speed that cannot be computed.
_INDETERMINATE = "Indeterminate"

# The log probability that stands for that of an impossible token, which JSON cannot write.
_IMPOSSIBLE = -1000.0


class Answer:
    """Turns the tokens of one generation into what TabbyAPI reads.

    Args:
        request_id: TabbyAPI's id of the request.
        loaded: the model.
        stream: its tokens.
        prompt_ids: the prompt.
        asked: the settings.
        params: the request.
        began_s: when the request arrived, of `time.monotonic()`.
    """

    def __init__(
        self, request_id: str, loaded: LoadedModel, stream: TokenStream,
        prompt_ids: Sequence[int], asked: Request, params: Any, began_s: float,
    ) -> None:
        self._request_id = request_id
        self._loaded = loaded
        self._generation = stream.generation
        self._prompt_tokens = len(self._generation.prompt_ids)
        # Makes a decoder of the answer.
        self._decoder = functools.partial(
            loaded.text_stream, prompt_ids, skip_special_tokens=False,
            token_healing=bool(asked.settings.get("token_healing")),
        )
        self._text = self._decoder(stop_strings=asked.stop_strings)
        self._stop_strings = asked.stop_strings
        self._has_logprobs = bool(asked.settings.get("logprobs"))
        self._top = getattr(params, "top_logprobs", 0) or 0
        self._began_s = began_s
        self._found_stop = False
        self._count = 0
        self._full_text = ""
        # Tokens whose text is not complete yet, or may begin a stop string.
        self._pending: list[int] = []

    def push(self, ids: Sequence[int]) -> dict[str, Any] | None:
        """Add tokens; return the piece to send, None if there is no text to show."""
        text = ""
        for token_id in ids:
            self._pending.append(token_id)
            if not self._found_stop:
                piece, self._found_stop = self._text.push(token_id)
                text += piece
        return self._piece(text)

    def rest(self) -> dict[str, Any] | None:
        """Return the last piece, None if there is no text left."""
        return None if self._found_stop else self._piece(self._text.flush())

    def end(self) -> dict[str, Any]:
        """Return the end of the answer, which the generation has reached."""
        stats = self._generation.stats
        finish_reason, eos_reason = self._reasons()
        total_s = time.monotonic() - self._began_s
        found = {
            "request_id": self._request_id,
            "prompt_tokens": self._prompt_tokens,
            "prompt_time": round(stats.prefill_s, 2),
            "prompt_tokens_per_sec": _speed(stats.prompt_tokens_per_s),
            "gen_tokens": stats.new_tokens,
            "gen_time": round(stats.decode_s, 2),
            "gen_tokens_per_sec": _speed(stats.tokens_per_s),
            "total_time": round(total_s, 2),
            "queue_time": round(max(0.0, total_s - stats.prefill_s - stats.decode_s), 2),
            "cached_tokens": stats.reused_tokens,
            "finish_reason": finish_reason,
            "eos_reason": eos_reason,
            "stop_str": self._stop_str() if eos_reason == "stop_string" else None,
            "full_text": self._full_text,
        }
        if stats.drafted_tokens:
            found["draft_accept"] = stats.accepted_tokens
            found["draft_reject"] = stats.drafted_tokens - stats.accepted_tokens
        return found

    def _piece(self, text: str) -> dict[str, Any] | None:
        if not text:
            return None
        token_ids, self._pending = self._pending, []
        first = self._count
        self._count += len(token_ids)
        self._full_text += text
        piece = {
            "request_id": self._request_id,
            "text": text,
            "token_ids": token_ids,
            "prompt_tokens": self._prompt_tokens,
            "generated_tokens": self._count,
            "offset": len(self._full_text),
        }
        if self._has_logprobs:
            entries = self._generation.logprobs[first : self._count]
            piece["logprobs_content"] = [self._logprob(entry) for entry in entries]
        return piece

    def _logprob(self, entry: Any) -> Any:
        types = importlib.import_module("endpoints.OAI.types.chat_completion")
        return types.ChatCompletionLogprob(
            **self._token(entry.token_id, entry.logprob),
            top_logprobs=[
                types.ChatCompletionLogprobLeaf(**self._token(token_id, logprob))
                for token_id, logprob in entry.top[: self._top]
            ],
        )

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": token_text(self._loaded.tokenizer, token_id), "token_id": token_id,
                "logprob": max(logprob, _IMPOSSIBLE)}

    def _reasons(self) -> tuple[str, str]:
        """Return OpenAI's reason for the end, and TabbyAPI's own."""
        reason = self._generation.finish_reason
        if reason == "loop":
            return "stop", "loop_detected"
        if reason in ("length", "context"):
            return "length", "max_new_tokens"
        if self._found_stop:
            return "stop", "stop_string"
        return "stop", "stop_token"

    def _stop_str(self) -> str | None:
        """Return the stop string that ended the answer: the one that begins first."""
        decoder = self._decoder()
        pieces = [decoder.push(token_id)[0] for token_id in self._generation.token_ids]
        text = "".join(pieces) + decoder.flush()
        found = [(start, stop) for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        return min(found)[1] if found else None


def token_text(tokenizer: Any, token_id: int) -> str:
    """Return the text of one token, with the space before a word that it may have."""
    if tokenizer.bytes_known:
        return tokenizer.token_bytes(token_id).decode("utf-8", "replace")
    return tokenizer.decode([token_id], skip_special=False)


def joined(chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the pieces of an answer and its end as one."""
    pieces = [chunk for chunk in chunks if "finish_reason" not in chunk]
    ends = [chunk for chunk in chunks if "finish_reason" in chunk]
    whole: dict[str, Any] = {"finish_reason": "stop", "prompt_tokens": 0}
    for end in ends:
        whole |= end
    whole["text"] = "".join(piece["text"] for piece in pieces)
    whole["offset"] = [piece["offset"] for piece in pieces]
    whole["logprobs_content"] = [
        entry for piece in pieces for entry in piece.get("logprobs_content", [])]
    whole["generated_tokens"] = pieces[-1]["generated_tokens"] if pieces else 0
    return whole


def log_prompt(request_id: str, prompt: str) -> None:
    """Write a prompt into TabbyAPI's log, if it is configured to keep prompts."""
    importlib.import_module("common.gen_logging").log_prompt(prompt, request_id)


def log_end(
    request_id: str, end: dict[str, Any], prompt: str, params: Any, max_seq_len: int
) -> None:
    """Write counts and seconds of an answer into TabbyAPI's log, as its own backend does."""
    logs = importlib.import_module("common.gen_logging")
    logs.log_generation_params(
        request_id=request_id, prompt=prompt, **params.model_dump(exclude={"prompt"}))
    logs.log_metrics(request_id, end, end["prompt_tokens"], max_seq_len)


def _speed(per_s: float) -> float | str:
    return round(per_s, 2) if per_s > 0 else _INDETERMINATE
