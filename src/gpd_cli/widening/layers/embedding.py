"""Plan tables whose rows are looked up by number, such as position embeddings in `nn.Embedding`."""

from __future__ import annotations

from torch import nn

from gpd_cli.widening.layers.base import LayerPlan, UnsupportedLayerError
from gpd_cli.widening.layers.linear import outputs
from gpd_cli.widening.layout import Layout, Scale
from gpd_cli.widening.plan import Axes, TensorPlan

Table = nn.Embedding | nn.EmbeddingBag


def plan_embedding(
    module: Table, axes: Axes, scale: Scale, keep_output: bool, layout: Layout | None
) -> LayerPlan:
    """Plan a table, whose columns widen as the outputs of a linear layer do.

    Columns are copied and not divided, since no sum runs over columns. An ``EmbeddingBag`` sums,
    averages or takes the maximum of rows column by column, so copies stay copies.

    Args:
        module: the narrow table.
        axes: index maps of an ``EmbeddingBag``'s per_sample_weights, if it gets any; row numbers do
            not widen.
        scale: how much wider the network gets.
        keep_output: whether the number of columns has to stay.
        layout: the order of the wide columns; by default copies are side by side.

    Raises:
        UnsupportedLayerError: when the per_sample_weights have widened.
    """
    if any(axes):
        raise UnsupportedLayerError(
            "its per_sample_weights have widened, and each row that it looks up has one weight"
        )
    plan = LayerPlan()
    columns = None if keep_output else outputs(module.embedding_dim, scale, layout)
    if columns is not None:
        plan.tensors["weight"] = TensorPlan((None, columns))
    plan.resize(module, "embedding_dim", columns)
    return plan
