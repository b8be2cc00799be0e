"""The experiments of results/README.md: run those that are missing, then make the tables.

    python tests/experiments.py --list                           the names of all runs
    python tests/experiments.py --data DATA --kodak KODAK        all of them: a day on two cores
    python tests/experiments.py --data DATA --only gauss100-nct-seed0      one, about an hour
    python tests/experiments.py                                  the tables alone

DATA: a folder of 64 x 64 images with train/<class>/ and val/<class>/; results/README.md says which.
KODAK: a flat folder of clean photographs.

Out: results/experiments.jsonl, one line a run, with its figures, commands, date and machine; and of
it results/experiments.md and results/robustness.png. A run that has a line is not run again: to
repeat it, delete the line. To go on after an interruption, give the same command.
Names that begin with cb52cd3/ are results of that commit, by commands that no longer exist.
"""

import argparse
import datetime
import fcntl
import functools
import itertools
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import common as c
import probe

ROOT = Path(__file__).parents[1]
OLD = "cb52cd3/"

# ==== what is compared ============================================================================
EPOCHS, SWITCH = 60, 18  # of every arm; those of a curriculum on denoised images
PATCH16 = "--patch_size 16 --global_size 64 --local_size 32"  # at half the cost of an epoch
CENTER = "--centering center --teacher_temp 0.04"
SHORT, LONG = (20, 12), (EPOCHS, SWITCH)  # the same of the search, which is shorter
SEARCH = {  # what differs from the preset, flags of pretrain.py, the same choices for every arm
    "tiny": "",
    "older": f"{PATCH16} {CENTER}",
    "patch16": PATCH16,
    "patch16-temp0.04": f"{PATCH16} --teacher_temp 0.04",
    "patch16-temp0.04-local6": f"{PATCH16} --teacher_temp 0.04 --local_crops 6",
    "center": CENTER,
    "lr0.004": "--lr 0.004",
    "lr0.016": "--lr 0.016",
    "momentum0.996": "--momentum 0.996",
    "prototypes2048": "--prototypes 2048",
    "ibot0": "--ibot_weight 0",
    "local6": "--local_crops 6",
    "local0": "--local_crops 0",
    "scale0.2": "--global_scale 0.2,1.0",
    "scale0.5": "--global_scale 0.5,1.0",
    "epochs60": "",  # LONG
}
SEARCHED = ("noisy", "nct", "denoised", "clean")
ANCHOR = 4  # weight in the arm nct
SEARCH_CURRICULA = {  # recipe, epochs on denoised images, weight of the anchor
    "tiny-nc": ("tiny", 12, 0),
    "switch6-nc": ("tiny", 6, 0),
    "switch6-nct": ("tiny", 6, ANCHOR),
    "anchor1-nct": ("tiny", 12, 1),
    "anchor10-nct": ("tiny", 12, 10),
    "switch6-anchor10-nct": ("tiny", 6, 10),
    "epochs60-nc": ("epochs60", SWITCH, 0),
    "epochs60-anchor1-nct": ("epochs60", SWITCH, 1),
}
ARMS = ("pixels", "random", "noisy", "nc", "nct", "denoised", "clean")
SEEDS = (0, 1, 2)
NOISES = ("gauss50", "shot3", "speckle0.7", "rician60", "impulse0.3")  # one seed each
SWITCHES = (0.15, 0.5, 0.7, 0.9)  # parts of the epochs
ANCHORS = (0.5, 1, 2)
DENOISERS = {  # name: (noise, data, flags of denoise.py train)
    **{f"denoiser-{k}": (k, "DATA", "") for k in ("gauss100", "gauss255", *NOISES)},
    **{f"denoiser-weak-{k}": (k, "DATA", "--epochs 1") for k in ("gauss100", "gauss255")},
    "denoiser-search": ("gauss100", "OUT/search", ""),
    "denoiser-gauss25-kodak": ("gauss25", "KODAK", "--epochs 800 --patch 64"),
    "denoiser-gauss50-kodak": ("gauss50", "KODAK", "--epochs 800 --patch 64"),
}


# ==== commands of one run; DATA, KODAK and OUT stand for this machine's folders ===================
def stage(script, data, noise, *flags):
    words = [script, "--preset tiny --data", data, "--noise", noise, *flags]
    return " ".join(str(word) for word in words if word != "")


