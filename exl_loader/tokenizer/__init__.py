"""Text to token ids and back: `tokenizer.json` and `tokenizer.model` behind one face.

Where a folder has both files, `tokenizer.json` is used, as transformers does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..chat.template import ChatTemplates
from ..errors import InvalidSettings, InvalidTokenizer
from ..setting_values import whole_numbers
from ..untrusted_files import is_there
from .backend import Backend
from .files import TokenizerConfig, read_tokenizer_config
from .hf import TokenizersBackend
from .spm import SentencePieceBackend
from .stream import StreamDecoder

__all__ = ["StreamDecoder", "Tokenizer"]

# What transformers' LlamaTokenizer takes where the folder names none.
_LLAMA_NAMED_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


class Tokenizer:
    """A folder's tokenizer. Safe to use from several threads.

    Args:
        backend: the vocabulary.
        config: the folder's settings.

    Attributes:
        vocab_size: one more than the largest token id.
        bos_token_id: None where the model has no such token.
        eos_token_ids: ids of the tokenizer's own end token; perhaps none.
        add_bos_token: `encode` puts the BOS token first unless told otherwise.
        special_tokens: `bos_token`, `eos_token`, ... -> text.
    """

    def __init__(self, backend: Backend, config: TokenizerConfig) -> None:
        self._backend = backend
        self._config = config
        self.vocab_size = backend.vocab_size
        self.special_tokens = self._named_tokens()
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self.eos_token_ids = () if self.eos_token_id is None else (self.eos_token_id,)
        self._prefix_ids, self._suffix_ids = self._frame()
        self.add_bos_token = self.bos_token_id in self._prefix_ids

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Open the tokenizer of a model folder.

        Raises:
            InvalidTokenizer: the folder has none, or one of its files is broken.
        """
        folder = Path(path)
        config = read_tokenizer_config(folder)
        if is_there(folder / "tokenizer.json"):
            return cls(TokenizersBackend(folder / "tokenizer.json", config), config)
        if is_there(folder / "tokenizer.model"):
            return cls(SentencePieceBackend(folder / "tokenizer.model", config), config)
        raise InvalidTokenizer(
            str(folder), expected="tokenizer.json or tokenizer.model", actual="neither",
            remedy="Copy the tokenizer files of the original model into the folder",
        )

    def encode(self, text: str, add_bos: bool | None = None, special: bool = True) -> list[int]:
        """Turn text into token ids.

        Args:
            text: any string; lone surrogates become replacement characters.
            add_bos: True or False: begin with the BOS token (where there is one) or not,
                and put nothing else around the text. None: what the folder says, which may
                be an EOS token at the end as well.
            special: recognise special tokens written in the text; else they are plain text.

        Raises:
            InvalidSettings: text is not a string.
        """
        if not isinstance(text, str):
            raise InvalidSettings("text to encode", expected="a string",
                                  actual=type(text).__name__)
        # A lone surrogate is no text, and neither library takes it.
        valid = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        ids = self._backend.encode(valid, special)
        if add_bos is None:
            return [*self._prefix_ids, *ids, *self._suffix_ids]
        return [self.bos_token_id, *ids] if add_bos and self.bos_token_id is not None else ids

    def prompt_ids(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Encode a prompt: what the folder puts before a text comes first, exactly once.

        A BOS token that the text itself begins with (`<s>...`, as templates write it) counts as
        that token. Nothing is put behind the prompt, because the model goes on there.

        Args:
            text: any string.
            add_bos: True: begin with the BOS token, where the model has one. False: add nothing;
                a BOS token in the text stays. None: what the folder says.

        Raises:
            InvalidSettings: text is not a string.
        """
        ids = self.encode(text, add_bos=False)
        bos = self.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        prefix = list(self._prefix_ids) if add_bos is None else []
        if add_bos and bos is not None:
            prefix = [bos]
        if bos is not None and prefix[-1:] == ids[:1] == [bos]:
            del ids[0]
        return [*prefix, *ids]

    def cut_left(self, ids: Sequence[int], length: int) -> list[int]:
        """Cut a prompt to its last tokens; a BOS token at its beginning stays.

        Args:
            ids: the prompt.
            length: tokens to keep, 1 or more; the BOS token is one of them where there is
                room for another token.
        """
        length = max(1, length)
        if len(ids) <= length:
            return list(ids)
        if length > 1 and self.bos_token_id is not None and ids[0] == self.bos_token_id:
            return [ids[0], *ids[len(ids) - length + 1 :]]
        return list(ids[len(ids) - length :])

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Turn token ids into text; ids beyond the vocabulary are left out.

        Raises:
            InvalidSettings: `ids` is something else.
        """
        known = [i for i in whole_numbers("ids", ids, "token ids") if 0 <= i < self.vocab_size]
        return self._backend.decode(known, skip_special)

    def stream(self, skip_special: bool = True, behind: Sequence[int] = ()) -> StreamDecoder:
        """Begin to decode one token at a time.

        Args:
            skip_special: leave special tokens out.
            behind: ids of the text that the new one goes on from. Where a tokenizer drops a
                text's first space, as Llama 2's does, that is no first space any more.
        """
        stream = StreamDecoder(self._backend, skip_special)
        last_word = next((i for i in reversed(behind) if i not in self.special_ids), None)
        if last_word is not None:
            stream.push(last_word)
        return stream

    def token_id(self, content: str) -> int | None:
        """Return the id of a token by its text, None where there is no such token."""
        return self._backend.token_id(content)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token, for tokenizers with `bytes_known`; empty where it has no text."""
        return self._backend.token_bytes(token_id)

    @property
    def bytes_known(self) -> bool:
        """Decoded text is the bytes of its tokens joined."""
        return self._backend.bytes_known

    @property
    def strips_space(self) -> bool:
        """Decoding drops one space from the start of the text."""
        return self._backend.strips_space

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        return self._backend.special_ids

    @cached_property
    def chat_templates(self) -> ChatTemplates:
        """The folder's chat templates; perhaps none."""
        return ChatTemplates.from_dir(self._config.folder, self._config.values)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        template: str | None = None,
        **variables: Any,
    ) -> str:
        """Write a conversation as the prompt that the model was trained on.

        Encode the result with `add_bos=False`: templates write the BOS token themselves.

        Args:
            messages: `{"role": ..., "content": ...}` in order.
            tools: JSON schemas of functions the model may call.
            add_generation_prompt: end with the header of the model's answer; None means yes,
                unless the final message is continued.
            continue_final_message: end inside the last message, so that the model writes on
                from its last character; a string names another key than `content`.
            template: name of one of the folder's templates; None is the default one.
            variables: further variables of the template, e.g. `enable_thinking`.

        Raises:
            InvalidTokenizer: there is no such template, or it cannot be rendered.
            InvalidSettings: messages are none, or the final one cannot be continued.
        """
        return self.chat_templates.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message, name=template,
            **{**self.special_tokens, **variables},
        )

    def _named_tokens(self) -> dict[str, str]:
        named: dict[str, str] = {}
        if isinstance(self._backend, SentencePieceBackend):
            named.update(self._backend.default_named_tokens())
        if self._config.tokenizer_class == "LlamaTokenizer":
            named.update(
                (name, content) for name, content in _LLAMA_NAMED_TOKENS.items()
                if self._backend.token_id(content) is not None
            )
        named.update((name, token.content) for name, token in self._config.named_tokens.items())
        # An explicit null says that the model has no such token.
        return {
            name: content for name, content in named.items()
            if not (name in self._config.values and self._config.values[name] is None)
        }

    def _id_of(self, name: str) -> int | None:
        content = self.special_tokens.get(name)
        return None if content is None else self._backend.token_id(content)

    def _frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids before and after a text: the folder's word, else the vocabulary's own."""
        config = self._config
        prefix, suffix = self._backend.prefix_ids, self._backend.suffix_ids
        add_bos = config.add_bos_token
        if add_bos is None and not config.declared and isinstance(
            self._backend, SentencePieceBackend
        ):
            # A folder of 2023 with nothing but `tokenizer.model`: a Llama, which was never
            # trained without its BOS token.
            add_bos = True
        if add_bos is not None:
            prefix = tuple(i for i in prefix if i != self.bos_token_id)
            if add_bos and self.bos_token_id is not None:
                prefix = (self.bos_token_id, *prefix)
        if config.add_eos_token is not None:
            suffix = tuple(i for i in suffix if i != self.eos_token_id)
            if config.add_eos_token and self.eos_token_id is not None:
                suffix = (*suffix, self.eos_token_id)
        return prefix, suffix
