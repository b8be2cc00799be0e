"""The experiments of the README: what is missing is run, by the stages' own commands; then tables are made of results/.

    python tests/experiments.py --data tiny-imagenet-10 --kodak kodak      all of them: hours on a laptop
    python tests/experiments.py --data tiny-imagenet-10 --only gauss100-nct-seed0 --results again    one arm, again
    python tests/experiments.py                                            results/experiments/README.md alone
    python tests/experiments.py --list                                     the names

Every run leaves results/experiments/NAME.json: figures, configuration, commands, date and machine. What has one is
not run again, and an interrupted run goes on.
"""

import argparse
import datetime
import functools
import itertools
import json
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).parents[1]))

import common as c
import denoise
import pretrain
import probe

ROOT = Path(__file__).parents[1]
EPOCHS, SWITCH = (pretrain.PRESETS["tiny"][k] for k in ("epochs", "switch"))
ANCHOR = f"{pretrain.ANCHORS['tiny']['none']:g}"
ARMS = ("random", "noisy", "nc", "nct", "denoised", "clean")
RECIPE = ["--preset", "tiny"]  # of all three stages
PATCH16 = str.split("--patch_size 16 --global_size 64 --local_size 32 --epochs 20 --switch 12")  # as long by the clock
SWITCHES, ANCHORS, SEEDS = (0.3, 0.5, 0.7, 0.9), (0.5, 1, 2), (0, 1, 2)
NOISES = ("gauss50", "shot3", "speckle0.7", "rician60", "impulse0.3")
LONG = SWITCH + 3 * (EPOCHS - SWITCH)
# prefix of a run's name -> flags of pretrain.py, epochs, switch; the rate is the best on the held-out part
RECIPES = {"": ([], EPOCHS, SWITCH), "patch16-": ([*PATCH16, "--lr", "0.008"], 20, 12)}
# what is searched, for every arm alike: name -> (label, flags of pretrain.py); first the rate, then the batch
SEARCH = {f"{name}lr{rate}": (f"rate {rate}{said}", [*flags, "--lr", rate]) for name, said, flags, rates in (
    ("", "", [], (0.004, 0.008)), ("patch16-", ", patches of 16, 20 epochs", PATCH16, (0.004, 0.008, 0.016)))
    for rate in rates}
SEARCH["patch16-batch_size32"] = "batch 32, rate 0.008, patches of 16", [*RECIPES["patch16-"][0], "--batch_size", "32"]
ABLATED = (("gauss100", ""), ("gauss255", "patch16-"))  # each noise by a recipe that learns there
KODAK = ("gauss25", "gauss50")
GAPS = (("nc", "noisy"), ("nct", "noisy"), ("nct", "nc"), ("nc", "denoised"), ("nct", "denoised"),
        ("nc", "norestart"))  # seed by seed


def switches(epochs):
    return [round(share * epochs) for share in SWITCHES]


