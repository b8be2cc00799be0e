"""common.py held to the paper: every test is a claim, checked against closed forms, plain loops,
Pillow, colorsys, timm, or golden.json (numbers of DINOv2's released losses, schedules and parameter
groups). Noise, images, checkpoints, logs and flags: test_data.py."""

import colorsys
import itertools
import json
import math
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
from common import UserError

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
LOSSES, SCHEDULES = GOLDEN["losses"], GOLDEN["schedules"]
CPU = torch.device("cpu")
K, B = 32, 4  # prototypes and images of golden.json


def f(shape, a, b):
    """golden.json's inputs: 2 sin(a i + b)."""
    i = np.arange(math.prod(shape))
    values = 2 * np.sin(a * i + b)
    return torch.tensor(values, dtype=torch.float32).reshape(shape)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def array(x):
    if torch.is_tensor(x):
        x = x.detach()
    return np.asarray(x, dtype=np.float64)


def close(a, b, rtol=1e-4, atol=0.0):
    np.testing.assert_allclose(array(a), array(b), rtol=rtol, atol=atol)


def near(a, b, atol=1e-5):
    close(a, b, rtol=0, atol=atol)


def close_mean(values, mean, deviation):
    """The mean of these independent values is `mean`, up to four standard errors."""
    near(np.mean(array(values)), mean, atol=4 * deviation / math.sqrt(len(values)))


def frequency(hits, p):
    close_mean(hits, p, math.sqrt(p * (1 - p)))


def uniform(values, low, high, slack=0.0):
    """Values are uniform between low and high: both ends are reached, mean and deviation fit.
    slack: how far they may be beyond an end by rounding."""
    length = high - low
    values = array(values)
    least, most = values.min(), values.max()
    assert low - slack <= least < low + 0.01 * length
    assert high - 0.01 * length < most <= high + slack
    deviation = length / math.sqrt(12)
    close_mean(values, low + length / 2, deviation)
    close(values.std(), deviation, rtol=0.03)


# ==== two processes: one spawn computes everything that the tests about processes look at =========
SPLITS = {"even": 4, "uneven": 5, "empty": 8}  # how many of the 2B rows rank 0 holds
GREY = np.full((4, 5, 3), 0.5, np.float32)


def teacher_logits():
    return f((2 * B, K), 0.37, 0.1)


def koleo_inputs():
    """Rows (6, 16) and a weight (16, 16) through which they go."""
    return f((6, 16), 0.61, 0.6), f((16, 16), 0.3, 0.2).requires_grad_()


def draw():
    return torch.rand(5, generator=common.generator(3, 1, 4, 1))


