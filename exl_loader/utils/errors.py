"""The exceptions of this package: one type for each thing that a user can do about an error.

Every error names the thing, what was expected, what was found and the remedy, so that a program
or a web page can show it as one readable line. Long text such as a compiler's output goes into
`details`.
"""

import re
import reprlib
import traceback
from collections.abc import Sequence
from typing import Any

# Control characters, which a terminal would obey; lone surrogates, which no stream can write; and
# characters that change the direction of the text around them.
_UNPRINTABLE = re.compile(
    "([\x00-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069])\\1*"
)
_LONGEST_RUN = 8

_SURROGATE = re.compile("[\ud800-\udfff]")

# Most characters of a part of an error's line. A list of all settings has 800.
_LONGEST_PART = 1500


def printable(text: str) -> str:
    """Escape the characters of a text that a terminal would obey or a stream cannot write."""
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    """Escape a run of one character. A long run is counted, so that no text grows by much."""
    run, escape = found[0], ascii(found[1])[1:-1]
    return escape * len(run) if len(run) <= _LONGEST_RUN else f"{escape} ({len(run)} times)"


def is_text(text: str) -> bool:
    """Return whether a string has no lone surrogates, which are halves of characters."""
    return _SURROGATE.search(text) is None


class _ShortRepr(reprlib.Repr):
    """`repr` of any value, bounded in length, depth and time; it raises nothing."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = limit
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = limit // 3
        self.maxlevel = 4

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write integers of thousands of digits.
        if value.bit_length() > 1 << 10:
            return f"an integer of {value.bit_length()} bits"
        return super().repr_int(value, level)


def shown(value: Any, limit: int = 80) -> str:
    """Return the `repr` of a value for a message, cut to `limit` characters.

    It works for any value: integers of thousands of digits, lists within lists, objects whose
    `repr` raises.
    """
    text = printable(_ShortRepr(limit).repr(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown_name(name: str, limit: int = 80) -> str:
    """Return the name of a file or a tensor for a message: printable, cut, without quotes."""
    text = printable(name)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown_names(names: Sequence[str], most: int = 3) -> str:
    """List names for a message: the first `most` names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown_name, names[:most])) + more


class ExlLoaderError(Exception):
    """Base of all exceptions that this package raises on purpose.

    Args:
        thing: what is wrong, named as the user knows it (a file, a tensor, a setting).
        expected: what would have been right, or None.
        actual: what was found instead, or None.
        remedy: what the user can do about it, or None.
        details: long text such as a compiler's output, which is not part of the line; or None.
    """

    def __init__(self, thing, *, expected=None, actual=None, remedy=None, details=None):
        self.thing = _plain(str(thing))
        self.expected = _plain(expected)
        self.actual = _plain(actual)
        self.remedy = _plain(remedy)
        self.details = _plain(details)
        super().__init__(self._line())

    def _line(self):
        expected, actual = _cut(self.expected), _cut(self.actual)
        line = _cut(self.thing)
        if self.expected is not None and self.actual is not None:
            line += f": expected {expected}, found {actual}"
        elif self.expected is not None:
            line += f": expected {expected}"
        elif self.actual is not None:
            line += f": {actual}"
        if self.remedy:
            line += f". {_cut(self.remedy)}"
        return " ".join(line.split())


def _cut(part: Any) -> str:
    """Cut a part of the line: a name or the message of a library may have megabytes."""
    text = str(part)
    return text if len(text) <= _LONGEST_PART else text[:_LONGEST_PART] + "..."


def _plain(value: Any) -> Any:
    """Return the value where it can be printed, otherwise an escaped text in its place."""
    if isinstance(value, str):
        return printable(value)
    if value is None:
        return None
    try:
        text = str(value)
    except Exception:
        # Python refuses to write integers of thousands of digits.
        return shown(value)
    return value if text.isprintable() else printable(text)


def known_line(error: BaseException) -> str | None:
    """Describe an error that a user can act on in one line; return None for a bug.

    Besides this package's errors these are errors of the system: a full disk, a folder that was
    removed, full memory, a missing package.
    """
    if isinstance(error, ExlLoaderError):
        return str(error)
    if isinstance(error, MemoryError):
        return "main memory is full. Close what takes it, or choose a smaller context"
    if isinstance(error, ImportError):
        return printable(f"{error}. `python -m exl_loader doctor` shows what is missing")
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return printable(f"{where}{error.strerror or error}")
    return None


class ModelNotFound(ExlLoaderError):
    """The model folder, or a file that every model folder has, does not exist."""


class InvalidConfig(ExlLoaderError):
    """`config.json` cannot be read or contradicts itself."""


class UnsupportedArchitecture(ExlLoaderError):
    """This engine does not run the model's architecture."""


class InvalidCheckpoint(ExlLoaderError):
    """Weight files are missing, truncated or contradict themselves."""


class UnsupportedFormat(ExlLoaderError):
    """The weights have a format that this engine does not read. Pickle files are one."""


class InvalidTokenizer(ExlLoaderError):
    """The tokenizer or chat template is missing or unusable."""


class InvalidSettings(ExlLoaderError):
    """A load option or a generation setting has an invalid value."""


class PromptTooLong(ExlLoaderError):
    """The prompt does not fit into the context."""


class InsufficientMemory(ExlLoaderError):
    """The reservation does not fit on a device, or the device refused a buffer.

    Attributes:
        reservation: the `reservation.Reservation` that does not fit, with every figure; None
            where another program took the memory after the plan had fitted.
    """

    # Any: every other module imports this one, so this one imports none of them.
    reservation: Any = None


class CacheFull(ExlLoaderError):
    """No free pages are left for this request."""


class KernelBuildError(ExlLoaderError):
    """Compiling or opening the kernels failed."""


class DeviceError(ExlLoaderError):
    """A graphics card or its driver is missing, or refused a request."""


class MachineLost(ExlLoaderError):
    """Another machine ended, hangs or cannot be reached any more, so its layers are gone."""


class MachineRefused(ExlLoaderError):
    """Machines cannot work together: one is missing, or its version, rank or type differs."""


class MachineFailed(ExlLoaderError):
    """Another machine failed at what it was asked for; `details` has its traceback."""


class DownloadError(ExlLoaderError):
    """A download failed: the server refuses it or cannot be reached, or the disk is too small."""


class ModelUnloaded(ExlLoaderError):
    """The model was used after `unload()`."""


class ModelForked(ModelUnloaded):
    """The model was used in a process that was forked from the one that loaded it."""


class InvalidCall(ExlLoaderError):
    """A callback on the model's thread made a call that would wait for that thread."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the system refused memory.

    PyTorch's CPU allocator raises a RuntimeError. Its text begins as below and goes on as the
    system's does: "can't allocate memory", "not enough memory".
    """
    return isinstance(error, MemoryError) or "DefaultCPUAllocator: " in str(error)


def drop_locals(error: BaseException) -> None:
    """Clear the local variables of the frames in an error's traceback that have ended.

    A caller may keep an error to show it, as an interactive session keeps its last one. Through
    the traceback it would also keep every buffer and view that a local variable held: a model's
    whole memory, long after it was unloaded.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            traceback.clear_frames(current.__traceback__)
            pending += [current.__cause__, current.__context__]


def modules_of(error: BaseException) -> list[str]:
    """Return the names of the modules in an error's traceback; the one that raised it is last."""
    names = []
    trace = error.__traceback__
    while trace is not None:
        names.append(str(trace.tb_frame.f_globals.get("__name__", "")))
        trace = trace.tb_next
    return names
