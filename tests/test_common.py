"""common.py held to the paper: every test is a claim, checked against closed forms, plain loops, Pillow, colorsys,
timm, or golden.json (numbers of DINOv2's released losses, schedules and parameter groups)."""

import argparse
import colorsys
import contextlib
import hashlib
import itertools
import json
import math
import os
import pickle
import signal
import statistics
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import denoise
from common import UserError

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
LOSSES, SCHEDULES = GOLDEN["losses"], GOLDEN["schedules"]
CPU = torch.device("cpu")
K, B = 32, 4  # prototypes and images of golden.json


def f(shape, a, b):
    """golden.json's inputs: 2 sin(a i + b)."""
    return torch.tensor(2 * np.sin(a * np.arange(math.prod(shape)) + b), dtype=torch.float32).reshape(shape)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def close(a, b, rtol=1e-4, atol=0.0):
    np.testing.assert_allclose(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64), rtol=rtol, atol=atol)


# ======================================================================================================
# two processes: one spawn computes everything that the tests about processes look at
# ======================================================================================================

SPLITS = {"even": (4, 4), "uneven": (5, 3), "empty": (8, 0)}  # rows of the 2B that rank 0 and rank 1 hold


def worker(rank, folder):
    """One of two Gloo processes: writes what it computed to folder/rank.pt."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    logits, out = f((2 * B, K), 0.37, 0.1), {}
    for name, (first, _) in SPLITS.items():
        mine = logits[:first] if rank == 0 else logits[first:]
        out[f"center {name}"] = common.update_center(torch.full((1, K), 0.5), mine)
        out[f"sinkhorn {name}"] = common.sinkhorn(mine, 0.05)
    x, weight = f((6, 16), 0.61, 0.6), f((16, 16), 0.3, 0.2).requires_grad_()
    mine = x[common.share(6, 6)[1]] @ weight
    out["gathered"] = common.gather_rows(mine).detach()
    out["loss"] = common.koleo_loss(common.gather_rows(mine))
    (out["loss"] * 2).backward()
    torch.distributed.all_reduce(weight.grad)
    out["grad"], out["loss"] = weight.grad / 2, out["loss"].detach()  # averaged over processes, as DDP does
    out["noise"] = torch.from_numpy(common.add_noise(np.full((4, 5, 3), 0.5, np.float32), "gauss50-255", "a/b.png", 7))
    out["draw"] = torch.rand(5, generator=common.generator(3, 1, 4, 1))
    torch.save(out, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in (0, 1)]


@pytest.mark.parametrize("split", SPLITS)
def test_center_is_the_same_on_one_and_two_processes(ranks, split):
    one = common.update_center(torch.full((1, K), 0.5), f((2 * B, K), 0.37, 0.1))
    for rank in ranks:
        torch.testing.assert_close(rank[f"center {split}"], one, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("split", SPLITS)
def test_sinkhorn_is_the_same_on_one_and_two_processes(ranks, split):
    one = common.sinkhorn(f((2 * B, K), 0.37, 0.1), 0.05)
    both = torch.cat([r[f"sinkhorn {split}"] for r in ranks])
    torch.testing.assert_close(both, one, rtol=1e-4, atol=1e-9)


def test_gathered_rows_come_in_rank_order(ranks):
    x = f((6, 16), 0.61, 0.6) @ f((16, 16), 0.3, 0.2)
    for rank in ranks:
        torch.testing.assert_close(rank["gathered"], x)


def test_koleo_gradient_over_two_processes_equals_one_process(ranks):
    weight = f((16, 16), 0.3, 0.2).requires_grad_()
    loss = common.koleo_loss(f((6, 16), 0.61, 0.6) @ weight)
    loss.backward()
    for rank in ranks:
        torch.testing.assert_close(rank["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rank["grad"], weight.grad, rtol=1e-4, atol=1e-6)


def test_noise_and_draws_are_the_same_in_other_processes(ranks):
    """Spawned processes have another hash seed of Python, which must not matter."""
    noisy = common.add_noise(np.full((4, 5, 3), 0.5, np.float32), "gauss50-255", "a/b.png", 7)
    for rank in ranks:
        assert np.array_equal(rank["noise"].numpy(), noisy)
        assert torch.equal(rank["draw"], torch.rand(5, generator=common.generator(3, 1, 4, 1)))


# ======================================================================================================
# losses
# ======================================================================================================


def plain_cross_entropy(target, logits):
    """H(target, softmax(logits / 0.1)) of two rows, in float64."""
    z = np.asarray(logits, dtype=np.float64) / 0.1
    return -(np.asarray(target, dtype=np.float64) * (z - z.max() - np.log(np.exp(z - z.max()).sum()))).sum()


def golden_views():
    """(student global crops [view A, view B], student local crops, targets (2, B, K)) of golden.json."""
    targets = common.softmax_center(f((2 * B, K), 0.37, 0.1), torch.zeros(1, K), 0.05).reshape(2, B, K)
    against_a, against_b = f((2 * B, K), 0.53, 0.2).split(B)  # rows already swapped: A's targets meet view B's crops
    return [against_b, against_a], list(f((8 * B, K), 0.71, 0.3).split(B)), targets


def test_targets_and_centre_equal_dinov2():
    teacher, centre = f((2 * B, K), 0.37, 0.1), torch.zeros(1, K)
    close(common.softmax_center(teacher, centre, 0.05)[0, :8], LOSSES["targets_row0_zero_center"])
    centre = common.update_center(centre, teacher, momentum=0.9)
    close(centre[0, :6], LOSSES["center_after_one_update"])
    close(common.softmax_center(teacher, centre, 0.05)[0, :8], LOSSES["targets_row0_second_step"])


def test_sinkhorn_equals_dinov2():
    close(common.sinkhorn(f((2 * B, K), 0.37, 0.1), 0.05)[0, :8], LOSSES["sinkhorn_row0"])


def test_dino_loss_equals_dinov2_on_global_pairs():
    views, _, targets = golden_views()
    close(common.dino_loss(views, targets) * 2, LOSSES["dino_global_sum_of_two_pair_means"])


def test_dino_loss_is_the_sum_of_18_pairs_divided_by_18():
    views, local, targets = golden_views()
    total = LOSSES["dino_global_sum_of_two_pair_means"] + LOSSES["dino_local_sum_of_16_pair_means"]
    close(common.dino_loss(views + local, targets), total / 18)


@pytest.mark.parametrize("n_local", [0, 3, 8])
def test_dino_loss_equals_plain_loops(n_local):
    student, targets = f((2 + n_local, B, K), 0.41, 0.3), F.softmax(f((2, B, K), 0.77, 0.1) * 3, -1)
    pairs = [np.mean([plain_cross_entropy(targets[t, b], student[s, b]) for b in range(B)])
             for t in range(2) for s in range(2 + n_local) if s != t]
    close(common.dino_loss(list(student), targets), sum(pairs) / (2 + 2 * n_local))


def test_same_view_pairs_are_never_compared():
    """Each global crop's gradient stays as it is when the target of its own view changes."""
    views, local, targets = golden_views()
    for view in (0, 1):
        changed = targets.clone()
        changed[view] = targets[view].flip(-1)
        gradients = []
        for t in (targets, changed):
            student = [v.clone().requires_grad_() for v in views + local]
            common.dino_loss(student, t).backward()
            gradients.append([s.grad for s in student])
        assert torch.equal(gradients[0][view], gradients[1][view])
        for other in set(range(10)) - {view}:
            assert not torch.allclose(gradients[0][other], gradients[1][other])


def golden_patches():
    """(student, targets, weights = 1 / masked patches of the row's crop) of golden.json."""
    targets = common.softmax_center(f((8, K), 0.29, 0.4), torch.zeros(1, K), 0.05)
    weights = torch.tensor([1 / 3] * 3 + [1.0] + [1 / 4] * 4)
    return f((8, K), 0.43, 0.5), targets, weights


def test_ibot_loss_equals_dinov2():
    close(common.ibot_loss(*golden_patches(), n_crops=2 * B), LOSSES["ibot"])


def test_ibot_loss_is_the_mean_over_patches_then_over_all_crops():
    student, targets, weights = golden_patches()
    rows = [plain_cross_entropy(t, s) for t, s in zip(targets, student, strict=True)]
    close(common.ibot_loss(student, targets, weights, n_crops=12),  # three of 12 crops are masked, in 8 patches
          (np.mean(rows[:3]) + rows[3] + np.mean(rows[4:])) / 12, rtol=1e-5)


def test_koleo_equals_dinov2():
    close(common.koleo_loss(f((6, 16), 0.61, 0.6)), LOSSES["koleo"])


def test_koleo_equals_plain_loops():
    x = f((7, 5), 1.3, 0.2)
    rows = x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
    nearest = [min(np.linalg.norm(a - b) for j, b in enumerate(rows) if j != i) for i, a in enumerate(rows)]
    close(common.koleo_loss(x), -np.mean(np.log(nearest)), rtol=1e-5)
    close(common.koleo_loss(x * 37), -np.mean(np.log(nearest)), rtol=1e-5)  # of directions alone


def test_koleo_of_equal_rows_and_of_one_row_is_finite():
    x = torch.ones(3, 8, requires_grad=True)
    loss = common.koleo_loss(x)
    loss.backward()
    assert 10 < loss.item() <= -math.log(1e-8) and x.grad.isfinite().all()
    one = torch.ones(1, 8, requires_grad=True)
    common.koleo_loss(one).backward()
    assert common.koleo_loss(one).item() == 0 and torch.equal(one.grad, torch.zeros(1, 8))


def test_anchor_is_dino_plus_ibot_against_the_other_teacher():
    views, local, targets = golden_views()
    patches, patch_targets, weights = golden_patches()
    student, other, other_patches = views + local, targets.flip(-1), patch_targets.flip(-1)
    dino, ibot = common.anchor_loss(student, patches, other, other_patches, weights, 2 * B)
    pairs = [plain_cross_entropy(other[t, b], student[s][b]) for t in range(2) for s in range(10) if s != t
             for b in range(B)]
    close(dino, np.mean(pairs), rtol=1e-5)
    rows = [plain_cross_entropy(t, s) for t, s in zip(other_patches, patches, strict=True)]
    close(ibot, np.dot(weights.double().numpy(), rows) / 8, rtol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_layer_scale_of_1e_5_survives_half_precision(dtype, tolerance):
    """1e-5 times a weight of 0.02 is below float16's normal numbers."""
    linear, x = torch.nn.Linear(64, 32), torch.randn(10, 64, generator=gen(1))
    linear.weight.data, linear.bias.data = 0.02 * torch.randn(32, 64, generator=gen(2)), torch.zeros(32)
    expected = 1e-5 * x @ linear.weight.T
    with torch.autocast("cpu", dtype):
        y = common.scaled_linear(linear, torch.full((32,), 1e-5), x).float()
    assert (y - expected).norm() < tolerance * expected.norm()


def test_losses_are_float32_under_autocast():
    """bf16 logits under autocast: every softmax, log and distance is float32, so only the inputs are rounded."""
    views, local, targets = golden_views()
    patches, patch_targets, weights = golden_patches()
    logits, x, centre = f((2 * B, K), 0.37, 0.1), f((6, 16), 0.61, 0.6), f((1, K), 0.9, 0.1) / 10
    calls = {"dino": lambda c: common.dino_loss([c(v) for v in views + local], targets),
             "ibot": lambda c: common.ibot_loss(c(patches), patch_targets, weights, 8),
             "koleo": lambda c: common.koleo_loss(c(x)),
             "softmax_center": lambda c: common.softmax_center(c(logits), centre, 0.05),
             "sinkhorn": lambda c: common.sinkhorn(c(logits), 0.05),
             "center": lambda c: common.update_center(centre, c(logits))}
    for name, call in calls.items():
        full = call(lambda t: t)
        rounded = call(lambda t: t.bfloat16().float())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(lambda t: t), full), name
            low = call(lambda t: t.bfloat16())
        assert low.dtype == torch.float32, name
        torch.testing.assert_close(low, rounded, rtol=1e-6, atol=1e-7, msg=name)
        if low.ndim == 0:
            close(low, full, rtol=1e-2)