def worker(rank, folder):
    """One of two Gloo processes: writes what it computed to folder/rank.pt."""
    torch.set_num_threads(1)
    where = f"file://{folder}/init"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    out = {}
    for name, first in SPLITS.items():
        mine = teacher_logits().tensor_split([first])[rank]
        out[f"center {name}"] = common.update_center(torch.full((1, K), 0.5), mine)
        out[f"sinkhorn {name}"] = common.sinkhorn(mine, 0.05)
    x, weight = koleo_inputs()
    batch, mine = common.share(6, 6)
    rows = common.gather_rows(x[mine] @ weight)
    loss = common.koleo_loss(rows)
    (2 * loss).backward()
    torch.distributed.all_reduce(weight.grad)
    out |= {"batch": batch, "gathered": rows.detach(), "loss": loss.detach()}
    out["grad"] = weight.grad / 2  # averaged over processes, as DDP does
    out["noise"] = common.add_noise(GREY, "gauss50-255", "a/b.png", 7)
    out["draw"] = draw()
    torch.save(out, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("split", SPLITS)
def test_center_is_the_same_on_one_and_two_processes(ranks, split):
    one = common.update_center(torch.full((1, K), 0.5), teacher_logits())
    for rank in ranks:
        close(rank[f"center {split}"], one, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("split", SPLITS)
def test_sinkhorn_is_the_same_on_one_and_two_processes(ranks, split):
    one = common.sinkhorn(teacher_logits(), 0.05)
    both = torch.cat([rank[f"sinkhorn {split}"] for rank in ranks])
    close(both, one, rtol=1e-4, atol=1e-9)


def test_gathered_rows_come_in_rank_order(ranks):
    x, weight = koleo_inputs()
    for rank in ranks:
        close(rank["gathered"], x @ weight, atol=1e-5)


def test_shares_of_one_process_are_everything_and_those_of_two_are_halves(ranks):
    assert common.world() == (0, 1)
    assert common.share(7, 15) == (7, slice(0, 7))
    assert [rank["batch"] for rank in ranks] == [6, 6]
    x = torch.rand(3, 2, generator=gen())
    assert torch.equal(common.gather_rows(x), x)
    assert torch.equal(common.all_reduce(x.clone(), "MAX"), x)


def test_koleo_gradient_over_two_processes_equals_one_process(ranks):
    x, weight = koleo_inputs()
    loss = common.koleo_loss(x @ weight)
    loss.backward()
    for rank in ranks:
        close(rank["loss"], loss, rtol=1e-5, atol=1e-6)
        close(rank["grad"], weight.grad, rtol=1e-4, atol=1e-6)


def test_noise_and_draws_are_the_same_in_other_processes(ranks):
    """Spawned processes have another hash seed of Python, which must not matter."""
    noisy = common.add_noise(GREY, "gauss50-255", "a/b.png", 7)
    for rank in ranks:
        assert torch.equal(rank["noise"], noisy)
        assert torch.equal(rank["draw"], draw())


# ==== targets and losses ==========================================================================
def plain_cross_entropy(target, logits):
    """H(target, softmax(logits / 0.1)) of two rows, in float64."""
    z = array(logits) / 0.1
    z = z - z.max()
    log_p = z - np.log(np.exp(z).sum())
    return -np.dot(array(target), log_p)


def golden_views():
    """golden.json's student global crops [view A, view B], local crops, and targets (2, B, K)."""
    targets = common.softmax_center(teacher_logits(), torch.zeros(1, K), 0.05)
    targets = targets.reshape(2, B, K)
    # rows of the golden student are already swapped: A's targets meet view B's crops
    against_a, against_b = f((2 * B, K), 0.53, 0.2).split(B)
    local = f((8 * B, K), 0.71, 0.3).split(B)
    return [against_b, against_a], list(local), targets


def golden_patches():
    """(student, targets, weights = 1 / masked patches of the row's crop) of golden.json."""
    targets = common.softmax_center(f((8, K), 0.29, 0.4), torch.zeros(1, K), 0.05)
    weights = torch.tensor([1 / 3] * 3 + [1.0] + [1 / 4] * 4)
    return f((8, K), 0.43, 0.5), targets, weights


def test_targets_and_centre_equal_dinov2():
    teacher, centre = teacher_logits(), torch.zeros(1, K)
    first = common.softmax_center(teacher, centre, 0.05)
    close(first[0, :8], LOSSES["targets_row0_zero_center"])
    centre = common.update_center(centre, teacher, momentum=0.9)
    close(centre[0, :6], LOSSES["center_after_one_update"])
    second = common.softmax_center(teacher, centre, 0.05)
    close(second[0, :8], LOSSES["targets_row0_second_step"])


def test_sinkhorn_equals_dinov2():
    targets = common.sinkhorn(teacher_logits(), 0.05)
    close(targets[0, :8], LOSSES["sinkhorn_row0"])


def test_dino_loss_equals_dinov2_on_global_pairs():
    views, _, targets = golden_views()
    loss = common.dino_loss(views, targets)
    close(loss * 2, LOSSES["dino_global_sum_of_two_pair_means"])


def test_dino_loss_is_the_sum_of_18_pairs_divided_by_18():
    views, local, targets = golden_views()
    pairs = LOSSES["dino_global_sum_of_two_pair_means"]
    pairs += LOSSES["dino_local_sum_of_16_pair_means"]
    close(common.dino_loss(views + local, targets), pairs / 18)


@pytest.mark.parametrize("n_local", [0, 3, 8])
def test_dino_loss_equals_plain_loops(n_local):
    views = 2 + n_local
    student = f((views, B, K), 0.41, 0.3)
    targets = F.softmax(f((2, B, K), 0.77, 0.1) * 3, dim=-1)
    pairs = []
    for t, s in itertools.product(range(2), range(views)):
        if s != t:
            rows = map(plain_cross_entropy, targets[t], student[s])
            pairs.append(np.mean(list(rows)))
    assert len(pairs) == 2 + 2 * n_local
    close(common.dino_loss(list(student), targets), np.mean(pairs))


def dino_gradients(student, targets):
    student = [view.clone().requires_grad_() for view in student]
    common.dino_loss(student, targets).backward()
    return [view.grad for view in student]


@pytest.mark.parametrize("view", [0, 1])
def test_same_view_pairs_are_never_compared(view):
    """Each global crop's gradient stays as it is when the target of its own view changes."""
    views, local, targets = golden_views()
    changed = targets.clone()
    changed[view] = targets[view].flip(-1)
    before = dino_gradients(views + local, targets)
    after = dino_gradients(views + local, changed)
    same = [torch.allclose(a, b) for a, b in zip(before, after, strict=True)]
    assert torch.equal(before[view], after[view])
    assert sum(same) == 1


def test_ibot_loss_equals_dinov2():
    close(common.ibot_loss(*golden_patches(), n_crops=2 * B), LOSSES["ibot"])


def test_ibot_loss_is_the_mean_over_patches_then_over_all_crops():
    """Three of 12 crops are masked, in 8 patches."""
    student, targets, weights = golden_patches()
    rows = list(map(plain_cross_entropy, targets, student))
    crops = [np.mean(rows[:3]), rows[3], np.mean(rows[4:])]
    close(common.ibot_loss(student, targets, weights, n_crops=12), sum(crops) / 12, rtol=1e-5)


def test_koleo_equals_dinov2():
    close(common.koleo_loss(f((6, 16), 0.61, 0.6)), LOSSES["koleo"])


def test_koleo_equals_plain_loops():
    x = f((7, 5), 1.3, 0.2)
    rows = [row / np.linalg.norm(row) for row in array(x)]
    logs = []
    for i, row in enumerate(rows):
        others = rows[:i] + rows[i + 1:]
        nearest = min(np.linalg.norm(row - other) for other in others)
        logs.append(math.log(nearest))
    expected = -np.mean(logs)
    close(common.koleo_loss(x), expected, rtol=1e-5)
    close(common.koleo_loss(x * 37), expected, rtol=1e-5)  # of directions alone


def test_koleo_of_equal_rows_is_finite():
    """DINOv2 adds 1e-8 twice: to each coordinate of the difference, and to the distance."""
    x = torch.ones(3, 8, requires_grad=True)
    loss = common.koleo_loss(x)
    loss.backward()
    distance = 1e-8 * math.sqrt(8)
    close(loss, -math.log(distance + 1e-8))
    assert x.grad.isfinite().all()


def test_koleo_of_one_row_is_zero():
    x = torch.ones(1, 8, requires_grad=True)
    loss = common.koleo_loss(x)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(x.grad, torch.zeros(1, 8))


def loss_calls():
    """{name: (function of one tensor, that tensor)}: every loss and target."""
    views, local, targets = golden_views()
    patches, patch_targets, weights = golden_patches()
    centre = f((1, K), 0.9, 0.1) / 10
    return {
        "dino": (lambda x: common.dino_loss(list(x), targets), torch.stack(views + local)),
        "ibot": (lambda x: common.ibot_loss(x, patch_targets, weights, 8), patches),
        "koleo": (common.koleo_loss, f((6, 16), 0.61, 0.6)),
        "softmax": (lambda x: common.softmax_center(x, centre, 0.05), teacher_logits()),
        "sinkhorn": (lambda x: common.sinkhorn(x, 0.05), teacher_logits()),
        "centre": (lambda x: common.update_center(centre, x), teacher_logits()),
    }


@pytest.mark.parametrize("name", loss_calls())
def test_losses_are_float32_under_autocast(name):
    """Every softmax, log and distance is float32: of bf16 logits only the inputs are rounded."""
    call, x = loss_calls()[name]
    full = call(x)
    rounded = call(x.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(x), full)
        low = call(x.bfloat16())
    assert low.dtype == torch.float32
    close(low, rounded, rtol=1e-6, atol=1e-7)
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
    logits = torch.randn(64, 128, generator=gen())
    q = common.sinkhorn(logits * scale, 0.04)
    assert q.isfinite().all()
    assert q.min() >= 0
    close(q.sum(1), 1, rtol=1e-5)


def test_sinkhorn_equals_plain_normalisation_and_balances_prototypes():
    logits = torch.randn(16, 8, generator=gen(1), dtype=torch.double)
    q = np.exp(array(logits) / 0.5)
    for _ in range(3):
        q = q / q.sum(0, keepdims=True) / 8
        q = q / q.sum(1, keepdims=True) / 16
    close(common.sinkhorn(logits, 0.5), q * 16, rtol=1e-4)
    balanced = common.sinkhorn(logits, 0.5, iterations=100)
    close(balanced.sum(0), 2, rtol=1e-3)  # 16 rows over 8 prototypes


def test_softmax_targets_are_finite_for_extreme_logits():
    p = common.softmax_center(torch.tensor([[1e4, -1e4, 0.0]]), torch.zeros(1, 3), 0.04)
    assert p.tolist() == [[1, 0, 0]]


# ==== head ========================================================================================
def small_head():
    torch.manual_seed(0)
    return common.DINOHead(12, out_dim=20, hidden_dim=16, bottleneck_dim=8)


def plain_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


@torch.no_grad()
def test_head_logits_are_cosines_of_the_bottleneck_with_prototypes():
    head = small_head()
    x = torch.randn(5, 12, generator=gen())
    state = head.state_dict()
    z = x
    for layer in (0, 2, 4):
        z = z @ state[f"mlp.{layer}.weight"].T + state[f"mlp.{layer}.bias"]
        if layer < 4:
            z = plain_gelu(z)
    directions = state["last_layer.weight_v"]
    cosines = torch.cosine_similarity(z[:, None], directions, dim=-1)
    close(head(x), cosines, atol=1e-5)
    directions.mul_(7)  # a direction, whatever its length
    close(head(x), cosines, atol=1e-5)
    state["last_layer.weight_g"].mul_(3)  # the length
    close(head(x), 3 * cosines, atol=1e-5)


def test_head_normalises_in_float32_under_autocast(monkeypatch):
    """What meets in the last product is of length 1 to float32's precision, however coarse the
    layers before."""
    head, seen = small_head(), []
    x = torch.randn(50, 12, generator=gen())
    full = head(x)
    linear = F.linear

    def watched(x, weight, bias=None):
        seen.append((x, weight))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", watched)
    with torch.autocast("cpu", torch.bfloat16):
        low = head(x)
    for rows in seen[-1]:
        close(array(rows.double().norm(dim=1)), 1, rtol=1e-6)
    near(low.float(), full, atol=0.03)  # bf16 products in every layer


def test_prototypes_start_as_torchs_linear_and_the_mlp_as_dinov2s():
    """The norm at the start sets how fast Adam turns the prototypes."""
    torch.manual_seed(0)
    state = common.DINOHead(192, out_dim=400, hidden_dim=300, bottleneck_dim=256).state_dict()
    assert state["last_layer.weight_v"].shape == (400, 256)
    uniform(state["last_layer.weight_v"].flatten(), -1 / 16, 1 / 16)
    assert torch.equal(state["last_layer.weight_g"], torch.ones(400, 1))
    for layer in (0, 2, 4):
        close(state[f"mlp.{layer}.weight"].std(), 0.02, rtol=0.03)
        assert not state[f"mlp.{layer}.bias"].any()


# ==== schedules and parameter groups ==============================================================
@pytest.mark.parametrize(("name", "base", "final", "warmup"), [
    ("lr", 1e-3, 1e-6, 10),
    ("weight_decay", 0.04, 0.4, 0),
    ("momentum", 0.992, 1.0, 0),
])
def test_cosine_schedules_equal_dinov2(name, base, final, warmup):
    values = [common.cosine(s, base, final, 100, warmup) for s in SCHEDULES["steps"]]
    close(values, SCHEDULES[name], rtol=1e-9)


def test_teacher_temperature_warms_up_as_in_dinov2():
    """Linear over 30 steps, then constant: a cosine that ends where it begins."""
    values = [common.cosine(s, 0.07, 0.07, 30, 30, start=0.04) for s in SCHEDULES["steps"]]
    close(values, SCHEDULES["teacher_temp_30_warmup"], rtol=1e-9)


def test_schedules_without_or_with_all_warmup_have_no_gap():
    assert common.cosine(0, 1.0, 0.0, 10) == 1.0
    warmup_alone = [common.cosine(step, 1.0, 0.0, 3, 3) for step in range(4)]
    assert warmup_alone == [0.0, 0.5, 1.0, 0.0]


def test_parameter_groups_equal_dinov2():
    for name, multipliers in GOLDEN["parameter_groups_vit_small_16"].items():
        if name != "about":
            close(common.param_multipliers(name, 12), multipliers, rtol=1e-9)


def test_every_parameter_is_in_exactly_one_group_with_its_multipliers():
    vit, head = small_vit(registers=1), small_head()
    found = {}
    for group in common.param_groups(vit, head):
        for p in group["params"]:
            assert p not in found
            found[p] = group["lr_mult"], group["wd_mult"], group["last"]
    expected = {}
    for name, p in vit.named_parameters():
        expected[p] = (*common.param_multipliers(name, 2), False)
    for name, p in head.named_parameters():
        decay = 0.0 if name.endswith("bias") else 1.0
        expected[p] = 1.0, decay, name.startswith("last_layer")
    assert found == expected


# ==== ViT =========================================================================================
def small_vit(**kw):
    """32 x 32 pixels, 4 x 4 patches, with parameters far from their initial values, so that each
    one matters."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    vit = common.VisionTransformer(**sizes | kw)
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=gen(p.numel())))
    return vit.eval()


def images(n, height=32, width=32, channels=3):
    return torch.randn(n, channels, height, width, generator=gen())


def plain_linear(x, state, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def plain_norm(x, state, name):
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def plain_attention(x, state, name, heads):
    """Tokens (N, D) to the same."""
    q, k, v = plain_linear(x, state, f"{name}.qkv").chunk(3, dim=1)
    outputs = []
    for qh, kh, vh in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True):
        scores = qh @ kh.T / math.sqrt(qh.shape[1])
        outputs.append(scores.softmax(1) @ vh)
    return plain_linear(torch.cat(outputs, 1), state, f"{name}.proj")


def plain_block(x, state, name, heads):
    y = plain_norm(x, state, f"{name}.norm1")
    y = plain_attention(y, state, f"{name}.attn", heads)
    x = x + state[f"{name}.ls1.gamma"] * y
    y = plain_norm(x, state, f"{name}.norm2")
    y = plain_gelu(plain_linear(y, state, f"{name}.mlp.fc1"))
    y = plain_linear(y, state, f"{name}.mlp.fc2")
    return x + state[f"{name}.ls2.gamma"] * y


def plain_position(pos, rows, columns):
    """Position embedding (1, 1 + n n, D) to (1 + rows columns, D)."""
    side = math.isqrt(pos.shape[1] - 1)
    grid = pos[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if (rows, columns) != (side, side):
        size = (rows, columns)
        grid = F.interpolate(grid, size, mode="bicubic", align_corners=False, antialias=False)
    return torch.cat([pos[0, :1], grid[0].flatten(1).T])


def plain_tokens(state, image, patch, mask):
    """One image (C, H, W) to the first block's input (1 + registers + N, D)."""
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    pos = plain_position(state["pos_embed"], rows, columns)
    kernel = state["patch_embed.proj.weight"].flatten(1)
    patches = F.unfold(image[None], patch, stride=patch)[0].T  # (N, C patch patch)
    tokens = patches @ kernel.T + state["patch_embed.proj.bias"]
    if mask is not None:
        tokens[mask] = state["mask_token"]
    tokens = [state["cls_token"][0] + pos[:1], tokens + pos[1:]]
    if "register_tokens" in state:
        tokens.insert(1, state["register_tokens"][0])
    return torch.cat(tokens)


def plain_vit(state, x, masks=None, patch=8, heads=3, depth=2):
    """Normed tokens (B, 1 + registers + N, D) of a ViT, from its state dict, in loops."""
    outputs = []
    for b, image in enumerate(x):
        z = plain_tokens(state, image, patch, None if masks is None else masks[b])
        for i in range(depth):
            z = plain_block(z, state, f"blocks.{i}", heads)
        outputs.append(plain_norm(z, state, "norm"))
    return torch.stack(outputs)


def check_features(out, expected, registers=0):
    """forward_features' dict is that of these normed tokens (B, 1 + registers + N, D)."""
    close(out["cls"], expected[:, 0], atol=1e-5)
    close(out["patches"], expected[:, 1 + registers:], atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("channels", "registers", "size"), [
    (3, 0, (32, 32)), (1, 0, (32, 32)), (5, 2, (32, 32)),
    (3, 0, (16, 48)), (3, 3, (48, 16)), (3, 0, (24, 24)),
])
@torch.no_grad()
def test_vit_equals_a_plain_transformer(channels, registers, size, masked):
    vit = small_vit(in_chans=channels, registers=registers)
    x = images(2, *size, channels)
    masks = None
    if masked:
        patches = math.prod(size) // 64
        masks = torch.rand(2, patches, generator=gen(2)) < 0.4
    out = vit.forward_features(x, masks)
    check_features(out, plain_vit(vit.state_dict(), x, masks), registers)
    if not masked:
        assert torch.equal(vit(x), out["cls"])


def scattered(model, deviation=0.02):
    """The model with noise on its parameters, so that each one matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(deviation * torch.randn(p.shape))
    return model.eval()


def import_timm():
    reason = "timm is not installed, or the torchvision that it needs"
    return pytest.importorskip("timm", reason=reason)


@pytest.mark.parametrize("arch", ["vit_small", "vit_base"])
@torch.no_grad()
def test_vit_equals_timm_on_the_same_weights(arch):
    timm = import_timm()
    ours = scattered(getattr(common, arch)(patch_size=16))
    theirs = timm.create_model(f"{arch}_patch16_224", init_values=1e-5, num_classes=0).eval()
    state = ours.state_dict()
    del state["mask_token"]
    theirs.load_state_dict(state)
    x = images(1, 224, 224)
    tokens = theirs.forward_features(x)
    out = ours.forward_features(x)
    close(out["cls"], tokens[:, 0], rtol=1e-3, atol=1e-4)
    close(out["patches"], tokens[:, 1:], rtol=1e-3, atol=1e-4)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_vits_have_the_parameters_of_dinov2():
    with torch.device("meta"):
        small = common.vit_small(patch_size=16)
        large = common.vit_large(patch_size=14, img_size=518)
    counts = GOLDEN["parameter_counts"]
    name = "vit_small patch 16 img 224, 3 channels, LayerScale, mask token, no head"
    assert parameters(small) == counts[name] == 21_675_264
    assert parameters(large) == 304_368_640  # DINOv2's ViT-L/14 (its model card: 304 M)
    assert len(large.blocks) == 24
    assert large.blocks[0].attn.num_heads == 16


def test_mask_token_replaces_patches_before_the_position_embedding():
    vit, x = small_vit(), images(1)
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, [1, 7, 15]] = True
    seen, hidden = vit.tokens(x)[0], vit.tokens(x, masks)[0]
    assert torch.equal(seen[0], hidden[0])
    for n in range(16):
        expected = seen[1 + n]
        if masks[0, n]:
            expected = vit.mask_token[0] + vit.pos_embed[0, 1 + n]
        close(hidden[1 + n], expected, rtol=1e-6)


def test_masked_pixels_are_invisible():
    vit, x = small_vit(), images(2)
    masks = torch.rand(2, 16, generator=gen(1)) < 0.5
    pixels = masks.reshape(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    out = vit.forward_features(x, masks)
    painted = vit.forward_features(torch.where(pixels, torch.ones(()), x), masks)
    for key in ("cls", "patches"):
        assert torch.equal(out[key], painted[key])


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (9, 4), (20, 14), (1, 1)])
def test_position_embedding_is_resized_bicubically_without_antialias(rows, columns):
    pos = torch.randn(1, 1 + 14 * 14, 8, generator=gen())
    resized = common.resize_pos_embed(pos, rows, columns)
    assert torch.equal(resized[:, 0], pos[:, 0])
    close(resized[0], plain_position(pos, rows, columns), atol=1e-5)
    assert torch.equal(common.resize_pos_embed(pos, 14, 14), pos)


def test_position_embedding_learns_after_it_was_used_in_inference_mode():
    vit, x = small_vit(), images(1, 40, 24)
    with torch.inference_mode():
        expected = vit(x)
    out = vit(x)
    out.sum().backward()
    close(out, expected.clone(), atol=1e-5)
    assert vit.pos_embed.grad.abs().sum() > 0


@torch.no_grad()
def test_features_are_independent_of_the_batch():
    vit, x = small_vit(), images(5)
    together = vit.forward_features(x)
    for i in range(5):
        alone = vit.forward_features(x[i:i + 1])
        for key in ("cls", "patches"):
            close(alone[key][0], together[key][i], rtol=1e-5, atol=1e-5)


def test_image_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ValueError, match="patch size 8"):
        small_vit()(images(1, 36, 32))


@torch.no_grad()
def test_last_layers_are_the_outputs_of_shallower_vits_last_first():
    vit, x = small_vit(depth=3), images(2)
    outputs = vit.last_layers(x, 2)
    assert len(outputs) == 2
    for out, depth in zip(outputs, (3, 2), strict=True):
        check_features(out, plain_vit(vit.state_dict(), x, depth=depth))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@torch.no_grad()
def test_layer_scale_of_1e_5_survives_half_precision(dtype, tolerance):
    """1e-5 times an output of 0.02 is below float16's normal numbers."""
    layer = torch.nn.Linear(64, 32, bias=False)
    layer.weight.copy_(0.02 * torch.randn(32, 64, generator=gen(2)))
    scale = common.LayerScale(32, 1e-5)
    x = torch.randn(10, 64, generator=gen(1))
    expected = 1e-5 * layer(x)
    with torch.autocast("cpu", dtype):
        y = scale(layer(x))
    assert y.dtype == torch.float32
    assert (y - expected).norm() < tolerance * expected.norm()


def test_attention_of_a_cpu_is_float32_under_autocast(monkeypatch):
    """Torch's kernels for bf16 take several times as long there."""
    seen, attention = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*inputs):
        result = attention(*inputs)
        seen.extend(x.dtype for x in (*inputs, result))
        return result

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", torch.bfloat16):
        small_vit()(images(2))
    assert set(seen) == {torch.float32}


@torch.no_grad()
def test_tokens_stay_float32_under_autocast_from_block_to_block():
    """Else a branch of 1e-5 would be lost in the sum."""
    vit, x = small_vit(), images(2)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = vit.tokens(x)
        assert tokens.dtype == torch.float32
        for block in vit.blocks:
            tokens = block(tokens)
            assert tokens.dtype == torch.float32


def test_drop_path_factors_are_zero_or_keep_the_mean():
    keep = common.draw_keep(3, 20_000, 0.3, CPU, gen())
    assert keep.shape == (3, 2, 20_000)
    close(keep.unique(), [0, 1 / 0.7], rtol=1e-6)
    branches = keep.flatten(0, 1)  # (6, samples)
    dropped = branches == 0
    for branch in dropped:
        frequency(branch, 0.3)
    close_mean(branches[0], 1, math.sqrt(0.3 / 0.7))
    for one, other in itertools.combinations(dropped, 2):  # each branch is dropped on its own
        frequency(one & other, 0.09)


def test_drop_path_factors_come_from_the_generator_and_are_one_without_drop_path():
    first = common.draw_keep(2, 50, 0.3, CPU, gen(1))
    assert torch.equal(common.draw_keep(2, 50, 0.3, CPU, gen(1)), first)
    assert not torch.equal(common.draw_keep(2, 50, 0.3, CPU, gen(2)), first)
    assert (common.draw_keep(2, 50, 0.0, CPU) == 1).all()


@torch.no_grad()
def test_drop_path_factors_scale_each_branch_of_each_image():
    vit, x = small_vit(), images(4)
    keep = common.draw_keep(2, 4, 0.4, CPU, gen(1))
    dropped = int((keep == 0).sum())
    assert 0 < dropped < 16
    expected = []
    for image, factors in zip(x, keep.unbind(2), strict=True):  # (depth, 2)
        state = dict(vit.state_dict())
        for block, (attention, mlp) in enumerate(factors):
            state[f"blocks.{block}.ls1.gamma"] = attention * state[f"blocks.{block}.ls1.gamma"]
            state[f"blocks.{block}.ls2.gamma"] = mlp * state[f"blocks.{block}.ls2.gamma"]
        expected.append(plain_vit(state, image[None]))
    check_features(vit.forward_features(x, keep=keep), torch.cat(expected))


@torch.no_grad()
def test_drop_path_is_drawn_in_training_only():
    vit, x = small_vit(drop_path=0.4), images(4)
    whole = vit(x)
    assert torch.equal(whole, vit(x))
    vit.train()
    torch.manual_seed(0)
    keep = common.draw_keep(2, 4, 0.4, CPU)
    torch.manual_seed(0)
    first = vit(x)
    assert torch.equal(first, vit.forward_features(x, keep=keep)["cls"])
    assert not torch.equal(first, vit(x))
    assert not torch.equal(first, whole)
    assert torch.equal(small_vit().train()(x), whole)  # of probability 0


def test_initial_values_are_dinov2s():
    torch.manual_seed(0)
    vit = common.VisionTransformer(img_size=64, embed_dim=192, depth=2, num_heads=3, patch_size=8)
    state = vit.state_dict()
    for name, p in state.items():
        if name.endswith("gamma"):
            assert (p == 1e-5).all(), name
        elif "norm" in name:
            assert (p == float(name.endswith("weight"))).all(), name
        elif name == "pos_embed" or re.match(r"blocks.*weight", name):
            close(p.std(), 0.02, rtol=0.03)
            assert abs(p.mean()) < 1e-3, name
        elif name.startswith("blocks") or name == "mask_token":
            assert (p == 0).all(), name
    assert 0 < state["cls_token"].abs().max() < 1e-5
    assert vit.norm.eps == vit.blocks[0].norm1.eps == 1e-6


def test_blocks_are_near_identity_at_first():
    torch.manual_seed(0)
    vit, x = common.make_vit("192,2,3", img_size=64), images(2, 64, 64)
    near(vit(x), vit.norm(vit.tokens(x))[:, 0], atol=0.2)


def test_vit_names_and_widths():
    with torch.device("meta"):
        assert common.make_vit("128,4,4").embed_dim == 128


@pytest.mark.parametrize("bad", ["vit_huge", "128,4", "128,4,3", "0,1,1", "a,b,c"])
def test_unknown_architectures_are_refused(bad):
    with pytest.raises(UserError, match=f"--arch {bad}"):
        common.make_vit(bad)


# ==== ViT weights of other code ===================================================================
def write(folder, state):
    path = folder / "weights.pth"
    torch.save(state, path)
    return path


def released(state, chunk):
    """A teacher checkpoint as the paper's code and DINOv2's write it: {'teacher': {'backbone.…',
    'dino_head.…'}}; chunk: blocks in each chunk, 0 for none. Block 1 of chunks of 1 is
    'blocks.1.1.…': the number within is that of the whole ViT."""
    teacher = {}
    for name, value in state.items():
        if chunk and name.startswith("blocks."):
            block = int(name.split(".")[1])
            name = name.replace("blocks.", f"blocks.{block // chunk}.", 1)
        teacher[f"backbone.{name}"] = value
    for name, value in small_head().state_dict().items():
        teacher[f"dino_head.{name}"] = value
    return {"teacher": teacher, "iteration": 1249}


LAYOUTS = {
    "flat": lambda state: state,
    "released": lambda state: released(state, chunk=0),
    "released, chunks of 1": lambda state: released(state, chunk=1),
    "released, chunks of 2": lambda state: released(state, chunk=2),
    "model": lambda state: {"model": state, "epoch": 3},
    "of DDP": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("registers", [0, 2])
@torch.no_grad()
def test_every_layout_of_the_same_weights_gives_the_same_features(tmp_path, layout, registers):
    vit, x = small_vit(depth=3, registers=registers), images(2)
    masks = torch.rand(2, 16, generator=gen(1)) < 0.4
    path = write(tmp_path, LAYOUTS[layout](vit.state_dict()))
    read = common.vit_of(path, heads=3)
    assert (read.patch_size, read.registers, len(read.blocks)) == (8, registers, 3)
    out, expected = read.forward_features(x, masks), vit.forward_features(x, masks)
    for key in ("cls", "patches"):
        assert torch.equal(out[key], expected[key])


@torch.no_grad()
def test_weights_in_timms_layout_give_timms_features(tmp_path):
    """With registers, timm's class token has no position; it has no mask token, and may have no
    LayerScale."""
    vit, x = small_vit(registers=2), images(2)
    ours = dict(vit.state_dict())
    ours["pos_embed"] = ours["pos_embed"].clone()
    ours["pos_embed"][:, 0] = 0
    timm = {"head.weight": torch.ones(5, 24), "head.bias": torch.ones(5)}
    for name, value in ours.items():
        if name.endswith("gamma"):
            ours[name] = torch.ones(24)
        elif name == "register_tokens":
            timm["reg_token"] = value
        elif name == "pos_embed":
            timm[name] = value[:, 1:]
        elif name != "mask_token":
            timm[name] = value
    read = common.vit_of(write(tmp_path, timm), heads=3)
    check_features(read.forward_features(x), plain_vit(ours, x), registers=2)
    assert not read.mask_token.any()


@pytest.mark.parametrize(("name", "registers"), [
    ("vit_small_patch16_224", 0),
    ("vit_base_patch16_224", 0),
    ("vit_small_patch14_reg4_dinov2", 4),
])
@torch.no_grad()
def test_timms_weights_give_timms_features(tmp_path, name, registers):
    timm = import_timm()
    theirs = timm.create_model(name, init_values=1e-5, num_classes=0, img_size=112)
    theirs = scattered(theirs)
    ours = common.vit_of(write(tmp_path, theirs.state_dict()))
    x = images(2, 112, 112)
    tokens = theirs.forward_features(x)
    out = ours.forward_features(x)
    close(out["cls"], tokens[:, 0], rtol=1e-3, atol=1e-4)
    close(out["patches"], tokens[:, 1 + registers:], rtol=1e-3, atol=1e-4)


def test_weights_of_half_precision_are_read_as_float32(tmp_path):
    state = small_vit().bfloat16().state_dict()
    weights = common.read_backbone(write(tmp_path, state))
    assert weights.keys() == state.keys()
    for name, value in weights.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state[name].float())


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16)])
def test_usual_widths_have_heads_of_64(tmp_path, width, heads):
    vit = small_vit(embed_dim=width, depth=1, num_heads=heads)
    read = common.vit_of(write(tmp_path, vit.state_dict()))
    assert read.blocks[0].attn.num_heads == heads


