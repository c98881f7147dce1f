"""Protocols of a kind of device: its memory, and the operations of a forward pass.

There is one `Backend` for each kind of device. It has the memory functions, the sizes of the
tensors that its operations need, and `open`, which returns the `DeviceOps` of one device. `Ops`
has one signature for each operation.
`reference.ops.ReferenceOps` defines the operations in plain torch; `cpu` and `cuda` call
compiled kernels. These rules hold for all of them:

- Activations are float32, contiguous, row-major; a row is one token.
- The caller passes the outputs (views into the workspace), and an operation writes them in place.
  An implementation allocates no memory in a call (the reference may).
- A row's result does not depend on which other rows are in the call, nor on the number of
  threads, bit for bit. So a request generates the same text, whatever other requests run.
- `scratch` is a uint8 view of the workspace with at least `Backend.scratch_bytes` bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from ..cache.layout import CacheLayer, CacheType
    from ..formats.layer import DenseLayer, DenseSizes, QuantizedLayer, QuantizedSizes
    from ..utils.progress import Progress
    from .cpu_access import CpuAccess

# Name -> dtype (a key of `table.DTYPE_BYTES`) and shape of a tensor.
Shapes = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Capacity:
    """The memory of a device now, in bytes.

    Args:
        capacity_bytes: the device's memory, or the part of it that may be used.
        free_bytes: can be taken now without displacing other data.
        own_bytes: held by this process.
        touchable_bytes: how much of the memory that `Backend.empty` has promised can be touched
            now; None means free_bytes. It is more than free_bytes if address space is the
            limit, because promised memory already has its addresses.
    """

    capacity_bytes: int
    free_bytes: int
    own_bytes: int = 0
    touchable_bytes: int | None = None

    @property
    def other_bytes(self) -> int:
        """Held by other processes, the desktop and the system."""
        return max(0, self.capacity_bytes - self.free_bytes - self.own_bytes)


@dataclass(frozen=True)
class Process:
    """Another process that holds memory of a device."""

    pid: int
    name: str
    held_bytes: int


@dataclass
class Batch:
    """Rows of one forward pass: S sequences of different lengths, consecutively.

    Args:
        positions: int32 [T], position of each row in its sequence.
        q_start: int32 [S + 1], first row of each sequence, then T.
        past_len: int32 [S], tokens of each sequence that are in the cache before the pass.
        page_table: int32 [S, max_pages], page numbers of each sequence in order.
        max_total_len: largest past_len + q_len of the batch (an int, so that no
            implementation has to read device memory).
        inv_freq: float32 [S, rotary_dim / 2], RoPE's frequencies of each sequence, for layers
            with a key bias; None if no layer has one.
        rope_factor: factor on the cosines and sines of RoPE, for layers with a key bias.
        open_pages: int32 [S], the open page of each sequence, for layers that have open pages.
            The rows of a sequence then lie in one page. None if no layer has open pages.
    """

    positions: torch.Tensor
    q_start: torch.Tensor
    past_len: torch.Tensor
    page_table: torch.Tensor
    max_total_len: int
    inv_freq: torch.Tensor | None = None
    rope_factor: float = 1.0
    open_pages: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        rows: int = self.positions.shape[0]
        return rows

    @property
    def num_sequences(self) -> int:
        sequences: int = self.past_len.shape[0]
        return sequences


@dataclass(frozen=True)
class AttentionShape:
    """The parameters of an attention layer other than its weights.

    Args:
        num_heads: query heads.
        num_kv_heads: key/value heads; divides num_heads.
        head_dim: elements a head.
        scale: factor on the dot product, before the soft cap.
        softcap: cap * tanh(score / cap) is applied to scores; 0 means no cap.
        sliding_window: number of latest positions that a row attends to, its own included; 0 is
            all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float = 0.0
    sliding_window: int = 0


