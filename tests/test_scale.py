"""scale.py: its formulas give what the code does, and results/scale.md is what it makes."""

import random
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import scale
import shapes
import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import common
import denoise
import pretrain

RESULTS = Path(__file__).parents[1] / "results"
META, CPU = torch.device("meta"), torch.device("cpu")
SMALL_HEAD = ["--prototypes", "1024", "--head_hidden", "16", "--head_bottleneck", "8"]


def count(module):
    """Number of parameters."""
    sizes = [p.numel() for p in module.parameters()]
    return sum(sizes)


def read(*flags):
    return pretrain.read_config([*flags, "--data", "none", "--out", "none"])


def step_data(args, images, device):
    """Crops without content, and the masks that are drawn for so many images."""
    size = args.global_size
    whole = torch.rand(2 * images, 3, size, size)
    size = args.local_size
    local = torch.rand(args.local_crops * images, 3, size, size)
    crops = {"noisy": [whole, local], "denoised": [whole]}
    side = args.global_size // args.patch_size
    rng = random.Random(1)
    masks = common.draw_masks(2 * images, side, side, rng)
    picked = masks.flatten().nonzero()[:, 0]
    data = {"masks": masks, "picked": picked}
    masked = len(picked) / images
    return common.to_device(crops, device), common.to_device(data, device), masked


# ==== parameters, FLOPs ===========================================================================
@pytest.mark.parametrize("preset, about", [("imagenet100", 22e6), ("imagenet1k", 86e6)])
def test_parameters_are_those_of_the_networks(preset, about):
    args = read("--preset", preset)
    found = scale.vit_parameters(args)
    assert found == count(common.make_vit(args.arch))
    assert found == pytest.approx(about, rel=0.02)
    width, *_ = common.ARCHS[args.arch]
    head = common.DINOHead(width)
    assert scale.head_parameters(args) == count(head)


def test_flops_of_vit_small_are_the_known_ones(monkeypatch):
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda x, **kw: x)  # it reads values
    args = read("--preset", "imagenet100")
    found, _ = scale.vit_flops(args, 224)
    assert found / 2 == pytest.approx(4.6e9, rel=0.01)  # multiplications
    with META:
        model = common.vit_small()
        image = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert found == counter.get_total_flops()


@pytest.mark.parametrize("preset", ["imagenet100", "imagenet1k"])
@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_flops_of_an_image_are_those_of_a_step(monkeypatch, preset, anchor):
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda x, **kw: x)
    monkeypatch.setattr(torch, "autocast", lambda *a, **kw: nullcontext())  # meta has none
    args, images = read("--preset", preset, "--amp", "off"), 4
    args.anchor = anchor
    with META:
        run = pretrain.Run(args, 3, META)
    crops, data, masked = step_data(args, images, META)
    with FlopCounterMode(display=False) as counter:
        losses, *_ = pretrain.step_losses(args, run, crops, data, 0.04)
        losses["total"].backward()
    teachers = 2 if anchor else 1
    found = scale.image_flops(args, masked, teachers)
    counted = counter.get_total_flops() / images
    assert found == pytest.approx(counted, rel=1e-6)


def test_masked_patches_of_an_image_are_those_of_one_crop():
    args = read("--preset", "imagenet100")
    masked = scale.masked_patches(args)
    assert masked / 196 == pytest.approx(0.297, abs=0.003)  # DINOv2's mean ratio on 14 x 14


def test_denoiser_flops_are_counted_as_one_step_and_one_pixel():
    argv = ["train", "--preset", "imagenet100", "--data", "none", "--out", "none"]
    _, args = denoise.read_config(argv)
    patch, pixel = scale.denoiser_flops(args)
    # forward on the patch, forward and backward on a sub-image of a quarter of its pixels
    forward = pixel * args.patch**2
    assert patch / forward == pytest.approx(1.75, rel=0.01)


# ==== bytes =======================================================================================
class Saved:
    """Bytes that the backward pass keeps, besides parameters; wanted: of which tensors."""
    def __init__(self, wanted, module):
        self.wanted = wanted
        self.bytes = {}  # of every storage
        self.parameters = set()
        for p in module.parameters():
            storage = p.untyped_storage()
            self.parameters.add(storage.data_ptr())

    def pack(self, x):
        storage = x.untyped_storage()
        place = storage.data_ptr()
        if self.wanted(x) and place not in self.parameters:
            self.bytes[place] = storage.nbytes()
        return x

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def total(self):
        return sum(self.bytes.values())


def test_activations_are_what_the_blocks_keep(monkeypatch):
    """In float32, as no GPU is needed for that."""
    monkeypatch.setitem(common.ARCHS, "vit_toy", (192, 3, 2))
    args, images = read("--preset", "imagenet100", "--arch", "vit_toy"), 2
    model = common.make_vit(args.arch)
    crops, *_ = step_data(args, images, CPU)
    inputs = [model.tokens(x) for x in crops["noisy"]]
    outputs = []  # which keep what is saved
    with Saved(lambda x: True, model) as saved:
        for x in inputs:
            for block in model.blocks:
                x = block(x)
            outputs.append(x)
    expected = scale.activation_bytes(args, images, scale.FLOAT)
    assert saved.total() == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("anchor", [0.0, 1.0])