def test_unknown_width_asks_for_heads(tmp_path):
    path = write(tmp_path, small_vit().state_dict())
    with pytest.raises(UserError, match="width 24 .*--heads"):
        common.vit_of(path)


@pytest.mark.parametrize("part", ["blocks.0.attn.q_norm.weight", "norm_pre.weight", "cls_norm.bias"])
def test_file_with_parts_that_ours_does_not_have_is_refused_by_name(tmp_path, part):
    """Its features would be others."""
    state = small_vit().state_dict() | {part: torch.ones(24)}
    with pytest.raises(UserError, match=re.escape(part)):
        common.vit_of(write(tmp_path, state), heads=3)


@pytest.mark.parametrize("name", [
    "norm.weight", "norm.bias", "patch_embed.proj.bias", "blocks.1.attn.qkv.bias",
    "blocks.1.mlp.fc2.weight", "cls_token", "pos_embed", "patch_embed.proj.weight",
    "blocks.0.norm1.weight",
])
def test_file_that_misses_a_part_is_refused_by_name(tmp_path, name):
    state = small_vit().state_dict()
    del state[name]
    path = write(tmp_path, state)
    with pytest.raises(UserError, match=rf"weights\.pth.*\b{re.escape(name)}"):
        common.vit_of(path, heads=3)


