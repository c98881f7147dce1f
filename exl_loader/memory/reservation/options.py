"""The options of `plan` and `load`: each one once, with its type, default, bounds and help.

The command line, the panel and the web UI's flags are made from `LoadOptions.OPTIONS`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypedDict

from ...cache.layout import PAGE_LEN, CacheType, open_bits, pages_for
from ...checkpoint.adapter import same_folder_key
from ...checkpoint.config import ModelConfig
from ...checkpoint.model_class import named_architecture
from ...checkpoint.rope import MAX_FACTOR, MAX_POSITIONS, check_scaling
from ...model.step import DEFAULT_CHUNK_SIZE, DEFAULT_MAX_BATCH_SIZE
from ...utils.byte_counts import parse_bytes
from ...utils.errors import InvalidSettings, shown
from ...utils.setting_values import (
    check_flag,
    check_integer,
    check_number,
    check_path,
    unknown_name,
)
from .length import stretched_length

# No memory holds a larger cache.
MAX_CACHE_TOKENS = 1 << 32

# Most tokens of context where the user names none.
DEFAULT_CTX_SIZE = 8192

# With open pages, tokens of context for each text that may run at once, and the fewest texts.
TOKENS_OF_A_TEXT = 8192
LEAST_BATCH_SIZE = 2
# Below so many tokens of context there is one text where open pages have 16 bits, because those of
# two could take more than the quantised cache saves.
TOKENS_OF_TWO_TEXTS = 4096

# A factor on an adapter that is no mistake is far smaller.
MAX_SCALING = 1e4

CtxSize = int | str | None
LoraPath = str | os.PathLike[str]
Loras = LoraPath | Sequence[LoraPath | tuple[LoraPath, float]] | None
Function = Literal["plan", "load"]


@dataclass(frozen=True)
class Option:
    """What a front end shows and checks of one option.

    Args:
        default: its value where the user gives none.
        help: one line for the command line and for pages, without a full stop.
        metavar: name of the value in the command line's help; None for a flag.
        unit: what a number counts: `tokens`, `sequences`, `GiB`, `bytes`; empty for a factor.
        least, most: the bounds of a number; None where the value is no number.
        step: the step of a slider; None where a page has no slider for it.
        choices: the values that a menu offers. `cache_type` takes others as well.
        only: the function that has this option, where the other one does not.
    """

    default: Any
    help: str
    metavar: str | None = None
    unit: str = ""
    least: float | None = None
    most: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    only: Function | None = None


def _option(default: Any, help: str, metavar: str | None = None, **more: Any) -> Any:
    option = Option(default, help, metavar, **more)
    return field(default=default, metadata={"option": option})


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is planned and loaded. The field names are the keywords of `plan` and `load`.

    An object may hold any values, as a person typed them: `check` finds those that make no
    sense, and `plan` and `load` call it.

    Attributes:
        ctx_size: tokens of context. None is the model's own length, at most 8192. `auto` is
            the most that fits, at most the model's own length. One text can use at most so many.
        cache_size: tokens that the pages of all texts hold together, in whole pages of 256. 0
            is as many as ctx_size. More let several long texts run at once. Without a ctx_size
            of its own, a text can use at most cache_size.
        cache_type: `fp16`, `q8`, `q6`, `q4`, `q3`, or keys and values apart such as `q8_q4`.
        device: `auto` (as many of the cards that can run models as the model needs, else the
            CPU), a device's name, or several names, over which layers are split in order.
        gpu_split: GiB that our buffers may take of each device, such as `20,24`.
        vram: of `plan` alone. Bytes of cards that need not be here, such as `24GiB,12GiB`.
        memory_limit: most bytes that our buffers may take of each device, such as `24GiB`.
        embedding_device: where the token embedding of a model on cards is: `auto` and `cpu` are
            main memory, which the card of the first layer reads a few rows of in each step. The
            name of that card puts the embedding there. A tied head that is not quantised, on the
            card of the first layer, is the embedding as well and takes no memory twice.
        chunk_size: most tokens in one forward pass; at least `max_batch_size`.
        max_batch_size: most sequences in one forward pass, and so most texts that run at once.
            None means 8, or with open pages (`cache_window`) one for each 8,192 tokens of the
            cache, from 2 to 8, so that their open pages stay small beside the cache; 1 below
            4,096 tokens beside codes of 6 or 8 bits.
        alpha_value: NTK factor of RoPE, which stretches the model's own length.
        compress_pos_emb: factor that positions are divided by, which stretches it too.
        as_architecture: architecture to run a model of an unknown class as, with a warning, such
            as `LlamaForCausalLM`; refused for a known class but its own. It holds for a draft
            model whose class is unknown as well.
        cache_window: 256 keeps the page that each running text is writing, its newest tokens up
            to a multiple of 256, and its first token in 16 bits beside a quantised cache, in 8
            bits beside 4-bit codes. 0 keeps none so, which takes less memory and loses quality.
        replacing: of `plan` alone. Plan as if every model that this process has loaded had
            been unloaded.
        model_draft: folder of a smaller model with the same vocabulary that guesses how texts
            go on. It lives as a whole on the first device. None or empty for none. Texts are
            the same with and without it.
        ctx_size_draft: the draft model's tokens of context, which is also the size of its cache;
            0 for as many of both as the model's.
        draft_max: of `load` alone. Most tokens that the draft model guesses at a time. Fewer are
            guessed, or none, where they would take more time than they save.
        loras: folders of LoRA adapters to load with the model, each alone or as (folder,
            scaling); or text such as `first,second=0.5`. Their room is reserved exactly.
        max_lora_bytes: the least room for LoRA adapters that is reserved on each device, such
            as `256MiB`, so that adapters can be loaded later.
        machines: where other machines find this one, such as `tcp://192.168.1.10:29500`. They run
            `python -m exl_loader serve-stage`, and each holds a part of the layers; see
            docs/machines.md. None or empty for this machine alone. `gpu_split` then has a part
            for each machine, divided by `;`, such as `20,24;16`.
    """

    OPTIONS: ClassVar[Mapping[str, Option]]

    ctx_size: CtxSize = _option(
        None,
        "tokens of context, or auto for the most that fits; by default the model's own length, "
        f"at most {DEFAULT_CTX_SIZE}",
        "N|auto", unit="tokens", least=1, most=MAX_POSITIONS, step=PAGE_LEN,
    )
    cache_size: int = _option(
        0, "tokens of the cache that all running texts share; 0 is as many as ctx_size", "N",
        unit="tokens", least=0, most=MAX_CACHE_TOKENS, step=PAGE_LEN,
    )
    cache_type: str | CacheType = _option(
        "fp16", "key/value cache: fp16, q8, q6, q4, q3, or keys and values apart such as q8_q4",
        "TYPE", choices=("fp16", "q8", "q6", "q4", "q3"),
    )
    device: str | Sequence[str] = _option(
        "auto",
        "cpu, a card such as cuda:0, or several such as cuda:0,cuda:1, over which layers are "
        "split; auto is as many of the cards that can run models as the model needs, else the CPU",
        "DEVICE",
    )
    gpu_split: str | Sequence[float] | None = _option(
        None, "GiB to use of each card, such as 20,24; with several machines 20,24;16",
        "GIB,...", unit="GiB"
    )
    vram: int | str | Sequence[int | str] | None = _option(
        None, "plan for cards of this size that are not here, such as 24GiB or 24GiB,12GiB",
        "SIZE,...", unit="bytes", only="plan",
    )
    memory_limit: int | str | None = _option(
        None, "most memory to take of each device, such as 8GiB", "SIZE", unit="bytes"
    )
    embedding_device: str = _option(
        "auto",
        "where the token embedding of a model on cards is: cpu, or the card of the first layer; "
        "auto is main memory",
        "DEVICE",
    )
    chunk_size: int = _option(
        DEFAULT_CHUNK_SIZE, "most tokens in one forward pass", "N",
        unit="tokens", least=1, most=1 << 16,
    )
    max_batch_size: int | None = _option(
        None,
        f"most texts that run at once; by default {DEFAULT_MAX_BATCH_SIZE}, with a quantised "
        f"cache one for each {TOKENS_OF_A_TEXT:,} tokens of context, from "
        f"{LEAST_BATCH_SIZE} to {DEFAULT_MAX_BATCH_SIZE}", "N",
        unit="sequences", least=1, most=1 << 10,
    )
    cache_window: int = _option(
        PAGE_LEN, "keep the newest tokens of each running text in more bits beside a quantised "
        f"cache: {PAGE_LEN}, the page that is being written, or 0 for none", "N",
        unit="tokens", least=0, most=PAGE_LEN, step=PAGE_LEN,
    )
    alpha_value: float = _option(
        1.0, "NTK factor of RoPE: about 2.6 for twice the model's own length", "N",
        least=1 / MAX_FACTOR, most=MAX_FACTOR, step=0.05,
    )
    compress_pos_emb: float = _option(
        1.0, "divide positions by N: 2 for twice the model's own length", "N",
        least=1 / MAX_FACTOR, most=MAX_FACTOR, step=0.1,
    )
    as_architecture: str | None = _option(
        None,
        "run a model of an unknown architecture as this one, such as LlamaForCausalLM; its output "
        "may be wrong", "CLASS",
    )
    replacing: bool = _option(
        False, "plan as if the models that this process has loaded had been unloaded",
        only="plan",
    )
    model_draft: str | os.PathLike[str] | None = _option(
        None,
        "smaller model with the same vocabulary that guesses ahead; the text stays the same",
        "FOLDER",
    )
    ctx_size_draft: int = _option(
        0, "tokens of context of the draft model; 0 is as many as the model's", "N",
        unit="tokens", least=0, most=MAX_POSITIONS,
    )
    draft_max: int = _option(
        4, "most tokens that the draft model guesses at a time", "N",
        unit="tokens", least=1, most=31, only="load",
    )
    loras: Loras = _option(
        None, "folders of LoRA adapters, with a scaling where that is not 1: first,second=0.5",
        "FOLDER,...",
    )
    max_lora_bytes: int | str | None = _option(
        None, "room to reserve on each device for LoRA adapters that are loaded later, such as "
        "256MiB", "SIZE", unit="bytes",
    )
    machines: str | None = _option(
        None, "address at which other machines, which run serve-stage, find this one and take "
        "a part of the layers, such as tcp://192.168.1.10:29500", "ADDRESS",
    )

    @classmethod
    def names(cls, function: Function) -> tuple[str, ...]:
        """Return the names of the options that `plan` or `load` has."""
        return tuple(
            name for name, option in cls.OPTIONS.items() if option.only in (None, function)
        )

    @classmethod
    def from_keywords(cls, function: Function, keywords: Mapping[str, Any]) -> LoadOptions:
        """Take the keywords of a call of `plan` or `load`.

        Raises:
            InvalidSettings: the function has no option of that name. A similar one is named.
        """
        known = cls.names(function)
        for name in keywords:
            if name in cls.OPTIONS and name not in known:
                raise InvalidSettings(
                    f"{function}: option {name!r}", expected=f"an option of {function}",
                    actual=f"an option of {cls.OPTIONS[name].only} alone", remedy="Leave it out",
                )
            if name not in known:
                arguments = (*known, "progress") if function == "load" else known
                raise unknown_name(f"{function}: option", name, arguments)
        return LoadOptions(**keywords)

    def for_plan(self) -> dict[str, Any]:
        """Return the keywords for `plan`: its options that are not at their defaults."""
        return self._keywords("plan")

    def for_load(self) -> dict[str, Any]:
        """Return the keywords for `load`: its options that are not at their defaults."""
        return self._keywords("load")

    def _keywords(self, function: Function) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.names(function)}
        defaults = self.OPTIONS
        return {name: value for name, value in values.items() if value != defaults[name].default}

    def check(self) -> None:
        """Check what can be judged without the model folder and without the devices.

        Raises:
            InvalidSettings: an option makes no sense. It is named.
        """
        if self.model_draft is not None:
            check_path("model_draft", self.model_draft, "folder")
        if self.as_architecture is not None:
            named_architecture(self.as_architecture)
        check_flag("replacing", self.replacing)
        if not isinstance(self.embedding_device, str):
            raise InvalidSettings(
                "embedding_device", expected="auto, cpu or a card such as cuda:0",
                actual=shown(self.embedding_device),
            )
        if isinstance(self.ctx_size, str) and self.ctx_size != "auto":
            raise InvalidSettings(
                "ctx_size", expected="a number of tokens or auto", actual=shown(self.ctx_size)
            )
        counts = ["cache_size", "chunk_size", "ctx_size_draft", "draft_max"]
        if self.max_batch_size is not None:
            counts.append("max_batch_size")
        if not (self.ctx_size is None or self.ctx_size == "auto"):
            counts.append("ctx_size")
        for name in counts:
            option = self.OPTIONS[name]
            assert option.least is not None and option.most is not None
            check_integer(name, getattr(self, name), int(option.least), int(option.most))
        if self.cache_size and isinstance(self.ctx_size, int):
            needed = pages_for(self.ctx_size)
            if pages_for(self.cache_size) < needed:
                raise InvalidSettings(
                    "cache_size",
                    expected=f"at least {needed * PAGE_LEN}: the pages of one text of ctx_size "
                    f"({self.ctx_size})",
                    actual=self.cache_size,
                    remedy="Choose a larger cache_size or a smaller ctx_size, or leave cache_size "
                    "at 0",
                )
        check_scaling(self.alpha_value, self.compress_pos_emb)
        check_integer("cache_window", self.cache_window, 0, PAGE_LEN)
        if self.cache_window not in (0, PAGE_LEN):
            raise InvalidSettings(
                "cache_window", expected=f"0 or {PAGE_LEN}", actual=self.cache_window
            )
        if self.max_batch_size is not None and self.chunk_size < self.max_batch_size:
            raise InvalidSettings(
                "chunk_size",
                expected=f"at least max_batch_size ({self.max_batch_size}): one row a sequence",
                actual=self.chunk_size,
            )
        CacheType.parse(self.cache_type)
        self.chosen_loras()
        self.lora_room()
        self._check_machines()

    def _check_machines(self) -> None:
        """Refuse an address that is no text, and what several machines cannot have."""
        if self.machines is not None and not isinstance(self.machines, str):
            raise InvalidSettings(
                "machines", expected="an address such as tcp://192.168.1.10:29500",
                actual=shown(self.machines),
            )
        if not self.machines:
            return
        alone = {"loras": bool(self.chosen_loras()), "max_lora_bytes": bool(self.lora_room()),
                 "vram": self.vram not in (None, "")}
        for name, is_set in alone.items():
            if is_set:
                raise InvalidSettings(
                    name, expected=f"no {name} together with machines",
                    actual=shown(getattr(self, name)),
                    remedy="Each machine tells what memory it has" if name == "vram"
                    else "LoRA adapters need a model on one machine: merge them into its weights",
                )

    def chosen_loras(self) -> tuple[tuple[str, float], ...]:
        """Return the folder and the scaling of each adapter in `loras`.

        Raises:
            InvalidSettings: an entry is no folder with a scaling, or a folder is there twice.
        """
        value = self.loras
        entries: list[Any]
        if value is None:
            entries = []
        elif isinstance(value, str):
            entries = [_with_scaling(text.strip()) for text in value.split(",") if text.strip()]
        elif isinstance(value, os.PathLike):
            entries = [value]
        elif isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
            entries = list(value)
        else:
            raise _invalid_loras(value)
        chosen = []
        for entry in entries:
            pair = entry if isinstance(entry, (tuple, list)) else (entry, 1.0)
            if len(pair) != 2:
                raise _invalid_loras(entry)
            folder, scaling = pair
            check_path("loras", folder, "folder")
            check_number("the scaling of a LoRA", scaling, -MAX_SCALING, MAX_SCALING)
            chosen.append((os.path.expanduser(os.fspath(folder)), float(scaling)))
        if len({same_folder_key(folder) for folder, _ in chosen}) < len(chosen):
            raise InvalidSettings("loras", expected="each folder once",
                                  actual=shown([folder for folder, _ in chosen]))
        return tuple(chosen)

    def lora_room(self) -> int:
        """Return `max_lora_bytes` in bytes; 0 without it."""
        if self.max_lora_bytes is None or self.max_lora_bytes in ("", 0):
            return 0
        return parse_bytes(self.max_lora_bytes, "max_lora_bytes")

    def stretched_length(self, model_dir: str | os.PathLike[str]) -> int:
        """Return the model's own length in tokens, as far as the RoPE options stretch it.

        Raises:
            InvalidSettings: a RoPE option makes no sense, or
                `as_architecture` does not fit the folder.
            ModelNotFound, InvalidConfig, UnsupportedArchitecture: of the folder's config.json.
        """
        check_scaling(self.alpha_value, self.compress_pos_emb)
        check_path("model_dir", model_dir, "folder")
        config = ModelConfig.from_dir(Path(model_dir), self.as_architecture)
        return stretched_length(config, self.alpha_value, self.compress_pos_emb)