def test_koleo_finds_neighbours_in_float32_under_autocast():
    """In a crowd, bf16 products take another row for the nearest."""
    x = torch.randn(200, 4, generator=gen())
    full = common.koleo_loss(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(common.koleo_loss(x), full)


def test_centre_stays_where_no_process_has_a_row():
    centre = f((1, K), 0.9, 0.1)
    assert torch.equal(common.update_center(centre, torch.zeros(0, K)), centre)


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_sinkhorn_rows_are_probabilities_even_for_extreme_logits(scale):
    q = common.sinkhorn(torch.randn(64, 128, generator=gen()) * scale, 0.04)
    assert q.isfinite().all() and q.min() >= 0
    torch.testing.assert_close(q.sum(1), torch.ones(64), rtol=1e-5, atol=1e-5)


def test_sinkhorn_equals_plain_normalisation_and_balances_prototypes():
    logits = torch.randn(16, 8, generator=gen(1), dtype=torch.double)
    q = np.exp(logits.numpy() / 0.5)
    for _ in range(3):
        q = q / q.sum(0, keepdims=True) / 8
        q = q / q.sum(1, keepdims=True) / 16
    close(common.sinkhorn(logits, 0.5), q * 16, rtol=1e-4)
    close(common.sinkhorn(logits, 0.5, iterations=100).sum(0), np.full(8, 2.0), rtol=1e-3)


def test_softmax_targets_are_finite_for_extreme_logits():
    p = common.softmax_center(torch.tensor([[1e4, -1e4, 0.0]]), torch.zeros(1, 3), 0.04)
    assert p.tolist() == [[1, 0, 0]]


def test_head_logits_are_cosines_of_the_bottleneck_with_unit_prototypes():
    torch.manual_seed(0)
    head = common.DINOHead(12, out_dim=20, hidden_dim=16, bottleneck_dim=8)
    x = torch.randn(5, 12, generator=gen())
    with torch.no_grad():
        z = x
        for i in (0, 2, 4):
            z = z @ head.mlp[i].weight.T + head.mlp[i].bias
            z = z if i == 4 else z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
        v = head.last_layer.weight_v
        expected = torch.cosine_similarity(z[:, None], v[None], dim=-1)
        torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-5)
        head.last_layer.weight_v.mul_(7)  # a direction, whatever its length
        torch.testing.assert_close(head(x), expected, rtol=1e-4, atol=1e-5)


def test_head_normalises_in_float32_under_autocast():
    """What reaches the prototypes is of length 1 to float32's precision, however coarse the layers before."""
    torch.manual_seed(0)
    head, seen = common.DINOHead(12, out_dim=20, hidden_dim=16, bottleneck_dim=8), []
    x, linear = torch.randn(50, 12, generator=gen()), F.linear

    def watched(x, weight, bias=None):
        seen.append((x, weight))
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(F, "linear", watched)
        low = head(x)
    for rows in seen[-1]:
        close(rows.detach().double().norm(dim=1), np.ones(len(rows)), rtol=1e-6)
    torch.testing.assert_close(low.float(), head(x), rtol=0, atol=0.03)  # bf16 products in every layer


# ======================================================================================================
# schedules and parameter groups
# ======================================================================================================


@pytest.mark.parametrize(("name", "base", "final", "warmup"), [
    ("lr", 1e-3, 1e-6, 10), ("weight_decay", 0.04, 0.4, 0), ("momentum", 0.992, 1.0, 0)])
def test_cosine_schedules_equal_dinov2(name, base, final, warmup):
    values = [common.cosine(s, base, final, 100, warmup) for s in SCHEDULES["steps"]]
    close(values, SCHEDULES[name], rtol=1e-9)


def test_teacher_temperature_warms_up_as_in_dinov2():
    """Linear over 30 steps, then constant: a cosine that ends where it begins."""
    close([common.cosine(s, 0.07, 0.07, 30, 30, start=0.04) for s in SCHEDULES["steps"]],
          SCHEDULES["teacher_temp_30_warmup"], rtol=1e-9)


def test_schedules_without_or_with_all_warmup_have_no_gap():
    assert common.cosine(0, 1.0, 0.0, 10) == 1.0
    assert [common.cosine(s, 1.0, 0.0, 3, 3) for s in range(4)] == [0.0, 0.5, 1.0, 0.0]


def test_parameter_groups_equal_dinov2():
    groups = {n: v for n, v in GOLDEN["parameter_groups_vit_small_16"].items() if n != "about"}
    for name, multipliers in groups.items():
        close(common.param_multipliers(name, 12), multipliers, rtol=1e-9)


