"""The flags of train.py: the published defaults, the rules, and what the experiments of run_all.sh set.
Imports neither torch nor pandas, so that --help and a wrong flag answer at once."""

import argparse
import re
import shlex
import string
import sys
from pathlib import Path

from errors import InputError, Parser

# data set -> what it changes in the defaults below: each study as it was published
PUBLISHED = {
    "odir": {},
    "aptos": dict(model="efficientnet-b1", optimizer="adam", lr=0.01, scheduler="step", batch=30, epochs=50)
    | dict(patience=50, preprocess="none", fine_tune=True, sampler="weighted"),
    "dr": dict(model="resnet18", lr=0.001, weight_decay=5e-4, scheduler="none", batch=64, epochs=25)
    | dict(patience=25, fine_tune=True, freeze_epochs=5, drop_last=True)
    | dict(preprocess="centre", size=256, crop=224, augment="lab"),
    "retina": dict(model="alexnet", optimizer="adam", lr=0.001, scheduler="none", epochs=50)
    | dict(fine_tune=True, weights="none"),  # published: network, optimiser and loss alone
    "mrnet": dict(model="mrnet", optimizer="adam", lr=1e-5, weight_decay=0.01, scheduler="plateau", batch=1)
    | dict(epochs=50, patience=50, fine_tune=True, augment="knee", weighted_loss=True, preprocess="crop"),
}
# schedule or optimiser -> its own flags and what they are where they are not given
SCHEDULES = {
    "none": {},
    "linear": dict(schedule_epochs=50, gamma=0.1),
    "cyclic": dict(schedule_epochs=10, max_lr=0.1),
    "step": dict(schedule_epochs=1, gamma=0.7),
    "plateau": dict(schedule_epochs=3, gamma=0.3),
    "cosine": dict(warmup_epochs=1.0),
}
OPTIMIZERS = {"sgd": dict(momentum=0.9), "adam": {}, "adamw": {}}
EYE_MODELS = ("v0", "v1", "v2", "v3")
# If a resume changes one of these, the schedule is as if it had been so from the start.
SCHEDULE_FLAGS = ("lr", "momentum", "weight_decay", "schedule_epochs", "gamma", "max_lr", "warmup_epochs")
MACHINE = ("device", "precision", "workers", "compile", "deterministic", "feature_cache", "cache")
# A resumed run keeps all others: most decide shapes, rows, or what optimiser and schedule hold.
RESUMABLE = {*SCHEDULE_FLAGS, *MACHINE, *"resume epochs patience folds data missing duplicates".split()}
WHERE = [*MACHINE, "seed", "name", "resume", "runs", "data"]  # all else is equal in one experiment's runs
LEAST = dict(size=16, batch=1, epochs=1, patience=1, freeze_epochs=0, views=0, seed=0, split_seed=0, lr=1e-12)
LEAST |= dict(max_lr=1e-12, weight_decay=0, momentum=0, min_confidence=0, schedule_epochs=1, workers=0)
LEAST |= dict(warmup_epochs=0, trunk_lr=0, ema=0, folds=0, weight_power=0, calibration_fraction=0, gamma=1e-6)
MOST = dict(momentum=1, min_confidence=1, ema=0.99999, calibration_fraction=0.5, gamma=0.999999, size=4096)


def add_machine_flags(add, precision=None):
    """Flags of every script with a network, by its parser's `add_argument`; `precision`: the default."""
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where it runs")
    text = "auto: the fastest native one" if precision else "default: what the run was asked to use"
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default=precision, help=text)
    add("--workers", type=int, help="processes that read pictures (default: all cores, at most 16)")


def add_checkpoint_flags(parser, out):
    """Flags of scripts that ask a trained network about a data set; `out`: what goes into --out."""
    add = parser.add_argument
    add("--data", help="another folder of the same layout (default: the one that was trained on)")
    add("--missing", choices=["stop", "drop"], help="rows without a picture (default: as in the run)")
    add("--out", type=Path, help=f"folder for {out} (default: in the run's folder)")
    add("--cache", default="cache", help="folder of kept pictures and features")
    add_machine_flags(add)