def train_denoiser(name):
    noise, data, flags = DENOISERS[name]
    return stage("denoise.py train", data, noise, flags, "--out", f"OUT/{name}")


def denoised_copy(name):
    """Commands that train a denoiser and denoise its data set."""
    noise, data, _ = DENOISERS[name]
    folders = f"--denoiser OUT/{name} --out OUT/{name}/images"
    return [train_denoiser(name), stage("denoise.py apply", data, noise, folders)]


class Setting(NamedTuple):
    """What the arms of one comparison share."""
    noise: str
    seed: int = 0
    weak: str = ""  # "weak-": with a denoiser of one epoch
    recipe: str = ""  # of SEARCH: on OUT/search, of which `val` is a quarter of the training images

    def base(self):
        return f"search-{self.recipe}" if self.recipe else f"{self.weak}{self.noise}"

    def run(self, arm):
        return f"{self.base()}-{arm}" if self.recipe else f"{self.base()}-{arm}-seed{self.seed}"

    def data(self):
        return "OUT/search" if self.recipe else "DATA"

    def denoiser(self):
        return "denoiser-search" if self.recipe else f"denoiser-{self.weak}{self.noise}"

    def length(self):
        """(epochs of every arm, those of a curriculum on denoised images)"""
        return SHORT if self.recipe not in ("", "epochs60") else LONG

    def switches(self):
        """The epochs at which a curriculum of the plan leaves the denoised run."""
        epochs, switch = self.length()
        others = [early for recipe, early, _ in SEARCH_CURRICULA.values() if recipe == self.recipe]
        if self in ABLATED:
            others = [round(part * epochs) for part in SWITCHES]
        return sorted({switch, *others})

    def pretrain(self, name, *flags):
        seed = "" if self.recipe else f"--seed {self.seed}"
        own = SEARCH[self.recipe] if self.recipe else ""
        return stage("pretrain.py", self.data(), self.noise, seed, *flags, own, f"--out OUT/{name}")

    def probe(self, name, noise="", denoised=False, run=""):
        """The probe of OUT/run, by default OUT/name, on other noise, or on denoised images."""
        denoiser = self.denoiser()
        through = f"--denoised OUT/{denoiser}/images --denoiser OUT/{denoiser}" if denoised else ""
        files = f"--run OUT/{run or name} --out OUT/{name}.json"
        return stage("probe.py", self.data(), noise or self.noise, through, files)

    def denoised_run(self, until):
        """Commands of the denoised run up to an epoch. On its way it stops at every switch and leaves
        its networks there: a run that has gone on cannot go back for them."""
        (epochs, _), images = self.length(), f"OUT/{self.denoiser()}/images"
        flags = f"--source denoised --denoised {images} --epochs {epochs}"
        whole = self.pretrain(self.run("denoised"), flags)
        commands = denoised_copy(self.denoiser())
        commands += [f"{whole} --stop {epoch}" for epoch in self.switches() if epoch <= until]
        if until == epochs:
            commands.append(whole)
        return commands

    def curriculum(self, name, switch, anchor=""):
        """Commands of a curriculum: NC; with the anchor's flags NCT."""
        start = f"OUT/{self.run('denoised')}/epoch{switch}.pth"
        rest = self.length()[0] - switch
        images = f"--denoised OUT/{self.denoiser()}/images" if anchor else ""
        flags = f"--source noisy --epochs {rest} --warmup_epochs 1 --init {start}"
        noisy = self.pretrain(name, flags, images, anchor)
        return [*self.denoised_run(switch), noisy, self.probe(name)]

    def arm(self, arm):
        """Commands of an arm."""
        name, (epochs, switch) = self.run(arm), self.length()
        if arm == "nc":
            return self.curriculum(name, switch)
        if arm == "nct":
            return self.curriculum(name, switch, f"--anchor {ANCHOR}")
        if arm == "denoised":
            return [*self.denoised_run(epochs), self.probe(name, denoised=True)]
        if arm == "pixels":
            return [pixels(name, self.data(), self.noise)]
        if arm == "random":
            return [self.pretrain(name, "--source noisy --epochs 0"), self.probe(name)]
        seen = "none" if arm == "clean" else self.noise  # the upper bound is tested on clean images
        return [self.pretrain(name, f"--source {arm} --epochs {epochs}"), self.probe(name, seen)]