def test_every_parameter_is_in_exactly_one_group_with_its_multipliers():
    torch.manual_seed(0)
    vit, head = small_vit(registers=1), common.DINOHead(24, 16, 8, 4)
    groups = common.param_groups(vit, head)
    where = {id(p): g for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(where) == len([*vit.parameters(), *head.parameters()])
    for name, p in vit.named_parameters():
        g = where[id(p)]
        assert (g["lr_mult"], g["wd_mult"], g["last"]) == (*common.param_multipliers(name, 2), False), name
    for name, p in head.named_parameters():
        g = where[id(p)]
        assert (g["lr_mult"], g["wd_mult"], g["last"]) == (
            1.0, 0.0 if name.endswith("bias") else 1.0, name.startswith("last_layer")), name


# ======================================================================================================
# ViT
# ======================================================================================================


def small_vit(**kw):
    """32 x 32 pixels, 4 x 4 patches, with parameters far from their initial values, so that each one matters."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    vit = common.VisionTransformer(**sizes | kw)
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=gen(p.numel())))
    return vit.eval()


def plain_norm(x, weight, bias):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias


def plain_vit(state, x, patch, heads, masks=None):
    """Normed tokens of a ViT, from its state dict, in loops: (B, 1 + registers + N, D)."""
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    kernel, pos = state["patch_embed.proj.weight"].flatten(1), state["pos_embed"]
    side = math.isqrt(pos.shape[1] - 1)
    if (side, side) != (rows, columns):
        grid = pos[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False, antialias=False)
        pos = torch.cat([pos[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
    images = []
    for b in range(len(x)):
        tokens = [state["cls_token"][0, 0] + pos[0, 0], *state.get("register_tokens", torch.zeros(1, 0, 1))[0]]
        for n in range(rows * columns):
            r, c = n // columns * patch, n % columns * patch
            token = kernel @ x[b, :, r:r + patch, c:c + patch].flatten() + state["patch_embed.proj.bias"]
            if masks is not None and masks[b, n]:
                token = state["mask_token"][0]
            tokens.append(token + pos[0, 1 + n])
        z = torch.stack(tokens)
        for i in range(1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))):
            s = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
            qkv = plain_norm(z, s["norm1.weight"], s["norm1.bias"]) @ s["attn.qkv.weight"].T + s["attn.qkv.bias"]
            q, k, v = qkv.split(z.shape[1], 1)
            width = z.shape[1] // heads
            parts = [slice(h * width, (h + 1) * width) for h in range(heads)]
            y = torch.cat([((q[:, p] @ k[:, p].T) / math.sqrt(width)).softmax(1) @ v[:, p] for p in parts], 1)
            z = z + s["ls1.gamma"] * (y @ s["attn.proj.weight"].T + s["attn.proj.bias"])
            y = plain_norm(z, s["norm2.weight"], s["norm2.bias"]) @ s["mlp.fc1.weight"].T + s["mlp.fc1.bias"]
            y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
            z = z + s["ls2.gamma"] * (y @ s["mlp.fc2.weight"].T + s["mlp.fc2.bias"])
        images.append(plain_norm(z, state["norm.weight"], state["norm.bias"]))
    return torch.stack(images)


@pytest.mark.parametrize(("channels", "registers", "size"), [
    (3, 0, (32, 32)), (1, 0, (32, 32)), (5, 2, (32, 32)), (3, 0, (16, 48)), (3, 3, (48, 16)), (3, 0, (24, 24))])
@torch.no_grad()
def test_vit_equals_a_plain_transformer(channels, registers, size):
    vit = small_vit(in_chans=channels, registers=registers)
    x = torch.randn(2, channels, *size, generator=gen())
    masks = torch.rand(2, size[0] * size[1] // 64, generator=gen(2)) < 0.4
    for m in (None, masks):
        expected = plain_vit(vit.state_dict(), x, 8, 3, m)
        out = vit.forward_features(x, m)
        torch.testing.assert_close(out["cls"], expected[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out["patches"], expected[:, 1 + registers:], rtol=1e-4, atol=1e-5)
        if m is None:
            assert torch.equal(vit(x), out["cls"])


@pytest.mark.parametrize("arch", ["vit_small", "vit_base"])
@torch.no_grad()
def test_vit_equals_timm_on_the_same_weights(arch):
    timm = pytest.importorskip("timm", reason="timm is not installed, or the torchvision that it needs")
    torch.manual_seed(0)
    ours = getattr(common, arch)(patch_size=16).eval()
    for p in ours.parameters():
        p.add_(0.02 * torch.randn(p.shape))
    theirs = timm.create_model(f"{arch}_patch16_224", init_values=1e-5, num_classes=0).eval()
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "mask_token"})
    x = torch.randn(1, 3, 224, 224, generator=gen())
    tokens, out = theirs.forward_features(x), ours.forward_features(x)
    torch.testing.assert_close(out["cls"], tokens[:, 0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(out["patches"], tokens[:, 1:], rtol=1e-3, atol=1e-4)


def test_vit_small_has_the_parameters_of_dinov2():
    with torch.device("meta"):
        vit = common.vit_small(patch_size=16)
        large = common.vit_large(patch_size=14, img_size=518)
    assert sum(p.numel() for p in vit.parameters()) == 21_675_264
    assert sum(p.numel() for p in vit.parameters()) == GOLDEN["parameter_counts"][
        "vit_small patch 16 img 224, 3 channels, LayerScale, mask token, no head"]
    assert sum(p.numel() for p in large.parameters()) == 304_368_640  # DINOv2's ViT-L/14 (its model card: 304 M)
    assert len(large.blocks) == 24 and large.blocks[0].attn.num_heads == 16


def test_mask_token_replaces_patches_before_the_position_embedding():
    vit, seen = small_vit(), []
    vit.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    x = torch.randn(1, 3, 32, 32, generator=gen())
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, [1, 7, 15]] = True
    vit.forward_features(x)
    vit.forward_features(x, masks)
    for n in range(16):
        expected = vit.mask_token[0] + vit.pos_embed[0, 1 + n] if masks[0, n] else seen[0][0, 1 + n]
        torch.testing.assert_close(seen[1][0, 1 + n], expected.detach())
    assert torch.equal(seen[0][:, 0], seen[1][:, 0])


def test_masked_pixels_are_invisible():
    vit, masks = small_vit(), torch.rand(2, 16, generator=gen(1)) < 0.5
    x = torch.randn(2, 3, 32, 32, generator=gen())
    hidden = masks.reshape(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    for key in ("cls", "patches"):
        assert torch.equal(vit.forward_features(x, masks)[key],
                           vit.forward_features(torch.where(hidden, torch.ones(()), x), masks)[key])


def test_position_embedding_is_resized_bicubically_without_antialias():
    pos = torch.randn(1, 1 + 14 * 14, 8, generator=gen())
    grid = pos[:, 1:].reshape(1, 14, 14, 8).permute(0, 3, 1, 2)
    for new in [(6, 6), (9, 4), (20, 14), (1, 1)]:
        expected = F.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=False)
        out = common.resize_pos_embed(pos, new)
        assert torch.equal(out[:, 0], pos[:, 0])
        torch.testing.assert_close(out[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2), rtol=1e-4, atol=1e-5)
    assert torch.equal(common.resize_pos_embed(pos, (14, 14)), pos)


def test_position_embedding_learns_after_it_was_used_in_inference_mode():
    vit, x = small_vit(), torch.randn(1, 3, 40, 24, generator=gen())
    with torch.inference_mode():
        expected = vit(x)
    out = vit(x)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), expected.clone())
    assert vit.pos_embed.grad.abs().sum() > 0


@torch.no_grad()
def test_class_token_is_independent_of_the_batch():
    vit, x = small_vit(), torch.randn(5, 3, 32, 32, generator=gen())
    together = vit.forward_features(x)
    for i in range(5):
        alone = vit.forward_features(x[i:i + 1])
        torch.testing.assert_close(alone["cls"][0], together["cls"][i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(alone["patches"][0], together["patches"][i], rtol=1e-5, atol=1e-5)


def test_image_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ValueError, match="patch size 8"):
        small_vit()(torch.zeros(1, 3, 36, 32))


@torch.no_grad()
def test_last_layers_are_the_outputs_of_shallower_vits_last_first():
    vit, x = small_vit(depth=3), torch.randn(2, 3, 32, 32, generator=gen())
    outputs = vit.last_layers(x, 2)
    assert len(outputs) == 2
    for dropped, out in enumerate(outputs):
        shallow = {k: v for k, v in vit.state_dict().items()
                   if not any(k.startswith(f"blocks.{3 - d}.") for d in range(1, dropped + 1))}
        expected = plain_vit(shallow, x, 8, 3)
        torch.testing.assert_close(out["cls"], expected[:, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out["patches"], expected[:, 1:], rtol=1e-4, atol=1e-5)


def test_drop_path_acts_in_training_only_and_keeps_the_mean():
    torch.manual_seed(0)
    block = common.Block(8, 2, 1.0, drop_path=0.3).requires_grad_(False)
    branch = torch.full((20_000, 1, 8), 2.0)
    u = torch.rand(len(branch), generator=gen())
    assert torch.equal(block.eval().drop(branch, u), branch)
    dropped = block.train().drop(branch, u)
    assert (dropped == dropped[:, :, :1]).all()  # a sample is dropped whole
    close(dropped.unique(), [0, 2 / 0.7], rtol=1e-6)
    close((dropped == 0).float().mean(), 0.3, rtol=0, atol=4 * math.sqrt(0.21 / 20_000))
    close(dropped.mean(), 2.0, rtol=0, atol=4 * 2 * math.sqrt(0.3 / 0.7 / 20_000))


@torch.no_grad()
def test_drop_path_drops_each_of_the_two_branches_on_its_own():
    torch.manual_seed(0)
    block = common.Block(8, 2, 1.0, drop_path=0.5)
    for p in block.parameters():
        p.add_(0.3 * torch.randn(p.shape))
    x = torch.randn(1, 3, 8)
    first_scale, second_scale = (block.state_dict()[f"ls{i}.gamma"] for i in (1, 2))
    attention = block.attn(block.norm1(x), first_scale)
    expected = []
    for first, second in itertools.product((0, 2), (0, 2)):
        y = x + first * attention
        expected.append(y + second * second_scale * block.mlp(block.norm2(y)))
    u = torch.rand(2, 4000, generator=gen())
    out = block.train()(x.expand(4000, -1, -1), u)
    hits = torch.stack([torch.isclose(out, e, rtol=1e-4, atol=1e-4).flatten(1).all(1) for e in expected])
    assert (hits.sum(0) == 1).all()
    close(hits.float().mean(1), [0.25] * 4, rtol=0, atol=4 * math.sqrt(0.25 * 0.75 / 4000))
    y = x + attention
    torch.testing.assert_close(block.eval()(x, u[:, :1]), y + second_scale * block.mlp(block.norm2(y)))


@torch.no_grad()
def test_given_drop_path_numbers_decide_each_branch_of_each_image():
    """A branch whose number is below the probability is dropped, any other divided by what is kept on average."""
    vit, x = small_vit(drop_path=0.4), torch.randn(4, 3, 32, 32, generator=gen())
    numbers = torch.rand(4, 4, generator=gen(1))  # (2 depth, B)
    assert 0 < (numbers < 0.4).sum() < 16
    out = vit.train().forward_features(x, drop=numbers)["patches"]
    for b in range(4):
        state = dict(vit.state_dict())
        for turn in range(4):
            key = f"blocks.{turn // 2}.ls{turn % 2 + 1}.gamma"
            state[key] = state[key] * (numbers[turn, b] >= 0.4) / 0.6
        torch.testing.assert_close(out[b], plain_vit(state, x[b:b + 1], 8, 3)[0, 1:], rtol=1e-4, atol=1e-5)
    assert torch.equal(vit.eval().forward_features(x, drop=numbers)["patches"], vit.forward_features(x)["patches"])


@torch.no_grad()
def test_numbers_of_the_drop_path_are_drawn_where_none_are_given():
    vit, x = small_vit(drop_path=0.4).train(), torch.randn(4, 3, 32, 32, generator=gen())
    torch.manual_seed(0)
    numbers = torch.rand(4, 4)
    torch.manual_seed(0)
    assert torch.equal(vit(x), vit.forward_features(x, drop=numbers)["cls"])
    assert not torch.equal(vit(x), vit.forward_features(x, drop=numbers)["cls"])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("registers", [0, 3])
def test_picked_patches_are_those_of_the_whole_and_have_the_same_gradients(training, registers):
    """Only the last block's MLP knows of them: it leaves out the patches that nobody asks for."""
    vit, x = small_vit(drop_path=0.4, registers=registers).train(training), torch.randn(4, 3, 32, 24, generator=gen())
    masks, drop = torch.rand(4, 12, generator=gen(1)) < 0.4, torch.rand(4, 4, generator=gen(2))
    picked = masks.flatten().nonzero()[:, 0]
    assert 5 < len(picked) < 43
    whole = vit.forward_features(x, masks, drop)
    expected = whole["cls"], whole["patches"].flatten(0, 1)[picked]
    part = vit.forward_features(x, masks, drop, picked)
    seen, theirs = [], (part["cls"], part["patches"])
    vit.blocks[-1].mlp.fc1.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].numel()))
    assert [y.shape for y in theirs] == [(4, 24), (len(picked), 24)]
    weights = [torch.randn(y.shape, generator=gen(3)) for y in expected]
    gradients = []
    for outputs in (expected, theirs):
        vit.zero_grad()
        sum((y * w).sum() for y, w in zip(outputs, weights, strict=True)).backward()
        gradients.append([p.grad for p in vit.parameters()])
    for a, b in zip([*expected, *gradients[0]], [*theirs, *gradients[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    vit.forward_features(x, masks, drop, picked)
    assert seen == [(4 + len(picked)) * 24]


def test_initial_values_are_dinov2s():
    torch.manual_seed(0)
    vit = common.VisionTransformer(img_size=64, patch_size=8, embed_dim=192, depth=2, num_heads=3)
    state = vit.state_dict()
    for name, p in state.items():
        if name.endswith("gamma"):
            assert (p == 1e-5).all(), name
        elif "norm" in name:
            assert (p == float(name.endswith("weight"))).all(), name
        elif name == "pos_embed" or (name.startswith("blocks") and name.endswith("weight")):
            close(p.std(), 0.02, rtol=0.03)
            assert abs(p.mean()) < 1e-3, name
        elif name.startswith("blocks") or name == "mask_token":
            assert (p == 0).all(), name
    assert 0 < state["cls_token"].abs().max() < 1e-5
    assert vit.norm.eps == vit.blocks[0].norm1.eps == 1e-6
    x = torch.randn(2, 3, 64, 64, generator=gen())
    shallow = plain_norm(vit.tokens(x)[:, 0], torch.ones(192), torch.zeros(192))
    torch.testing.assert_close(vit(x), shallow, rtol=0, atol=0.2)  # LayerScale: at first, blocks are near identity


def test_vit_names_and_widths():
    with torch.device("meta"):
        assert common.make_vit("128,4,4").embed_dim == 128
    for bad in ("vit_huge", "128,4", "128,4,3", "0,1,1", "a,b,c"):
        with pytest.raises(UserError, match=f"--arch {bad}"):
            common.make_vit(bad)


# ======================================================================================================
# masks
# ======================================================================================================


def in_a_block_of_four(mask):
    """Every masked patch of (rows, columns) lies in a masked rectangle of 4 patches: 2 x 2, 1 x 4 or 4 x 1."""
    covered = np.zeros_like(mask)
    for h, w in ((2, 2), (1, 4), (4, 1)):
        for r in range(mask.shape[0] - h + 1):
            for c in range(mask.shape[1] - w + 1):
                if mask[r:r + h, c:c + w].all():
                    covered[r:r + h, c:c + w] = True
    return (covered == mask).all()


@pytest.mark.parametrize("seed", range(5))
def test_half_of_the_crops_are_masked_with_ratios_stratified_over_a_tenth_to_a_half(seed):
    masks = common.draw_masks(200, (14, 14), gen(seed))
    counts = masks.sum(1)
    assert (counts > 0).sum() == 100
    ratios = (counts[counts > 0] / 196).sort().values
    assert ratios.min() >= 0.1 and ratios.max() <= 0.5
    close(ratios.mean(), 0.3, rtol=0, atol=0.005)
    edges = torch.linspace(0.1, 0.5, 101)  # one crop in each of 100 equal strata, up to rounding to whole patches,
    assert (ratios <= edges[1:] + 0.5 / 196).all()  # never more,
    assert (ratios >= edges[:-1] - 3.5 / 196).all()  # and less by no more than a block's rest


def test_masks_are_blocks_of_at_least_four_patches():
    for seed in range(4):
        for mask in common.draw_masks(64, (14, 14), gen(seed)).reshape(-1, 14, 14).numpy():
            assert in_a_block_of_four(mask)
    alone = torch.rand(14, 14, generator=gen()).numpy() < 0.3
    assert not in_a_block_of_four(alone)  # the check itself can fail


def test_blocks_have_a_log_uniform_aspect_between_0_3_and_its_inverse():
    """One masked crop of a fine grid whose lowest number is that of a block: a single proposal makes its mask."""
    one = gen()
    masks = torch.cat([common.draw_masks(2, (60, 60), one, ratio=(0, 0.1), rounds=1, tries=1) for _ in range(1500)])
    masks = masks[masks.any(1)].reshape(-1, 60, 60)
    h, w, count = masks.any(2).sum(1), masks.any(1).sum(1), masks.sum((1, 2))
    assert (h * w == count).all() and count.min() >= 4
    aspect = (h / w).log()[count >= 50]  # of larger blocks, as sides are rounded to whole patches
    limit = math.log(1 / 0.3)
    assert limit < aspect.max() < limit + 0.15 and -limit - 0.15 < aspect.min() < -limit
    close(aspect.mean(), 0, rtol=0, atol=4 * 2 * limit / math.sqrt(12 * len(aspect)))
    close(aspect.std(), 2 * limit / math.sqrt(12), rtol=0.06)


def test_masks_are_not_scattered():
    """Neighbours of a masked patch are masked far more often than the ratio of 0.3."""
    masks = common.draw_masks(400, (14, 14), gen()).reshape(-1, 14, 14)
    masks = masks[masks.any(2).any(1)]
    both = (masks[:, 1:] & masks[:, :-1]).sum() / masks[:, :-1].sum()
    assert both > 0.6


def test_every_crop_is_masked_equally_often_and_both_sides_alike():
    masks = torch.stack([common.draw_masks(16, (14, 14), gen(s)) for s in range(200)])
    per_crop = masks.any(2).float().mean(0)
    close(per_crop, [0.5] * 16, rtol=0, atol=4 * math.sqrt(0.25 / 200))
    per_patch = masks.float().mean((0, 1)).reshape(14, 14)
    close(per_patch.mean(), 0.15, rtol=0, atol=0.005)
    close(per_patch, per_patch.flip(0), rtol=0, atol=0.08)
    close(per_patch, per_patch.flip(1), rtol=0, atol=0.08)
    assert per_patch.min() > 0.01  # blocks meet the corners least


@pytest.mark.parametrize(("grid", "most"), [((4, 4), 8), ((2, 7), 7), ((2, 2), 2), ((1, 1), 0), ((6, 6), 18)])
def test_small_grids_are_masked_and_never_fully(grid, most):
    for seed in range(20):
        masks = common.draw_masks(8, grid, gen(seed))
        counts = masks.sum(1)
        assert (counts > 0).sum() == (4 if most else 0)
        assert counts.max() <= most
        if most >= 4:
            assert all(in_a_block_of_four(m) for m in masks.reshape(8, *grid).numpy())


def test_masks_are_reproducible_from_the_generator():
    first, again, other = (common.draw_masks(8, (14, 14), gen(s)) for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


# ======================================================================================================
# crops
# ======================================================================================================


def photo(seed, height, width, channels=3, low=0, high=255, contrast=180):
    """A smooth random picture (a sum of waves), uint8 (H, W, C); the default range has saturated areas."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [rng.normal(size=channels) * np.sin(rng.uniform(-0.5, 0.5) * x + rng.uniform(-0.5, 0.5) * y
                                                + rng.uniform(0, 6.28))[..., None] for _ in range(6)]
    return np.clip(np.rint(127 + contrast / 2.4 * sum(waves)), low, high).astype(np.uint8)


def pad(pictures, fill=0):
    """uint8 (H, W, C) pictures to (B, C, Hmax, Wmax) and sizes (B, 2)."""
    sizes = torch.tensor([p.shape[:2] for p in pictures])
    batch = torch.full((len(pictures), pictures[0].shape[2], *sizes.amax(0)), fill, dtype=torch.uint8)
    for b, p in enumerate(pictures):
        batch[b, :, :p.shape[0], :p.shape[1]] = torch.from_numpy(p).permute(2, 0, 1)
    return batch, sizes


SIZES = [(60, 80), (97, 41), (33, 120), (50, 50), (120, 96), (17, 23), (41, 97)]
# top, left, height, width in images of SIZES: whole image, touching each border, inside, enlarged, tiny
BOXES = [(0, 0, 60, 80), (5, 0, 92, 41), (0, 60, 33, 60), (10, 12, 25, 30), (0, 0, 7, 96), (3, 4, 10, 12),
         (40, 96, 1, 1)]


def crops(pictures, boxes, out, flips=None):
    """resample to integers (B, out, out, C)."""
    images, sizes = pad(pictures)
    flips = torch.zeros(len(pictures), dtype=torch.bool) if flips is None else flips
    x = common.resample(images.float(), sizes, torch.tensor(boxes, dtype=torch.double), flips, out)
    return x.round().permute(0, 2, 3, 1).int().numpy()


def pillow(picture, box, out, passes):
    """Pillow's bicubic crop (out, out, C): in one call, or as a horizontal and then a vertical call.

    Pillow 13 picks the order of its two passes by the shape (vertical first where that is less work) and clips to
    8 bit between them, so that the two orders differ by tens of levels at pixels where the first one overshoots.
    Ours is horizontal first. Pictures with saturated areas are therefore compared with two single-axis calls,
    pictures that leave room for the overshoot with the one call.
    """
    top, left, height, width = box
    bands = []
    for c in range(picture.shape[2]):
        image = Image.fromarray(np.ascontiguousarray(picture[..., c]))
        if passes == 1:
            image = image.resize((out, out), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        else:
            full = image.height
            image = image.resize((out, full), Image.Resampling.BICUBIC, box=(left, 0, left + width, full))
            image = image.resize((out, out), Image.Resampling.BICUBIC, box=(0, top, out, top + height))
        bands.append(np.asarray(image))
    return np.stack(bands, -1).astype(int)


@pytest.mark.parametrize("out", [16, 48, 96])
@pytest.mark.parametrize(("low", "high", "contrast", "passes"), [(0, 255, 180, 2), (0, 255, 60, 1)])
def test_resample_equals_pillow_within_one_step(out, low, high, contrast, passes):
    """Several sizes in one batch, shrunk and enlarged, boxes at every border."""
    pictures = [photo(i, *size, low=low, high=high, contrast=contrast) for i, size in enumerate(SIZES)]
    if passes == 2:
        assert np.mean([(p == 0) | (p == 255) for p in pictures[:2] for p in [p[:41, :41]]]) > 0.02
    got = crops(pictures, BOXES, out)
    for picture, box, crop in zip(pictures, BOXES, got, strict=True):
        difference = np.abs(crop - pillow(picture, box, out, passes))
        assert difference.max() <= 1
        assert difference.mean() < 0.3


@pytest.mark.skipif("PHOTOGRAPHS" not in os.environ, reason="PHOTOGRAPHS names no folder of photographs")
@pytest.mark.parametrize("out", [16, 48, 96, 224])
@pytest.mark.parametrize("flip", [False, True])
def test_resample_of_photographs_equals_pillow_within_one_step(out, flip):
    """The first of a folder's photographs, whole and in parts, shrunk, enlarged and padded."""
    paths = [Path(os.environ["PHOTOGRAPHS"], p) for p in common.list_images(os.environ["PHOTOGRAPHS"])[:6]]
    whole = [x for x in map(common.read_image, paths) if x.shape[2] == 3]
    parts = [p[:512, :512] for p in whole] + [whole[0][:97, 40:150], whole[0][60:77, 60:83]]
    boxes = [(i, 0, p.shape[0] - i, p.shape[1] - 2 * i) for i, p in enumerate(parts)]
    got = crops(parts, boxes, out, torch.full((len(parts),), flip))
    for part, box, crop in zip(parts, boxes, got, strict=True):
        expected = pillow(part, box, out, 2)
        difference = np.abs(crop - (expected[:, ::-1] if flip else expected))
        assert difference.max() <= 1 and difference.mean() < 0.3


def test_resample_antialiases():
    """Shrinking white noise by 8 averages it: a bicubic of 4 taps would keep most of its deviation."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 1), dtype=np.uint8)
    assert crops([noise], [(0, 0, 128, 128)], 16).std() < 0.2 * noise.std()


def test_flipped_crop_is_the_mirrored_crop():
    pictures = [photo(i, *size) for i, size in enumerate(SIZES)]
    flips = torch.tensor([True, False, True, True, False, True, False])
    plain, flipped = crops(pictures, BOXES, 24), crops(pictures, BOXES, 24, flips)
    for i, flip in enumerate(flips):
        assert np.abs(flipped[i] - (plain[i][:, ::-1] if flip else plain[i])).max() <= 1  # rounding of x.5
    assert not np.array_equal(plain[0], flipped[0])


@pytest.mark.parametrize("garbage", [0, 1, 255])
def test_padding_never_leaks(garbage):
    pictures = [photo(i, *size) for i, size in enumerate(SIZES)]
    clean, sizes = pad(pictures)
    dirty, _ = pad(pictures, fill=garbage)
    boxes, flips = torch.tensor(BOXES, dtype=torch.double), torch.arange(len(SIZES)) % 2 == 0
    for out in (16, 64):
        assert torch.equal(common.resample(clean.float(), sizes, boxes, flips, out),
                           common.resample(dirty.float(), sizes, boxes, flips, out))


def test_crop_of_its_own_size_is_the_shifted_image():
    picture = photo(0, 40, 50)
    assert np.array_equal(crops([picture], [(7, 11, 24, 24)], 24)[0], picture[7:31, 11:35])
    flipped = crops([picture], [(7, 11, 24, 24)], 24, torch.tensor([True]))[0]
    assert np.array_equal(flipped, picture[7:31, 11:35][:, ::-1])


def test_crops_do_not_depend_on_the_rest_of_the_batch():
    pictures = [photo(i, *size) for i, size in enumerate(SIZES)]
    together = crops(pictures, BOXES, 32)
    for i, picture in enumerate(pictures):
        assert np.abs(crops([picture], BOXES[i:i + 1], 32)[0] - together[i]).max() <= 1  # rounding of x.5


def test_values_of_constant_images_are_kept_at_both_scales():
    flips, boxes = torch.zeros(1, dtype=torch.bool), torch.tensor([[3.0, 0, 20, 17]])
    for value in (0.0, 0.3, 1.0, 77.0, 255.0):
        x = common.resample(torch.full((1, 2, 30, 20), value), torch.tensor([[30, 20]]), boxes, flips, 12)
        close(x, np.full((1, 2, 12, 12), value), rtol=1e-5)


def view_of(sizes, out, **changes):
    """A view that changes nothing: whole image, no flip, no colour; `changes` by key."""
    n = len(sizes)
    off = torch.zeros(n, dtype=torch.bool)
    boxes = torch.cat([torch.zeros(n, 2), sizes], 1).double()
    view = {"boxes": boxes, "flip": off, "jitter": off, "factors": torch.tensor([[1.0, 1, 1, 0]]).repeat(n, 1),
            "order": torch.arange(4).repeat(n, 1), "grey": off, "blur": off, "sigma": torch.ones(n), "solarize": off}
    assert changes.keys() <= view.keys()
    return view | changes


def squares(n, channels=3, size=24):
    """(uint8 batch, sizes, the same as float64 in [0, 1])."""
    images, sizes = pad([photo(i, size, size, channels) for i in range(n)])
    return images, sizes, images.double() / 255


def augment(images, sizes, out=24, **changes):
    return common.augment(images, sizes, view_of(sizes, out, **changes), out).double()


def plain_luma(x):
    return 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]


def plain_jitter(x, k, factor):
    """Textbook brightness, contrast, saturation (k = 0, 1, 2) of one image (3, H, W) in [0, 1]."""
    other = (torch.zeros_like(x), plain_luma(x).mean().expand_as(x), plain_luma(x)[None].expand_as(x))[k]
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def plain_hue(x, turn):
    """colorsys on every pixel of (3, H, W)."""
    pixels = []
    for r, g, b in x.flatten(1).T.tolist():
        h, s, v = colorsys.rgb_to_hsv(r, g, b)
        pixels.append(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
    return torch.tensor(pixels, dtype=torch.double).T.reshape(x.shape)


def test_view_without_changes_is_the_image():
    images, sizes, x = squares(3)
    torch.testing.assert_close(augment(images, sizes), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_brightness_contrast_and_saturation_are_the_textbook_formulas(k):
    images, sizes, x = squares(4)
    factors = torch.tensor([[1.0, 1, 1, 0]]).repeat(4, 1)
    factors[:, k] = torch.tensor([0.6, 0.9, 1.15, 1.4])
    out = augment(images, sizes, jitter=torch.ones(4, dtype=torch.bool), factors=factors)
    for b in range(4):
        torch.testing.assert_close(out[b], plain_jitter(x[b], k, factors[b, k].item()), rtol=0, atol=1e-5)


def test_hue_equals_colorsys():
    x = torch.rand(1, 3, 20, 20, generator=gen())
    x[0, :, 0] = torch.tensor([[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0],
                               [0, 1, 1], [1, 0, 1], [0.2, 0.2, 0.7]] * 2, dtype=torch.float32).T
    for turn in (-0.5, -0.1, 0.0, 0.07, 1 / 3, 0.5):
        out = common.adjust_hue(x, torch.full((1, 1, 1, 1), turn))
        torch.testing.assert_close(out[0].double(), plain_hue(x[0].double(), turn), rtol=0, atol=1e-5)


def test_hue_turns_red_to_green_in_a_third_of_the_circle():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    images[:, 0] = 255
    out = augment(images, torch.tensor([[8, 8]]), 8, jitter=torch.tensor([True]),
                  factors=torch.tensor([[1, 1, 1, 1 / 3]]))
    torch.testing.assert_close(out, torch.tensor([0, 1.0, 0]).double()[None, :, None, None].expand(1, 3, 8, 8),
                               rtol=0, atol=1e-5)


def test_jitter_is_applied_in_each_images_own_order():
    orders = torch.tensor(list(itertools.permutations(range(4))))  # (24, 4)
    n = len(orders)
    images, sizes, x = squares(n, size=6)
    factors = torch.tensor([[1.4, 0.6, 1.4, 0.1]]).repeat(n, 1)
    out = augment(images, sizes, 6, jitter=torch.ones(n, dtype=torch.bool), factors=factors, order=orders)
    for b in range(n):
        y = x[b]
        for k in orders[b].tolist():
            y = plain_hue(y, 0.1) if k == 3 else plain_jitter(y, k, (1.4, 0.6, 1.4)[k])
        torch.testing.assert_close(out[b], y, rtol=0, atol=2e-5)


def test_grey_and_solarize_act_on_their_images_alone():
    images, sizes, x = squares(4)
    which = torch.tensor([True, False, True, False])
    grey, solar = augment(images, sizes, grey=which), augment(images, sizes, solarize=which)
    for b in range(4):
        torch.testing.assert_close(grey[b], plain_luma(x[b]).expand(3, -1, -1) if which[b] else x[b], rtol=0, atol=1e-5)
        torch.testing.assert_close(solar[b], torch.where(x[b] >= 0.5, 1 - x[b], x[b]) if which[b] else x[b],
                                   rtol=0, atol=1e-5)


def plain_blur(x, sigma):
    """9 taps by 9 on (C, H, W), borders mirrored without repeating the edge."""
    taps = np.exp(-np.arange(-4, 5) ** 2 / (2 * sigma**2))
    taps /= taps.sum()
    padded = np.pad(x, ((0, 0), (4, 4), (4, 4)), mode="reflect")
    height, width = x.shape[1:]
    return sum(taps[i] * taps[j] * padded[:, i:i + height, j:j + width] for i in range(9) for j in range(9))


@pytest.mark.parametrize("size", [16, 96])
def test_blur_is_a_nine_tap_gaussian_with_reflected_borders(size):
    x, sigma = torch.rand(3, 2, size, size, generator=gen()), torch.tensor([0.1, 0.7, 2.0])
    out = common.gaussian_blur(x, sigma)
    for b in range(3):
        close(out[b], plain_blur(x[b].double().numpy(), sigma[b].item()), rtol=0, atol=1e-6)


def test_augment_goes_crop_jitter_grey_blur_solarize():
    images, sizes, x = squares(2)
    on, box = torch.tensor([True, True]), torch.tensor([[2.0, 3, 16, 16], [8, 8, 16, 16]]).double()
    factors, sigma = torch.tensor([[1.3, 1, 1, 0], [0.8, 1, 1, 0]]), torch.tensor([0.5, 1.5])
    out = augment(images, sizes, 16, boxes=box, flip=on, jitter=on, factors=factors, grey=on, blur=on, sigma=sigma,
                  solarize=on)
    for b, (t, left) in enumerate([(2, 3), (8, 8)]):
        y = plain_jitter(x[b, :, t:t + 16, left:left + 16].flip(2), 0, factors[b, 0].item())
        y = plain_blur(plain_luma(y).expand(3, -1, -1).numpy(), sigma[b].item())
        close(out[b], np.where(y >= 0.5, 1 - y, y), rtol=0, atol=1e-5)


def test_same_parameters_give_the_same_bits_and_paired_crops():
    """An image whose denoised copy is itself gets the same crop twice: the anchor's pairs."""
    images, sizes = pad([photo(i, *size) for i, size in enumerate(SIZES)])
    view = common.draw_view(sizes, (0.32, 1.0), gen(), blur_p=0.5, solarize_p=0.5)
    kept = {k: v.clone() for k, v in view.items()}
    first, denoised = common.augment(images, sizes, view, 32), common.augment(images.clone(), sizes, view, 32)
    assert torch.equal(first, denoised)
    assert all(torch.equal(view[k], kept[k]) for k in kept)  # drawn once, not changed by use
    again = common.draw_view(sizes, (0.32, 1.0), gen(), blur_p=0.5, solarize_p=0.5)
    assert all(torch.equal(view[k], again[k]) for k in kept)


def frequency(x, p):
    close(x.float().mean(), p, rtol=0, atol=4 * math.sqrt(max(p * (1 - p), 1e-12) / len(x)))


@pytest.mark.parametrize(("blur_p", "solarize_p", "scale"), [
    (1.0, 0.0, (0.32, 1.0)), (0.1, 0.2, (0.32, 1.0)), (0.5, 0.0, (0.05, 0.32))])
def test_augmentations_are_as_frequent_as_in_dinov2(blur_p, solarize_p, scale):
    n = 10_000
    view = common.draw_view(torch.tensor([[500, 500]]).expand(n, 2), scale, gen(), blur_p, solarize_p)
    for key, p in (("flip", 0.5), ("jitter", 0.8), ("grey", 0.2), ("blur", blur_p), ("solarize", solarize_p)):
        frequency(view[key], p)
    joint = view["flip"] & view["jitter"] & view["grey"]
    frequency(joint, 0.5 * 0.8 * 0.2)  # drawn independently
    for k, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        factor = view["factors"][:, k]
        assert low <= factor.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < factor.max() <= high
        close(factor.mean(), (low + high) / 2, rtol=0, atol=4 * (high - low) / math.sqrt(12 * n))
        close(factor.std(), (high - low) / math.sqrt(12), rtol=0.03)
    assert 0.1 <= view["sigma"].min() < 0.12 and 1.98 < view["sigma"].max() <= 2.0
    close(view["sigma"].mean(), 1.05, rtol=0, atol=4 * 1.9 / math.sqrt(12 * n))
    counts = (view["order"] * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert (view["order"].sort(1).values == torch.arange(4)).all()
    close(counts, [n / 24] * 24, rtol=0, atol=4 * math.sqrt(n / 24))


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
@pytest.mark.parametrize("size", [(500, 500), (400, 600)])
def test_boxes_are_inside_with_uniform_area_and_log_uniform_aspect(size, scale):
    n = 10_000
    top, left, h, w = common.draw_boxes(torch.tensor([size]).expand(n, 2), scale, gen()).T
    assert (torch.stack([top, left, h, w]) % 1 == 0).all() and min(h.min(), w.min()) >= 1
    assert top.min() >= 0 and left.min() >= 0 and (top + h).max() <= size[0] and (left + w).max() <= size[1]
    area, aspect = h * w / math.prod(size), w / h
    rounding = (h + w) / (h * w)  # each side is rounded to whole pixels
    assert (area >= scale[0] * (1 - rounding)).all() and (area <= scale[1] * (1 + rounding)).all()
    assert (aspect >= 0.75 * (1 - rounding)).all() and (aspect <= 4 / 3 * (1 + rounding)).all()
    if scale[1] < 0.5:  # all boxes fit, so nothing is redrawn
        close(area.mean(), sum(scale) / 2, rtol=0, atol=4 * (scale[1] - scale[0]) / math.sqrt(12 * n))
        close(area.std(), (scale[1] - scale[0]) / math.sqrt(12), rtol=0.03)
        close(aspect.log().mean(), 0, rtol=0, atol=4 * 2 * math.log(4 / 3) / math.sqrt(12 * n))
        close(aspect.log().std(), 2 * math.log(4 / 3) / math.sqrt(12), rtol=0.03)
    for start, room in ((top, size[0] - h), (left, size[1] - w)):  # uniform over the whole places that fit
        place = ((start + 0.5) / (room + 1))[room > 20]
        close(place.mean(), 0.5, rtol=0, atol=4 / math.sqrt(12 * len(place)))
        close(place.std(), 1 / math.sqrt(12), rtol=0.03)


def test_boxes_reach_both_borders_equally_often():
    """13 x 13 boxes in 15 x 15 pixels have 3 places along each axis."""
    top, left, h, w = common.draw_boxes(torch.full((30_000, 2), 15), (0.75, 0.75), gen()).T
    for start, length in ((top, h), (left, w)):
        counts = torch.bincount(start[length == 13].long(), minlength=3)
        close(counts / counts.sum(), [1 / 3] * 3, rtol=0, atol=4 * math.sqrt(2 / 9 / counts.sum()))


def test_boxes_of_extreme_images_are_central_and_of_an_allowed_aspect():
    """torchvision's fallback where no try fits: 10 x 1000 pixels have no box of 32 % and aspect 4/3."""
    boxes = common.draw_boxes(torch.tensor([[10, 1000], [1000, 10], [1, 1], [1, 50]]), (0.32, 1.0), gen())
    assert boxes[0, [0, 2, 3]].tolist() == [0, 10, 13] and 493 <= boxes[0, 1] <= 494
    assert boxes[1, [1, 2, 3]].tolist() == [0, 13, 10] and 493 <= boxes[1, 0] <= 494
    assert boxes[2].tolist() == [0, 0, 1, 1]
    assert boxes[3, 2:].tolist() == [1, 1] and 0 <= boxes[3, 1] <= 49


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channel_counts_have_no_hue_saturation_grey_or_solarize(channels):
    images, sizes, x = squares(2, channels)
    on = torch.tensor([True, True])
    factors = torch.tensor([[1.2, 0.7, 0.3, 0.1], [0.7, 1.4, 1.9, -0.1]])
    order = torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2]])
    out = augment(images, sizes, jitter=on, factors=factors, order=order, grey=on, solarize=on, blur=on)
    for b in range(2):
        y = x[b]
        for k in [k for k in order[b].tolist() if k < 2]:
            y = (y * factors[b, 0] if k == 0 else factors[b, 1] * y + (1 - factors[b, 1]) * y.mean()).clamp(0, 1)
        close(out[b], plain_blur(y.numpy(), 1.0), rtol=0, atol=1e-5)


# ======================================================================================================
# noise
# ======================================================================================================

NORMAL = statistics.NormalDist()


def clipped_gaussian(mean, sigma):
    """Mean and standard deviation of clip(N(mean, sigma), 0, 1)."""
    a, b = -mean / sigma, (1 - mean) / sigma
    inner = NORMAL.cdf(b) - NORMAL.cdf(a)
    pa, pb, above = NORMAL.pdf(a), NORMAL.pdf(b), 1 - NORMAL.cdf(b)
    first = mean * inner + sigma * (pa - pb) + above
    second = (mean**2 + sigma**2) * inner + 2 * mean * sigma * (pa - pb) + sigma**2 * (a * pa - b * pb) + above
    return first, math.sqrt(second - first**2)


def clipped_poisson(x, photons):
    """Mean and standard deviation of min(Poisson(photons x) / photons, 1)."""
    p = [math.exp(-photons * x) * (photons * x) ** k / math.factorial(k) for k in range(100)]
    values = [min(k / photons, 1) for k in range(100)]
    first = sum(a * b for a, b in zip(p, values, strict=True))
    return first, math.sqrt(sum(a * b * b for a, b in zip(p, values, strict=True)) - first**2)


def noisy(x, spec, key="a.png", seed=0, shape=(200, 200, 3)):
    return common.add_noise(np.full(shape, x, np.float32), spec, key, seed)


def check_moments(values, mean, deviation):
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() <= 1
    values = values.astype(np.float64)
    close(values.mean(), mean, rtol=0, atol=4.5 * deviation / math.sqrt(values.size) + 1e-7)
    close(values.std(), deviation, rtol=0.02, atol=1e-7)


@pytest.mark.parametrize("x", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("level", [50, 100, 255])
def test_gaussian_noise_has_the_moments_of_a_clipped_gaussian(level, x):
    check_moments(noisy(x, f"gauss{level}"), *clipped_gaussian(x, level / 255))


def test_gauss255_moves_black_to_0_316_and_white_to_0_684():
    close(noisy(0.0, "gauss255").mean(), 0.3156, rtol=0, atol=0.005)
    close(noisy(1.0, "gauss255").mean(), 0.6845, rtol=0, atol=0.005)


@pytest.mark.parametrize("x", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("photons", [10, 3, 1, 0.5])
def test_shot_noise_has_the_moments_of_a_clipped_poisson(photons, x):
    values = noisy(x, f"shot{photons}")
    check_moments(values, *clipped_poisson(x, photons))
    counts = values[values < 1] * photons  # whole photons
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-5)


@pytest.mark.parametrize("x", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("level", [0.4, 0.7, 1.0])
def test_speckle_noise_is_proportional_to_the_pixel(level, x):
    check_moments(noisy(x, f"speckle{level}"), *(clipped_gaussian(x, x * level) if x else (0.0, 0.0)))


def test_rician_noise_has_the_moments_of_a_magnitude():
    sigma = 10 / 255
    check_moments(noisy(0.0, "rician10"), sigma * math.sqrt(math.pi / 2), sigma * math.sqrt(2 - math.pi / 2))
    values = noisy(0.5, "rician10").astype(np.float64)
    close((values**2).mean(), 0.25 + 2 * sigma**2, rtol=0, atol=4.5 * 2 * 0.5 * sigma / math.sqrt(values.size))
    close(values.std(), sigma, rtol=0.02)  # Gaussian far from 0


@pytest.mark.parametrize("level", [0.1, 0.5, 1.0])
def test_impulse_noise_replaces_its_fraction_half_by_black_half_by_white(level):
    values = noisy(0.3, f"impulse{level}")
    assert set(np.unique(values)) <= {0.0, np.float32(0.3), 1.0}
    frequency(torch.from_numpy(values == 0).flatten(), level / 2)
    frequency(torch.from_numpy(values == 1).flatten(), level / 2)


MODELS = ["gauss100", "shot3", "speckle0.7", "rician80", "impulse0.4"]


def test_all_registered_models_are_tested():
    assert {m.rstrip("0123456789.") for m in MODELS} == set(common.NOISES)


@pytest.mark.parametrize("spec", MODELS)
def test_noise_is_independent_between_channels_pixels_and_images(spec):
    a, b, c = noisy(0.5, spec), noisy(0.5, spec, "b.png"), noisy(0.5, spec, seed=1)
    pairs = [(a[..., 0], a[..., 1]), (a[..., 0], a[..., 2]), (a[..., 1], a[..., 2]), (a[:, 1:], a[:, :-1]),
             (a[1:], a[:-1]), (a[1:, 1:], a[:-1, :-1]), (a, b), (a, c)]
    for p, q in pairs:
        assert abs(np.corrcoef(p.ravel(), q.ravel())[0, 1]) < 4.5 / math.sqrt(p.size)


@pytest.mark.parametrize("spec", [*MODELS, "gauss50-255", "shot1-10"])
def test_noise_is_fixed_by_key_and_seed(spec):
    x = np.random.default_rng(0).random((9, 8, 3), dtype=np.float32)
    kept = x.copy()
    first = common.add_noise(x, spec, "train/a/1.png", 3)
    noisy(0.1, spec, "between")
    assert np.array_equal(first, common.add_noise(x, spec, "train/a/1.png", 3))
    assert np.array_equal(x, kept)  # the image itself stays
    for key, seed in [("train/a/2.png", 3), ("val/a/1.png", 3), ("train/a/1.png", 4), ("3:train/a/1.png", 0)]:
        assert not np.array_equal(first, common.add_noise(x, spec, key, seed)), (key, seed)


def test_noise_is_drawn_from_the_hash_of_base_seed_and_relative_path():
    """By hand: the same in every version of this code, or published figures could not be compared."""
    rng = np.random.default_rng(np.frombuffer(hashlib.sha256(b"7:train/caf\xc3\xa9/1.png").digest(), "<u4"))
    expected = np.clip(0.5 + 100 / 255 * rng.standard_normal((6, 5, 3), np.float32), 0, 1)
    assert np.array_equal(noisy(0.5, "gauss100", "train/café/1.png", 7, (6, 5, 3)), expected)


def test_a_range_draws_a_level_for_each_image_within_it():
    """The level is read off the share of clipped values of a mid-grey image: P(|n| > 0.5) at sigma."""
    levels = []
    for i in range(60):
        values = noisy(0.5, "gauss50-255", f"{i}.png", shape=(64, 64, 3))
        clipped = np.mean((values == 0) | (values == 1))
        levels.append(255 * 0.5 / NORMAL.inv_cdf(1 - clipped / 2))
    assert 50 * 0.95 < min(levels) < 65 and 240 < max(levels) < 255 * 1.05
    close(np.mean(levels), 152.5, rtol=0, atol=4 * 205 / math.sqrt(12 * 60))
    assert len({round(v, 3) for v in levels}) == 60


def test_noise_none_is_the_image_itself():
    x = np.random.default_rng(0).random((5, 4, 3), dtype=np.float32)
    assert np.array_equal(common.add_noise(x, "none", "a"), x)
    assert common.parse_noise("none") is None


@pytest.mark.parametrize("spec", ["gaus100", "gauss", "gauss-5", "gauss0", "impulse1.5", "gauss255-50", "gaussnan",
                                  "gaussinf", "gauss1e999", "gauss10-", "gauss10-20-30", "100", "", "None", "gauss 1 2",
                                  "impulse0.5-1.5", "shot0-3", "shot99999999999999999999"])
def test_bad_noise_specs_are_refused_by_name(spec):
    with pytest.raises(UserError, match="--noise") as error:
        common.parse_noise(spec)
    assert spec in str(error.value) and "\n" not in str(error.value)


def test_noise_specs_parse_to_name_and_levels():
    assert common.parse_noise("gauss100") == ("gauss", 100, 100)
    assert common.parse_noise("gauss50-255") == ("gauss", 50, 255)
    assert common.parse_noise("speckle0.4") == ("speckle", 0.4, 0.4)
    assert common.parse_noise("impulse1") == ("impulse", 1, 1)


def test_an_added_model_of_three_lines_parses_by_the_same_rule(monkeypatch):
    monkeypatch.setattr(common, "NOISES", dict(common.NOISES))

    @common.noise("gaussstripes", most=1)  # begins with another model's name
    def stripes(x, level, rng):
        return x + level * rng.standard_normal((1, x.shape[1], 1), np.float32)

    assert common.parse_noise("gaussstripes0.5") == ("gaussstripes", 0.5, 0.5)
    assert common.parse_noise("gauss0.5")[0] == "gauss"
    with pytest.raises(UserError, match="up to 1"):
        common.parse_noise("gaussstripes2")
    x = noisy(0.5, "gaussstripes0.1-0.2")
    assert (x == x[:1, :, :1]).all() and x.std() > 0.05


# ======================================================================================================
# images
# ======================================================================================================


def save(path, x, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path, **kw)
    return path


@pytest.fixture
def colour(tmp_path):
    """DIR/train/{a,b}/*.png of several sizes."""
    for i, size in enumerate(SIZES):
        save(tmp_path / "data" / "train" / "ab"[i % 2] / f"{i}.png", photo(i, *size))
    return tmp_path / "data"


def only(folder, **kw):
    """The one image of a folder as Folder reads it."""
    found = common.Folder(folder, **kw)
    assert len(found) == 1
    x = found.read(0)
    assert x.dtype == np.uint8 and x.shape == (*found.sizes[0].tolist(), found.channels)
    return x


def test_8_bit_png_is_read_as_it_is(tmp_path):
    x = photo(0, 7, 9)
    save(tmp_path / "a.png", x)
    assert np.array_equal(only(tmp_path), x)


@pytest.mark.parametrize("suffix", [".png", ".pgm"])  # Pillow opens the second as 32 bit
def test_16_bit_grey_image_is_scaled_by_its_range(tmp_path, suffix):
    x = np.array([[0, 257, 1000], [30000, 65000, 65535]], np.uint16)
    if suffix == ".png":
        save(tmp_path / "a.png", x)
    else:
        (tmp_path / "a.pgm").write_bytes(b"P5 3 2 65535\n" + x.astype(">u2").tobytes())
    assert np.array_equal(only(tmp_path)[..., 0], np.rint(x / 65535 * 255).astype(np.uint8))


@pytest.mark.parametrize("transparency", [None, 3, bytes([255, 0, 128])])
def test_palette_image_becomes_rgb_by_its_colours(tmp_path, transparency):
    index = np.random.default_rng(0).integers(0, 4, (6, 5), dtype=np.uint8)
    palette = np.array([[255, 0, 0], [0, 200, 10], [9, 8, 7], [255, 255, 255]], np.uint8)
    image = Image.frombytes("P", (5, 6), index.tobytes())
    image.putpalette(palette.ravel().tolist())
    image.save(tmp_path / "a.png", **({} if transparency is None else {"transparency": transparency}))
    assert np.array_equal(only(tmp_path), palette[index])


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_dropped(tmp_path, channels):
    x = photo(0, 7, 9, channels)
    save(tmp_path / "a.png", x)
    assert np.array_equal(only(tmp_path), x[..., :channels - 1])


def test_cmyk_becomes_rgb(tmp_path):
    x = np.zeros((8, 8, 4), np.uint8)
    x[:4, :, 0] = 255  # cyan above, black below
    x[4:, :, 3] = 255
    Image.fromarray(x, "CMYK").save(tmp_path / "a.tif")
    out = only(tmp_path)
    assert (out[:4] == [0, 255, 255]).all() and (out[4:] == 0).all()


def test_bilevel_image_is_black_and_white(tmp_path):
    x = np.random.default_rng(0).random((9, 8)) < 0.5
    save(tmp_path / "a.png", x)
    assert np.array_equal(only(tmp_path)[..., 0], np.where(x, 255, 0))


TURNS = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
         6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x.swapaxes(0, 1), 2), 8: np.rot90, 9: lambda x: x}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_rotated_jpeg_is_upright(tmp_path, orientation):
    x = photo(0, 16, 32, contrast=60)
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(tmp_path / "a.jpg", x, exif=exif, quality=95, subsampling=0)
    with Image.open(tmp_path / "a.jpg") as image:
        stored = np.array(image)
    assert stored.shape == (16, 32, 3)
    assert np.array_equal(only(tmp_path), TURNS[orientation](stored))


def test_grey_image_among_rgb_is_grey_in_three_channels_with_independent_noise(tmp_path):
    grey = photo(0, 40, 50, 1, contrast=40)[..., 0]  # far from clipping
    save(tmp_path / "a.png", grey)
    save(tmp_path / "b.png", photo(1, 8, 9))
    folder = common.Folder(tmp_path)
    assert folder.channels == 3
    assert np.array_equal(folder.read(0), np.repeat(grey[..., None], 3, 2))
    noise = common.Folder(tmp_path, spec="gauss20").read(0).astype(float) - grey[..., None]
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.1


@pytest.mark.parametrize(("shape", "channels"), [((6, 7), 1), ((6, 7, 1), 1), ((6, 7, 3), 3), ((6, 7, 5), 5)])
def test_npy_arrays_have_any_number_of_channels(tmp_path, shape, channels):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "a.npy", x)
    out = only(tmp_path)
    assert out.shape == (6, 7, channels) and np.array_equal(out.reshape(shape), x)


@pytest.mark.parametrize(("dtype", "low", "high"), [
    ("uint16", 0, 65535), (">u2", 0, 65535), ("int16", -32768, 32767), ("int8", -128, 127), ("uint32", 0, 2**32 - 1),
    ("float32", 0.0, 1.0), ("float64", 0.0, 1.0), ("float16", 0.0, 1.0)])
def test_npy_values_are_scaled_by_the_dtypes_range(tmp_path, dtype, low, high):
    fractions = np.array([[0, 0.1, 0.25], [0.6, 0.77, 1]])
    x = low + fractions * (high - low)
    x = (x if dtype.startswith("float") else np.rint(x)).astype(dtype)
    np.save(tmp_path / "a.npy", x)
    expected = (x.astype(np.float64) - low) / (high - low)
    assert np.array_equal(only(tmp_path)[..., 0], np.rint(expected * 255).astype(np.uint8))


def test_bool_npy_is_black_and_white(tmp_path):
    x = np.array([[True, False, True]])
    np.save(tmp_path / "a.npy", x)
    assert only(tmp_path)[..., 0].tolist() == [[255, 0, 255]]


@pytest.mark.parametrize(("value", "taken"), [(60000, True), (65535, True), (65536, False), (-1, False)])
def test_32_bit_images_hold_16_bit_values_or_are_refused(tmp_path, value, taken):
    Image.fromarray(np.full((4, 5), value, np.int32)).save(tmp_path / "a.tif")
    if taken:
        assert (only(tmp_path) == round(value / 65535 * 255)).all()
        return
    with pytest.raises(UserError, match=r"a\.tif: not a readable image \(32-bit"):
        only(tmp_path)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan, math.inf, -math.inf])
