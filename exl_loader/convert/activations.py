"""Run texts through the engine's layers, with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from ..backends import backend_of, base, get_ops
from ..backends.base import Batch
from ..backends.layouts import DenseLinear, fill_dense
from ..cache.layout import CacheLayer, pages_for
from ..checkpoint.rope import inv_freq
from ..model.builder import Builder
from ..model.decoder import DecoderLayer
from ..model.parts.experts import Experts
from ..model.parts.linear import Linear
from ..model.parts.mlp import Mlp, PlainMlp
from ..model.parts.part import Block, LayerState, Loading, StepViews
from ..utils.table import MAIN_MEMORY, TensorSpec
from .error_feedback import Hessian
from .reservation import CACHE_TYPE, rows_at_once, step_cache_specs, step_specs

if TYPE_CHECKING:
    from ..backends.base import DeviceOps
    from ..utils.progress import Progress
    from .source import Source


class FirstProducts:
    """Products of a block's input, of which each is computed once.

    They are those with the weights that its linear layers have now. A layer whose weights are
    replaced is computed each time.

    Args:
        linears: layers that read the block's input.
    """

    def __init__(self, linears: Iterable[Linear]) -> None:
        self._weights = [linear.weights for linear in linears]
        self._known: dict[tuple[int, int], torch.Tensor] = {}
        self.step = 0

    def has(self, w: base.Linear) -> bool:
        """Return whether it is one of the layers' own weights."""
        return any(own is w for own in self._weights)

    def multiply(self, ops: DeviceOps, x: torch.Tensor, w: base.Linear, out: torch.Tensor,
                 scratch: torch.Tensor) -> None:
        """out = x @ W + bias, from memory if it was computed before."""
        product = out[:, : w.out_features]
        known = self._known.get((self.step, id(w)))
        if known is None:
            ops.linear(x, w, out, scratch)
            self._known[self.step, id(w)] = product.clone()
        else:
            product.copy_(known)


class _RecordingOps:
    """The operations of a device, which also give the inputs of chosen linear layers to a callback.

    Args:
        ops: those of the device.

    Attributes:
        recorders: id of a layer's weights -> called with its input, float32 [T, K].
        unused: id of a layer's weights whose product nobody reads, so that it is left out.
        products: those that are computed once, at the moment; None for none.
    """

    def __init__(self, ops: DeviceOps) -> None:
        self._ops = ops
        self.recorders: dict[int, Any] = {}
        self.unused: int | None = None
        self.products: FirstProducts | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def call(self, function: Any) -> None:
        # Experts call the operations that they are given: these.
        function(self)

    def linear(self, x: torch.Tensor, w: base.Linear, out: torch.Tensor, scratch: torch.Tensor,
               add: bool = False) -> None:
        record = self.recorders.get(id(w))
        if record is not None:
            record(x)
        if id(w) == self.unused:
            return
        if self.products is not None and self.products.has(w):
            assert not add
            self.products.multiply(self._ops, x, w, out, scratch)
            return
        self._ops.linear(x, w, out, scratch, add)


_NOTHING = torch.empty(0, dtype=torch.uint8)


def _do_nothing() -> None:
    return


def _allocate(specs: Iterable[TensorSpec]) -> dict[str, torch.Tensor]:
    """Allocate each tensor on its device, with zeros.

    Raises:
        MemoryError: the system refused.
    """
    found = {}
    for spec in specs:
        # The tensor keeps its buffer's memory alive.
        buffer, owner = backend_of(spec.device).empty(spec.device, max(spec.nbytes, 1))
        found[spec.name] = buffer.zero_()[: spec.nbytes].view(getattr(torch, spec.dtype)).view(
            spec.shape
        )
    return found


