"""One exception per thing a user can do about it.

Every error names the thing, what was expected, what was found and the remedy, so that a
person (or a web page) can show it as one readable line. Long material such as a compiler's
output goes into `details`.
"""

from typing import Any


class ExlLoaderError(Exception):
    """Base of everything this package raises on purpose.

    Args:
        thing: what is wrong, named as the user knows it (a file, a tensor, a setting).
        expected: what would have been right.
        actual: what was found instead.
        remedy: what the user can do about it.
        details: long text for a fold-out (compiler output), never part of the one line.
    """

    def __init__(self, thing, *, expected=None, actual=None, remedy=None, details=None):
        self.thing = str(thing)
        self.expected = expected
        self.actual = actual
        self.remedy = remedy
        self.details = details
        super().__init__(self._line())

    def _line(self):
        line = self.thing
        if self.expected is not None and self.actual is not None:
            line += f": expected {self.expected}, found {self.actual}"
        elif self.expected is not None:
            line += f": expected {self.expected}"
        elif self.actual is not None:
            line += f": {self.actual}"
        if self.remedy:
            line += f". {self.remedy}"
        return " ".join(line.split())


class ModelNotFound(ExlLoaderError):
    """The folder, or a file that every model folder has, is not there."""


class InvalidConfig(ExlLoaderError):
    """`config.json` cannot be read or contradicts itself."""


class UnsupportedArchitecture(ExlLoaderError):
    """The model is of a kind this engine does not run."""


class InvalidCheckpoint(ExlLoaderError):
    """Weight files are missing, truncated, or say something that cannot be true."""


class UnsupportedFormat(ExlLoaderError):
    """The weights are stored in a way this engine does not read (pickle files included)."""


class InvalidTokenizer(ExlLoaderError):
    """The tokenizer or chat template is missing or unusable."""


class InvalidSettings(ExlLoaderError):
    """A load option or generation setting has a value that makes no sense."""


class PromptTooLong(ExlLoaderError):
    """The prompt does not fit into the context."""


class InsufficientMemory(ExlLoaderError):
    """The reservation does not fit a device, or the device refused a buffer.

    Attributes:
        reservation: the `reservation.Reservation` that does not fit, with every figure; None
            where memory vanished after a plan had fitted.
    """

    # Any: this file is what all others stand on, and imports none of them.
    reservation: Any = None


class CacheFull(ExlLoaderError):
    """No free pages are left for this request."""


class KernelBuildError(ExlLoaderError):
    """Compiling or opening the kernels failed."""


class DeviceError(ExlLoaderError):
    """A graphics card or its driver is not there, or refused what it was asked."""


class ModelUnloaded(ExlLoaderError):
    """The model was used after `unload()`."""