def test_float_values_out_of_range_are_refused_with_the_file(tmp_path, value):
    x = np.full((4, 4, 3), 0.5)
    x[1, 2, 0] = value
    np.save(tmp_path / "odd.npy", x)
    for spec in ("none", "gauss10"):
        with pytest.raises(UserError, match=r"odd\.npy"):
            common.Folder(tmp_path, spec=spec).read(0)


def break_file(path, how):
    if how == "zero":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("this is no image\n")
    elif how == "truncated":
        data = path.read_bytes()
        path.write_bytes(data[:len(data) // 2])
    elif how == "directory in the file's place":
        path.unlink()
        path.mkdir()


@pytest.mark.parametrize("how", ["zero", "text", "truncated"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".npy", ".bmp", ".gif", ".webp"])
def test_unreadable_files_are_refused_with_their_name(tmp_path, suffix, how):
    path, x = tmp_path / f"broken{suffix}", np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    if suffix == ".npy":
        np.save(path, x)
    else:
        save(path, x)
    break_file(path, how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about truncated TIFFs before it raises
        with pytest.raises(UserError, match=rf"broken\{suffix}") as error:
            common.Folder(tmp_path).read(0)
    assert ("empty file" in str(error.value)) == (how == "zero")


@pytest.mark.parametrize("x", [np.zeros(5), np.zeros((2, 3, 4, 5)), np.zeros((0, 4, 3)), np.zeros((4, 4), complex),
                               np.array([[object()]])], ids=["1-D", "4-D", "empty", "complex", "objects"])
def test_arrays_that_are_no_images_are_refused_with_their_name(tmp_path, x):
    np.save(tmp_path / "odd.npy", x, allow_pickle=True)
    with pytest.raises(UserError, match=r"odd\.npy"):
        common.Folder(tmp_path).read(0)


def test_archive_named_npy_is_refused_with_its_name(tmp_path):
    with open(tmp_path / "odd.npy", "wb") as file:
        np.savez(file, x=np.zeros((4, 4)))
    with pytest.raises(UserError, match=r"odd\.npy"):
        common.Folder(tmp_path).read(0)


def test_unreadable_files_stop_both_kinds_of_batches_with_their_name(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.jpg", photo(i, 64, 64))
    folder = common.Folder(tmp_path)
    break_file(tmp_path / "2.jpg", "truncated")
    with pytest.raises(UserError, match=r"2\.jpg"):
        common.Batches(folder, ["noisy"], CPU)
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"2\.jpg"):
            list(common.Batches(folder, ["noisy"], CPU, cache_gb=0, workers=workers).epoch([[0, 1], [2, 3]]))


def test_nested_and_flat_folders_and_their_keys(tmp_path):
    """A data folder with train/ keys its images by train/...; any other folder by the path below it."""
    paths = ["train/b/2.png", "train/a/1.JPG", "train/a/deep/er/3.png", "val/a/9.png"]
    for i, path in enumerate(paths):
        save(tmp_path / path, photo(i, 5, 6 + i))
    assert common.Folder(tmp_path).paths == sorted(paths[:3])
    assert common.Folder(tmp_path, "val").paths == ["val/a/9.png"]
    assert common.Folder(tmp_path / "train").paths == ["a/1.JPG", "a/deep/er/3.png", "b/2.png"]
    assert common.Folder(tmp_path / "train" / "a" / "deep" / "er").paths == ["3.png"]
    assert common.Folder(tmp_path).labels() == ["a", "a", "b"]
    assert common.Folder(tmp_path).sizes.tolist() == [[5, 7], [5, 8], [5, 6]]
    with pytest.raises(UserError, match="class"):
        common.Folder(tmp_path / "train" / "b").labels()
    for data, split in [(tmp_path / "nowhere", "train"), (tmp_path / "train", "val")]:
        with pytest.raises(UserError, match="no such folder"):
            common.Folder(data, split)
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="void"):
        common.Folder(tmp_path / "void")


def test_hidden_and_other_files_are_passed_over(tmp_path):
    save(tmp_path / "a.png", photo(0, 5, 6))
    save(tmp_path / ".b.png", photo(0, 5, 6))
    (tmp_path / "._c.png").write_bytes(b"resource fork")
    (tmp_path / "labels.txt").write_text("a 1")
    (tmp_path / "Thumbs.db").write_bytes(b"")
    save(tmp_path / ".ipynb_checkpoints" / "a.png", photo(0, 5, 6))
    assert common.Folder(tmp_path).paths == ["a.png"]


def test_links_are_followed_once_and_loops_end(tmp_path):
    save(tmp_path / "data" / "a.png", photo(0, 5, 6))
    save(tmp_path / "far" / "b.png", photo(1, 5, 6))
    os.symlink(tmp_path / "data", tmp_path / "data" / "loop")
    os.symlink(tmp_path / "far", tmp_path / "data" / "link")
    os.symlink(tmp_path / "data", tmp_path / "far" / "back")
    assert common.Folder(tmp_path / "data").paths == ["a.png", "link/b.png"]


def test_images_do_not_depend_on_the_order_in_which_the_disk_lists_folders(tmp_path, monkeypatch):
    """A folder that is met twice, itself and by a link, has one path on every machine: it is the noise's key."""
    save(tmp_path / "a" / "1.png", photo(0, 5, 6))
    os.symlink(tmp_path / "a", tmp_path / "b")
    real, listings = os.scandir, []

    class Sorted(contextlib.ExitStack):
        """os.scandir of a disk that lists names upwards or downwards."""

        def __init__(self, path, reverse):
            super().__init__()
            with real(path) as entries:
                self.entries = iter(sorted(entries, key=lambda e: e.name, reverse=reverse))

        def __iter__(self):
            return self.entries

        def __next__(self):
            return next(self.entries)

    for reverse in (False, True):
        monkeypatch.setattr(os, "scandir", lambda path, reverse=reverse: Sorted(path, reverse))
        listings.append(common.list_images(tmp_path))
    monkeypatch.undo()
    assert listings[0] == listings[1]


def test_files_of_different_channel_counts_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 4, 5), np.uint8))
    save(tmp_path / "b.png", photo(0, 5, 6))
    with pytest.raises(UserError, match=r"b\.png has 3.*a\.npy has 5"):
        common.Folder(tmp_path)


