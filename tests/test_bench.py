"""bench.py at toy size: every part runs. (No timing is asserted.)"""

import math

import bench
import shapes

def test_every_part_is_measured(tmp_path):
    shapes.write(tmp_path / "data", 16, 10, size=32)
    figures = bench.measure(str(tmp_path / "data"), "demo", "gauss100", repeats=1, batch=4)
    assert {"step", "teacher", "data path, images/s"} <= figures.keys()
    assert all(math.isfinite(v) and v > 0 for v in figures.values())
