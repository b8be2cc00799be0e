"""A training step keeps an accelerator busy: all of it runs on one device, waits for nothing and
copies nothing but its batch. No GPU is needed.

The pretended device is torch's 'meta': tensors without values, so a ViT-S costs nothing, and every
call that would have to read a value, which on a GPU waits for the device, is an error. `Watch` adds
what torch does not tell: operations that mix devices, copies from the host, kernels.
(Fake 'cuda' tensors would be closer by name, but a torch without CUDA cannot index them.)

Not seen here: AdamW's own launch (its fused kernel knows real devices only), autocast (meta has
none) and drop path (meta has no generator; the preset has no drop path).
"""

import multiprocessing
import random
from collections import Counter
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import pretrain

DEVICE = torch.device("meta")
FLAGS = "--preset imagenet100 --anchor 4 --init unused --denoised unused --data unused --amp off"
SOURCES = ["noisy", "denoised"]


# ==== the instrument ==============================================================================
class MixedDevices(Exception):
    pass


class Operations(TorchDispatchMode):
    """Counts kernels and copies from the host; a mix of devices is an error. (A host tensor of one
    value is none: a GPU gets it as a kernel's argument.)"""
    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        inputs = tensors((args, kwargs))
        reads_host = any(x.device != DEVICE and x.dim() > 0 for x in inputs)
        uses_device = any(x.device == DEVICE for x in [*inputs, *tensors(result)])
        if reads_host and uses_device:
            if name not in ("_to_copy", "copy_"):
                raise MixedDevices(function)
            waits = not (kwargs.get("non_blocking") or True in args[2:])
            self.watch.copies["blocking" if waits else "non_blocking"] += 1
        elif uses_device and not function.is_view and name not in NO_KERNELS:
            self.watch.kernels[name] += 1
        return result


class HostValues(TorchFunctionMode):
    """Counts tensors that are made on the device from numbers of the host, each a blocking copy."""
    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        makers = (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
        if function in makers and result.device == DEVICE:
            self.watch.copies["blocking"] += 1
        return result


class Watch:
    """Counts while it is entered; may be entered again and again."""
    def __init__(self):
        self.kernels, self.copies = Counter(), Counter()

    def __enter__(self):
        self.modes = [HostValues(self), Operations(self)]
        for mode in self.modes:
            mode.__enter__()

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)


NO_KERNELS = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "lift_fresh"}


def tensors(nested):
    return [x for x in tree_leaves(nested) if isinstance(x, torch.Tensor)]


ERRORS = (MixedDevices, RuntimeError, NotImplementedError, TypeError)  # but one torch's, of meta


@pytest.mark.parametrize("offence", [
    lambda x, host: x.sum().item(),
    lambda x, host: x.tolist(),
    lambda x, host: x.cpu(),
    lambda x, host: x.numpy(),
    lambda x, host: x.nonzero(),
    lambda x, host: x[x > 0],
    lambda x, host: float(x[0]),
    lambda x, host: x if x.any() else None,
    lambda x, host: x + host,
    lambda x, host: x[host.long()],
    lambda x, host: torch.cat([x, host]),
])
def test_instrument_refuses_synchronisations_and_mixed_devices(offence):
    x, host = torch.zeros(3, device=DEVICE), torch.zeros(3)
    with Watch(), pytest.raises(ERRORS):
        offence(x, host)


@pytest.mark.parametrize("copy, kind", [
    (lambda x, host: host.to(DEVICE, non_blocking=True), "non_blocking"),
    (lambda x, host: host.to(DEVICE), "blocking"),
    (lambda x, host: x.copy_(host), "blocking"),
    (lambda x, host: x.copy_(host, non_blocking=True), "non_blocking"),
    (lambda x, host: torch.tensor([1.0, 2.0], device=DEVICE), "blocking"),
    (lambda x, host: x.new_tensor([1.0, 2.0]), "blocking"),
])
def test_instrument_counts_copies_from_the_host(copy, kind):
    x, host, watch = torch.zeros(3, device=DEVICE), torch.zeros(3), Watch()
    with watch:
        copy(x, host)
    assert watch.copies == {kind: 1}


