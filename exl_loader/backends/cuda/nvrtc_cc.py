"""NVRTC as a command-line compiler: a program that ninja runs like nvcc.

    python -I -S nvrtc_cc.py --library libnvrtc.so.13 OPTION... SOURCE -o OUTPUT
    python -I -S nvrtc_cc.py --library libnvrtc.so.13 --supported

The output is a cubin, or PTX where the architecture is `compute_90` rather than `sm_90`.

It is a process of its own, because a compiler that crashes or leaks must not affect a running
web UI, and because ninja can then count and stop it like any other compiler. It uses the
standard library only, so it starts in 20 ms.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

# Prefix of the names of architectures of PTX.
_VIRTUAL = "compute_"
_PREFIXES = ("libnvrtc-builtins", "nvrtc-builtins")


class NvrtcError(Exception):
    """NVRTC failed; the message is its own."""


class Nvrtc:
    """The functions of the NVRTC library at `path`."""

    def __init__(self, path: Path) -> None:
        if hasattr(os, "add_dll_directory"):
            os.add_dll_directory(str(path.parent.absolute()))
        # NVRTC opens its built-in headers by bare name, in folders that the loader may not search.
        self._builtins = [
            ctypes.CDLL(str(other), mode=ctypes.RTLD_GLOBAL)
            for other in sorted(path.parent.iterdir())
            if other.name.startswith(_PREFIXES) and ".alt" not in other.name
        ]
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def supported(self) -> list[int]:
        """Return the architectures that NVRTC compiles for; 90 is sm_90."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", archs)
        return list(archs)

    def compile(self, source: bytes, name: str, options: list[str]) -> tuple[bytes, str]:
        """Compile a source to a cubin, or to PTX for an architecture such as `compute_90`.

        Returns:
            The cubin or PTX, and the compiler's remarks.

        Raises:
            NvrtcError: the source does not compile; the message is the compiler's.
        """
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source, name.encode(), 0,
                   None, None)
        try:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            code = self._library.nvrtcCompileProgram(program, len(options), given)
            log = self._text("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if code != 0:
                raise NvrtcError(log or self._words(code))
            if any(option.startswith(f"--gpu-architecture={_VIRTUAL}") for option in options):
                return self._text("nvrtcGetPTX", program).rstrip(b"\0"), log
            return self._text("nvrtcGetCUBIN", program), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, function: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{function}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(function, program, text)
        return text.raw

    def _call(self, function: str, *arguments) -> None:
        try:
            called = getattr(self._library, function)
        except AttributeError:
            raise NvrtcError(f"this NVRTC is too old: it has no {function}") from None
        code = called(*arguments)
        if code != 0:
            raise NvrtcError(f"{function}: {self._words(code)}")

    def _words(self, code: int) -> str:
        return self._library.nvrtcGetErrorString(code).decode()


def main(arguments: list[str]) -> int:
    """Compile one file, and print the compiler's messages to stdout.

    `--library FILE` comes first, then NVRTC's own options, then `SOURCE -o OUTPUT`. With
    `--supported` instead of these, print the architectures.
    """
    if arguments[2:] == ["--supported"]:
        print(*(f"sm_{number}" for number in Nvrtc(Path(arguments[1])).supported()))
        return 0
    # By position, because argparse takes an option with a space in its path for a file.
    option, library, *options, source, minus_o, output = arguments
    assert (option, minus_o) == ("--library", "-o"), arguments
    try:
        nvrtc = Nvrtc(Path(library))
        cubin, words = nvrtc.compile(Path(source).read_bytes(), source, options)
        Path(output).write_bytes(cubin)
    except (NvrtcError, OSError) as error:
        print(error if isinstance(error, NvrtcError) else f"error: {error}")
        return 1
    if words.strip():
        print(words)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