def expected_noisy(folder, i, spec, seed=0):
    """The image on disk, noise put on by its path, rounded to 8 bit."""
    with Image.open(folder.data / folder.paths[i]) as image:
        clean = np.asarray(image, dtype=np.float32) / np.float32(255)
    x = common.add_noise(clean, spec, folder.paths[i], seed)
    return np.rint(x * np.float32(255)).astype(np.uint8)


@pytest.mark.parametrize("spec", ["gauss100", "shot1-10"])
def test_noisy_images_are_the_same_in_any_order_thread_and_worker(colour, spec):
    folder = common.Folder(colour, spec=spec, seed=5)
    expected = [expected_noisy(folder, i, spec, 5) for i in range(len(folder))]
    order = [3, 0, 6, 6, 2, 5, 1, 4, 0]
    for i in order:
        assert np.array_equal(folder.read(i), expected[i])
    with ThreadPoolExecutor(4) as pool:
        for i, x in zip(order * 3, pool.map(folder.read, order * 3), strict=True):
            assert np.array_equal(x, expected[i])
    for workers in (0, 2):
        stream = common.Batches(folder, ["noisy"], CPU, cache_gb=0, workers=workers).epoch([order[:5], order[5:]])
        for part, (images, sizes) in zip([order[:5], order[5:]], stream, strict=True):
            for b, i in enumerate(part):
                height, width = sizes[b].tolist()
                assert np.array_equal(images[0][b, :, :height, :width].permute(1, 2, 0).numpy(), expected[i])
    assert np.array_equal(folder.read(1, "clean"), np.asarray(Image.open(colour / folder.paths[1])))


