"""Convert text to token ids and back, with the tokenizer files of a model folder.

The first of these files that exists is used, as in transformers: `tokenizer.json`,
`tokenizer.model`, `vocab.json` with `merges.txt`. `roles` defines which tokens begin and end a
text, and which are special.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ...utils.errors import InvalidSettings, InvalidTokenizer, is_text
from ...utils.setting_values import check_flag, whole_numbers
from ...utils.untrusted_files import is_there
from ..chat.template import ChatTemplates
from . import roles, vocab_merges
from .sentencepiece_vocabulary import SentencePieceVocabulary
from .stream import StreamDecoder, clean_up
from .token_starts import TokenStarts
from .tokenizer_config import TokenizerConfig, read_tokenizer_config
from .tokenizers_vocabulary import TokenizersVocabulary
from .vocabulary import Vocabulary

__all__ = ["StreamDecoder", "Tokenizer", "has_tokenizer", "no_tokenizer"]

# Put before text that continues another text; no tokenizer joins it with what follows.
_BEFORE = "\x02"


def has_tokenizer(folder: Path) -> bool:
    """Return whether a model folder has files that `Tokenizer.from_dir` reads."""
    single = any(is_there(folder / name) for name in ("tokenizer.json", "tokenizer.model"))
    return single or vocab_merges.has_vocab_and_merges(folder)


def no_tokenizer(thing: str) -> InvalidTokenizer:
    """Return the error for text where the model folder has no tokenizer.

    Args:
        thing: what the error is about, such as the folder.
    """
    return InvalidTokenizer(
        thing, expected="tokenizer.json, tokenizer.model, or vocab.json with merges.txt in the "
        "model folder", actual="none of them",
        remedy="Copy the tokenizer files of the original model into the folder",
    )


class Tokenizer:
    """A folder's tokenizer. Several threads may use it at the same time.

    Args:
        vocabulary: tokens and the rules that find them.
        config: the folder's settings.

    Attributes:
        vocab_size: one more than the largest token id.
        bos_token_id: None where the model has no BOS token.
        eos_token_id: None where the tokenizer names no EOS token.
        eos_token_ids: the same as a tuple of one or no id.
        add_bos_token: True where `encode` puts the BOS token first by default.
        special_tokens: `bos_token`, `eos_token`, ... -> text.
    """

    def __init__(self, vocabulary: Vocabulary, config: TokenizerConfig) -> None:
        self._vocabulary = vocabulary
        self._config = config
        self.vocab_size = vocabulary.vocab_size
        self.special_tokens = roles.named_tokens(config, vocabulary)
        self.bos_token_id = roles.bos_id(config, vocabulary, self.special_tokens)
        eos_token = self.special_tokens.get("eos_token")
        self.eos_token_id = None if eos_token is None else vocabulary.token_id(eos_token)
        self.eos_token_ids = () if self.eos_token_id is None else (self.eos_token_id,)
        self._prefix_ids, self._suffix_ids = roles.prefix_and_suffix(
            config, vocabulary, self.bos_token_id, self.eos_token_id
        )
        self.add_bos_token = self.bos_token_id in self._prefix_ids

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Open the tokenizer of a model folder.

        Args:
            path: the folder.

        Raises:
            InvalidTokenizer: the folder has no tokenizer, or one of its files is broken.
        """
        folder = Path(path)
        config = read_tokenizer_config(folder)
        if is_there(folder / "tokenizer.json"):
            return cls(TokenizersVocabulary.from_json(folder / "tokenizer.json", config), config)
        if is_there(folder / "tokenizer.model"):
            return cls(SentencePieceVocabulary(folder / "tokenizer.model", config), config)
        if vocab_merges.has_vocab_and_merges(folder):
            return cls(TokenizersVocabulary.from_vocab_and_merges(folder, config), config)
        raise no_tokenizer(str(folder))

    def encode(self, text: str, add_bos: bool | None = None, special: bool = True) -> list[int]:
        """Convert text to token ids.

        Args:
            text: any string. A lone surrogate becomes a replacement character.
            add_bos: True or False: begin with the BOS token (if the model has one) or not, and
                add no other token. None: as the folder's files have it, which may add an EOS
                token at the end as well.
            special: recognise special tokens written in the text; otherwise they are plain text.

        Raises:
            InvalidSettings: an argument has another type.
        """
        if not isinstance(text, str):
            raise InvalidSettings("text to encode", expected="a string",
                                  actual=type(text).__name__)
        if add_bos is not None:
            check_flag("add_bos", add_bos)
        check_flag("special", special)
        if not is_text(text):
            # Neither library accepts surrogates. Two halves of a character become the character.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = self._vocabulary.encode(text, special)
        if add_bos is None:
            return [*self._prefix_ids, *ids, *self._suffix_ids]
        return [self.bos_token_id, *ids] if add_bos and self.bos_token_id is not None else ids

    def continuation_ids(self, text: str, special: bool = True) -> list[int] | None:
        """Encode text that continues another text, without a space before it.

        Args, raises: as `encode`. The vocabulary needs `bytes_known`.

        Returns:
            Token ids that have exactly the bytes of the text; None if the tokenizer changes it.
        """
        ids = self.encode(_BEFORE + text, add_bos=False, special=special)
        pieces = [self.token_bytes(i) for i in ids]
        before, wanted = _BEFORE.encode(), text.encode("utf-8", "replace")
        for count in range(1, len(ids) + 1):
            if b"".join(pieces[:count]).endswith(before):
                return ids[count:] if b"".join(pieces[count:]) == wanted else None
        return None

    def prompt_ids(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Convert a prompt to token ids that begin with the folder's prefix exactly once.

        A BOS token at the beginning of the text (`<s>...`, as templates write it) counts as that
        prefix. No token is added at the end, because the model continues there.

        Args:
            text: any string.
            add_bos: True: begin with the BOS token, if the model has one. False: add nothing; a
                BOS token in the text stays. None: as the folder's files have it.

        Raises:
            InvalidSettings: text is not a string.
        """
        ids = self.encode(text, add_bos=False)
        bos = self.bos_token_id
        if bos is None:
            return ids if add_bos is not None else [*self._prefix_ids, *ids]
        prefix = list(self._prefix_ids) if add_bos is None else [bos] if add_bos else []
        while ids[:2] == [bos, bos]:
            del ids[0]
        if ids[: len(prefix)] == prefix:
            return ids
        if bos in prefix and ids[:1] == [bos]:
            del ids[0]
        return [*prefix, *ids]

    def cut_left(self, ids: Sequence[int], length: int) -> list[int]:
        """Cut a prompt to its last tokens, but keep the folder's prefix, such as the BOS token.

        Args:
            ids: token ids of the prompt.
            length: tokens to keep, 1 or more. The prefix is kept where at least one other token
                fits as well.

        Returns:
            At most `length` token ids.
        """
        length = max(1, length)
        if len(ids) <= length:
            return list(ids)
        kept = list(self._prefix_ids)
        if not kept or list(ids[: len(kept)]) != kept:
            kept = [] if self.bos_token_id is None else [self.bos_token_id]
        if length <= len(kept) or list(ids[: len(kept)]) != kept:
            kept = []
        return [*kept, *ids[len(ids) - length + len(kept) :]]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Convert token ids to text, the same text as `stream` returns for them.

        Ids outside the vocabulary are left out. Bytes that are not UTF-8 become replacement
        characters.

        Args:
            ids: token ids.
            skip_special: leave special tokens out.

        Raises:
            InvalidSettings: an argument has another type.
        """
        check_flag("skip_special", skip_special)
        checked = whole_numbers("ids", ids, "token ids")
        if self._vocabulary.bytes_known:
            text = self._vocabulary.decode(checked, skip_special)
            return clean_up(text) if self._vocabulary.cleans_up else text
        # In other vocabularies the text of a token depends on its neighbours.
        stream = StreamDecoder(self._vocabulary, skip_special)
        return "".join(map(stream.push, checked)) + stream.flush()

    def stream(
        self, skip_special: bool = True, previous_ids: Sequence[int] = (), num_shown: int = 0
    ) -> StreamDecoder:
        """Return a decoder that takes one token at a time.

        Args:
            skip_special: leave special tokens out.
            previous_ids: token ids that precede the first one. A tokenizer that drops the first
                space of a text, as Llama 2's does, keeps it after other text.
            num_shown: how many bytes at the start of the first token are left out, because
                they have been shown already. Needs `bytes_known`.
        """
        stream = StreamDecoder(self._vocabulary, skip_special)
        last_word = next((i for i in reversed(previous_ids) if i not in self.special_ids), None)
        if last_word is not None:
            stream.continue_after(last_word, num_shown)
        return stream

    def stop_ids(self, model_ids: Iterable[int]) -> set[int]:
        """Return the token ids that end a text; see `roles`.

        Args:
            model_ids: `ModelConfig.eos_token_ids` of the folder.
        """
        return roles.stop_ids(self._config, self._vocabulary, self.eos_token_id, model_ids)

    def token_id(self, content: str) -> int | None:
        """Return the id of a token by its text, or None where there is no such token."""
        # No token contains a lone surrogate, and the libraries do not accept one.
        return self._vocabulary.token_id(content) if is_text(content) else None

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; empty for an id without text. Needs `bytes_known`."""
        return self._vocabulary.token_bytes(token_id)

    def ids_that_begin_with(self, start: bytes) -> list[int]:
        """Return the ids, rising, of the tokens whose bytes begin with `start`.

        Special tokens are left out. Needs `bytes_known`.
        """
        return self._token_starts.find(start)

    @cached_property
    def _token_starts(self) -> TokenStarts:
        """Made for the first request that needs it, because it takes a fraction of a second."""
        ordinary = (i for i in range(self.vocab_size) if i not in self.special_ids)
        tokens = ((self.token_bytes(i), i) for i in ordinary)
        return TokenStarts((token, i) for token, i in tokens if token)

    @property
    def bytes_known(self) -> bool:
        """Decoded text is the bytes of its tokens joined."""
        return self._vocabulary.bytes_known

    @property
    def strips_space(self) -> bool:
        """Decoding drops one space from the start of the text."""
        return self._vocabulary.strips_space

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        return self._vocabulary.special_ids

    @cached_property
    def chat_templates(self) -> ChatTemplates:
        """The folder's chat templates, of which there may be none."""
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
        """Render a conversation as the prompt format that the model was trained on.

        Encode the result with `add_bos=False`, because templates write the BOS token.

        Args:
            messages: `{"role": ..., "content": ...}` in order.
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: end with the header of the model's answer. None means yes,
                unless the final message is continued.
            continue_final_message: end inside the last message, so that the model continues it
                from its last character; a string names another key than `content`.
            template: name of one of the folder's templates; None for the default one.
            variables: further variables of the template, e.g. `enable_thinking`.

        Raises:
            InvalidTokenizer: there is no such template, or it cannot be rendered.
            InvalidSettings: `messages` is no list of messages, or the final message cannot be
                continued.
        """
        return self.chat_templates.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message, name=template,
            **{**self.special_tokens, **variables},
        )
