"""The definition of the tokens that begin a text, end it, and are left out of decoded text.

The folder's settings win over the defaults of tokenizer and model classes.

**Names** (`bos_token`, `eos_token`, ...), as templates see them: `tokenizer_config.json`; where
that has no `added_tokens_decoder`, `special_tokens_map.json` before it; then the names in a
`tokenizer.model`; then the defaults of the class (LlamaTokenizer's `<s>` and `</s>`) that the
vocabulary has. `null` in `tokenizer_config.json` means that there is no such token.

**BOS id**: the named token; else the token that the post-processor of `tokenizer.json` puts
before a text; else none where the name is `null`; else `bos_token_id` of `config.json` or
`generation_config.json`; else the token of the default name. An id beyond the model's
`vocab_size` does not count.

**Prefix**, the ids before a text: with a `tokenizer.json`, the ids of its post-processor, as in
transformers 5, whatever `add_bos_token` is; where there are none, `"add_bos_token": true` adds
the BOS token, as in exllamav2 and llama.cpp. With a `tokenizer.model`, `add_bos_token` decides;
without that setting, CodeLlamaTokenizer adds one, and so does a folder without
`tokenizer_config.json`, because such a folder is a Llama of 2023.

**Suffix**, the ids that `encode` puts after a text: those of the post-processor, or the EOS token
where `add_eos_token` is true. Prompts have no suffix.

**Stop ids**: every id that the folder names, because a model may end its text with any of them:
`eos_token_id` (one id or a list) of `generation_config.json` and of `config.json`, and the named
`eos_token`. Where the folder names none: the token of the default name, and the default of the
model class.

**Special tokens**, which `skip_special` leaves out of decoded text: added tokens with
`"special": true`, tokens with a name, `extra_special_tokens`, and the control and unknown pieces
of a `tokenizer.model`.
"""

from __future__ import annotations

from collections.abc import Iterable

from .tokenizer_config import TokenizerConfig
from .vocabulary import Vocabulary


def named_tokens(config: TokenizerConfig, vocabulary: Vocabulary) -> dict[str, str]:
    """Return name -> text of the tokens with a name: `bos_token`, `eos_token`, ..."""
    named = {
        name: content for name, content in vocabulary.default_named_tokens().items()
        if vocabulary.token_id(content) is not None
    }
    named.update((name, token.content) for name, token in config.named_tokens.items())
    return {name: content for name, content in named.items() if not config.is_null(name)}


def bos_id(config: TokenizerConfig, vocabulary: Vocabulary, names: dict[str, str]) -> int | None:
    """Return the id of the BOS token, or None."""
    declared = config.named_tokens.get("bos_token")
    candidates = [] if declared is None else [vocabulary.token_id(declared.content)]
    candidates += vocabulary.prefix_ids
    if not config.is_null("bos_token"):
        candidates += [i for i in config.model.bos_ids if vocabulary.has_token(i)]
        if "bos_token" in names:
            candidates.append(vocabulary.token_id(names["bos_token"]))
    usable = (i for i in candidates if i is not None and config.model.has_id(i))
    return next(usable, None)


def prefix_and_suffix(
    config: TokenizerConfig, vocabulary: Vocabulary, bos: int | None, eos: int | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that `encode` puts before a text, and those that it puts after it."""
    prefix, suffix = vocabulary.prefix_ids, vocabulary.suffix_ids
    add_bos = vocabulary.adds_bos if config.add_bos_token is None else config.add_bos_token
    if add_bos and bos is not None and bos not in prefix:
        prefix = (bos, *prefix)
    if config.add_eos_token and eos is not None and not vocabulary.has_post_processor:
        suffix = (*suffix, eos)
    return prefix, suffix


def stop_ids(
    config: TokenizerConfig, vocabulary: Vocabulary, eos: int | None, model_ids: Iterable[int]
) -> set[int]:
    """Return the token ids that end a text.

    Args:
        config, vocabulary: of the tokenizer.
        eos: id of the token named `eos_token`, or None.
        model_ids: `ModelConfig.eos_token_ids`, which are the default of the model class where
            the folder's files name none.
    """
    declared = config.named_tokens.get("eos_token")
    is_declared = declared is not None and vocabulary.token_id(declared.content) is not None
    ids = set() if eos is None else {eos}
    if is_declared and config.model.silent_on_eos:
        return ids
    if not is_declared and config.model.eos_ids:
        return set(model_ids)
    return ids | set(model_ids)