def test_instrument_counts_kernels_but_no_views():
    x, watch = torch.zeros(2, 3, device=DEVICE), Watch()
    with watch:
        y = x[:, 1:].mT.expand(2, 2)
        z = y * 2 + torch.zeros(())  # a number of the host
        torch.empty_like(z)[0].detach()
    assert watch.kernels == {"mul": 1, "add": 1}
    assert not watch.copies


# ==== a step of imagenet100's NCT =================================================================
class Images:
    """Stands for a folder of 120 images, of which no pixel matters."""
    channels = 3
    paths = [f"{i}.png" for i in range(120)]

    def __len__(self):
        return len(self.paths)

    def hold(self, *_):
        pass

    def copies(self, i, sources):
        return [torch.zeros(3, 256, 256, dtype=torch.uint8) for _ in sources]


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("run"))
    return pretrain.read_config([*FLAGS.split(), "--out", out])


@pytest.fixture(scope="module")
def batch(args):
    """What a worker makes for one step, on the host."""
    indices = list(range(args.batch_size))
    return pretrain.make_batch(args, Images(), SOURCES, slice(None), 0, 0, indices)


@pytest.fixture
def run(args, monkeypatch):
    """Student, teacher and anchor on the device."""
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda x, **kw: x)  # it reads values
    monkeypatch.setattr(torch, "autocast", lambda *a, **kw: nullcontext())
    with DEVICE:
        run = pretrain.Run(args, 3, DEVICE)
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    return run


def test_step_has_the_papers_size(args, batch, run):
    assert batch["noisy_global"].shape == batch["denoised_global"].shape == (80, 3, 224, 224)
    assert batch["noisy_local"].shape == (320, 3, 96, 96)
    for network in (run.network, run.teacher, run.anchor):
        assert len(network.backbone.blocks) == 12
        assert network.backbone.embed_dim == 384
        assert network.head.last_layer["weight_v"].shape == (65536, 256)


def test_batch_reaches_the_device_in_at_most_eight_copies_that_wait_for_nothing(batch):
    watch = Watch()
    with watch:
        moved = common.to_device(batch, DEVICE)
    print(f"copies of a batch: {dict(watch.copies)}")
    assert all(x.device == DEVICE for x in tensors(moved))
    assert watch.copies == {"non_blocking": len(batch)}
    assert len(batch) <= 8


@pytest.mark.parametrize("device, pinned", [("cuda:0", True), ("cpu", False)])
def test_batches_are_made_in_pinned_memory_for_cuda(monkeypatch, streams, device, pinned):
    """A copy from any other memory would block, whatever it is asked for."""
    asked = []

    def loader(*_, pin_memory, **kw):
        asked.append(pin_memory)
        return []

    monkeypatch.setattr(torch.utils.data, "DataLoader", loader)
    list(common.prefetch(None, [], torch.device(device), 0))
    assert asked == [pinned]


# ==== batches are copied ahead ====================================================================
CUDA = torch.device("cuda:0")


