"""The same work assembled from timm, lightly and torchvision, as a careful user would: for bench.py --peers alone.

PIL crops in DataLoader workers (one a core), timm's ViT masked by lightly, lightly's heads, losses, masks, EMA; AdamW.
"""

import itertools
import os
import statistics
import time

import torch
from torch import nn

import common as c
import pretrain

try:
    import timm
    import torchvision
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import random_block_mask, update_momentum
    from torchvision import transforms as T
except ImportError as error:
    raise SystemExit(f"--peers: pip install timm lightly, and the torchvision of this torch ({error})") from None


def view(size, scale, blur, solarize):
    return T.Compose([
        T.RandomResizedCrop(size, scale, interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), T.RandomGrayscale(0.2),
        T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], blur), T.RandomSolarize(128, solarize),
        T.ToTensor(), T.Normalize((0.45,) * 3, (0.25,) * 3)])


class Views(torch.utils.data.Dataset):
    """Noisy image i of a Folder as its crops."""

    def __init__(self, folder, args):
        self.folder = folder
        big, small = (args.global_size, args.global_scale), (args.local_size, args.local_scale)
        self.views = [view(*big, 1.0, 0.0), view(*big, 0.1, 0.2)] + [view(*small, 0.5, 0.0)] * args.local_crops

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, i):
        image = c.Image.fromarray(self.folder.read(i % len(self.folder)))
        return [v(image) for v in self.views]


class Peer(nn.Module):
    """Backbone and head of student or teacher."""

    def __init__(self, args):
        super().__init__()
        dim, depth, heads = c.ARCHS.get(args.arch) or (int(v) for v in args.arch.split(","))
        vit = timm.models.VisionTransformer(
            img_size=args.global_size, patch_size=args.patch_size, embed_dim=dim, depth=depth, num_heads=heads,
            num_classes=0, init_values=args.layer_scale, dynamic_img_size=True)
        self.backbone = MaskedVisionTransformerTIMM(vit=vit, mask_token=None, weight_initialization="skip",
                                                    antialias=False, pos_embed_initialization="skip")
        self.head = DINOv2ProjectionHead(dim, args.head_hidden, args.head_bottleneck, args.prototypes)


def stepper(args, device):
    """A function that trains on one batch: list of (B, C, S, S) crops, the two global ones first."""
    student, teacher = Peer(args).to(device), Peer(args).to(device).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    dino, ibot, koleo = DINOLoss(args.prototypes).to(device), IBOTPatchLoss(args.prototypes).to(device), KoLeoLoss()
    optimizer = torch.optim.AdamW(student.parameters(), 1e-6)
    grid = args.global_size // args.patch_size

    def step(crops):
        n = len(crops[0])
        big, small = torch.cat(crops[:2]), torch.cat(crops[2:])
        mask = torch.zeros(2 * n, 1 + grid * grid, dtype=torch.bool, device=device)
        block = random_block_mask(size=(2 * n, grid, grid), min_num_masks_per_block=1, device=device)
        mask[:, 1:] = block.flatten(1)
        with torch.no_grad():
            features = teacher.backbone.encode(big)
            cls, patches = teacher.head(features[:, 0]), teacher.head(features[:, 1:][block.flatten(1)])
        features = student.backbone.encode(big, mask=mask)
        student_cls, seen = features[:, 0], features[:, 1:][block.flatten(1)]
        local = student.head(student.backbone.encode(small)[:, 0])
        loss = dino(teacher_out=list(cls.chunk(2)), epoch=0,
                    student_out=[*student.head(student_cls).chunk(2), *local.chunk(len(crops) - 2)])
        loss = loss + args.ibot_weight * ibot(teacher_out=patches, student_out=student.head(seen), mask=block)
        loss = loss + args.koleo_weight * sum(koleo(x) for x in student_cls.chunk(2))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for part in (student.backbone, student.head):
            nn.utils.clip_grad_norm_(part.parameters(), args.clip)
        optimizer.step()
        update_momentum(student, teacher, 0.99)
    return step


def images_a_second(folder, args, device, steps, workers):
    ahead = 2 * workers  # batches that the workers hold ready: they are busy as long as anything is timed
    loader = torch.utils.data.DataLoader(
        Views(folder, args), args.batch_size, num_workers=workers, prefetch_factor=2,
        sampler=torch.randint(len(folder), ((steps + 1 + ahead) * args.batch_size,)))
    step, times = stepper(args, device), []
    for crops in itertools.islice(loader, steps + 1):
        step([x.to(device) for x in crops])
        times.append(time.perf_counter())
    return args.batch_size * steps / (times[-1] - times[0])


def compare(bench, folder, argv, training):
    """Whole training and crops, ours and theirs in turns."""
    args = pretrain.read_config(argv)
    args.batch_size = min(args.batch_size, len(folder))
    bench.title("beside timm, lightly and torchvision")
    steps = 12 if args.global_size < 128 else 4
    ours, theirs = [], []
    for _ in range(bench.args.repeats):
        ours.append(training(bench, argv, max(1, -(-2 * steps * args.batch_size // len(folder))))[0])
        theirs.append(images_a_second(folder, args, bench.device, steps, os.cpu_count()))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    bench.row("training, data included: theirs", statistics.median(theirs), 1.0)
    bench.row("training, data included: ours", statistics.median(ours), 1.0,
              note=f"{statistics.median(ratios):.2f} times theirs ({', '.join(f'{r:.2f}' for r in sorted(ratios))})")
    n, threads = min(args.batch_size, len(folder)), torch.get_num_threads()
    torch.set_num_threads(1)
    batch, sizes = next(c.Batches(folder, ["noisy"], bench.device, 0.0, 0).epoch([list(range(n))]))
    pictures = [c.Image.fromarray(folder.read(i)) for i in range(n)]
    mean, std = (torch.full((folder.channels, 1, 1), v, device=bench.device) for v in (0.45, 0.25))
    theirs = Views(folder, args).views
    views = pretrain.draw_step(args, sizes, 0, 0, 0, 0)[0]
    ours, peer = bench.seconds(lambda: pretrain.make_crops(args, batch[0], sizes, views, mean, std),
                               lambda: [v(p) for p in pictures for v in theirs])
    bench.row("crops, per core: torchvision", n, peer)
    bench.row("crops, per core: ours", n, ours, note=f"{peer / ours:.2f} times theirs")
    torch.set_num_threads(threads)
    print(f"timm {timm.__version__}, torchvision {torchvision.__version__}")