def _with_scaling(text: str) -> tuple[str, float]:
    """Read a folder with its scaling, such as `adapters/first=0.5`."""
    folder, equals, scaling = text.rpartition("=")
    try:
        return (folder, float(scaling)) if equals else (text, 1.0)
    except ValueError:
        return text, 1.0


def _invalid_loras(value: Any) -> InvalidSettings:
    return InvalidSettings(
        "loras", expected="folders, each alone or as (folder, scaling)", actual=shown(value)
    )


LoadOptions.OPTIONS = MappingProxyType(
    {entry.name: entry.metadata["option"] for entry in fields(LoadOptions)}
)


class SharedKeywords(TypedDict, total=False):
    """The keywords of `plan` and `load`, for editors and type checkers; see `LoadOptions`."""

    ctx_size: CtxSize
    cache_size: int
    cache_type: str | CacheType
    device: str | Sequence[str]
    gpu_split: str | Sequence[float] | None
    memory_limit: int | str | None
    embedding_device: str
    chunk_size: int
    max_batch_size: int | None
    cache_window: int
    alpha_value: float
    compress_pos_emb: float
    as_architecture: str | None
    model_draft: str | os.PathLike[str] | None
    ctx_size_draft: int
    loras: Loras
    max_lora_bytes: int | str | None
    machines: str | None