@pytest.fixture
def streams(monkeypatch):
    """What the streams of a pretended GPU are told, in order; copies to it stay on the host."""
    seen, current = [], ["compute"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            seen.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def entered(stream):
        current.append(stream.name)
        yield
        current.pop()

    def copy(batch, device):
        seen.append(f"copy {batch['x'].item()} on {current[-1]}")
        return batch

    def record(x, stream):
        seen.append(f"{x.item()} is kept for {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(current[-1]))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.Tensor, "record_stream", record)
    monkeypatch.setattr(common, "to_device", copy)
    loader = torch.utils.data.DataLoader

    def pageable(*args, pin_memory, **kw):
        return loader(*args, **kw)

    monkeypatch.setattr(torch.utils.data, "DataLoader", pageable)
    return seen


def numbered(i):
    return {"x": torch.tensor(i)}


@pytest.mark.parametrize("workers", [0, 2])
def test_next_batch_is_copied_on_a_stream_of_its_own_before_the_present_one_is_computed_on(streams, workers):
    """Computing waits for its own batch, not for the next one, and keeps its memory."""
    keys = [(i,) for i in range(3)]
    for batch in common.prefetch(numbered, keys, CUDA, workers):
        streams.append(f"compute on {batch['x'].item()}")
    assert streams == [
        "copy 0 on side",
        "compute waits for side", "0 is kept for compute", "copy 1 on side", "compute on 0",
        "compute waits for side", "1 is kept for compute", "copy 2 on side", "compute on 1",
        "compute waits for side", "2 is kept for compute", "compute on 2"]


@pytest.mark.parametrize("device", [CUDA, torch.device("cpu")])
def test_one_batch_is_made_ahead_for_cuda_and_none_without_workers_on_the_cpu(streams, device):
    made = []

    def make(i):
        made.append(i)
        return numbered(i)

    ahead = 1 if device == CUDA else 0
    for i, batch in enumerate(common.prefetch(make, [(i,) for i in range(5)], device, 0)):
        assert batch["x"] == i
        assert made == list(range(min(i + 1 + ahead, 5)))
    assert any("side" in line for line in streams) == (device == CUDA)


def test_set_of_one_batch_and_of_none_end(streams):
    assert [x["x"].item() for x in common.prefetch(numbered, [(7,)], CUDA, 0)] == [7]
    assert list(common.prefetch(numbered, [], CUDA, 0)) == []


def test_stop_leaves_no_worker(streams):
    keys = ((i,) for i in range(1000))
    batches = common.prefetch(numbered, keys, CUDA, 2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


# ==== crops =======================================================================================
def test_crops_of_a_step_are_made_by_at_most_350_kernels(batch):
    moved, watch = common.to_device(batch, DEVICE), Watch()
    mean, std = torch.zeros(2, 3, 1, 1, device=DEVICE)
    with watch:
        crops = pretrain.make_crops(moved, SOURCES, mean, std)
    print(f"kernels of the crops: {watch.kernels.total()}, {dict(watch.kernels)}")
    shapes = {source: [tuple(x.shape) for x in made] for source, made in crops.items()}
    globals_, locals_ = (80, 3, 224, 224), (320, 3, 96, 96)
    assert shapes == {"noisy": [globals_, locals_], "denoised": [globals_]}
    assert 0 < watch.kernels.total() <= 350
    assert not watch.copies


def host_states():
    """Of all random numbers that a process draws by default."""
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def test_steps_copy_nothing_but_their_batch_and_wait_for_nothing(args, batch, run, monkeypatch):
    """train() itself, two steps of an epoch of three, which has neither a log line nor a
    checkpoint: crops, forward passes, losses, centres, backward, clipping, EMA."""
    watch, states = Watch(), []

    def batches(loop, make, epochs):
        for _ in range(2):
            moved = common.to_device(batch, loop.device)
            states.append(host_states())
            with watch:
                yield moved
        states.append(host_states())

    monkeypatch.setattr(common.Loop, "batches", batches)
    before = dict(run.anchor.named_buffers())
    data = {"mean": [0.5] * 3, "std": [0.2] * 3}
    loop, stopped = pretrain.train(args, run, Images(), data, (0, 0, 0.0), None)
    print(f"kernels of a step: {watch.kernels.total() // 2}, copies: {dict(watch.copies)}")
    assert (loop.total, stopped) == (2, False)
    assert not watch.copies
    assert states[0] == states[1] == states[2]
    # all of it was seen
    assert watch.kernels["native_layer_norm_backward"] > 0
    assert watch.kernels["_foreach_lerp_"] == 2
    for name, center in run.anchor.named_buffers():
        assert center is not before[name]
    for teacher in (run.teacher, run.anchor):
        assert teacher.cls_center.device == DEVICE
    for network in (run.network, run.teacher, run.anchor):
        assert {p.device for p in network.parameters()} == {DEVICE}


# ==== the same on the CPU, with the optimiser and drop path =======================================
def test_steps_draw_no_random_number_by_default(tmp_path, monkeypatch):
    """All draws are keyed: whatever else uses the default generators changes no result."""
    (tmp_path / "data").mkdir()
    for i in range(8):
        Image.new("RGB", (32, 32), (30 * i, 99, 255 - 30 * i)).save(tmp_path / f"data/{i}.png")
    states, update = [], pretrain.Run.update

    def watched(run, *rest):
        update(run, *rest)
        states.append(host_states())

    monkeypatch.setattr(pretrain.Run, "update", watched)
    flags = ("--arch 16,2,2 --prototypes 16 --global_size 32 --local_size 16 --batch_size 4 "
             "--epochs 2 --drop_path 0.2 --noise gauss50 --device cpu --workers 0")
    paths = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", ["pretrain.py", *flags.split(), *paths])
    assert pretrain.main() == 0
    assert len(states) == 4
    assert all(state == states[0] for state in states)
