"""One noised update a message: whatever a client's code returns is clipped and noised as a whole, at the site itself.

The code may do what it likes with the records: only Δ = w' − w is taken from it, over all floating-point tensors
together, and leaves by `privacy.local.LocalPlan`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..core.keys import Stream
from ..core.parameters import Arrays, Layout
from ..privacy.local import LocalPlan


def noised_update(
    model: Arrays, update: Arrays | None, *, layout: Layout, plan: LocalPlan, stream: Stream
) -> dict[str, NDArray[np.generic]]:
    """Return w + clip(w' − w, C) + noise, laid out like the model; whole-number tensors are the model's own.

    An update of another form, one that holds a number that is not finite, and None (the code failed) count as no
    change, since whether they happen may follow from the records.
    """
    start = layout.flatten(model)
    moving = ~layout.whole
    change = np.zeros(layout.size)
    if update is not None and _fits(layout, update):
        change = layout.flatten(update) - start
    start[moving] += plan.release(change[moving], stream)
    return layout.unflatten(start)


def _fits(layout: Layout, update: Arrays) -> bool:
    return set(update) == set(layout.names) and all(
        update[name].shape == shape and update[name].dtype.str == dtype
        for name, shape, dtype in zip(layout.names, layout.shapes, layout.dtypes, strict=True)
    )