# ==== the plan: name -> what it takes ===============================================================================
def plan():
    """{name: run}: noise, data (the set, its search or its redrawn copy), denoiser (its name, or None), flags of
    pretrain.py, fork (name of the run that it goes on from), probed. The most telling first."""
    runs = {}

    def add(name, noise, *flags, data="data", denoiser=None, fork=None, probed=True):
        runs[name] = SimpleNamespace(name=name, noise=noise, data=data, denoiser=denoiser, fork=fork, probed=probed,
                                     flags=[str(f) for f in flags])

    def arms(noise, names, seed=0, prefix="", flags=(), denoiser=None):
        """Arms with one first phase for denoised, nc and nct."""
        base, denoiser = f"{prefix}{noise}", denoiser or f"denoiser-{noise}"
        common = ["--seed", seed, *flags]
        if {"denoised", "nc", "nct"} & set(names):
            add(f"{base}-phase1-seed{seed}", noise, "--arm", "phase1", *common, denoiser=denoiser, probed=False)
        for arm in names:
            alone = arm in ("random", "noisy", "clean")
            add(f"{base}-{arm}-seed{seed}", noise, "--arm", arm, *common,
                denoiser=None if alone else denoiser, fork=None if alone else f"{base}-phase1-seed{seed}")

    # the same choice for every arm, on a quarter of train that is held out for it
    for (name, (_, flags)), arm in itertools.product(SEARCH.items(), ("noisy", "denoised", "clean")):
        add(f"search-{name}-{arm}", "gauss100", "--arm", arm, *flags, data="search",
            denoiser="denoiser-search" if arm == "denoised" else None)
    for noise, seed in itertools.product(("gauss100", "gauss255"), SEEDS):
        names = [arm for arm in ARMS if (arm, noise) != ("clean", "gauss255")]  # no noise in it
        for prefix, (flags, *_) in RECIPES.items():
            arms(noise, names, seed, prefix, flags)
    for noise in NOISES:
        arms(noise, ("noisy", "nc", "nct"))

    for noise, prefix in ABLATED:
        recipe, epochs, _ = RECIPES[prefix]
        name, own, before = f"{prefix}{noise}", f"denoiser-{noise}", None
        base, first = ["--seed", 0, *recipe], f"{name}-phase1-seed0"
        for k in switches(epochs):  # one denoised run, left at each switch
            add(f"{name}-denoised{k}", noise, *base, "--curriculum", f"denoised:{k}/{epochs}", denoiser=own,
                fork=before, probed=False)
            before = f"{name}-denoised{k}"
            add(f"{name}-switch{k}", noise, *base, "--curriculum", f"denoised:{k}/{epochs},noisy:{epochs - k}",
                denoiser=own, fork=before)
        for weight in ANCHORS:
            add(f"{name}-anchor{weight}", noise, *base, "--arm", "nct", "--anchor", weight, denoiser=own, fork=first)
        add(f"{name}-live", noise, *base, "--arm", "nct", "--anchor_head", "live", denoiser=own, fork=first)
        for seed in SEEDS:
            add(f"{name}-norestart-seed{seed}", noise, "--seed", seed, *recipe, "--arm", "nc", "--no-restart",
                denoiser=own)
        arms(noise, ("nc", "nct"), prefix=f"weak-{prefix}", flags=recipe, denoiser=f"denoiser-weak-{noise}")
    # three times the noisy phase, and a baseline that is as long
    long = ["--curriculum", f"denoised:{SWITCH}/{EPOCHS},noisy:{LONG - SWITCH}"]
    for seed in SEEDS:
        for arm, flags in (("nc", long), ("nct", [*long, "--anchor", ANCHOR])):
            add(f"long-gauss255-{arm}-seed{seed}", "gauss255", "--seed", seed, *flags, denoiser="denoiser-gauss255",
                fork=f"gauss255-phase1-seed{seed}")
        arms("gauss255", ["noisy"], seed, "long-", ["--epochs", LONG])
    # whether the restart matters more then, where noisy images teach
    add("long-gauss100-nc-seed0", "gauss100", "--seed", 0, *long, denoiser="denoiser-gauss100",
        fork="gauss100-phase1-seed0")
    add("long-gauss100-norestart-seed0", "gauss100", "--seed", 0, *long, "--no-restart", denoiser="denoiser-gauss100")
    # noise drawn anew at every reading: as many copies of each image, each with its own draw, and one epoch of them
    once = ["--seed", 0, "--curriculum", "noisy:1", "--warmup_epochs", 0.2, "--freeze_last_epochs", 0]
    add("gauss100-redrawn", "gauss100", *once, data="redrawn")
    return runs


# denoisers that are not trained by the preset on the data set itself: name -> noise, data, flags
DENOISER = {"denoiser-search": ("gauss100", "search", []),
            "denoiser-weak-gauss100": ("gauss100", "data", ["--epochs", "1"]),
            "denoiser-weak-gauss255": ("gauss255", "data", ["--epochs", "1"]),
            "denoiser-redrawn-gauss100": ("gauss100", "redrawn", ["--epochs", "1"]),
            "denoiser-long-gauss100": ("gauss100", "data", ["--epochs", str(EPOCHS)]),  # as many steps
            **{f"denoiser-{noise}-kodak": (noise, "kodak", ["--epochs", "800", "--patch", "64"]) for noise in KODAK}}