def pixels(name, data, noise):
    return stage("probe.py", data, noise, f"--pixels --out OUT/{name}.json")


ABLATED = (Setting("gauss100"), Setting("gauss255"))


# ==== the plan ====================================================================================
def plan():
    """{name of a run: its commands, the one that makes its figures last}."""
    runs = {}
    for arm, name in itertools.product(SEARCHED, SEARCH):
        setting = Setting("gauss100", recipe=name)
        runs[setting.run(arm)] = setting.arm(arm)
    for name, (recipe, switch, weight) in SEARCH_CURRICULA.items():
        setting, anchor = Setting("gauss100", recipe=recipe), f"--anchor {weight}" if weight else ""
        runs[f"search-{name}"] = setting.curriculum(f"search-{name}", switch, anchor)
    for noise in ("gauss100", "none"):
        runs[f"search-pixels-{noise}"] = [pixels(f"search-pixels-{noise}", "OUT/search", noise)]
    arms = {}  # of each setting
    for noise, seed in itertools.product(("gauss100", "gauss255"), SEEDS):
        shared = {"pixels"} if seed else set()  # it has no seed
        if noise != "gauss100":
            shared.add("clean")  # it sees no noise
        arms[Setting(noise, seed)] = [arm for arm in ARMS if arm not in shared]
    for noise in NOISES:
        arms[Setting(noise)] = ("noisy", "nc", "nct")
    for setting in ABLATED:
        arms[setting._replace(weak="weak-")] = ("nc", "nct")
    for setting, names in arms.items():
        runs |= {setting.run(arm): setting.arm(arm) for arm in names}
    for setting in ABLATED:
        runs |= ablations(setting)
    for seed, arm in itertools.product(SEEDS, ("noisy", "nc", "nct", "denoised")):
        setting = Setting("gauss100", seed=seed)
        run = setting.run(arm)
        name = f"clean-head-{run}"
        runs[name] = [*runs[run][:-1], setting.probe(name, "none", run=run)]
    runs |= {name: [train_denoiser(name)] for name in DENOISERS}
    return runs


def ablations(setting):
    base = setting.base()
    kinds = {"live": (SWITCH, f"--anchor {ANCHOR} --anchor_head live")}
    for epoch in setting.switches():
        if epoch != SWITCH:
            kinds[f"switch{epoch}"] = (epoch, "")
    for weight in ANCHORS:
        kinds[f"anchor{weight}"] = (SWITCH, f"--anchor {weight}")
    names = {f"{base}-{kind}": flags for kind, flags in kinds.items()}
    return {name: setting.curriculum(name, *flags) for name, flags in names.items()}


# ==== running =====================================================================================
def placed(command, args):
    """The words of a command with this machine's folders."""
    folders = {"DATA": args.data, "KODAK": args.kodak, "OUT": args.out}
    words = []
    for word in command.split():
        first, slash, rest = word.partition("/")
        words.append(f"{folders.get(first, first)}{slash}{rest}")
    return words


@functools.cache
def call(*command):
    """Run one stage and show its output; many runs share a stage, which is called once."""
    print("==", *command, flush=True)
    code = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]]).returncode
    if code:
        sys.exit(code)


def make_search(data, out):
    """OUT/search: links to the training images of DATA, every fourth one of a class in val. None to
    DATA/val."""
    part, seen = out.with_suffix(".part"), Counter()
    for path in sorted(Path(data).resolve().glob("train/*/*")):
        seen[path.parent.name] += 1
        split = "val" if seen[path.parent.name] % 4 == 0 else "train"
        link = part / split / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(path)
    part.rename(out)


def run(args, name, commands):
    """Run what is missing of one run; gives its figures."""
    out = Path(args.out)
    if "OUT/search" in " ".join(commands) and not (out / "search").exists():
        make_search(args.data, out / "search")
    for command in commands:
        call(*placed(command, args))
    if name.startswith("denoiser-"):
        seconds = c.read_log(out / name / "log.jsonl")[-1]["seconds"]
        return {"quality": c.read_json(out / name / "quality.json"), "seconds": seconds}
    trained = re.search("--run OUT/(.*) --out", commands[-1])  # or pixels
    return figures(out / f"{name}.json", out / (trained[1] if trained else name))