def test_batches_in_memory_and_streamed_are_the_same(colour, tmp_path):
    for path in common.list_images(colour):
        save(tmp_path / "denoised" / path, photo(99, *np.asarray(Image.open(colour / path)).shape))
    folder = common.Folder(colour, spec="gauss100", denoised=tmp_path / "denoised")
    parts, sources = [[4, 1], [0, 2, 3], [5], [6, 6]], ["noisy", "denoised", "clean"]
    kept = list(common.Batches(folder, sources, CPU, cache_gb=1).epoch(parts))
    streamed = list(common.Batches(folder, sources, CPU, cache_gb=0, workers=2).epoch(parts))
    for part, (a, a_sizes), (b, b_sizes) in zip(parts, kept, streamed, strict=True):
        assert torch.equal(a_sizes, b_sizes) and torch.equal(a_sizes, folder.sizes[part])
        for source, x, y in zip(sources, a, b, strict=True):
            assert x.dtype == y.dtype == torch.uint8 and torch.equal(x, y)
            for j, i in enumerate(part):
                height, width = a_sizes[j].tolist()
                assert np.array_equal(x[j, :, :height, :width].permute(1, 2, 0).numpy(), folder.read(i, source))
                assert not x[j, :, height:].any() and not x[j, :, :, width:].any()


