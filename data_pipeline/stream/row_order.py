"""The order of the packs of a block: drawn at random, but for the few that cost far more than the others.

A step deals its rows to the ranks so that all have the same work (`windows.assign_rows`), each rank as many rows. One
row that costs as much as five others cannot be evened out by that, but by a second one like it in the same step. So the
rows above HEAVY times the median cost stand together, as long as they are rare: where they are common, every step has
several and the dealing has what it needs.

    clusters    of CLUSTER_ROWS rows, by descending cost, each where its costliest row was drawn
    the rest    as drawn
"""

from __future__ import annotations

from itertools import islice

import numpy as np
import numpy.typing as npt

from triweave.data_pipeline.stream.mixture import keyed_order

HEAVY = 2.0
"""Multiple of the median cost above which a row is heavy; with 8 rows a rank the others even out what is below."""
MOST_HEAVY = 1 / 8
"""Largest share of heavy rows at which they are put together: one for each of the 8 rows of a rank."""
CLUSTER_ROWS = 16
"""Rows of a cluster: two for each of 8 ranks."""


def row_order(costs: npt.NDArray[np.float64], *key: object) -> npt.NDArray[np.int64]:
    """Return the order that `key` selects of rows that cost `costs` [R], int64 [R]; a pure function of both."""
    order = keyed_order(len(costs), *key)
    drawn = costs[order]
    heavy = np.flatnonzero(drawn > HEAVY * np.median(costs)) if len(costs) else order
    if not 0 < len(heavy) <= MOST_HEAVY * len(costs):
        return order
    light = iter(np.delete(order, heavy).tolist())
    heavy = heavy[np.argsort(-drawn[heavy], kind="stable")]
    stretches = -(-len(costs) // CLUSTER_ROWS)
    clusters: dict[int, list[int]] = {}
    for first in range(0, len(heavy), CLUSTER_ROWS):
        stretch = int(heavy[first]) // CLUSTER_ROWS
        while stretch in clusters:
            stretch = (stretch + 1) % stretches
        clusters[stretch] = order[heavy[first : first + CLUSTER_ROWS]].tolist()
    rows: list[int] = []
    for stretch in range(stretches):
        rows += clusters.get(stretch, [])
        rows += islice(light, CLUSTER_ROWS * (stretch + 1) - len(rows))
    return np.asarray(rows, np.int64)
