"""Train one network of the five studies.

    python train.py --lr 0.05 --scheduler linear --model v0

is experiment 3 of the eye-pair study: a linear head on a frozen ResNet-50, on data/odir (or, where that is
missing, on rendered stand-ins, which is said loudly). Writes runs/<name>/ (best.pt, last.pt, run.json,
split.csv, train_results.xlsx, TensorBoard events) and a copy of best.pt here, then prints the best scores."""

import shlex
import sys
import time

from arguments import get_args
from errors import guard


def main(argv=None):
    # Arguments. What imports torch comes after them, so that --help and a wrong flag answer at once.
    started = time.perf_counter()
    args, stored = get_args(argv, __doc__)
    import torch

    import checkpoint
    import dataset
    import engine
    import learner as learning
    import metrics
    import records
    from features import evaluate

    # Device, data, network, run folder
    device = engine.start_processes(engine.pick_device(args.device), args.deterministic)
    precision = engine.pick_precision(args.precision, device)
    with engine.together():
        checkpoint.check_name(args)
    data = dataset.load(args)
    records.print_data(args, data, device, precision)
    learner = learning.build_learner(args, data, precision, device, stored)
    folder, state, lock = records.open_run(args, stored, data, learner)
    if stored and records.is_finished(args, stored, folder):
        print(f"{folder} is finished: {state['epoch']} epochs. To go on, raise --epochs or --patience")
        return
    args.name, writer = folder.name, None
    val_criterion = engine.Criterion(data.task)  # validation loss: no weights, bce whatever --loss says
    if args.bn == "batch" and engine.world() > 1 and device.type != "cuda":
        print("note: a CPU has no synchronised BatchNorm: each process normalises by its own share")

    # Epochs
    before, first = time.perf_counter() - state["seconds"], state["epoch"]
    epochs = engine.progress(range(first, args.epochs), folder.name, initial=first, total=args.epochs)
    try:
        with engine.together():
            if engine.rank() == 0:
                writer = records.RunRecords(folder, args, data, learner, state)
        for epoch in epochs:
            if records.is_over(args, state):
                break
            train_loss, *train_outputs = learner.train_epoch(data.train, epoch)
            lr, network = learner.optimizer.param_groups[-1]["lr"], learner.evaluated()
            engine.share_buffers(learner.model, network)

            # Validation
            val_loss, probs = evaluate(network, learner.features, data.val, val_criterion)
            engine.check_finite(val_loss, epoch)
            scores = metrics.scores(data.family, data.val.targets, probs, data.labels, ordered=data.ordered)
            own = metrics.scores(data.family, *train_outputs, data.labels, ordered=data.ordered)
            row = {"epoch": epoch, "lr": lr, "train_loss": train_loss, "val_loss": val_loss}
            for part, found in (("train", own), ("val", scores)):
                row |= {f"{part}_{'final_score' if key == 'final' else key}": found[key] for key in found}
            state["history"].append(row)
            learning.step_scheduler(args, learner.scheduler, val_loss)

            # Best epoch, files
            better = state["best"] is None or val_loss < state["best"]["loss"]
            state["stale"] = 0 if better else state["stale"] + 1
            kept = better or args.keep == "last"
            if kept:
                best = {"epoch": epoch, "loss": val_loss, "scores": scores, "thresholds": None}
                best |= {"probs": torch.from_numpy(probs), "weights": learner.kept_weights()}
                if args.calibration_fraction:
                    _, answers = evaluate(network, learner.features, data.calibration, val_criterion)
                    thresholds = metrics.learned_thresholds(data.calibration.targets, answers)
                    best["thresholds"] = thresholds.tolist()
                state["best"] = best
            state["epoch"], state["seconds"] = epoch + 1, time.perf_counter() - before
            with engine.together():
                if writer:
                    epochs.clear()  # the bar gives way to the epoch's line
                    writer.epoch(kept)

        # Thresholds, learned on the training patients alone; the last files
        if not args.calibration_fraction:
            state["best"]["thresholds"] = None  # a resume without --folds has none
        if args.folds:
            probs = learning.out_of_fold(args, data, learner, state["best"]["epoch"] + 1)
            state["best"]["thresholds"] = metrics.learned_thresholds(data.train.targets, probs).tolist()
        epochs.close()
        if writer:
            writer.end(time.perf_counter() - started)
    except (KeyboardInterrupt, FloatingPointError, RuntimeError) as stop:
        # last.pt holds the last whole epoch that was written. After a signal guard says how to go on.
        if writer:
            writer.interrupted()
        if (folder / "last.pt").exists():
            stop.go_on = shlex.join(["python", "train.py", "--resume", str(folder)])
        raise


if __name__ == "__main__":
    sys.exit(guard(main))