@pytest.mark.parametrize("content", [[torch.ones(3)], torch.ones(3), {0: torch.ones(3)}, {}])
def test_file_without_a_vit_is_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"weights\.pth"):
        common.vit_of(write(tmp_path, content), heads=3)


@pytest.mark.parametrize("positions", [1 + 4 + 16, 12])
def test_position_embedding_of_no_square_is_refused(tmp_path, positions):
    state = small_vit().state_dict() | {"pos_embed": torch.zeros(1, positions, 24)}
    with pytest.raises(UserError, match=f"pos_embed has {positions} positions"):
        common.read_backbone(write(tmp_path, state))


def test_loaded_backbone_has_the_weights_with_its_position_embedding_resized(tmp_path):
    weights = common.read_backbone(write(tmp_path, small_vit(registers=2).state_dict()))
    model = small_vit(registers=2, img_size=48)
    others = {"head.weight": torch.ones(3, 24), "norm_pre.bias": torch.ones(24)}
    assert common.load_backbone(model, weights | others, "w.pth") == ["norm_pre.bias"]
    state = model.state_dict()
    expected = plain_position(weights.pop("pos_embed"), 6, 6)
    close(state.pop("pos_embed")[0], expected, atol=1e-6)
    for name, value in state.items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize(("kw", "wrong"), [
    ({"in_chans": 1}, "patch_embed.proj.weight"),
    ({"embed_dim": 12}, "norm.bias"),
    ({"registers": 2}, "register_tokens"),
    ({"depth": 3}, "blocks.2.norm1.weight"),
])
def test_backbone_of_another_shape_is_refused_by_name(tmp_path, kw, wrong):
    weights = common.read_backbone(write(tmp_path, small_vit(img_size=16).state_dict()))
    with pytest.raises(UserError, match=rf"w\.pth: .*\b{re.escape(wrong)}"):
        common.load_backbone(small_vit(**kw), weights, "w.pth")