@dataclass(frozen=True)
class Routing:
    """How a mixture of experts chooses the experts of a row.

    The scores of all experts are the softmax or the sigmoid of the router's logits. The top_k
    experts of score + correction are chosen; without a correction these are those of the largest
    logits. Their weights are their scores, divided by the sum of the chosen ones where
    `normalize`, times `factor`.

    Args:
        top_k: experts of a row.
        score: `softmax` or `sigmoid`.
        normalize: whether the weights of the chosen experts sum up to `factor`.
        factor: on the weights.
        correction: float32 [E], used for the choice only; None means 0.
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    factor: float = 1.0
    correction: torch.Tensor | None = None


@dataclass(frozen=True)
class StepSizes:
    """The largest step of a model on one device; scratch and workspace depend on it.

    Args:
        rows: most rows of a step, all sequences together.
        logits_rows: most rows of logits; 0 on a device without the output head.
        max_batch_size: most sequences of a step.
        ctx_size: tokens of the longest sequence.
        cache_type: bits of keys and values.
        attention: the layers' attention; a sliding window is not counted.
        products: (rows, stored rows) of every quantised linear layer, with the head.
        dense_products: the same of the layers that the device stores unquantised.
        vocab_size: logits of a row.
        num_layers: decoder layers on the device.
        num_experts: experts of a layer; 0 if layers have none.
    """

    rows: int
    logits_rows: int
    max_batch_size: int
    ctx_size: int
    cache_type: CacheType
    attention: AttentionShape
    products: frozenset[tuple[int, int]]
    dense_products: frozenset[tuple[int, int]]
    vocab_size: int
    num_layers: int
    num_experts: int


class Backend(Protocol):
    """A kind of device. `device` is `cpu`, `cpu:1`, `cuda:0`, ...; one object serves all."""

    kind: str
    """The start of a device's name, such as `cuda`."""

    default_device: str
    """The device that `kind` alone names, such as `cuda:0`."""

    is_main_memory: bool
    """Whether the devices' memory is the machine's main memory, which every process uses."""

    alignment_bytes: int
    """Every tensor in a buffer starts at a multiple of this many bytes."""

    granularity_bytes: int
    """A buffer takes a multiple of this many bytes."""

    read_buffer_bytes: int
    """Bytes of a buffer that no cache of the device holds, by which its bandwidth is measured."""

    taken_by_touch: bool
    """Whether `empty` only promises memory, which `touch` takes."""

    def auto_devices(self, count: int = 0) -> list[str]:
        """Return the devices of this kind that `device="auto"` may use, in order.

        Args:
            count: number of devices to return, present or not; 0 means the present ones that can
                run models.
        """

    def initialize(self, device: str) -> None:
        """Take the memory that running on the device takes outside our buffers, once.

        Raises:
            InvalidSettings: there is no such device.
        """

    def is_initialized(self, device: str) -> bool:
        """Return whether `initialize` was called: `capacity` and `overhead` are then measured."""

    def capacity(self, device: str) -> Capacity:
        """Return the memory that the system reports.

        Raises:
            InvalidSettings: there is no such device.
        """

    def overhead(self, device: str) -> tuple[int, bool]:
        """Return the bytes that running takes outside our buffers; True if they are measured."""

    def relative_speed(self, device: str) -> int:
        """Return how fast layers run beside other devices of the kind, found without measuring."""

    def processes(self, device: str, limit: int) -> list[Process]:
        """Return the other processes that hold most memory, largest first; [] if unknown."""

    def empty(self, device: str, nbytes: int) -> tuple[torch.Tensor, object]:
        """Allocate one buffer.

        Returns:
            A uint8 tensor [nbytes], and the object that owns the memory: it is freed with it.

        Raises:
            MemoryError: the system refused.
        """

    def empty_mapped(self, device: str, nbytes: int) -> tuple[torch.Tensor, object]:
        """Allocate a buffer of main memory that the device's operations read in place.

        Returns:
            As `empty`; a tensor of the CPU.

        Raises:
            MemoryError: the system refused.
        """

    def touch(self, buffer: torch.Tensor) -> None:
        """Touch the memory of a buffer, or of a part of one, so that the system provides it."""

    def linear_shapes(self, sizes: QuantizedSizes | DenseSizes) -> Shapes:
        """Return the resident tensors of a linear layer except its bias, by role."""

    def stored_rows(self, sizes: QuantizedSizes | DenseSizes) -> int:
        """Return the rows of a layer's stored weight, with the rows that fill up groups."""

    def scratch_bytes(self, step: StepSizes) -> int:
        """Return the most scratch that any operation of such steps needs."""

    def workspace_shapes(self, step: StepSizes) -> Shapes:
        """Return the tensors that only operations of this kind need in the workspace."""

    def open(self, device: str, progress: Progress | None = None) -> DeviceOps:
        """Return a device's operations. Their kernels are compiled if no build of them exists.

        Args:
            progress: shows the compilation, as units done of all.

        Raises:
            InvalidSettings: there are no operations for this device.
            KernelBuildError: the kernels do not compile or do not open.
            DeviceError: the device cannot be used.
            InsufficientMemory: the device has no room for the kernels.
        """