@dataclass(eq=False)
class LoadedLayer:
    """A decoder layer in memory.

    Args:
        index: its number.
        layer: its parts, with their weights.
        state: room for keys and values of a step.
    """

    index: int
    layer: DecoderLayer
    state: LayerState

    def __post_init__(self) -> None:
        self._own = {linear.name: linear.weights for linear in self.layer.linears}
        self._by_name = {linear.name: linear for linear in self.layer.linears}

    def replace(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Use other weights [in_features, out_features] in linear layers, by their names."""
        for name, weight in weights.items():
            linear = self._by_name[name]
            own = self._own[name]
            assert isinstance(own, DenseLinear)
            tiles = torch.zeros_like(own.weight, dtype=weight.dtype)
            fill_dense(weight.t(), 0, tiles)
            linear.weights = DenseLinear(own.in_features, own.out_features, tiles, own.bias)

    def restore(self, names: Iterable[str]) -> None:
        """Use the source's weights again."""
        for name in names:
            self._by_name[name].weights = self._own[name]


def _batch(rows: int, row_len: int, device: torch.device) -> Batch:
    pages = pages_for(row_len)

    def numbers(count: int) -> torch.Tensor:
        return torch.arange(count, dtype=torch.int32, device=device)

    return Batch(
        positions=numbers(row_len).repeat(rows),
        q_start=numbers(rows + 1) * row_len,
        past_len=torch.zeros(rows, dtype=torch.int32, device=device),
        page_table=numbers(rows * pages).view(rows, pages),
        max_total_len=row_len,
    )


class LayerRunner:
    """Runs the layers of a model over hidden states that the caller keeps.

    Hidden states are float32 [R, T, hidden_size], R texts of T tokens, in main memory. The device
    has a layer, the tensors of a step, and what is computed from them.

    Args:
        source: the model.
        row_len: the largest T, and the length that RoPE is scaled for.
        progress: shows the compilation of kernels.
        device: runs the layers.

    Attributes:
        ops: the operations that it runs.
        torch_device: of the tensors on the device, for PyTorch.
        tick: called after each step, to show that the work goes on.
    """

    def __init__(
        self, source: Source, row_len: int, progress: Progress | None = None,
        device: str = MAIN_MEMORY,
    ) -> None:
        self._source, self._device, self._progress = source, device, progress
        self._parts = source.parts_on(device)
        self.tick: Callable[[], None] = _do_nothing
        self._row_len = row_len
        self._rows_at_once = rows_at_once(row_len)
        self._recording = _RecordingOps(get_ops(device, progress))
        self.ops = cast("DeviceOps", self._recording)
        self._workspace = _allocate(step_specs(self._parts, row_len))
        self.torch_device = self._workspace["x"].device
        self._cache_specs = step_cache_specs(self._parts, row_len)
        self._known_views: dict[tuple[int, int], StepViews] = {}
        self._ropes = [
            (rope, *inv_freq(rope.config, row_len)) for rope in self._parts.ropes()
        ]

    def _views(self, rows: int, row_len: int) -> StepViews:
        """Return the views of a step of texts of row_len tokens, with its angles computed."""
        views = self._known_views.get((rows, row_len))
        if views is None:
            hidden_size = self._source.config.hidden_size
            views = StepViews(
                self._workspace, _batch(rows, row_len, self.torch_device), hidden_size
            )
            self._known_views[rows, row_len] = views
        for rope, frequencies, factor in self._ropes:
            rope.run(self.ops, views, self._on_device(frequencies), factor)
        return views

    def _on_device(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, device=self.torch_device)

    def embed(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the input of layer 0 for texts of T token ids."""
        source, (embedding, _) = self._source, self._source.parts.ends
        # In main memory on every device: each row of the table is read a few times at most.
        ops = get_ops(MAIN_MEMORY, self._progress)
        table = source.checkpoint.read(embedding.spec.name)
        factor = source.config.embedding_multiplier
        positions = source.parts.positions
        if positions is not None:
            views = _allocate(positions.specs())
            positions.load(Loading(source.checkpoint, views, {MAIN_MEMORY: ops}))
        states = torch.empty(len(rows), self._row_len, source.config.hidden_size)
        batch = _batch(1, self._row_len, states.device)
        for row, state in zip(rows, states, strict=True):
            ops.embed(torch.tensor(row, dtype=torch.int32), table, factor, state)
            if positions is not None:
                work = {"x": state, "h": torch.empty_like(state), "scratch": _NOTHING}
                positions.run(ops, StepViews(work, batch, source.config.hidden_size))
        return states

    def load(self, index: int) -> LoadedLayer:
        """Read the weights of a layer."""
        source = self._source
        # A new object each time, so that its weights are freed with it.
        layer = Builder(source.config, source.checkpoint).layer(index, self._device)
        layer.load(self._loading(layer.specs()))
        prefix = f"cache.{index}."
        cache = _allocate(s for s in self._cache_specs if s.name.startswith(prefix))
        keys, values = cache[f"{prefix}k_codes"], cache[f"{prefix}v_codes"]
        state = LayerState(CacheLayer(keys, None, values, None, CACHE_TYPE))
        return LoadedLayer(index, layer, state)

    def _loading(self, specs: Iterable[TensorSpec]) -> Loading:
        """Return what parts with these specs load into: new memory."""
        return Loading(self._source.checkpoint, _allocate(specs), {self._device: self.ops})

    def _steps(self, states: torch.Tensor) -> Iterator[tuple[StepViews, torch.Tensor]]:
        """Cut hidden states into steps: views, and states [rows of the step * T, hidden_size]."""
        for part in states.split(self._rows_at_once):
            yield self._views(*part.shape[:2]), part.view(-1, part.shape[-1])
            self.tick()

    def run(self, loaded: LoadedLayer, states: torch.Tensor) -> None:
        """Replace the inputs of a layer by its outputs."""
        for views, part in self._steps(states):
            views.x.copy_(part)
            loaded.layer.run(self.ops, views, loaded.state)
            part.copy_(views.x)

    def record(
        self, loaded: LoadedLayer, states: torch.Tensor, kept_rows: int = 0,
        outputs: torch.Tensor | None = None,
    ) -> tuple[dict[str, Hessian], dict[str, torch.Tensor]]:
        """Run a layer over hidden states, which stay as they are, and record inputs.

        Args:
            loaded: the layer.
            states: its inputs.
            kept_rows: texts whose inputs of the blocks are kept, from the first on; 0 for none.
            outputs: gets the layer's outputs; None where they are not needed.

        Returns:
            Name of the first linear layer of every `input_groups` group -> Hessian of its input;
            "attention" and "mlp" -> inputs of the blocks, float32 [kept_rows, T, hidden_size].
        """
        layer = loaded.layer
        hessians: dict[str, Hessian] = {}
        recorders = self._recording.recorders
        for group in layer.input_groups():
            hessian = hessians[group[0].name] = Hessian(
                group[0].spec.in_features, self.torch_device
            )
            recorders[id(group[0].weights)] = hessian.add
        kept = {name: _KeptRows(kept_rows * states.shape[1]) for name in ("attention", "mlp")}
        for name, block in (("attention", layer.attention), ("mlp", layer.mlp)):
            first = id(_reads_input(block).weights)
            recorders[first] = kept[name].before(recorders.get(first))
        if outputs is None and isinstance(layer.mlp, (Mlp, PlainMlp)):
            # The last product of a layer, a quarter of the work.
            self._recording.unused = id(layer.mlp.down.weights)
        first_row = 0
        for views, part in self._steps(states):
            views.x.copy_(part)
            layer.run(self.ops, views, loaded.state)
            if outputs is not None:
                outputs.flatten(0, 1)[first_row : first_row + len(part)] = views.x
                first_row += len(part)
        recorders.clear()
        self._recording.unused = None
        inputs = {
            name: rows.rows().view(kept_rows, states.shape[1], -1) for name, rows in kept.items()
        } if kept_rows else {}
        return hessians, inputs

    def run_block(
        self, loaded: LoadedLayer, block: Block, x: torch.Tensor,
        products: FirstProducts | None = None,
    ) -> torch.Tensor:
        """Return what a block adds to the hidden states, before its output norm.

        Args:
            x: inputs of the block, float32 [R, T, hidden_size], from `record`.
            products: from `FirstProducts`, always of the same inputs; None computes all products.
        """
        out = x.clone()
        self._recording.products = products
        for step, (views, part) in enumerate(self._steps(out)):
            if products is not None:
                products.step = step
            views.h.copy_(part)
            views.x.zero_()
            block.run(self.ops, views, loaded.state, views.h, views.x, add=True)
            part.copy_(views.x)
        self._recording.products = None
        return out

    def load_head(self) -> None:
        """Read final norm and output head, for `logits`."""
        _, head = self._parts.ends
        head.load(self._loading(head.specs()))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states after the last layer.

        Args:
            states: float32 [n, hidden_size], n at most `LOGITS_ROWS`.

        Returns:
            float32 [n, vocab_size]; the next call overwrites them.
        """
        views = self._views(self._rows_at_once, self._row_len)
        _, head = self._parts.ends
        views.x[: len(states)].copy_(states)
        logits = views.view("logits", len(states), head.linear.out_features)
        rows = torch.arange(len(states), dtype=torch.int32, device=self.torch_device)
        head.run(self.ops, views, rows, logits)
        return logits

    def head_hessian(self, states: torch.Tensor) -> Hessian:
        """Return the Hessian of the output head's inputs for outputs of the last layer."""
        _, head = self._parts.ends
        norm = head.norm
        norm.load(self._loading(norm.specs()))
        hessian = Hessian(states.shape[-1], self.torch_device)
        for state in states:
            x = state.to(self.torch_device)
            normed = torch.empty_like(x)
            norm.run(self.ops, x, normed)
            hessian.add(normed)
        return hessian


def _reads_input(block: Block) -> Linear:
    """Return a linear layer whose input is that of the block."""
    if isinstance(block, Experts):
        return block.router
    return block.input_groups()[0][0]


def first_products(block: Block) -> FirstProducts:
    """Return the products of a block's input; a mixture's depend on what else an expert reads."""
    return FirstProducts([] if isinstance(block, Experts) else block.input_groups()[0])


class _KeptRows:
    """Collects the first rows of an input.

    Args:
        count: rows to keep.
    """

    def __init__(self, count: int) -> None:
        self._left = count
        self._parts: list[torch.Tensor] = []

    def before(self, other: Any) -> Any:
        """Return a recorder that keeps rows and then calls `other`, if there is one."""
        def record(x: torch.Tensor) -> None:
            if self._left:
                part = x[: self._left].clone()
                self._parts.append(part)
                self._left -= len(part)
            if other is not None:
                other(x)
        return record

    def rows(self) -> torch.Tensor:
        """Return the rows, float32 [count, K]."""
        return torch.cat(self._parts)