# ==== masks =======================================================================================
def draw_grids(crops, rows, columns, seed):
    """Masks of all crops as bool arrays (crops, rows, columns)."""
    masks = common.draw_masks(crops, rows, columns, random.Random(seed))
    assert masks.shape == (crops, rows * columns)
    assert masks.dtype == torch.bool
    return masks.reshape(-1, rows, columns).numpy()


@pytest.fixture(scope="module")
def many():
    """10,000 masks (n, 14, 14): of half of the crops."""
    masks = draw_grids(20_000, 14, 14, seed=0)
    return masks[masks.any((1, 2))]


@pytest.mark.parametrize("seed", range(5))
def test_half_of_the_crops_are_masked_with_ratios_stratified_over_a_tenth_to_a_half(seed):
    counts = draw_grids(200, 14, 14, seed).sum((1, 2))
    counts.sort()
    assert not counts[:100].any()
    edges = 196 * np.linspace(0.1, 0.5, 101)  # one crop in each of 100 strata: truncated,
    assert (counts[100:] <= edges[1:]).all()  # never more than the upper edge,
    short = edges[:-1] - counts[100:]
    assert short.max() < 3  # and short of the lower one by a small block at most,
    assert np.mean(short < 1) > 0.9  # mostly by the truncation alone


def test_mean_ratio_is_that_of_dinov2(many):
    """0.29707 in 150,000 masks of DINOv2's generator. Rounding instead of truncating gives 0.2996.
    Strata are so narrow that what is left of the deviation is 0.002."""
    ratios = many.mean((1, 2))
    close_mean(ratios, 0.29707, 0.002)
    close(ratios.std(), 0.11547, rtol=0.005)


def components(mask):
    """Sizes of the groups of masked patches of (rows, columns) that touch by a side."""
    left = set(zip(*mask.nonzero(), strict=True))
    sizes = []
    while left:
        group = [left.pop()]
        for r, c in group:  # grows as it is read
            touching = {(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)} & left
            group.extend(touching)
            left -= touching
        sizes.append(len(group))
    return sizes


def test_components_are_counted_by_sides():
    mask = np.array([[1, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 1]], dtype=bool)
    assert sorted(components(mask)) == [1, 2, 3]


def test_masks_have_as_many_isolated_specks_as_dinov2s(many):
    """The last blocks may be smaller than four patches: 43.5 % of 150,000 masks of DINOv2's
    generator have such a speck on its own."""
    specks = [min(components(mask)) < 4 for mask in many]
    frequency(specks, 0.435)


def test_masks_have_as_many_whole_rows_or_columns_as_dinov2s(many):
    """No block spans the grid, but several together do: in 3.44 % of 150,000 masks of DINOv2's
    generator."""
    rows = many.all(2).any(1)
    columns = many.all(1).any(1)
    frequency(rows | columns, 0.0344)


def test_masks_are_not_scattered(many):
    """Neighbours of a masked patch are masked far more often than the ratio of 0.3."""
    upper, lower = many[:, :-1], many[:, 1:]
    assert (upper & lower).sum() > 0.6 * upper.sum()