class Linear(Protocol):
    """A linear layer in the resident layout of its device. Only operations use the layout."""

    in_features: int
    out_features: int
    bias: torch.Tensor | None
    """float32 [out_features]; the engine may change it in place."""


class ExpertTable(Protocol):
    """One projection of all experts of a layer, for `Ops.linear_pairs`."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...


class Ops(Protocol):
    """The operations of a forward pass. A `recorder.Recorder` collects them instead."""

    def embed(self, ids: torch.Tensor, table: torch.Tensor | Linear, factor: float,
              out: torch.Tensor) -> None:
        """out[t] = table[ids[t]] * factor.

        Args:
            ids: int32 [T].
            table: [vocab, hidden] in float16, bfloat16 or float32, of the device or from
                `Backend.empty_mapped`, or the unquantised head if word embeddings are tied.
            out: float32 [T, hidden].
        """

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float,
                 out: torch.Tensor) -> None:
        """out = x / sqrt(mean(x^2) + eps) * weight, per row.

        Args:
            x, out: float32 [R, D], may be the same tensor.
            weight: float32 [D], with an offset such as Gemma's + 1 already added.
        """

    def layer_norm(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                   eps: float, out: torch.Tensor) -> None:
        """out = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, per row.

        Args:
            x, out: float32 [R, D], may be the same tensor.
            weight: float32 [P, D], of which row r of x takes row r % P: P is 1, or the heads of
                a token where each head has weights of its own. R is a multiple of P.
            bias: float32 [P, D]; None means 0.
        """

    def linear(self, x: torch.Tensor, w: Linear, out: torch.Tensor, scratch: torch.Tensor,
               add: bool = False) -> None:
        """out = x @ W + bias, or out += x @ W + bias if `add`.

        Args:
            x: float32 [T, in_features].
            out: float32 [T, >= out_features], of which the first out_features columns are
                written (its row stride is respected).
        """

    def rope_table(self, positions: torch.Tensor, inv_freq: torch.Tensor, factor: float,
                   out: torch.Tensor) -> None:
        """Angles: out[t, 0, i] = cos(positions[t] * inv_freq[i]) * factor, out[t, 1, i] the sine.

        Angles are exact to float32 rounding at any position.

        Args:
            positions: int32 [T].
            inv_freq: float32 [rotary_dim / 2].
            out: float32 [T, 2, rotary_dim / 2].
        """

    def rope(self, x: torch.Tensor, table: torch.Tensor, interleaved: bool = False,
             mean: torch.Tensor | None = None) -> None:
        """Rotate heads in place, after subtracting `mean` from those of each row.

        Args:
            x: float32 [T, heads, head_dim]; elements from rotary_dim on stay as they are.
            table: from `rope_table`.
            interleaved: elements 2 * i and 2 * i + 1 of a head are a pair (GLM, Cohere); if not,
                elements i and rotary_dim / 2 + i are (Llama).
            mean: float32 [heads, head_dim]; None: nothing is subtracted.
        """

    def write_cache(self, k: torch.Tensor, v: torch.Tensor, layer: CacheLayer, batch: Batch,
                    scratch: torch.Tensor) -> None:
        """Store keys and values of the batch's rows at positions past_len, ... of their sequences.

        With open pages they are stored there as well, and position 0 as the first token.

        Args:
            k, v: float32 [T, num_kv_heads, head_dim], keys after RoPE, without what
                `layer.key_bias` has.
        """

    def attention(self, q: torch.Tensor, layer: CacheLayer, batch: Batch,
                  shape: AttentionShape, out: torch.Tensor, scratch: torch.Tensor,
                  sinks: torch.Tensor | None = None) -> None:
        """Causal attention of the rows over their sequences' cache (rows already written).

        With open pages, keys and values of the page that contains past_len are read from there,
        position 0 from the first tokens, and only the others from pages.

        The scores of `layer.key_bias` are added; see `DeviceOps.adds_key_bias`.

        Args:
            q, out: float32 [T, num_heads, head_dim]; q is overwritten.
            sinks: float32 [num_heads], a logit of each head that joins the softmax of its rows
                as if it were the score of a key whose value is 0 (GPT-OSS). Neither scale nor
                soft cap nor sliding window applies to it. None: no sinks.
        """

    def gate(self, gate: torch.Tensor, up: torch.Tensor, activation: str,
             out: torch.Tensor) -> None:
        """out = activation(gate) * up, float32 [T, D].

        Args:
            activation: `silu`, `gelu_tanh`, `gelu`, `relu`, `relu2` (the square of `relu`), or
                `quick_gelu` (x * sigmoid(1.702 * x)). Or `clamped_swiglu` (GPT-OSS):
                out = quick_gelu(min(gate, 7)) * (1 + min(max(up, -7), 7)).
            out: may be gate or up.
        """

    def activate(self, x: torch.Tensor, activation: str, out: torch.Tensor) -> None:
        """out = activation(x), float32 [T, D]. out may be x.

        Args:
            activation: one of `gate`, but not `clamped_swiglu`.
        """

    def add(self, x: torch.Tensor, y: torch.Tensor, factor: float = 1.0) -> None:
        """x += y * factor, float32, same shape."""

    def add_gated_rows(self, x: torch.Tensor, y: torch.Tensor, logits: torch.Tensor) -> None:
        """x[t] += sigmoid(logits[t]) * y[t].

        Args:
            x, y: float32 [T, D].
            logits: float32 [T].
        """

    def clamp(self, x: torch.Tensor, limit: float) -> None:
        """x = min(max(x, -limit), limit) in place, float32."""

    def softcap(self, x: torch.Tensor, cap: float) -> None:
        """x = cap * tanh(x / cap) in place, float32 [T, D]."""

    def moe_route(self, router_logits: torch.Tensor, routing: Routing, weights: torch.Tensor,
                  experts: torch.Tensor) -> None:
        """Choose the experts of each row, and their weights.

        Args:
            router_logits: float32 [T, E].
            routing: how; E is at least its top_k.
            weights: float32 [T, top_k], in the order of `experts`.
            experts: int32 [T, top_k], the best first. Equal ones: the lower expert first.
        """

    def linear_pairs(self, x: torch.Tensor, table: ExpertTable, experts: torch.Tensor,
                     out: torch.Tensor, scratch: torch.Tensor) -> None:
        """out[p] = x[p // share] @ W of expert experts[p]. The device reads the expert numbers.

        Args:
            x: float32 [T, in_features].
            table: from `DeviceOps.expert_table`.
            experts: int32 [T, k] or [P].
            out: float32 [P, out_features] of P pairs of a row and an expert. share is P / T, so
                it is 1 if each pair has its own row.
        """

    def moe_sum(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor,
                out: torch.Tensor) -> None:
        """out[t] += sum over k of weights[t, k] * x[t * top_k + k], by rising expert.

        Args:
            x: float32 [T * top_k, D].
            weights: float32 [T, top_k].
            experts: int32 [T, top_k].
            out: float32 [T, D].
        """

    def gather_rows(self, x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
        """out[i] = x[rows[i]]. rows: int32 [R]. float32 [*, D]."""

    def scatter_add_rows(self, x: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor,
                         out: torch.Tensor) -> None:
        """out[rows[i]] += weights[i] * x[i]; a row is in `rows` at most once a call."""

    def top_logits(self, logits: torch.Tensor, vocab_size: int, out: torch.Tensor,
                   scratch: torch.Tensor) -> None:
        """Take up to 1024 of each row's largest logits, and the sum of all others.

        Equal logits are taken together or not at all. A row's result depends on that row alone,
        bit for bit. Called where `Backend.workspace_shapes` has a tensor `top_logits`.

        Args:
            logits: float32 [T, at least vocab_size].
            vocab_size: columns that count.
            out: int32 [T, RESULT_WORDS]; see `top_logits.py`.
        """

    def call(self, function: Callable[[DeviceOps], None]) -> None:
        """Run a function in every step, because its operations depend on values of the step.

        Args:
            function: called with the device's operations.
        """


class Call(Protocol):
    """A recorded call of an operation, with its arguments; see `recorder.py`."""

    def run(self, ops: Ops) -> None:
        """Call the operation."""


class DeviceOps(Ops, Protocol):
    """The operations of a device, and functions for loading and recorded steps."""

    name: str

    adds_key_bias: bool
    """Whether `attention` adds a `CacheLayer.key_bias`. If not, no layer may have one."""

    decode_rows: int | None
    """Most rows of a sequence in a call that have the same bits as in calls of one row each; None
    if that is so for any number."""

    cpu_access: CpuAccess
    """How the CPU reads and writes the device's tensors."""

    needs_upload_buffer: bool
    """Whether packing a layer takes an `upload_buffer`."""

    load_threads: int
    """How many threads may pack layers at once."""

    upload_buffer: torch.Tensor | None
    """uint8 [n] of the device while weights are read; None at other times."""

    def prepare(self, calls: Sequence[Call]) -> list[Callable[[], None]]:
        """Prepare recorded calls once for many replays. Consecutive calls may be joined.

        The tensors keep their addresses; their values may change between replays.
        """

    def read_through(self, buffer: torch.Tensor) -> int:
        """Read a buffer as fast as the device's memory allows, and wait for it.

        A card copies one half of the buffer to the other several times.

        Args:
            buffer: uint8 [`Backend.read_buffer_bytes`] of the device.

        Returns:
            The bytes that were read and written.
        """

    def expert_table(self, layers: Sequence[Linear], room: torch.Tensor) -> ExpertTable | None:
        """Describe one projection of all experts to `linear_pairs`.

        Args:
            layers: in the order of experts.
            room: uint8 [n] of the device, part of the workspace tensor `expert_tables`.

        Returns:
            None if `linear_pairs` cannot run these layers.
        """

    def share_permutations(self, layers: Sequence[Linear]) -> None:
        """Let loaded layers with equal permutations of one input share one permutation tensor."""

    def pack(self, layer: QuantizedLayer | DenseLayer, views: dict[str, torch.Tensor]) -> Linear:
        """Pack a layer into its resident layout.

        Args:
            layer: from `formats.read_linear`.
            views: role -> resident tensor, for the roles of `Backend.linear_shapes` and `bias`;
                every byte is written.

        Raises:
            InvalidCheckpoint: a value is not finite.
            UnsupportedFormat: the layout has no room for the groups.
        """

    def choose_levels(self, rows: torch.Tensor, scales: torch.Tensor, highest: torch.Tensor,
                      tried: int, bits: int, weights: torch.Tensor, levels: torch.Tensor,
                      errors: torch.Tensor) -> None:
        """Find the level of every column's scale with the smallest weighted error, for conversions.

        The error of a level is the sum over rows of weights[r] * (code * scale - rows[r])^2, where
        code is rows[r] / scale, rounded and limited to its bits. A column has `tried` levels: its
        highest, and those just below.

        Args:
            rows: float32 [n, N], the weights of a group.
            scales: float32 [C, 16], C tables of the scale of each level.
            highest: int32 [C, N], `tried` to 16; level 1 is the first of the table.
            bits: of a code, 2 to 8.
            weights: float32 [n].
            levels: int32 [C, N], written.
            errors: float32 [C, N], written: those of the levels.
        """

    def round_rows(self, rows: torch.Tensor, feedback: torch.Tensor, scales: torch.Tensor,
                   bits: int, codes: torch.Tensor, errors: torch.Tensor) -> None:
        """Round the rows of a group consecutively and pass errors on, for conversions.

        errors[i] = (rows[i] - codes[i] * scales) / feedback[i, i]; then, for every j > i,
        rows[j] -= feedback[i, j] * errors[i].

        Args:
            rows: float32 [n, N], overwritten.
            feedback: float32 [n, n], upper triangular.
            scales: float32 [N].
            bits: of a code, 2 to 8.
            codes: int8 [n, N], written: -2^(bits - 1) to 2^(bits - 1) - 1.
            errors: float32 [n, N], written.
        """
