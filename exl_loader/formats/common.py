"""Functions that all formats use: checks of headers, reading of biases, checks of values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..utils.errors import InvalidCheckpoint, UnsupportedFormat
from ..utils.integers import round_up

if TYPE_CHECKING:
    import torch

    from ..checkpoint import Checkpoint, TensorHeader
    from .layer import LinearSpec, RowRanges

FLOAT_DTYPES = ("float16", "bfloat16", "float32")
WRONG_FILE = "Check that the weight files belong to this config.json, or download them again"


def expect(header: TensorHeader, dtypes: Iterable[str], shape: tuple[int | None, ...]) -> None:
    """Check a tensor's dtype and shape.

    Args:
        header: of the tensor.
        dtypes: the allowed ones.
        shape: the required one; None allows any size of a dimension.

    Raises:
        InvalidCheckpoint: the shape differs.
        UnsupportedFormat: the dtype is not allowed.
    """
    dtypes = tuple(dtypes)
    if header.dtype not in dtypes:
        raise UnsupportedFormat(
            f"{header.name}: dtype",
            expected=" or ".join(dtypes),
            actual=header.dtype,
            remedy=WRONG_FILE,
        )
    if len(header.shape) != len(shape) or any(
        want not in (None, have) for want, have in zip(shape, header.shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise InvalidCheckpoint(
            f"{header.name}: shape",
            expected=f"[{wanted}]",
            actual=list(header.shape),
            remedy=WRONG_FILE,
        )


def expect_columns(
    header: TensorHeader,
    stored: int,
    out_features: int,
    rows: RowRanges | None,
    padding: int = 1,
) -> None:
    """Check that a tensor has the output columns that a layer needs.

    Args:
        header: of the tensor, for messages.
        stored: number of output columns of the tensor.
        out_features: number of output columns that the layer needs.
        rows: output rows of a fused tensor; None is the whole tensor.
        padding: `stored` may be `out_features` rounded up to a multiple of this number.

    Raises:
        InvalidCheckpoint: the tensor has too few or too many columns.
    """
    if rows is not None:
        assert sum(map(len, rows)) == out_features, (header.name, rows)
        most = max(part[-1] + 1 for part in rows)
        if stored < most:
            raise InvalidCheckpoint(
                f"{header.name}: output features",
                expected=f"at least {most}",
                actual=stored,
                remedy=WRONG_FILE,
            )
        return
    if stored not in (out_features, round_up(out_features, padding)):
        raise InvalidCheckpoint(
            f"{header.name}: output features",
            expected=out_features,
            actual=stored,
            remedy=WRONG_FILE,
        )


def has_bias(
    checkpoint: Checkpoint,
    source: str,
    out_features: int,
    rows: RowRanges | None,
    bias: bool | None,
    expert: int | None = None,
) -> bool:
    """Return whether a layer has a bias, and check its header.

    A stored bias is used even if the architecture has none, because AutoGPTQ stores zero biases
    for every layer, and adding zeros changes nothing.

    Args:
        bias: True requires a bias, False ignores a stored one, None uses one that is stored.
        expert: number of the bias in a tensor [experts, output features]; None where the tensor
            has one bias.

    Raises:
        InvalidCheckpoint: `bias` is True and no bias is stored, or its shape is wrong.
        UnsupportedFormat: the dtype of the bias is not in `FLOAT_DTYPES`.
    """
    stored = f"{source}.bias"
    if bias is False or (bias is None and stored not in checkpoint.headers):
        return False
    header = checkpoint.header(stored)
    expect(header, FLOAT_DTYPES, (None,) if expert is None else (None, None))
    if expert is not None:
        expect_experts(header, header.shape[0], expert)
    expect_columns(header, header.shape[-1], out_features, rows)
    return True


def expect_experts(header: TensorHeader, stored: int, expert: int) -> None:
    """Check that a tensor of `stored` experts has the one of this number.

    Raises:
        InvalidCheckpoint: it has not.
    """
    if expert >= stored:
        raise InvalidCheckpoint(
            f"{header.name}: experts", expected=f"at least {expert + 1}", actual=stored,
            remedy=WRONG_FILE,
        )


def read_columns(spec: LinearSpec, tensor: torch.Tensor) -> torch.Tensor:
    """Return the layer's columns of a tensor [..., output columns of the source].

    This is a view where they are one range.
    """
    import torch

    ranges = spec.rows or (range(spec.out_features),)
    parts = [tensor[..., part.start : part.stop : part.step] for part in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def read_word_rows(
    spec: LinearSpec, checkpoint: Checkpoint, name: str, first: int, end: int
) -> torch.Tensor:
    """Read rows first to end of a tensor of codes, int32 [end - first, columns of the layer].

    Padding columns are included where the layer is the whole tensor.
    """
    words = checkpoint.read_rows(name, first, end)
    return words if spec.rows is None else read_columns(spec, words)


def read_bias(spec: LinearSpec, checkpoint: Checkpoint) -> torch.Tensor | None:
    """Read a layer's bias, float32 [out_features]; None if the layer has none.

    Raises:
        InvalidCheckpoint: a value is not finite.
    """
    if not spec.has_bias:
        return None
    name = f"{spec.source}.bias"
    expert = spec.options.get("expert")
    if expert is None:
        bias = checkpoint.read(name)
    else:
        bias = checkpoint.read_rows(name, expert, expert + 1)[0]
    require_finite(checkpoint.header(name).name, bias)
    return read_columns(spec, bias).float()


def require_finite(name: str, tensor: torch.Tensor) -> None:
    """Check that a tensor of `FLOAT_DTYPES` is finite.

    Raises:
        InvalidCheckpoint: a value is NaN or infinite.
    """
    import torch

    # Values are compared as integers: without the sign bit, exactly the bit patterns from that
    # of infinity upwards are not finite. For 16-bit types this takes a tenth of the time of
    # `torch.isfinite`, and every weight is checked.
    integer = torch.int32 if tensor.element_size() == 4 else torch.int16
    infinity = torch.tensor(float("inf"), dtype=tensor.dtype).view(integer)
    magnitude = tensor.view(integer) & torch.iinfo(integer).max
    if tensor.numel() and bool(magnitude.max() >= infinity):
        raise InvalidCheckpoint(
            f"{name}: values",
            expected="finite numbers",
            actual=f"{int((magnitude >= infinity).sum())} that are NaN or infinite",
            remedy="Download the file again",
        )