class Watching(random.Random):
    """Keeps a copy of the mask at each draw, so that blocks are seen one by one."""
    def watch(self, mask):
        self.mask, self.copies = mask, []

    def random(self):
        self.copies.append(self.mask.copy())
        return super().random()


def first_blocks(n, rows, columns, patches):
    """(height, width) of the first block of each of n masks: array (n, 2)."""
    rng = Watching(0)
    sizes = []
    for _ in range(n):
        mask = np.zeros((rows, columns), dtype=bool)
        rng.watch(mask)
        common.add_blocks(mask, patches, rng)
        first = next(m for m in [*rng.copies, mask] if m.any())
        height, width = first.any(1).sum(), first.any(0).sum()
        assert first.sum() == height * width  # a rectangle
        sizes.append((height, width))
    return np.array(sizes)


def test_blocks_have_a_log_uniform_aspect_between_0_3_and_its_inverse():
    sizes = first_blocks(2000, 60, 60, 360)
    large = sizes.prod(1) >= 50  # sides are rounded to whole patches
    height, width = sizes[large].T
    limit = math.log(1 / 0.3)
    uniform(np.log(height / width), -limit, limit, slack=0.15)


def test_blocks_have_a_uniform_area_from_four_patches_to_what_is_left():
    area = first_blocks(2000, 60, 60, 360).prod(1)
    assert area.max() <= 360
    uniform(area, 4, 360, slack=1)


def test_no_block_spans_the_grid_in_a_direction():
    height, width = first_blocks(500, 5, 12, 30).T
    assert height.max() == 4
    height, width = first_blocks(500, 12, 5, 30).T
    assert width.max() == 4


def test_every_crop_is_masked_equally_often_and_both_sides_alike():
    masks = np.stack([draw_grids(16, 14, 14, seed) for seed in range(400)])
    for crop in masks.any((2, 3)).T:
        frequency(crop, 0.5)
    patches = masks.mean((0, 1))  # (14, 14)
    near(patches.mean(), 0.297 / 2, atol=0.002)
    near(patches, patches[::-1], atol=0.05)
    near(patches, patches[:, ::-1], atol=0.05)
    near(patches, patches.T, atol=0.05)
    assert patches.min() > 0.01  # blocks meet the corners least


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (6, 6), (2, 7), (3, 3)])
def test_small_grids_are_masked_and_never_by_more_than_half(rows, columns):
    counts = [draw_grids(8, rows, columns, seed).sum((1, 2)) for seed in range(50)]
    counts = np.stack(counts)  # (draws, crops)
    assert counts.max() <= rows * columns / 2
    masked = (counts > 0).sum(1)
    assert masked.max() <= 4
    assert masked.mean() > 2


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (2, 2)])
def test_tiny_grids_are_never_fully_masked(rows, columns):
    for seed in range(50):
        counts = draw_grids(8, rows, columns, seed).sum((1, 2))
        assert counts.max() <= rows * columns / 2


@pytest.mark.parametrize(("crops", "masked"), [(1, 0), (2, 1), (5, 2)])
def test_half_of_the_crops_is_rounded_down(crops, masked):
    assert draw_grids(crops, 14, 14, 0).any((1, 2)).sum() == masked


def test_masks_are_reproducible_from_the_generator():
    first = draw_grids(8, 14, 14, seed=3)
    assert np.array_equal(draw_grids(8, 14, 14, seed=3), first)
    assert not np.array_equal(draw_grids(8, 14, 14, seed=4), first)


# ==== crops =======================================================================================
def photo(seed, height, width, channels=3, contrast=180):
    """A smooth random picture (a sum of waves), uint8 (C, H, W); its default contrast saturates
    parts of it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    picture = np.full((channels, height, width), 127.0)
    for _ in range(6):
        fx, fy = rng.uniform(-0.5, 0.5, 2)
        wave = np.sin(fx * x + fy * y + rng.uniform(0, 2 * math.pi))
        picture += contrast / 2.4 * rng.normal(size=(channels, 1, 1)) * wave
    pixels = np.rint(picture).clip(0, 255)
    return torch.from_numpy(pixels.astype(np.uint8))


SIZES = [(60, 80), (97, 41), (33, 120), (50, 50), (120, 96), (17, 23), (41, 97)]
# top, left, height, width in images of SIZES: whole image, touching each border, inside, tiny
BOXES = [(0, 0, 60, 80), (5, 0, 92, 41), (0, 60, 33, 60), (10, 12, 25, 30), (0, 0, 7, 96),
         (3, 4, 10, 12), (40, 96, 1, 1)]


def pictures(channels=3, **kw):
    """[(picture, box)] of all SIZES."""
    made = [photo(i, *size, channels, **kw) for i, size in enumerate(SIZES)]
    return list(zip(made, BOXES, strict=True))


def pillow(picture, box, height, width):
    """Pillow's bicubic crop of uint8 (C, H, W), int (C, height, width): horizontal, then vertical.

    Pillow picks the order of its two passes by the shape (vertical first where that is less work)
    and clips to 8 bit between them, so that the orders differ where the first one overshoots. Ours
    is horizontal first: two calls of one axis each fix that order.
    """
    top, left, h, w = box
    bands = []
    for band in picture.numpy():
        image = Image.fromarray(band).crop((left, top, left + w, top + h))
        image = image.resize((width, h), Image.Resampling.BICUBIC)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        bands.append(np.asarray(image))
    return torch.tensor(np.stack(bands)).int()


def check_pillow(crops):
    """crops: [(crop, picture, box)]. One level, but for one value in 5000, which the rounding after
    each of the two passes may put two levels off."""
    differences = []
    for crop, picture, box in crops:
        assert crop.dtype == torch.uint8
        expected = pillow(picture, box, *crop.shape[1:])
        differences.append((crop.int() - expected).abs().flatten())
    differences = torch.cat(differences).float()
    assert differences.max() <= 2
    assert (differences > 1).float().mean() < 1 / 5000
    assert differences.mean() < 0.02


@pytest.mark.parametrize("size", [16, 48, 96])
@pytest.mark.parametrize("contrast", [60, 180])
def test_cut_equals_pillow_within_one_level(size, contrast):
    """Shrunk and enlarged, with boxes at every border."""
    crops = []
    for picture, box in pictures(contrast=contrast):
        crops.append((common.cut(picture, box, False, size), picture, box))
    check_pillow(crops)


def test_pictures_of_high_contrast_are_saturated_in_part():
    picture = photo(0, *SIZES[0])
    saturated = (picture == 0) | (picture == 255)
    assert 0.02 < saturated.float().mean() < 0.5


@pytest.mark.skipif("PHOTOGRAPHS" not in os.environ, reason="PHOTOGRAPHS names no such folder")
@pytest.mark.parametrize("size", [16, 48, 96, 224])
def test_cuts_of_photographs_equal_pillow_within_one_level(size):
    """The first of a folder's photographs, and parts of it, shrunk and enlarged."""
    folder, crops = Path(os.environ["PHOTOGRAPHS"]), []
    for i, path in enumerate(common.list_images(folder)[:6]):
        picture = torch.from_numpy(common.read_image(folder / path)).permute(2, 0, 1)
        height, width = picture.shape[1:]
        for box in ((0, 0, height, width), (i, 7, 97, 110), (60, 60 + i, 17, 23)):
            crops.append((common.cut(picture, box, False, size), picture, box))
    check_pillow(crops)


@pytest.mark.parametrize(("height", "width"), [(30, 50), (100, 90), (7, 200)])
def test_resize_equals_pillow_within_one_level(height, width):
    crops = []
    for picture, _ in pictures():
        box = (0, 0, *picture.shape[1:])
        crops.append((common.resize(picture, height, width), picture, box))
    check_pillow(crops)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_each_channel_is_cut_as_one_of_rgb(channels):
    for picture, box in pictures(channels):
        crop = common.cut(picture, box, False, 48)
        for band, cut_band in zip(picture, crop, strict=True):
            rgb = common.cut(band.repeat(3, 1, 1), box, False, 48)
            near(cut_band, rgb[0], atol=1)


def test_resize_antialiases():
    """Shrinking white noise by 8 averages it: a bicubic of 4 taps would keep most of its
    deviation."""
    noise = torch.randint(0, 256, (1, 128, 128), dtype=torch.uint8, generator=gen())
    small = common.resize(noise, 16, 16)
    assert small.float().std() < 0.2 * noise.float().std()