def get_args_parser(dataset="odir", description=None):
    parser = Parser(description, usage="python train.py [--flag value ...]")
    yes_no = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=PUBLISHED, default="odir", help="data set; sets the published defaults below")
    add("--data", help="its folder (default: data/<dataset>, else rendered stand-ins)")
    add("--missing", choices=["stop", "drop"], default="stop", help="missing pictures: stop, or drop the row")
    add("--duplicates", choices=["stop", "keep"], default="stop", help="pictures in training and validation")
    add("--labels", nargs="+", help="retina, mrnet: which labels (default: the study's)")
    add("--val-fraction", type=float, help="validation patients (published: 0.2; aptos 733/3662)")
    add("--test-fraction", type=float, help="patients kept away (published: 0; aptos 583/3662)")
    add("--split-seed", type=int, default=42, help="seed of the split (write-up)")
    add("--shuffle-labels", action="store_true", help="control: the training patients' labels, shuffled")
    add("--pseudo-labels", metavar="FILE", help="retina: spread_labels.py's CSV joins the training part")
    add("--min-confidence", type=float, default=0.0, help="least confidence of a pseudo-label")
    add = parser.add_argument_group("pictures").add_argument
    text = "fov: the eye alone (write-up); none: scaled; centre: shorter side, then crop; crop: of knees"
    add("--preprocess", choices=["fov", "none", "centre", "crop"], default="fov", help=text)
    add("--size", type=int, default=224, help="pixels a side after --preprocess (write-up)")
    add("--crop", type=int, help="pixels a side of a random crop in training; evaluation resizes to it")
    text = "eyes: experiments 8, 9; pair: 14-17; lab: dr; knee: mrnet"
    add("--augment", choices=["none", "eyes", "pair", "lab", "knee"], default="none", help=text)
    add("--views", type=int, default=0, help="cycle through N random views; 0: fresh ones (write-up)")
    add = parser.add_argument_group("network").add_argument
    text = "v0 to v3: both eyes; mrnet; alexnet, efficientnet-b1, efficientnet-lite0 or torchvision's name"
    add("--model", default="v0", help=text)
    add("--trunk", default="resnet50", help="of v0 to v3 (write-up: resnet50), named as --model's networks")
    add("--weights", default="imagenet", help="imagenet (write-up), none, IMAGENET1K_V1 and such, or a file")
    add("--fine-tune", action=yes_no, default=False, help="train the trunk too (13-17, the other studies)")
    add("--freeze-epochs", type=int, default=0, help="of --fine-tune: the head alone first (dr lab: 5)")
    text = "BatchNorm (default: fitted once for resnet50, pretrained for other trunks, batch if fine-tuned)"
    add("--bn", choices=["fitted", "pretrained", "batch"], help=text)
    add = parser.add_argument_group("optimisation").add_argument
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="(write-up)")
    add("--lr", type=float, default=0.05, help="learning rate (experiment 3); cyclic: lower end")
    add("--trunk-lr", type=float, default=1.0, help="of --fine-tune: the trunk's share of --lr")
    add("--momentum", type=float, help="of sgd (write-up: 0.9); --scheduler cyclic moves it, 0.8 to 0.9")
    add("--weight-decay", type=float, default=0.0, help="(write-up: none)")
    add("--scheduler", choices=SCHEDULES, default="linear", help="steps by epoch; cosine: by batch")
    add("--schedule-epochs", type=int, help="linear: over 50; cyclic: up in 10; step: 1; plateau: wait 3")
    add("--gamma", type=float, help="factor: linear (0.1), step (0.7), plateau (0.3)")
    add("--max-lr", type=float, help="cyclic: upper end (experiment 4: 0.1)")
    add("--warmup-epochs", type=float, help="cosine: the rate rises this long (default: 1)")
    add("--batch", type=int, default=32, help="rows of one step, all processes (write-up)")
    add("--epochs", type=int, default=100, help="at most (write-up)")
    add("--patience", type=int, default=20, help="epochs without a lower validation loss; not of --keep last")
    add("--keep", choices=["best", "last"], default="best", help="best: lowest validation loss (write-up)")
    add("--ema", type=float, default=0.0, help="decay of averaged weights, validated and kept; 0: none")
    add("--loss", choices=["bce", "asymmetric"], default="bce", help="of several labels (write-up: bce)")
    add("--weighted-loss", action=yes_no, default=False, help="pos_weight or class weights (experiment 11)")
    add("--weight-power", type=float, default=1.0, help="exponent of these weights; below 1: softer")
    add("--sampler", choices=["shuffle", "balanced", "weighted"], default="shuffle", help="(experiment 12)")
    add("--drop-last", action=yes_no, default=False, help="leave out a short last batch (dr lab)")
    add = parser.add_argument_group("thresholds, learned on training patients").add_argument
    add("--folds", type=int, default=0, help="of a frozen trunk: this many parts, each left out once")
    add("--calibration-fraction", type=float, default=0.0, help="of --fine-tune: patients no gradient sees")
    add = parser.add_argument_group("machine").add_argument
    add_machine_flags(add, "auto")
    add("--compile", action=yes_no, default=False, help="torch.compile; pays off in long runs")
    add("--deterministic", action=yes_no, default=False, help="the same bits on a GPU too; slower there")
    add("--feature-cache", action=yes_no, default=True, help="keep a frozen trunk's features on disk")
    add("--cache", default="cache", help="folder of kept pictures and features")
    add = parser.add_argument_group("run").add_argument
    add("--runs", default="runs", help="folder of the run folders")
    add("--name", help="of the run folder (default: a number)")
    add("--resume", metavar="RUN", help="go on with runs/<name>; --epochs, --lr and such may change")
    add("--seed", type=int, default=42, help="of weights, order, dropout, views (write-up)")
    parser.set_defaults(**PUBLISHED[dataset])
    return parser


