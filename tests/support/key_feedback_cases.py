"""Second moments of queries, and layers whose keys are rounded with feedback, for tests."""

from __future__ import annotations

import torch

from exl_loader.backends.reference.feedback import feedback_matrix
from exl_loader.cache.layout import GROUP
from exl_loader.utils.integers import round_up
from support.cache_layers import make_layer, write


def moments(heads, head_dim, seed=0, spread=100.0):
    """Return float64 [heads, head_dim, head_dim] with eigenvalues from 1 / spread to 1."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(heads, head_dim, head_dim, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(normal)[0]
    values = spread ** -torch.linspace(0, 1, head_dim, dtype=torch.float64)
    return basis @ (values[:, None] * basis.transpose(1, 2))


def stored_feedback(m):
    """Return the matrix for moments as a layer has it."""
    feedback = feedback_matrix(m)
    padding = round_up(m.shape[-1], GROUP) - m.shape[-1]
    return torch.nn.functional.pad(feedback, (0, padding)).half()


def written(writer, cache_type, k, batch, feedback):
    layer = make_layer(cache_type, int(batch.page_table.max()) + 1, *k.shape[1:])
    layer.key_feedback = feedback
    write(writer, k, k, layer, batch)
    return layer