class PlanKeywords(SharedKeywords, total=False):
    """The keywords of `plan`."""

    vram: int | str | Sequence[int | str] | None
    replacing: bool


class LoadKeywords(SharedKeywords, total=False):
    """The keywords of `load`, apart from `progress`."""

    draft_max: int


@dataclass(frozen=True)
class RunOptions:
    """What decides the bytes of a run, apart from the model and its devices.

    The options of the same names of `LoadOptions`; a max_batch_size of None stands for the number
    that `at` chooses.
    """

    cache_type: CacheType
    chunk_size: int
    max_batch_size: int | None = None
    cache_window: int = PAGE_LEN
    cache_size: int = 0

    def cache_tokens(self, ctx_size: int) -> int:
        """Return the tokens that the cache holds in whole pages, at least those of one text."""
        return pages_for(max(self.cache_size, ctx_size)) * PAGE_LEN

    def at(self, ctx_size: int) -> RunOptions:
        """Return the options with the max_batch_size for a context of `ctx_size` tokens."""
        if self.max_batch_size is not None:
            return self
        most = DEFAULT_MAX_BATCH_SIZE
        if self.has_open_pages:
            tokens = self.cache_tokens(ctx_size)
            kind = self.cache_type
            is_large = max(open_bits(kind.k_bits), open_bits(kind.v_bits)) == 16
            least = 1 if is_large and tokens < TOKENS_OF_TWO_TEXTS else LEAST_BATCH_SIZE
            most = min(most, max(least, tokens // TOKENS_OF_A_TEXT))
        return replace(self, max_batch_size=min(most, self.chunk_size))

    @property
    def has_open_pages(self) -> bool:
        """True if the workspace has open pages."""
        return self.cache_window > 0 and self.cache_type.has_open_pages