def test_flipped_crop_is_the_mirrored_crop():
    for picture, box in pictures():
        plain = common.cut(picture, box, False, 24)
        assert torch.equal(common.cut(picture, box, True, 24), plain.flip(2))


def test_nothing_beyond_the_box_is_read():
    """Cut first, then resized: the rim knows nothing of its neighbours."""
    for picture, box in pictures():
        top, left, h, w = box
        other = 255 - picture
        inside = slice(None), slice(top, top + h), slice(left, left + w)
        other[inside] = picture[inside]
        for size in (16, 64):
            crop = common.cut(picture, box, False, size)
            assert torch.equal(common.cut(other, box, False, size), crop)


def test_crop_of_its_own_size_is_the_shifted_image():
    picture = photo(0, 40, 50)
    expected = picture[:, 7:31, 11:35]
    assert torch.equal(common.cut(picture, (7, 11, 24, 24), False, 24), expected)


def test_crops_do_not_depend_on_how_the_image_lies_in_memory():
    """Decoded ones have their channels last, those of .npy files may not."""
    for picture, box in pictures():
        channels_last = picture.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        crop = common.cut(picture, box, False, 48)
        assert torch.equal(common.cut(channels_last, box, False, 48), crop)


@pytest.mark.parametrize("value", [0, 1, 77, 255])
def test_values_of_constant_images_are_kept(value):
    picture = torch.full((2, 30, 20), value, dtype=torch.uint8)
    for size in (12, 50):
        assert (common.cut(picture, (3, 0, 20, 17), False, size) == value).all()


def draw_boxes(n, height, width, scale):
    """(top, left, height, width) of n boxes: array (n, 4)."""
    rng = random.Random(0)
    return np.array([common.draw_box(height, width, scale, rng) for _ in range(n)])


GLOBAL, LOCAL = (0.32, 1.0), (0.05, 0.32)


@pytest.mark.parametrize("scale", [GLOBAL, LOCAL])
@pytest.mark.parametrize(("height", "width"), [(500, 500), (400, 600)])
def test_boxes_are_anywhere_inside(height, width, scale):
    top, left, h, w = draw_boxes(5000, height, width, scale).T
    for start, length, side in ((top, h, height), (left, w, width)):
        room = side - length
        assert length.min() >= 1
        assert start.min() >= 0
        assert (start <= room).all()
        place = (start + 0.5) / (room + 1)  # uniform over the places that fit
        uniform(place[room > 20], 0, 1)


def area_and_aspect(scale):
    """Area as a part of the image and log aspect of boxes in an image of so many pixels that the
    rounding of sides is below 0.001."""
    side = 10_000
    h, w = draw_boxes(10_000, side, side, scale).T[2:]
    return h * w / side**2, np.log(w / h)


def test_boxes_have_a_uniform_area_and_a_log_uniform_aspect():
    """Local crops of a square: all fit, so nothing is drawn again."""
    area, aspect = area_and_aspect(LOCAL)
    uniform(area, *LOCAL, slack=0.001)
    limit = math.log(4 / 3)
    uniform(aspect, -limit, limit, slack=0.001)


def test_boxes_of_global_crops_have_allowed_areas_and_aspects():
    """Large boxes of an extreme aspect do not fit: the rest is drawn again."""
    area, aspect = area_and_aspect(GLOBAL)
    assert 0.319 < area.min() < 0.33
    assert 0.98 < area.max() <= 1
    assert np.abs(aspect).max() < math.log(4 / 3) + 0.001


def test_boxes_reach_both_borders_equally_often():
    """13 x 13 boxes in 15 x 15 pixels have 3 places along each axis."""
    top, left, h, w = draw_boxes(20_000, 15, 15, (0.75, 0.75)).T
    for start, length in ((top, h), (left, w)):
        start = start[length == 13]
        assert len(start) > 2000
        for place in range(3):
            frequency(start == place, 1 / 3)


@pytest.mark.parametrize(("size", "box"), [
    ((10, 1000), (0, 493, 10, 13)),
    ((1000, 10), (493, 0, 13, 10)),
    ((1, 1), (0, 0, 1, 1)),
])
def test_boxes_of_extreme_images_are_central_and_of_an_allowed_aspect(size, box):
    """torchvision's fallback where no try fits: 10 x 1000 pixels have no box of 32 % and 4/3."""
    assert common.draw_box(*size, (0.32, 1.0), random.Random(0)) == box


def test_boxes_are_reproducible_from_the_generator():
    assert np.array_equal(draw_boxes(20, 80, 90, (0.1, 1)), draw_boxes(20, 80, 90, (0.1, 1)))


# ==== colours =====================================================================================
def encode(*operations, grey=False, sigma=0.0, solarize=False):
    """The 24 numbers of a crop of given (operation, factor) in order."""
    weights = {
        "brightness": lambda factor: [factor, 0, 0],
        "contrast": lambda factor: [factor, 0, 1 - factor],
        "saturation": lambda factor: [factor, 1 - factor, 0],
    }
    before, after, turn = [], [], 0.0
    mixes = before
    for name, factor in operations:
        if name == "hue":
            turn, mixes = factor, after
        else:
            mixes.append(weights[name](factor))
    same = [1, 0, 0]
    for part in (before, after):
        part.extend([same] * (3 - len(part)))
    row = [*before, *after, [0, 1, 0] if grey else same, [turn, sigma, float(solarize)]]
    return torch.tensor(row).float().flatten()


def decode(numbers):
    """The jitter [(operation, factor)] in the 24 numbers of draw_color, in its order."""
    mixes = np.reshape(numbers[:18], (6, 3)).tolist()
    operations = []
    for k, (image, grey, mean) in enumerate(mixes):
        if k == 3 and numbers[21]:
            operations.append(("hue", numbers[21]))
        if [image, grey, mean] == [1, 0, 0]:
            continue
        name = "contrast" if mean else "saturation" if grey else "brightness"
        near(image + grey + mean, image if name == "brightness" else 1, atol=1e-12)
        operations.append((name, image))
    return operations


def plain_luma(x):
    """(C, H, W) to (H, W)."""
    if len(x) != 3:
        return x.mean(0)
    return 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2]


def plain_hue(x, turn):
    """colorsys on every pixel of (3, H, W)."""
    pixels = []
    for red, green, blue in x.flatten(1).T.tolist():
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        pixels.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
    return torch.tensor(pixels, dtype=torch.double).T.reshape(x.shape)


def plain_jitter(x, operation, factor):
    """The textbook's operation on one image (C, H, W) in [0, 1]."""
    if operation == "hue":
        return plain_hue(x, factor)
    others = {
        "brightness": torch.tensor(0.0),
        "contrast": plain_luma(x).mean(),
        "saturation": plain_luma(x),
    }
    mixed = factor * x + (1 - factor) * others[operation]
    return mixed.clamp(0, 1)


def plain_blur(x, sigma):
    """9 taps by 9 on (C, H, W), borders mirrored without repeating the edge."""
    taps = np.exp(-np.arange(-4, 5) ** 2 / (2 * sigma**2))
    kernel = np.outer(taps, taps)
    kernel /= kernel.sum()
    height, width = x.shape[1:]
    padded = np.pad(array(x), ((0, 0), (4, 4), (4, 4)), mode="reflect")
    blurred = np.zeros(x.shape)
    for (i, j), weight in np.ndenumerate(kernel):
        blurred += weight * padded[:, i:i + height, j:j + width]
    return torch.from_numpy(blurred)


def plain_color(crop, *operations, grey=False, sigma=0.0, solarize=False):
    """uint8 (C, H, W) to float64 in [0, 1]: jitter, grey, blur, solarise."""
    x = crop.double() / 255
    for operation, factor in operations:
        x = plain_jitter(x, operation, factor)
    if grey:
        x = plain_luma(x).expand_as(x)
    if sigma:
        x = plain_blur(x, sigma)
    if solarize:
        x = torch.where(x >= 0.5, 1 - x, x)
    return x


def squares(n, channels=3, size=24):
    """uint8 (n, C, size, size)."""
    return torch.stack([photo(i, size, size, channels) for i in range(n)])


