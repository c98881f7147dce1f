"""Which tokens begin a text, end it, and are left out of it: the one definition of each.

What the folder says wins over what a class of tokenizers or models takes when it is silent.

**Names** (`bos_token`, `eos_token`, ...), as templates see them: `tokenizer_config.json`; where
that has no `added_tokens_decoder`, `special_tokens_map.json` before it; then what a
`tokenizer.model` says of itself; then the defaults of the class (LlamaTokenizer's `<s>` and
`</s>`) as far as the vocabulary has them. `null` in `tokenizer_config.json` means that there is
no such token.

**BOS id**: the named token; else the token that the post-processor of `tokenizer.json` puts in
front of a text; else none where the name is `null`; else `bos_token_id` of `config.json` or
`generation_config.json`; else the default name's token. An id beyond the model's `vocab_size`
is none.

**What is put in front of a text**: with a `tokenizer.json`, what its post-processor puts there,
as transformers 5 does, whatever `add_bos_token` says; where that puts nothing,
`"add_bos_token": true` adds the BOS token, as exllamav2 and llama.cpp do. With a
`tokenizer.model`, `add_bos_token`; where it is silent, CodeLlamaTokenizer adds one, and a folder
that has no `tokenizer_config.json` is a Llama of 2023, which has one as well. `encode` also puts
behind a text what the post-processor or `add_eos_token` says; prompts never end so.

**Stop ids**: every id that the folder names, because a model may end its text with any of them:
`eos_token_id` (one id or a list) of `generation_config.json` and of `config.json`, and the named
`eos_token`. Where the folder names none, the default name's token and the model class's default.

**Special tokens**, which `skip_special` leaves out of decoded text: added tokens with
`"special": true`, tokens with a name, `extra_special_tokens`, and the control and unknown pieces
of a `tokenizer.model`.
"""

from __future__ import annotations

from collections.abc import Iterable

from .tokenizer_config import TokenizerConfig
from .vocabulary import Vocabulary


def named_tokens(config: TokenizerConfig, vocabulary: Vocabulary) -> dict[str, str]:
    """Return the tokens with a name, `bos_token` and so on, each with its text."""
    named = {
        name: content for name, content in vocabulary.default_named_tokens().items()
        if vocabulary.token_id(content) is not None
    }
    named.update((name, token.content) for name, token in config.named_tokens.items())
    return {name: content for name, content in named.items() if not config.is_null(name)}


def bos_id(config: TokenizerConfig, vocabulary: Vocabulary, names: dict[str, str]) -> int | None:
    """Return the id of the token that a text begins with; None without one."""
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
    """Return the ids that `encode` puts before and after a text."""
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
    """Return the ids that end a text.

    Args:
        config, vocabulary: of the tokenizer.
        eos: the token named `eos_token`, None without one.
        model_ids: what the model's configuration says: `ModelConfig.eos_token_ids`, which are
            its class's default where its files say nothing.
    """
    declared = config.named_tokens.get("eos_token")
    tokenizer_says = declared is not None and vocabulary.token_id(declared.content) is not None
    ids = set() if eos is None else {eos}
    if tokenizer_says and config.model.silent_on_eos:
        return ids
    if not tokenizer_says and config.model.eos_ids:
        return set(model_ids)
    return ids | set(model_ids)
