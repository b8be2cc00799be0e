"""gpu.py at toy size on a CPU; what it reports of a section that fails, and of wrong values."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import bench
import gpu
import pytest
import torch
from torch import nn

from common import UserError

ROOT = Path(__file__).parents[1]


def test_every_section_runs_and_passes_at_toy_size(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/gpu.py"), "--toy", "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads((tmp_path / "gpu.json").read_text())["lines"]
    assert [line for line in lines if not line["ok"]] == []
    assert list(dict.fromkeys(line["section"] for line in lines)) == list(gpu.sections(gpu.TOY))
    numbers = [line["value"] for line in lines if not isinstance(line["value"], str)]
    assert all(map(math.isfinite, numbers))
    whats = {line["what"] for line in lines}
    assert {"speed", "the device waits", "linear probe", "graphs", "processes", "52 heads, 10 classes"} <= whats
    limits = [line for line in lines if line["limit"] is not None]
    assert len(limits) >= 14
    assert len(done.stdout.splitlines()) == len(lines)


def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing(monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    out = tmp_path / "gpu.json"
    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(out)])
    with pytest.raises(UserError, match="no GPU that works.*--toy"):
        gpu.main()
    assert not out.exists()


# a CUDA torch, as far as an import can tell; a process that has counted devices may fork no user of them
PRETENDED = """
import sys
sys.path[:0] = {paths!r}
import torch
calls = []
for name in ("getDeviceCount", "init", "getCurrentRawStream", "getDevice", "exchangeDevice", "maybeExchangeDevice"):
    setattr(torch._C, "_cuda_" + name, lambda *_: calls.append(1) or 1)
import gpu, torch._dynamo
assert not calls
assert torch.cuda.is_available() and calls  # the pretence works
"""


def test_importing_it_touches_no_gpu_so_that_its_forks_may():
    script = PRETENDED.format(paths=[str(ROOT), str(ROOT / "tests")])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ==== what is reported ============================================================================
def raises(s, table):
    table.figure("before", 1.0)
    raise UserError("no such thing")


def test_a_section_that_fails_dies_or_hangs_is_reported_and_the_others_run(tmp_path, capsys):
    sections = {
        "raises": raises,
        "dies": lambda s, table: os._exit(3),
        "hangs": lambda s, table: time.sleep(600),
        "good": lambda s, table: table.check("fine", 1, 2),
    }
    saved = []
    s = SimpleNamespace(folder=tmp_path)
    lines = gpu.run_sections(sections, s, lambda x: saved.append(list(x)), 60, longest=2)
    failed = {line["section"]: line["value"] for line in lines if not line["ok"]}
    assert set(failed) == {"raises", "dies", "hangs"}
    assert failed["raises"].endswith("no such thing")
    assert "exit code 3" in failed["dies"]
    assert failed["hangs"] == "took longer than 2 s"
    assert {"before", "fine"} <= {line["what"] for line in lines}
    lengths = [len(part) for part in saved]
    assert lengths == sorted(set(lengths))
    assert len(saved) == 4
    assert saved[-1] == lines
    assert capsys.readouterr().out.count("FAILED") == 3


def test_no_section_begins_after_the_time_is_up(tmp_path):
    s = SimpleNamespace(folder=tmp_path)
    lines = gpu.run_sections({"late": raises}, s, lambda _: None, -1)
    whats = [line["what"] for line in lines]
    assert whats == ["error", "whole section"]


@pytest.mark.parametrize("value, code", [(1.0, 0), (1.1, 1), (math.nan, 1)])
def test_a_check_above_its_limit_or_not_a_number_makes_exit_code_1(tmp_path, monkeypatch, value, code):
    monkeypatch.setattr(gpu, "sections", lambda s: {"one": lambda s, table: table.check("it", value, 1.0)})
    monkeypatch.setattr("sys.argv", ["gpu.py", "--toy", "--out", str(tmp_path / "gpu.json")])
    assert gpu.main() == code
    first = json.loads((tmp_path / "gpu.json").read_text())["lines"][0]
    assert (first["what"], first["ok"]) == ("it", code == 0)


# ==== comparison with the CPU =====================================================================
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("amp, error, ok", [
    ("off", 5e-5, True), ("off", 2e-4, False), ("bf16", 5e-3, True), ("bf16", 4e-2, False),
])
def test_values_tell_a_wrong_crop_loss_or_gradient(monkeypatch, part, amp, error, ok):
    results = []

    def one_step(s, device, wanted):
        found = [torch.ones(3), torch.tensor([10.0, 0.1]), torch.ones(5)]
        if results and wanted == amp:  # the first step is the CPU's
            found[part] = found[part] * (1 + error)
        results.append(found)
        return found

    monkeypatch.setattr(gpu, "one_step", one_step)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # and back afterwards
    table = gpu.Table("values")
    gpu.values(SimpleNamespace(device=torch.device("cpu")), table)
    if part == 0 and amp == "bf16":  # crops are made in float32
        ok = True
    assert all(line["ok"] for line in table.lines) == ok


def test_gradient_of_fp16_is_taken_at_the_first_scale_at_which_it_is_finite():
    layer = nn.Linear(2, 1, bias=False)
    before = layer.weight.detach().clone()
    run = SimpleNamespace(network=layer, optimizer=torch.optim.SGD(layer.parameters(), 1.0),
                          scaler=torch.amp.GradScaler("cpu"))
    found = gpu.gradient(run, 1e35 * layer(torch.tensor([1.0, 2.0])).sum())
    torch.testing.assert_close(found, torch.tensor([1e35, 2e35]))
    assert torch.equal(layer.weight, before)
    assert run.scaler.get_scale() < 65536


# ==== speed =======================================================================================
def test_busy_counts_a_second_once_however_much_runs_in_it():
    assert gpu.busy([]) == 0
    work = [("a", 20, 21), ("b", 0, 2), ("c", 1, 10), ("d", 2, 3), ("e", 4, 5)]
    assert gpu.busy(work) == 11


def test_longest_kernels_are_sums_over_calls():
    work = [("short", 0, 2), ("long", 2, 5), ("short", 5, 7), ("least", 7, 8)]
    assert gpu.longest_kernels(work, 2) == [("short", 4, 2), ("long", 3, 1)]


def test_device_work_is_what_the_function_does():
    x = torch.randn(300, 300)
    work = gpu.device_work(lambda: x @ x, x.device)
    names = {name for name, *_ in work}
    assert "aten::mm" in names
    assert all(start <= end for _, start, end in work)


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    asked = []

    def training(args, folder, batch, device):
        asked.append(batch)
        if batch > 70:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return SimpleNamespace(batch=batch, step=lambda: None)

    monkeypatch.setattr(bench, "Training", training)
    s = SimpleNamespace(device=torch.device("cpu"), steps=1)
    run, _ = gpu.fitting(None, None, 256, s)
    assert asked == [256, 128, 64]
    assert run.batch == 64
