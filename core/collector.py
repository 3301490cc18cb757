"""Python's collector of reference cycles, kept from going through what is there to stay."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def sparing() -> Iterator[None]:
    """Leave all objects that are there out of later collections, until the end.

    Thousands of messages a round set off collections that go through the whole process again and again, which took a
    quarter of a round of a large cohort.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