# ==== running =======================================================================================================
class Runner:
    def __init__(self, args):
        self.args, self.runs = args, plan()
        self.out, self.results = Path(args.out), Path(args.results)
        # many runs share a denoiser and a first phase: each is asked for once
        self.denoiser, self.pretrain = functools.cache(self.denoiser), functools.cache(self.pretrain)

    def call(self, *command):
        """One stage; its output is shown. Gives the command as a reader would type it."""
        command = [str(x) for x in command]
        print("==", *command, flush=True)
        code = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]]).returncode
        if code:
            sys.exit(code)
        return self.tidy(" ".join(["python", *command]))

    def tidy(self, text):
        """Without this machine's paths."""
        for path, name in ((self.out, "OUT"), (self.args.kodak, "KODAK"), (self.args.data, "DATA"), (ROOT, ".")):
            text = text.replace(str(path), name) if path else text
        return text

    def data(self, kind):
        """The data set, or a folder of links to it: `search` holds a quarter of train out as its val; `redrawn` has
        every training image EPOCHS times, which gives each copy a noise of its own."""
        source, made = Path(self.args.data).resolve(), self.out / kind
        if kind in ("data", "kodak"):
            return getattr(self.args, kind)
        if not made.exists():
            part = made.with_suffix(".part")
            for path in sorted((source / "train").glob("*/*")):
                k = int(c.digest([path.name]), 16)
                names = [("val" if k % 4 == 0 else "train", path.name)] if kind == "search" else [
                    ("train", f"{path.stem}-{i}{path.suffix}") for i in range(EPOCHS)]
                for split, name in names:
                    link = part / split / path.parent.name / name
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.unlink(missing_ok=True)
                    link.symlink_to(path)
            if kind == "redrawn":
                (part / "val").unlink(missing_ok=True)
                (part / "val").symlink_to(source / "val")
            part.rename(made)
        return made

    def denoiser(self, name):
        """(folder of the denoiser, of the denoised images, commands)."""
        noise, kind, flags = DENOISER.get(name, (name.removeprefix("denoiser-"), "data", []))
        folder, where = self.out / name, [*RECIPE, "--data", self.data(kind), "--noise", noise]
        commands = [self.call("denoise.py", "train", *where, *flags, "--out", folder)]
        if not (self.results / f"{name}.json").exists():
            self.save(name, {"quality": c.read_json(folder / "quality.json"), "commands": list(commands), "seconds":
                      c.read_log(folder / "log.jsonl")[-1]["seconds"], "config": c.read_json(folder / "config.json")})
        images = folder / "images"
        if kind in ("data", "search"):
            commands += [self.call("denoise.py", "apply", *where, "--denoiser", folder, "--out", images)]
        return folder, images, commands

    def pretrain(self, name):
        """(folder of the finished run, flags that its probe needs, commands)."""
        run, commands, denoised = self.runs[name], [], []
        folder = self.out / name
        flags = [*RECIPE, "--data", self.data(run.data), "--noise", run.noise, *run.flags]
        if run.denoiser:
            unet, images, made = self.denoiser(run.denoiser)
            commands += made
            flags += ["--denoised", images]
            if "denoised" in run.flags:  # the arm
                denoised = ["--denoised", images, "--denoiser", unet]
        if run.fork:
            commands += self.pretrain(run.fork)[2]
            flags += ["--fork", self.out / run.fork / "checkpoint.pth"]
        commands += [self.call("pretrain.py", *flags, "--out", folder)]
        return folder, denoised, list(dict.fromkeys(commands))

    def run(self, name, clean=False):
        """Train and probe; clean: the probe's head is trained on clean images, too, and no denoiser used."""
        run, saved = self.runs[name], f"clean-head-{name}" if clean else name
        folder, flags, commands = self.pretrain(name)
        figures = self.out / f"{saved}.json"
        data = ["--data", self.data("data" if run.data == "redrawn" else run.data)]
        if not (clean or "clean" in run.flags):  # the upper bound is probed on clean images, too
            data += ["--noise", run.noise, *flags]
        if not figures.exists():
            self.call("probe.py", *RECIPE, *data, "--run", folder, "--out", figures)
        log = c.read_log(folder / "log.jsonl")
        monitors = [r for r in log if "entropy" in r][-1:]  # at the end of training
        self.save(saved, {**c.read_json(figures), "monitors": {k: r[k] for r in monitors for k in
                          ("entropy", "kl", "cls_std", "rank", "dino", "ibot")}, "commands": commands})

    def save(self, name, figures):
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        cpu = (re.findall(r"model name\s*: (.*)", info) or [platform.machine()])[0]
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        figures = {"name": name, "date": datetime.date.today().isoformat(), "torch": torch.__version__,
                   "hardware": gpu or f"{torch.get_num_threads()} cores of {cpu}", **figures}
        c.write_json(self.results / f"{name}.json", json.loads(self.tidy(json.dumps(figures))))

    def kodak(self, noise):
        """PSNR on photographs: denoisers trained on the data set and on the photographs themselves, and a blur."""
        folder = c.Folder(self.args.kodak, "train", noise)
        images = [(folder.read(i, "clean") / 255, folder.read(i)) for i in range(len(folder))]

        def mean(function):
            return round(float(np.mean([denoise.psnr(function(y) / 255.0, x) for x, y in images])), 3)

        device = c.setup()
        result = {"noisy": mean(lambda y: y)}
        blurs = {r: mean(lambda y, r=r: np.asarray(Image.fromarray(y).filter(ImageFilter.GaussianBlur(r))))
                 for r in (0.5, 0.75, 1, 1.25, 1.5, 2, 3)}
        result["blur"], result["radius"] = max((v, k) for k, v in blurs.items())
        commands = []
        for name, denoiser in (("data", f"denoiser-{noise}"), ("kodak", f"denoiser-{noise}-kodak")):
            unet, _, made = self.denoiser(denoiser)
            commands += made
            model, _ = denoise.load_denoiser(unet, device)
            result[f"trained on {name}"] = mean(lambda y, model=model: denoise.denoise(
                model, torch.from_numpy(y).permute(2, 0, 1)[None].to(device))[0].permute(1, 2, 0).cpu().numpy())
        self.save(f"kodak-{noise}", {**result, "images": len(images), "commands": commands})

    def cost(self):
        """Inference, images/s: the backbone alone, and the denoiser before it; median of 7 turns."""
        device = c.setup()
        unet, _ = denoise.load_denoiser(self.denoiser("denoiser-gauss100")[0], device)
        model, config = probe.load_run(self.pretrain("gauss100-nct-seed0")[0], device)
        x, times = torch.randint(256, (64, 3, 64, 64), dtype=torch.uint8, device=device), {"alone": [], "denoiser": []}
        for _ in range(8):
            for name, y in (("alone", lambda: x), ("denoiser", lambda: denoise.denoise(unet, x))):
                start = time.perf_counter()
                with torch.no_grad():
                    float(model(y() / 255).sum())
                times[name].append(time.perf_counter() - start)
        rates = {k: round(64 / float(np.median(v[1:])), 1) for k, v in times.items()}
        self.save("cost", {"images_s": rates, "pixels": 64, "arch": config["arch"], "patch_size": config["patch_size"]})

    def everything(self):
        """{name: function}, in order."""
        jobs = {name: (lambda name=name: self.run(name)) for name, run in self.runs.items() if run.probed}
        jobs |= {f"clean-head-{name}": (lambda name=name: self.run(name, clean=True)) for name in self.runs
                 if re.fullmatch(r"gauss100-(noisy|nc|nct|denoised)-seed\d", name)}
        jobs |= {name: (lambda name=name: self.denoiser(name)) for name in DENOISER if re.search("redrawn|long", name)}
        jobs |= {"cost": self.cost}
        if self.args.kodak:
            jobs |= {f"kodak-{noise}": (lambda noise=noise: self.kodak(noise)) for noise in KODAK}
        return jobs


