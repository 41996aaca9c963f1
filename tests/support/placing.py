"""Pages put into RAM by their indices, as a destination puts runs of them."""

from __future__ import annotations

import numpy as np

from migd.ram.bitmap import PageIndices, runs_of
from migd.ram.block import RamBlock
from migd.ram.layout import RamLayout


def put_pages(ram: RamBlock | RamLayout, indices: PageIndices, pages: np.ndarray) -> None:
    """Pages, shape (n, 4096), at ascending indices."""
    layout = ram if isinstance(ram, RamLayout) else RamLayout([ram])
    layout.write(runs_of(indices), memoryview(pages.tobytes()))