def get_args(argv=None, description=None):
    """-> (args, what last.pt holds or None): what is typed, over a resumed run's flags, over the study's."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default="odir")
    first.add_argument("--resume")
    asked, state = first.parse_known_args(argv)[0], None
    parser = get_args_parser(asked.dataset if asked.dataset in PUBLISHED else "odir", description)
    if asked.resume:
        import checkpoint  # here, because it imports torch

        state = checkpoint.load_last(asked.resume)
        parser.set_defaults(**state["args"])
    args = parser.parse_args(argv)
    if state:
        compare_with_stored(args, state)
    check_args(args)
    # What depends on other flags gets its value here, so that run.json says what was used.
    for name, value in (SCHEDULES[args.scheduler] | OPTIMIZERS[args.optimizer]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.bn is None:
        published = (args.trunk if args.model in EYE_MODELS else args.model) == "resnet50"
        frozen = "fitted" if published else "pretrained"  # better for other trunks (docs/results.md)
        args.bn = "batch" if args.fine_tune else frozen
    return args, state


def compare_with_stored(args, state):
    """Refuse to change what a resumed run keeps; a changed schedule is told in run.json and the report."""
    stored = state["args"]
    changed = [name for name in vars(args) if getattr(args, name) != stored.get(name, getattr(args, name))]
    if refused := [name for name in changed if name not in RESUMABLE]:
        kept = ", ".join(f"--{name.replace('_', '-')} {stored[name]}" for name in refused)
        raise InputError(f"a resumed run keeps its {kept}: start a new run to change it")
    if args.epochs < state["epoch"] or args.patience < stored["patience"]:
        had = f"--epochs {state['epoch']} --patience {stored['patience']}"
        raise InputError(f"--epochs {args.epochs} --patience {args.patience}: expected {had} or more")
    for name in changed:  # the cosine schedule falls to zero at the last epoch
        if name in SCHEDULE_FLAGS or name == "epochs" and args.scheduler == "cosine":
            state["changes"].append(f"{name} was {stored[name]} for {state['epoch']} epochs")


def check_args(args):
    """Flags that do not go together are refused, not ignored."""
    for name, least in LEAST.items():
        value, most = getattr(args, name), MOST.get(name, sys.float_info.max)
        if value is not None and not least <= value <= most:
            asked = f"{least:g} to {most:g}" if name in MOST else f"{least:g} or more"
            memory = f" ({3 * value**2 / 1e9:.3g} GB a picture)" if name == "size" else ""
            raise InputError(f"--{name.replace('_', '-')} {value}{memory}: expected {asked}")
    name, model, knees = args.dataset, args.model, args.dataset == "mrnet"
    if args.labels and len(set(args.labels)) < len(args.labels):
        raise InputError(f"--labels {' '.join(args.labels)}: a label is named twice")
    if args.pseudo_labels and name != "retina" or args.min_confidence and not args.pseudo_labels:
        raise InputError("--pseudo-labels belongs to --dataset retina, --min-confidence to --pseudo-labels")
    if args.crop and (args.augment == "none" or knees or not 16 <= args.crop <= args.size):
        raise InputError(f"--crop {args.crop} needs --augment and a --size ({args.size}) that it fits into")
    recipes = {"odir": ("none", "eyes", "pair"), "mrnet": ("none", "knee")}.get(name, ("none", "eyes", "lab"))
    kinds = ("crop", "none") if knees else ("fov", "none", "centre")
    for flag, allowed in (("augment", recipes), ("preprocess", kinds)):
        if getattr(args, flag) not in allowed:
            raise InputError(f"--{flag} {getattr(args, flag)}: {name} takes {' or '.join(allowed)}")
    if args.views and args.augment == "none":
        raise InputError("--views needs --augment: without it every epoch sees the same pictures")
    if knees and not 64 <= args.size <= (256 if args.preprocess == "crop" else 4096):
        raise InputError(f"--size {args.size}: expected 64 (for AlexNet) to 256 (MRNet's slices)")
    if (name == "odir") != (model in EYE_MODELS) or knees != (model == "mrnet"):
        takes = {"odir": "v0, v1, v2 or v3", "mrnet": "mrnet"}.get(name, "a network for one photograph")
        raise InputError(f"--model {model} does not take {name}; expected {takes}")
    if args.trunk != "resnet50" and model not in EYE_MODELS:
        raise InputError(f"--trunk belongs to --model v0 to v3: give --model {args.trunk}")
    if not args.fine_tune and (args.freeze_epochs or args.trunk_lr != 1):
        raise InputError("--freeze-epochs, --trunk-lr: without --fine-tune the trunk does not learn")
    kept_features = args.feature_cache and not args.fine_tune and args.bn != "batch"
    possible = args.folds > 1 and kept_features and args.dataset == "odir" and not args.calibration_fraction
    if args.folds and not possible:
        raise InputError("--folds needs 2 or more, and kept features of eye pairs; or --calibration-fraction")
    theirs = SCHEDULES[args.scheduler] | OPTIMIZERS[args.optimizer]
    for name in ("schedule_epochs", "gamma", "max_lr", "warmup_epochs", "momentum"):
        if getattr(args, name) is not None and name not in theirs:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: not with --scheduler {args.scheduler} --optimizer {args.optimizer}")
    high = args.max_lr or SCHEDULES["cyclic"]["max_lr"]
    if args.scheduler == "cyclic" and (args.lr >= high or args.trunk_lr != 1):
        raise InputError(f"cyclic: expected --lr {args.lr} below --max-lr {high}, and no --trunk-lr")
    if args.warmup_epochs is not None and args.warmup_epochs > args.epochs:
        raise InputError(f"--warmup-epochs {args.warmup_epochs:g}: expected --epochs {args.epochs} or less")
    one_class = args.dataset not in ("odir", "mrnet")
    if one_class and (args.folds or args.calibration_fraction or args.loss != "bce"):
        raise InputError(f"{args.dataset} has one class a picture: no thresholds to learn, --loss bce alone")
    if args.sampler == "weighted" and not one_class:
        raise InputError(f"--sampler weighted needs one class a picture; for {args.dataset} use balanced")
    if args.weighted_loss and args.loss == "asymmetric" or args.weight_power != 1 and not args.weighted_loss:
        raise InputError("--weighted-loss: --weight-power needs it; not with --loss asymmetric, which weighs")


def experiments():
    """{name: its flags as parsed} of every line `run NAME FLAGS` of run_all.sh."""
    values, found = {"prefix": ""}, {}
    for line in Path(__file__).with_name("run_all.sh").read_text().splitlines():
        line = string.Template(line).safe_substitute(values)
        if setting := re.fullmatch(r'(\w+)="([^"]*)"', line):
            values[setting[1]] = setting[2]
        if line.startswith("run "):
            name, *flags = shlex.split(line, comments=True)[1:]
            found[name] = get_args(["--dataset", name.split("-")[0], *flags])[0]
    return found


def run_file(path, demo):
    """(run folder, file) of a path, the folder without what run_all.sh adds for --seeds and --demo."""
    path = Path(str(path))
    folder = re.sub(r"-seed\d+$", "", path.parent.name)
    return folder.removeprefix("demo-") if demo else folder, path.name


def differences(args, line):
    """What a run's arguments (a dict) have other than an experiment's line: ["lr 0.5 not 0.05", ...]."""
    told, demo = [], str(args.get("name")).startswith("demo-")
    for name, asked in vars(line).items():
        used = args.get(name, asked)
        same = "/" in str(asked) and run_file(used, demo) == run_file(asked, demo)  # in any --runs
        if used != asked and not same and name not in WHERE:
            told.append(f"{name.replace('_', ' ')} {used} not {asked}")
    return told