def figures(result, folder):
    """A probe's result without its settings, and the monitors at the end of pretraining."""
    result = c.read_json(result)
    monitored = [r for r in c.read_log(folder / "log.jsonl") if "entropy" in r]
    for settings in ("config", "pretrain"):
        result.pop(settings, None)
    return {**result, "monitors": monitored[-1] if monitored else {}}


# ==== results =====================================================================================
def read_results(path):
    """{name: result} of experiments.jsonl."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["name"]: result for result in map(json.loads, lines)}


def save(path, name, result):
    """Put one line into experiments.jsonl, in the place of an earlier one of that name. The file is
    whole at any time; runs that end together wait for each other."""
    info = Path("/proc/cpuinfo")
    cpus = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    hardware = f"{torch.get_num_threads()} cores of {(cpus or [platform.machine()])[0]}"
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    about = {"name": name, "date": datetime.date.today().isoformat(), "torch": torch.__version__}
    line = json.dumps({**about, "hardware": hardware, **result})
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    results = read_results(path)
    results[name] = json.loads(line, parse_float=lambda digits: float(f"{float(digits):.6g}"))
    lines = [json.dumps(results[k], separators=(",", ":")) + "\n" for k in sorted(results)]
    c.write_text(path, "".join(lines))
    os.close(lock)


# ==== tables ======================================================================================
PAIRS = (("nc", "noisy"), ("nct", "noisy"), ("nct", "nc"), ("nc", "denoised"), ("nct", "denoised"),
         ("nc", "norestart"))  # compared seed by seed


def columns(result):
    """What the tables show of a probed run."""
    monitors, minutes = result.get("monitors", {}), None
    if "summary" in result:  # not of pixels
        minutes = result["summary"]["seconds"] / 60
    return {
        "linear": result["linear"],
        "linear, clean val": result.get("clean_linear"),
        "20-NN": result["knn"]["20"],
        "20-NN, clean val": result.get("clean_knn", {}).get("20"),
        "cosine to clean": result.get("cosine"),
        "minutes": minutes,
        "effective rank": monitors.get("rank"),
        "teacher entropy": monitors.get("entropy"),
    }


def by_group(results):
    """{group, as patch16-gauss100: {run: {seed: result}}}, the arms first."""
    def order(name):
        arm = name.partition("-seed")[0].rpartition("-")[2]
        return (ARMS.index(arm) if arm in ARMS else len(ARMS), name)

    groups = {}
    for name in sorted(results, key=order):
        run, _, seed = name.partition("-seed")
        kind = "search" if run.startswith("search-") else run.rpartition("-")[0]
        group = groups.setdefault(kind, {})
        group.setdefault(run, {})[seed] = results[name]
    return dict(sorted(groups.items()))


def minus(a, b):
    """What two results differ by, of those figures that are compared."""
    a, b = columns(a), columns(b)
    return {k: a[k] - b[k] for k in list(a)[:5] if a[k] is not None}


def figures_table(rows):
    """Lines of a table: rows {label: columns of each seed}."""
    head = list(next(iter(rows.values()))[0])
    lines = []
    for label, seeds in rows.items():
        cells = []
        for name in head:
            values = [seed.get(name) for seed in seeds]
            cells.append(probe.spread(values, 2 if name == "cosine to clean" else 1))
        lines.append([label, str(len(seeds)), *cells])
    return [*probe.table(["", "seeds", *head], lines), ""]


def group_tables(group, runs):
    """Lines of the table of a group: its runs over seeds; seed 0 of its arms, if runs of seed 0
    alone are to be compared with them; the differences of its arms."""
    rows = {run: [columns(result) for result in seeds.values()] for run, seeds in runs.items()}
    if any("" in seeds for seeds in runs.values()):
        several = [run for run, seeds in runs.items() if len(seeds) > 1]
        rows |= {f"{run}-seed0": [columns(runs[run]["0"])] for run in several if "0" in runs[run]}
    for a, b in PAIRS:
        first, second = runs.get(f"{group}-{a}", {}), runs.get(f"{group}-{b}", {})
        both = [seed for seed in first if seed in second]
        if both:
            rows[f"{group}-{a} minus {b}"] = [minus(first[seed], second[seed]) for seed in both]
    return [f"### {group}", "", *figures_table(rows)]


def sweeps(runs):
    """{run of several seeds: [(strength of the test noise, mean of the linear probe)]}"""
    curves = {}
    for run, seeds in runs.items():
        found = [result["sweep"] for result in seeds.values() if "sweep" in result]
        if len(found) > 1:
            points = zip(*found, strict=True)
            curves[run] = [(p[0]["strength"], mean(seed["linear"] for seed in p)) for p in points]
    return curves


def sweep_table(curves):
    strengths = [f"{strength:g} x" for strength, _ in next(iter(curves.values()))]
    rows = [[run, *(f"{linear:.1f}" for _, linear in curve)] for run, curve in curves.items()]
    head = ["linear probe at other strengths of the test noise", *strengths]
    return [*probe.table(head, rows), ""]


RETRIEVAL = {"map": "mAP", "map_r": "mAP@R", "recall1": "Recall@1", "recall5": "Recall@5", "recall10": "Recall@10"}


def retrieval_table(runs):
    """Lines of a table of retrieval, of those seeds that were probed for it."""
    rows = {}
    for run, seeds in runs.items():
        found = [result for result in seeds.values() if "map_r" in result]
        if found:
            rows[run] = [{label: result[name] for name, label in RETRIEVAL.items()} for result in found]
    if not rows:
        return []
    first, *rest = figures_table(rows)
    return [first.replace("|  |", "| retrieval |", 1), *rest]


def plain_tables(results):
    """Lines of the tables of runs without a probe: denoisers (PSNR in dB) and the like."""
    groups, text = {}, []
    for name, result in results.items():
        figures = {k: v for k, v in result.items() if isinstance(v, float)}
        figures |= result.get("quality", {}) | result.get("images_s", {})
        groups.setdefault(name.partition("-")[0], {})[name] = figures
    for group, rows in groups.items():
        head = list(next(iter(rows.values())))
        lines = [[name, *(f"{row[k]:.2f}" for k in head)] for name, row in rows.items()]
        text += [f"### {group}", "", *probe.table(["", *head], lines), ""]
    return text


def tables(results):
    """(text of experiments.md, panels of robustness.png) of {name: result}."""
    text = ["# Experiments", "", "`python tests/experiments.py` makes this page of experiments.jsonl.",
            "Figures in %, mean ± standard deviation over seeds. A row has the name of its runs.", ""]
    panels = {}
    for mark, title in (("", "The present code"), (OLD, f"Commit {OLD[:-1]}")):
        names = [name for name in results if name.startswith(OLD) == bool(mark)]
        part = {name.removeprefix(mark): results[name] for name in names}
        text += [f"## {title}", ""] if part else []
        probed = {name: result for name, result in part.items() if "knn" in result}
        for group, runs in by_group(probed).items():
            text += group_tables(group, runs) + retrieval_table(runs)
            curves = sweeps(runs)
            if curves:
                text += sweep_table(curves)
                lines = {run.rpartition("-")[2]: curve for run, curve in curves.items()}
                panels[f"{mark}{group}: linear probe in %, by test noise"] = lines
        text += plain_tables({name: part[name] for name in part if name not in probed})
    return "\n".join([*text, "![robustness](robustness.png)"]) + "\n", panels


# ==== main ========================================================================================
def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="folder with train/<class>/ and val/<class>/; without it, tables alone")
    add("--kodak", help="flat folder of clean photographs; without it, no run that needs them")
    add("--out", default="runs/experiments", help="checkpoints and denoised images")
    add("--results", default=str(ROOT / "results"), help="folder of experiments.jsonl and the tables")
    add("--only", nargs="+", default=[], metavar="NAME", help="these runs, with what they need")
    add("--list", action="store_true", help="print the names of all runs")
    return parser.parse_args(argv)


def main():
    args, runs = parse(), plan()
    if args.list:
        return print("\n".join(runs))
    if not args.kodak:
        runs = {name: commands for name, commands in runs.items() if "kodak" not in name}
    for name in args.only:
        if name not in runs or not args.data:
            raise c.UserError(f"--only {name}: no such run (see --list), or no --data or --kodak for it")
    path = Path(args.results) / "experiments.jsonl"
    for name in args.only or runs if args.data else []:
        if name not in read_results(path):
            commands = [f"python {command}" for command in runs[name]]
            save(path, name, {**run(args, name, runs[name]), "commands": commands})
    text, panels = tables(read_results(path))
    c.write_text(path.with_suffix(".md"), text)
    if panels:
        probe.chart(panels).quantize(64).save(path.with_name("robustness.png"))


if __name__ == "__main__":
    c.run(main)
