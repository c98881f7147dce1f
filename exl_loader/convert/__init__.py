"""Convert an unquantised model folder to EXL2.

    exl_loader.convert.convert("model", "model-exl2", bits=4.5, head_bits=6)

Importing this package does not import PyTorch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.table import MAIN_MEMORY

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..utils.progress import Progress
    from .conversion import Conversion
    from .reservation import ConversionReservation


def convert(
    model_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    bits: float = 4.5,
    head_bits: int = 6,
    calibration: str | os.PathLike[str] | None = None,
    calibration_rows: int = 64,
    calibration_row_len: int = 512,
    measurement: str | os.PathLike[str] | None = None,
    as_architecture: str | None = None,
    device: str = MAIN_MEMORY,
    progress: Progress | None = None,
    announce: Callable[[ConversionReservation], None] | None = None,
) -> Conversion:
    """Quantise a model to EXL2 with GPTQ error feedback.

    Every linear layer gets a mix of widths (2, 3, 4, 5, 6 or 8 bits). The mixes are chosen by what
    they change in the model's predictions on calibration text, so that the average meets `bits`.
    Embeddings, norms and routers become float16. The output folder appears when it is complete;
    until then a work folder beside it, named `out_dir` and `.work`, has what is done. After an
    interruption the same call continues from there, and writes the same bytes.

    Args:
        model_dir: an unquantised Hugging Face folder of an architecture this engine runs.
        out_dir: a folder that does not exist yet or is empty.
        bits: most bits per weight of the decoder layers, including scales and tables, 2 to 8.
        head_bits: bits of a code of the output head, 6 or 8.
        calibration: a UTF-8 text file; None for the default: prose, code, conversations and
            several languages.
        calibration_rows: rows of calibration text; a short text gives fewer.
        calibration_row_len: tokens of a row; at most the model's `max_position_embeddings`.
        measurement: `measurement.json` of an earlier conversion of this model, by this function or
            by exllamav2, instead of measuring again. Every conversion leaves one in its folder.
        as_architecture: see `LoadOptions`. The new folder keeps the class of its source, so it
            needs the option as well.
        device: runs layers and quantises them, such as `cuda:0`; main memory keeps the rest.
        progress: shows the progress; None shows nothing.
        announce: called with the memory and disk space that it takes, before it starts.

    Returns:
        The chosen mixes of all layers, and the sizes.

    Raises:
        InvalidSettings: a setting is invalid or does not fit the folder, `out_dir` is not empty,
            the work folder is of another conversion, or the disk is too full.
        InsufficientMemory: there is too little memory; nothing was begun.
        UnsupportedFormat: the model is quantised already.
        ModelNotFound, InvalidConfig, UnsupportedArchitecture, InvalidCheckpoint,
        InvalidTokenizer: the source folder cannot be used.
    """
    from ..backends import backend_of, full_name
    from ..utils.errors import InvalidSettings, shown
    from ..utils.setting_values import check_path
    from .conversion import ConvertSettings, run

    check_path("model_dir", model_dir, "folder")
    check_path("out_dir", out_dir, "folder")
    if calibration is not None:
        check_path("calibration", calibration)
    if measurement is not None:
        check_path("measurement", measurement)
    if not isinstance(device, str):
        raise InvalidSettings("device", expected="a name such as cuda:0", actual=shown(device))
    device = full_name(device)
    if backend_of(device).is_main_memory:
        device = MAIN_MEMORY
    settings = ConvertSettings(
        bits=bits,
        head_bits=head_bits,
        calibration=None if calibration is None else Path(calibration),
        num_rows=calibration_rows,
        row_len=calibration_row_len,
        measurement=None if measurement is None else Path(measurement),
        as_architecture=as_architecture,
        device=device,
    )
    return run(Path(model_dir), Path(out_dir), settings, progress, announce)