def test_logits_kept_are_targets_and_log_softmax_of_every_teacher(anchor):
    images = 4
    args = read("--preset", "imagenet100", "--arch", "16,1,1", *SMALL_HEAD, "--amp", "off")
    args.anchor = anchor
    run = pretrain.Run(args, 3, CPU)
    crops, data, masked = step_data(args, images, CPU)
    with Saved(lambda x: x.shape[-1:] == (1024,), run.network) as saved:
        losses, *_ = pretrain.step_losses(args, run, crops, data, 0.04)
    teachers = 2 if anchor else 1
    kept, everything = scale.logit_bytes(args, images, masked, teachers)
    prototypes = 4 * 1024 * args.head_bottleneck  # kept, too, but once
    assert saved.total() - prototypes == pytest.approx(kept, rel=1e-6)
    assert losses["total"].requires_grad
    assert everything > kept


@pytest.mark.parametrize("teachers", [1, 2])
def test_state_and_checkpoint_are_what_a_run_holds(monkeypatch, teachers):
    monkeypatch.setitem(common.ARCHS, "vit_toy", (32, 2, 2))
    args = read("--preset", "imagenet100", "--arch", "vit_toy", *SMALL_HEAD)
    args.anchor = float(teachers - 1)
    run = pretrain.Run(args, 3, CPU)
    weights = scale.vit_parameters(args) + scale.head_parameters(args)
    assert weights == count(run.network)
    for p in run.network.parameters():
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    state = run.state(run.parts)
    held = 0
    for x in tree_leaves(state):
        if torch.is_tensor(x) and x.dim() > 0:  # not AdamW's step numbers
            held += x.nbytes
    assert held == scale.checkpoint_bytes(args, weights, teachers)
    centers = 4 * 2 * 1024 * teachers
    gradient = 4 * weights
    assert scale.state_bytes(weights, teachers) == held - centers + gradient


def test_several_gpus_keep_buckets_too_and_send_the_gradient_in_a_ring():
    assert scale.state_bytes(100, 2, gpus=8) - scale.state_bytes(100, 2) == 400
    assert scale.ring_bytes(100, 1) == 0
    for gpus in (2, 4, 8):  # pieces of 1 / gpus: once round to add them up, once to hand them out
        piece = 400 / gpus
        assert scale.ring_bytes(100, gpus) == (gpus - 1) * piece + (gpus - 1) * piece


# ==== the page ====================================================================================
def test_presets_have_the_papers_curriculum():
    assert scale.curriculum("imagenet100") == (200, 140, False)
    assert scale.curriculum("imagenet1k") == (100, 30, True)  # the anchor's epochs 31 to 100 count, too
    small, large = map(scale.describe, scale.IMAGES)
    assert (small.steps, small.denoised_epochs, small.noisy_epochs) == (1250, 140, 60)
    assert (large.steps, large.denoised_epochs, large.noisy_epochs) == (2502, 100, 70)


def test_speeds_follow_from_the_share_of_the_rate():
    p = scale.describe("imagenet1k")
    measured = {"images_s": {"denoised": 100.0, "NCT": 50.0}}
    rows = scale.speed_rows(p, measured)
    images = p.steps * p.args.batch_size  # an epoch
    for share, row in zip(scale.SHARES, rows, strict=True):
        numbers = [float(cell.replace(",", "")) for cell in row[2:]]
        denoised, cores, noisy, more_cores, *hours = numbers
        work = denoised * scale.image_flops(p.args, p.masked, 1)
        assert work == pytest.approx(share * scale.RATE, rel=1e-2)
        work = noisy * scale.image_flops(p.args, p.masked, 2)
        assert work == pytest.approx(share * scale.RATE, rel=1e-2)
        assert cores == pytest.approx(denoised / 100, abs=0.6)
        assert more_cores == pytest.approx(noisy / 50, abs=0.6)
        first = images * p.denoised_epochs / denoised
        second = images * p.noisy_epochs / noisy
        for gpus, hour in zip(scale.GPUS, hours, strict=True):
            expected = (first + second) / 3600 / gpus
            assert hour == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("value, text", [
    (0.5, "0.5 B"), (999, "999 B"), (999.9, "1 kB"), (12345, "12.3 kB"), (98.4e9, "98.4 GB"), (5e21, "5e+03 EB"),
])
def test_si(value, text):
    assert scale.si(value, "B") == text


def test_measurements_are_of_the_folder_and_its_copies(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "DENOISER", "--preset small --epochs 1 --width 4 --workers 1")
    shapes.write(tmp_path / "data", 10, 10, size=32)
    threads = torch.get_num_threads()
    measured = scale.measure(str(tmp_path / "data/train"))
    torch.set_num_threads(threads)
    assert (measured["images"], measured["pixels"]) == (10, 32 * 32)
    assert 0 < measured["copy_bytes_a_pixel"] < 5  # of three channels, and PNG's header
    assert min(measured["images_s"].values()) > 0
    assert str(tmp_path) not in str(measured)
    assert "10 photographs" in scale.page(measured)


def test_results_hold_the_page_of_the_stored_measurements():
    measured = common.read_json(RESULTS / "scale.json")
    text = (RESULTS / "scale.md").read_text()
    assert text == scale.page(measured)
    assert "| 49.2 GB |" in text  # the features of ImageNet-1k, of which the README warns
    assert not re.search(r"\s/\w+/", text + str(measured))  # no place on a machine