# ==== tables ========================================================================================================
def table(head, rows, title=None):
    """Lines of a markdown table below its title; none where there are no rows."""
    lines = ["| " + " | ".join(r) + " |" for r in (head, *rows)]
    return [*([f"## {title}", ""] if title else []), lines[0], "|---" * len(head) + "|", *lines[1:], ""] if rows else []


def tables(folder):
    """README.md and robustness.png in the results' folder, from its files alone."""
    all_ = {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}
    for r in all_.values():
        if "knn" in r:
            r |= {"knn20": r["knn"]["20"], "clean_knn20": r.get("clean_knn", {}).get("20"),
                  "minutes": r["summary"]["seconds"] / 60, "rank": r["monitors"].get("rank"),
                  "entropy": r["monitors"].get("entropy")}
    columns = {"linear": "linear", "clean_linear": "linear, clean val", "knn20": "20-NN",
               "clean_knn20": "20-NN, clean val", "cosine": "cosine to clean", "minutes": "minutes",
               "rank": "effective rank", "entropy": "teacher entropy"}
    text = ["# Experiments", "", "Made by `python tests/experiments.py` from the files beside it; mean ± standard "
            "deviation over seeds where there are several.", ""]

    def rows(title, names):
        """[(label, [names of runs])] -> table of those that exist."""
        found = [(label, [all_[n] for n in group if n in all_]) for label, group in names]
        return table(["", "seeds", *columns.values()],
                     [[label, str(len(r)), *(probe.spread([x.get(k) for x in r], 1 + (k == "cosine")) for k in columns)]
                      for label, r in found if r], title)

    curves = []
    recipes = (("", EPOCHS, SWITCH, ""), ("long-", LONG, SWITCH, ""),
               ("patch16-", *RECIPES["patch16-"][1:], ", patches of 16"))
    for (prefix, epochs, switch, said), noise in itertools.product(recipes, ("gauss100", "gauss255")):
        base, title = f"{prefix}{noise}", f"{noise}, {switch} + {epochs - switch} epochs{said}"
        for (a, b), seed in itertools.product(GAPS, SEEDS):
            x, y = (all_.get(f"{base}-{arm}-seed{seed}") for arm in (a, b))
            if x and y:
                all_[f"{base}-{a} less {b}-seed{seed}"] = {
                    k: x[k] - y[k] for k in ("linear", "clean_linear", "knn20", "clean_knn20", "cosine")}
        groups = [(arm, [f"{prefix}{'gauss100' if arm == 'clean' else noise}-{arm}-seed{s}" for s in SEEDS])
                  for arm in (*ARMS, "norestart", *(f"{a} less {b}" for a, b in GAPS))]
        text += rows(f"Arms, {title}", groups)
        lines = {}
        for arm, names in groups[:len(ARMS)]:
            sweeps = [all_[n]["sweep"] for n in names if "sweep" in all_.get(n, {})]
            if sweeps:
                lines[arm] = [(s["strength"], float(np.mean([x[i]["linear"] for x in sweeps])))
                              for i, s in enumerate(sweeps[0])]
        if lines:
            curves.append((f"{title}: linear probe in % by test noise", lines))
            strengths = [f"{x:g} x" for x, _ in next(iter(lines.values()))]
            text += ["Linear probe under other test noise, relative to pretraining's:", "",
                     *table(["", *strengths], [[arm, *(f"{y:.1f}" for _, y in p)] for arm, p in lines.items()])]
    text += rows("Clean images, the probe's head too, no denoiser", [
        (f"gauss100 {arm}", [f"clean-head-gauss100-{arm}-seed{s}" for s in SEEDS])
        for arm in ("noisy", "nc", "nct", "denoised")])
    text += rows("Other noises", [(f"{noise} {arm}", [f"{noise}-{arm}-seed0"]) for noise in NOISES
                                  for arm in ("noisy", "nc", "nct")])
    for noise, prefix in ABLATED:
        name, (_, epochs, switch) = f"{prefix}{noise}", RECIPES[prefix]
        seed0 = [(f"{arm}, as above", [f"{name}-{arm}-seed0"]) for arm in ("noisy", "nc", "nct")]
        part = [(f"switch at epoch {k} of {epochs}, nc", [f"{name}-switch{k}"]) for k in switches(epochs)]
        part += [("norestart: nc without", [f"{name}-norestart-seed0"]), ("nct, live head", [f"{name}-live"])]
        part += [(f"nct, anchor {w}", [f"{name}-anchor{w}"]) for w in ANCHORS]
        part += [(f"{arm}, denoiser of one epoch", [f"weak-{name}-{arm}-seed0"]) for arm in ("nc", "nct")]
        part += [("noisy, noise redrawn every epoch", [f"{name}-redrawn"])]
        if any(n in all_ for _, group in part for n in group):
            title = f"Ablations, {name}, seed 0 (switch at {switch}, anchor {ANCHOR}, frozen head unless said)"
            text += rows(title, seed0 + part)
    text += rows("Search, gauss100, on a held-out quarter of train", [
        (f"{arm}, {label}", [f"search-{name}-{arm}"]) for arm in ("noisy", "denoised", "clean")
        for name, (label, _) in SEARCH.items()])
    found = {k: r for k, r in all_.items() if k.startswith("denoiser-")}
    text += table(
        ["", "noisy", "denoised", "noisy, of E[noisy]", "denoised, of E[noisy]", "minutes"],
        [[k.removeprefix("denoiser-"), *(f"{r['quality'][q]:.2f}" for q in (
            "noisy_clean", "denoised_clean", "noisy_expected", "denoised_expected")), f"{r['seconds'] / 60:.1f}"]
         for k, r in found.items()], "Denoisers: PSNR in dB on val")
    found = [(noise, all_[f"kodak-{noise}"]) for noise in KODAK if f"kodak-{noise}" in all_]
    names = ("noisy", "blur", "trained on data", "trained on kodak")
    text += table(["", *names], [[n, *(f"{r[k]:.2f}" for k in names)] for n, r in found], "Kodak: PSNR in dB")
    if "cost" in all_:
        rates = all_["cost"]["images_s"]
        text += ["## Inference", "", f"{rates['alone']:.0f} images/s by the backbone alone, {rates['denoiser']:.0f} "
                 "through the denoiser first.", ""]
    if curves:
        probe.chart(curves).save(folder / "robustness.png")
        text += ["![robustness](robustness.png)"]
    (folder / "README.md").write_text("\n".join(text).rstrip() + "\n")
    print("\n".join(text))


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with train/<class>/ and val/<class>/; without it only tables are made")
    parser.add_argument("--kodak", help="flat folder of clean photographs")
    parser.add_argument("--out", default="runs/experiments", help="checkpoints and denoised images")
    parser.add_argument("--results", default=str(ROOT / "results" / "experiments"))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these, and what they need")
    parser.add_argument("--list", action="store_true")
    return parser.parse_args(argv)


def main():
    args = parse()
    runner = Runner(args)
    jobs = runner.everything()
    if unknown := set(args.only) - set(jobs):
        raise c.UserError(f"--only {sorted(unknown)[0]}: no such experiment; --list names them")
    if args.list:
        return print("\n".join(jobs))
    for name in args.only or jobs if args.data else ():
        if not (runner.results / f"{name}.json").exists():
            jobs[name]()
    tables(runner.results)


if __name__ == "__main__":
    c.run(main)