def test_images_without_noise_make_batches_too(tmp_path):
    """--noise none, the real use: 8-bit files straight from Pillow."""
    pictures = [photo(i, 6, 7) for i in range(3)]
    for i, x in enumerate(pictures):
        save(tmp_path / f"{i}.png", x)
    for cache in (1, 0):
        (images, _), = common.Batches(common.Folder(tmp_path), ["noisy"], CPU, cache_gb=cache).epoch([[2, 0, 1]])
        assert np.array_equal(images[0].permute(0, 2, 3, 1).numpy(), np.stack([pictures[i] for i in (2, 0, 1)]))


def test_denoised_images_are_matched_by_path_without_suffix(colour, tmp_path):
    folder = common.Folder(colour)
    for i, path in enumerate(folder.paths):
        x = photo(100 + i, *folder.sizes[i].tolist())
        target = (tmp_path / "denoised" / path).with_suffix(".npy" if i % 2 else ".bmp")
        target.parent.mkdir(parents=True, exist_ok=True)
        np.save(target, x) if i % 2 else save(target, x)
    folder = common.Folder(colour, spec="gauss100", denoised=tmp_path / "denoised")
    for i in range(len(folder)):
        assert np.array_equal(folder.read(i, "denoised"), photo(100 + i, *folder.sizes[i].tolist()))


def test_missing_denoised_images_are_counted_and_the_first_is_named(colour, tmp_path):
    folder = common.Folder(colour)
    for i in (0, 3):
        save(tmp_path / "denoised" / folder.paths[i], photo(0, *folder.sizes[i].tolist()))
    with pytest.raises(UserError, match=f"5 of 7 .*{folder.paths[1]}"):
        common.Folder(colour, denoised=tmp_path / "denoised")
    with pytest.raises(UserError, match="nowhere"):
        common.Folder(colour, denoised=tmp_path / "nowhere")


def test_denoised_image_of_another_size_is_refused_with_both_names(colour, tmp_path):
    folder = common.Folder(colour)
    for path in folder.paths:
        save(tmp_path / "denoised" / path, photo(0, 8, 8))
    with pytest.raises(UserError, match=f"denoised.*{folder.paths[0]} is"):
        common.Folder(colour, denoised=tmp_path / "denoised")


@pytest.mark.parametrize(("spec", "seed", "message"), [
    ("gauss50", 0, None), ("gauss100", 0, "--noise gauss50 (now gauss100)"), ("gauss50", 5, "--noise_seed 0 (now 5)")])
def test_denoised_copy_of_other_noise_is_refused(colour, tmp_path, spec, seed, message):
    for path in common.Folder(colour).paths:
        save(tmp_path / path, photo(0, *np.asarray(Image.open(colour / path)).shape))
    common.write_json(tmp_path / "made_by.json", {"denoiser": "0", "noise": "gauss50", "noise_seed": 0})
    if message:
        with pytest.raises(UserError) as error:
            common.Folder(colour, spec=spec, seed=seed, denoised=tmp_path)
        assert message in str(error.value) and str(tmp_path) in str(error.value)
    else:
        assert common.Folder(colour, spec=spec, seed=seed, denoised=tmp_path).read(0, "denoised").any()


def test_two_images_that_differ_in_suffix_alone_do_not_share_a_denoised_image(tmp_path):
    save(tmp_path / "data" / "1.png", photo(0, 8, 8))
    save(tmp_path / "data" / "1.bmp", photo(1, 8, 8))
    save(tmp_path / "denoised" / "1.png", photo(2, 8, 8))
    with pytest.raises(UserError, match=r"1\.(png|bmp)"):
        common.Folder(tmp_path / "data", denoised=tmp_path / "denoised")


