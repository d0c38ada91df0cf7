"""Tables that are looked up by number, such as position embeddings in ``nn.Embedding``."""

from __future__ import annotations

from torch import nn

from gpd_cli.widening.layers.base import Axes, LayerPlan, UnsupportedLayerError
from gpd_cli.widening.layers.linear import outputs
from gpd_cli.widening.layout import Layout, Scale
from gpd_cli.widening.plan import TensorPlan

Table = nn.Embedding | nn.EmbeddingBag


def plan_embedding(
    module: Table, axes: Axes, scale: Scale, keep_output: bool, layout: Layout | None
) -> LayerPlan:
    """Plan a table: it chooses how its columns widen, as a linear layer chooses its outputs.

    Columns are copied and not divided: nothing is summed over them. A bag sums, averages or takes
    the maximum of rows column by column, so that copies stay copies.

    Args:
        module: the narrow table.
        axes: of the weights of a bag's rows, where there are any; numbers of rows do not widen.
        scale: how much wider.
        keep_output: whether its output has to keep its width.
        layout: how its columns widen; by default copies side by side.
    """
    if any(axes):
        raise UnsupportedLayerError("the weights of its rows have become more")
    plan = LayerPlan()
    columns = None if keep_output else outputs(module.embedding_dim, scale, layout)
    if columns is not None:
        plan.tensors["weight"] = TensorPlan((None, columns))
    plan.resize(module, "embedding_dim", columns)
    return plan
