"""bench.py at toy size. (No timing is asserted.)"""

import math

import bench
import shapes
import torch

def test_every_figure_is_finite_and_positive(tmp_path):
    shapes.write(tmp_path / "data", 16, 10, size=32)
    flags = ["--data", str(tmp_path / "data"), "--batch_size", "4", "--repeats", "1"]
    threads = torch.get_num_threads()
    figures = bench.measure(bench.read_options(flags))
    torch.set_num_threads(threads)
    assert len(figures) == 13
    assert all(math.isfinite(v) and v > 0 for v in figures.values())