@pytest.mark.parametrize("spec", ["none", "gauss100"])
def test_stats_are_mean_and_deviation_of_all_noisy_pixels(colour, spec):
    folder = common.Folder(colour, spec=spec)
    pixels = np.concatenate([folder.read(i).reshape(-1, 3) for i in range(len(folder))]) / 255
    mean, deviation = folder.stats()
    close(mean, pixels.mean(0), rtol=1e-9)
    close(deviation, pixels.std(0), rtol=1e-7)


def test_stats_of_a_large_folder_come_from_images_spread_over_it(tmp_path):
    for i in range(9):
        save(tmp_path / f"{i}.png", np.full((3, 3), i * 20, np.uint8))
    mean, deviation = common.Folder(tmp_path).stats(most=3)  # images 0, 4 and 8
    close(mean, [80 / 255], rtol=1e-9)
    close(deviation, [np.std([0, 80, 160]) / 255], rtol=1e-7)


def test_reflect_bounces_between_the_edges():
    def bounce(i, n):
        at, step = 0, 1
        for _ in range(abs(i)):  # symmetric about 0
            if not 0 <= at + step < n:
                step = -step
            at += step if n > 1 else 0
        return at

    for n in (1, 2, 3, 7):
        got = denoise.reflect(torch.arange(-20, 30), torch.tensor(n)).tolist()
        assert got == [bounce(i, n) for i in range(-20, 30)]
    sizes = torch.tensor([[1], [2], [5]])
    assert denoise.reflect(torch.arange(6), sizes).tolist() == [[0] * 6, [0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 3]]


# ======================================================================================================
# runtime
# ======================================================================================================


def test_generators_are_deterministic_and_differ_between_keys():
    keys = [(s, p, e, t) for s in range(3) for p in range(3) for e in range(8) for t in range(30)]
    draws = {k: tuple(torch.rand(3, generator=common.generator(*k)).tolist()) for k in keys}
    assert len(set(draws.values())) == len(keys)
    assert all(draws[k] == tuple(torch.rand(3, generator=common.generator(*k)).tolist()) for k in keys[::50])
    values = np.array(list(draws.values()))
    close(values.mean(0), [0.5] * 3, rtol=0, atol=4 / math.sqrt(12 * len(keys)))
    assert abs(np.corrcoef(values[1:, 0], values[:-1, 0])[0, 1]) < 4 / math.sqrt(len(keys))  # of neighbouring steps


def test_generators_differ_between_keys_of_other_lengths():
    """An epoch's order, keyed (seed, phase, epoch), is not drawn from the same numbers as its step 0."""
    keys = [(1,), (1, 0), (1, 0, 0), (1, 0, 0, 0), (0, 1), (1, 1)]
    draws = {tuple(torch.rand(3, generator=common.generator(*k)).tolist()) for k in keys}
    assert len(draws) == len(keys)


def test_checkpoint_is_loaded_bit_for_bit_and_the_one_before_is_kept(tmp_path):
    path = tmp_path / "run" / "checkpoint.pth"
    for step in (1, 2, 3):
        common.save_checkpoint(path, {"step": step, "w": torch.full((3,), 0.1 * step), "config": {"lr": 1e-3}})
    state = common.load_checkpoint(path)
    assert state["step"] == 3 and state["config"] == {"lr": 1e-3} and torch.equal(state["w"], torch.full((3,), 0.1 * 3))
    assert common.load_checkpoint(path.with_name("checkpoint.pth.previous"))["step"] == 2
    assert sorted(p.name for p in path.parent.iterdir()) == ["checkpoint.pth", "checkpoint.pth.previous"]


@pytest.mark.parametrize("how", ["truncated", "zero", "text"])
def test_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, how, capsys):
    path = tmp_path / "checkpoint.pth"
    for step in (1, 2):
        common.save_checkpoint(path, {"step": step, "w": torch.arange(1000.0)})
    break_file(path, how)
    assert common.load_checkpoint(path)["step"] == 1
    assert str(path) in capsys.readouterr().err
    break_file(path.with_name("checkpoint.pth.previous"), how)
    with pytest.raises(UserError, match=r"checkpoint\.pth"):
        common.load_checkpoint(path, required=False)


def test_crash_between_the_two_renames_loses_one_checkpoint_at_most(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    common.save_checkpoint(path, {"step": 1})
    real = os.replace

    def crash(a, b):
        real(a, b)
        if str(b).endswith(".previous"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        common.save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert common.load_checkpoint(path)["step"] in (1, 2)
    common.save_checkpoint(path, {"step": 3})
    assert common.load_checkpoint(path)["step"] == 3


def test_missing_checkpoint_is_none_or_an_error(tmp_path):
    assert common.load_checkpoint(tmp_path / "no.pth", required=False) is None
    with pytest.raises(UserError, match=r"no\.pth"):
        common.load_checkpoint(tmp_path / "no.pth")


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path, writer):
    path, marker = tmp_path / "checkpoint.pth", str(tmp_path / "was run")
    if writer == "torch":
        torch.save({"step": 1, "w": Hostile(marker)}, path)
    else:
        path.write_bytes(pickle.dumps({"step": 1, "w": Hostile(marker)}))
    with pytest.raises(UserError, match=r"checkpoint\.pth"):
        common.load_checkpoint(path)
    assert not os.path.exists(marker)
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert os.path.exists(marker)  # the file is hostile indeed


def test_config_check_names_each_field_and_both_values(tmp_path):
    saved, now = {"lr": 0.004, "batch_size": 40, "noise": "gauss100", "workers": 2}, {
        "lr": 0.002, "batch_size": 40, "noise": "gauss255", "workers": 8, "anchor": 1.1}
    with pytest.raises(UserError) as error:
        common.check_config(saved, now, {"workers"}, tmp_path)
    text = str(error.value)
    for part in ("--lr", "0.004", "0.002", "--noise", "gauss100", "gauss255", "--anchor", "1.1", str(tmp_path)):
        assert part in text
    assert "workers" not in text and "batch_size" not in text
    common.check_config(saved, saved | {"workers": 8}, {"workers"}, tmp_path)


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("disk full"), ValueError("bug"),
                                   KeyboardInterrupt()], ids=lambda e: type(e).__name__)
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "results.json"
    common.write_json(path, {"a": 1})

    def fail(file):
        file.write(b"half of it")
        raise error

    with pytest.raises(UserError if isinstance(error, (OSError, RuntimeError)) else type(error)) as caught:
        common.write_atomic(path, fail)
    if caught.type is UserError:
        assert str(path) in str(caught.value) and "disk full" in str(caught.value)
    assert common.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_written_json_is_read_back_and_bad_json_is_refused(tmp_path):
    common.write_json(tmp_path / "new" / "a.json", {"x": [1, 2.5, None]})
    assert common.read_json(tmp_path / "new" / "a.json") == {"x": [1, 2.5, None]}
    (tmp_path / "b.json").write_text("{")
    for name in ("b.json", "c.json"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            common.read_json(tmp_path / name)


@pytest.fixture
def loop(tmp_path):
    """loop(step, **flags): a Loop that goes on from `step`; what it saves is appended to loop.saved."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def start(step=0, **flags):
        args = argparse.Namespace(**{"out": str(tmp_path), "log_steps": 1, "save_minutes": 1e9} | flags)
        return common.Loop(args, 100, step, 0.0, lambda seconds: start.saved.append(seconds))

    start.saved, start.log = [], tmp_path / "log.jsonl"
    yield start
    for s, handler in handlers.items():
        signal.signal(s, handler)


def test_log_drops_the_lines_after_the_step_it_goes_on_from(loop):
    first = loop()
    for step in range(1, 6):
        first.tick({"dino": torch.tensor(1 / step)}, 4, {})
    with open(loop.log, "a") as file:
        file.write('{"step": 2, "di')  # cut short by a crash
    loop(3).tick({"dino": torch.tensor(9.5)}, 4, {})
    records = common.read_log(loop.log)
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    close([r["dino"] for r in records], [1, 0.5, 1 / 3, 9.5], rtol=1e-5)
    assert len(loop.log.read_text().splitlines()) == 4


def test_log_holds_the_means_of_the_steps_since_the_line_before(loop):
    run = loop(log_steps=3)
    for step in range(1, 8):
        run.tick({"dino": torch.tensor(float(step)), "koleo": torch.tensor(-2.0 * step)}, 4, {"epoch": 5})
    assert [(r["step"], r["dino"], r["koleo"], r["epoch"]) for r in common.read_log(loop.log)] == [
        (3, 2, -4, 5), (6, 5, -10, 5)]


def test_log_keeps_the_digits_of_small_numbers(loop):
    loop().tick({"dino": torch.tensor(2.5e-7)}, 4, {"lr": 1.30428e-06})
    record, = common.read_log(loop.log)
    close([record["lr"], record["dino"]], [1.30428e-06, 2.5e-7], rtol=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_is_named_with_its_step_and_never_saved(loop, value):
    run = loop(10, log_steps=100)
    for step in range(11, 15):
        run.tick({"dino": torch.tensor(1.0), "koleo": torch.tensor(value if step >= 13 else 1.0)}, 4, {})
    with pytest.raises(UserError, match="koleo is not finite at step 13"):
        run.checkpoint()
    assert not loop.saved


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signal_stops_after_the_step_saved(loop, name):
    run = loop()
    assert not run.tick({"dino": torch.tensor(1.0)}, 4, {}) and not loop.saved
    os.kill(os.getpid(), getattr(signal, name))
    assert run.tick({"dino": torch.tensor(1.0)}, 4, {}) and len(loop.saved) == 1


def test_checkpoint_is_due_after_the_given_minutes(loop, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(common, "now", lambda: clock[0])
    run, saves = loop(save_minutes=2.0), []
    for _ in range(10):
        clock[0] += 50
        assert not run.tick({"dino": torch.tensor(1.0)}, 4, {})
        saves.append(len(loop.saved))
    assert saves == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]  # after 150, 300 and 450 seconds
    assert loop.saved == [150, 300, 450]


def test_shares_of_one_process_are_everything():
    assert common.world() == (0, 1) and common.share(7, 15) == (7, slice(0, 7), 2)
    x = torch.rand(3, 2, generator=gen())
    assert torch.equal(common.gather_rows(x), x) and torch.equal(common.all_reduce(x.clone(), "MAX"), x)


def test_bad_input_ends_with_one_line_and_code_2(capsys):
    def main():
        raise UserError("--data nowhere: no such folder")

    with pytest.raises(SystemExit) as stopped:
        common.run(main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --data nowhere: no such folder\n"


NEEDED = ["--data", "somewhere", "--out", "elsewhere"]


def parser():
    made = common.Parser("doc", {"demo": {}, "large": {"epochs": 200, "compile": True}})
    made.add("schedule", "--epochs", 10, "epochs")
    made.add("schedule", "--lr", 0.004, "learning rate")
    made.add("schedule", "--compile", False, "compile")
    return made


def test_presets_set_defaults_that_flags_override():
    def read(*argv):
        args = parser().read([*NEEDED, *argv])
        return args.epochs, args.compile, args.lr

    assert read() == (10, False, 0.004)
    assert read("--preset", "large", "--lr", "0.1") == (200, True, 0.1)
    assert read("--epochs", "3", "--preset", "large", "--no-compile") == (3, False, 0.004)


@pytest.mark.parametrize(("flag", "value"), [("--epohcs", "3"), ("--epoch", "3"), ("--preset", "huge")])
def test_unknown_flags_and_presets_are_errors(flag, value, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser().read([*NEEDED, flag, value])
    assert stopped.value.code == 2
    assert flag in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("--epochs", "-1"), ("--lr", "nan"), ("--lr", "-0.1"), ("--lr", "inf")])
def test_numbers_that_are_negative_or_not_finite_are_refused_with_their_flag(flag, value):
    with pytest.raises(UserError, match=flag):
        parser().read([*NEEDED, f"{flag}={value}"])