def check_colors(crops, settings, atol=2e-5):
    """color of all crops in one call is what the textbook says of each. settings: [(operations,
    {grey, sigma, solarize})]."""
    numbers = torch.stack([encode(*operations, **kw) for operations, kw in settings])
    out = common.color(crops, numbers)
    assert out.dtype == torch.float32
    for crop, result, (operations, kw) in zip(crops, out, settings, strict=True):
        near(result, plain_color(crop, *operations, **kw), atol)


def test_colors_without_changes_are_the_image():
    check_colors(squares(3), 3 * [((), {})], atol=1e-6)


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation"])
def test_brightness_contrast_and_saturation_are_the_textbook_formulas(operation):
    factors = (0.6, 0.9, 1.15, 1.4)
    settings = [([(operation, factor)], {}) for factor in factors]
    check_colors(squares(4), settings, atol=1e-5)


@pytest.mark.parametrize("turn", [-0.5, -0.1, 0.0, 0.07, 1 / 3, 0.5])
def test_hue_equals_colorsys(turn):
    """Of random colours, greys, and colours whose channels are equal in part."""
    x = torch.rand(1, 3, 20, 20, generator=gen())
    corners = itertools.product((0, 0.2, 0.5, 1), repeat=3)
    corners = torch.tensor(list(corners))  # (64, 3)
    x[0, :, :16, :4] = corners.T.reshape(3, 16, 4)
    out = common.adjust_hue(x, torch.full((1, 1, 1, 1), turn))
    near(out[0], plain_hue(x[0].double(), turn))


def test_hue_turns_red_to_green_in_a_third_of_the_circle():
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    out = common.color(red, encode(("hue", 1 / 3))[None])
    near(out[0, :, 2, 2], [0, 1, 0])


def test_jitter_is_applied_in_each_images_own_order():
    factors = {"brightness": 1.4, "contrast": 0.6, "saturation": 1.4, "hue": 0.1}
    orders = list(itertools.permutations(factors.items()))
    assert len(orders) == 24
    check_colors(squares(24, size=6), [(order, {}) for order in orders])


def test_grey_and_solarize_act_on_their_images_alone():
    settings = [((), {"grey": True}), ((), {}), ((), {"solarize": True}), ((), {})]
    check_colors(squares(4), settings, atol=1e-5)


@pytest.mark.parametrize("size", [16, 96])
def test_blur_is_a_nine_tap_gaussian_with_reflected_borders(size):
    x = torch.rand(3, 2, size, size, generator=gen())
    sigmas = [0.1, 0.7, 2.0]
    out = common.gaussian_blur(x, torch.tensor(sigmas)[:, None])
    for image, blurred, sigma in zip(x, out, sigmas, strict=True):
        near(blurred, plain_blur(image, sigma), atol=1e-6)


def test_blur_of_sigma_zero_changes_nothing():
    x = torch.rand(2, 3, 24, 24, generator=gen())
    out = common.gaussian_blur(x, torch.tensor([[0.0], [1.0]]))
    assert torch.equal(out[0], x[0])
    assert not torch.equal(out[1], x[1])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_blur_of_crops_smaller_than_its_kernel_keeps_constants(size):
    x = torch.full((1, 3, size, size), 0.3)
    near(common.gaussian_blur(x, torch.tensor([[2.0]])), x, atol=1e-6)


def test_colors_go_jitter_grey_blur_solarize():
    every = {"grey": True, "sigma": 1.5, "solarize": True}
    settings = [
        ([("hue", 0.1), ("brightness", 1.3)], every),
        ([("contrast", 0.8)], every | {"sigma": 0.5}),
        ([("brightness", 1.4), ("saturation", 0.8)], every | {"grey": False}),
    ]
    check_colors(squares(3), settings)


def test_drawn_numbers_give_the_textbooks_colors():
    rng = random.Random(0)
    rows = [common.draw_color(rng, True, 0.5, 0.5) for _ in range(48)]
    crops = squares(48, size=12)
    out = common.color(crops, torch.tensor(rows))
    for crop, result, row in zip(crops, out, rows, strict=True):
        grey = row[18:21] == [0, 1, 0]
        sigma, solarize = row[22:]
        expected = plain_color(crop, *decode(row), grey=grey, sigma=sigma, solarize=solarize)
        near(result, expected, atol=3e-5)


def test_same_numbers_give_the_same_bits_and_paired_crops():
    """An image whose denoised copy is itself gets the same crop twice: the anchor's pairs."""
    rng = random.Random(0)
    for picture, _ in pictures():
        box = common.draw_box(*picture.shape[1:], (0.32, 1.0), rng)
        numbers = torch.tensor([common.draw_color(rng, True, 0.5, 0.5)])
        kept = numbers.clone()
        noisy = common.cut(picture, box, True, 32)[None]
        denoised = common.cut(picture.clone(), box, True, 32)[None]
        first = common.color(noisy, numbers)
        assert torch.equal(common.color(denoised, numbers), first)
        assert torch.equal(numbers, kept)  # drawn once, not changed by use
        assert torch.equal(noisy, denoised)


def test_colors_do_not_depend_on_the_rest_of_the_batch():
    rng = random.Random(0)
    numbers = torch.tensor([common.draw_color(rng, True, 0.5, 0.5) for _ in range(6)])
    crops = squares(6)
    together = common.color(crops, numbers)
    for i in range(6):
        alone = common.color(crops[i:i + 1], numbers[i:i + 1])
        near(alone[0], together[i], atol=1e-6)


def draw_colors(n, rgb=True, blur_p=0.5, solarize_p=0.0):
    rng = random.Random(0)
    return [common.draw_color(rng, rgb, blur_p, solarize_p) for _ in range(n)]


@pytest.mark.parametrize(("blur_p", "solarize_p"), [(1.0, 0.0), (0.1, 0.2), (0.5, 0.0)])
def test_color_operations_are_as_frequent_as_in_dinov2(blur_p, solarize_p):
    rows = draw_colors(10_000, blur_p=blur_p, solarize_p=solarize_p)
    jittered = [bool(decode(row)) for row in rows]
    columns = np.transpose(rows)
    grey, sigma, solarized = columns[[19, 22, 23]]
    blurred = sigma > 0
    frequency(jittered, 0.8)
    frequency(grey, 0.2)
    frequency(blurred, blur_p)
    frequency(solarized, solarize_p)
    frequency(jittered & (grey == 1) & blurred, 0.8 * 0.2 * blur_p)  # drawn independently
    uniform(sigma[blurred], 0.1, 2.0)


def test_jitter_factors_are_uniform_over_dinov2s_ranges():
    factors = {name: [] for name in ("brightness", "contrast", "saturation", "hue")}
    for row in draw_colors(10_000):
        for name, factor in decode(row):
            factors[name].append(factor)
    uniform(factors["brightness"], 0.6, 1.4)
    uniform(factors["contrast"], 0.6, 1.4)
    uniform(factors["saturation"], 0.8, 1.2)
    uniform(factors["hue"], -0.1, 0.1)


def test_every_order_of_the_jitter_is_equally_frequent():
    orders = [tuple(name for name, _ in decode(row)) for row in draw_colors(10_000)]
    orders = [order for order in orders if order]
    every = list(itertools.permutations(common.JITTER))
    assert set(orders) == set(every)
    for order in every:
        frequency([drawn == order for drawn in orders], 1 / 24)


def test_drawn_colors_are_reproducible_from_the_generator():
    assert draw_colors(20) == draw_colors(20)


def test_images_that_are_not_rgb_have_no_saturation_grey_or_solarize():
    rows = draw_colors(2000, rgb=False, blur_p=0.5, solarize_p=1.0)
    orders = set()
    for row in rows:
        names = [name for name, _ in decode(row)]
        orders.add(tuple(name for name in names if name != "hue"))
    assert orders == {(), ("brightness", "contrast"), ("contrast", "brightness")}
    columns = np.transpose(rows)
    grey, sigma, solarized = columns[[19, 22, 23]]
    assert not grey.any()
    assert not solarized.any()
    frequency(sigma > 0, 0.5)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_that_are_not_rgb_have_no_hue(channels):
    crops = squares(1, channels)
    out = common.color(crops, encode(("hue", 0.1))[None])
    near(out, crops / 255, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_brightness_contrast_and_blur_work_on_any_channels(channels):
    settings = [
        ([("brightness", 1.2), ("contrast", 0.7)], {"sigma": 1.0}),
        ([("contrast", 1.4), ("brightness", 0.7)], {}),
    ]
    check_colors(squares(2, channels), settings)
