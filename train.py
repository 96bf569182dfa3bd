"""Train one network of the five studies.

    python train.py --lr 0.05 --scheduler linear --model v0

is experiment 3 of the eye-pair study: a linear head on a frozen ResNet-50, on data/odir (or, where that is
missing, on rendered stand-ins, which is said loudly). Writes runs/<name>/ (best.pt, last.pt, run.json,
split.csv, train_results.xlsx, TensorBoard events) and a copy of best.pt here. The last line has the best
epoch's scores.
"""

import functools
import sys
import time

from arguments import get_args
from errors import guard


def main(argv=None):
    # Arguments. What imports torch comes after them, so that --help and a wrong flag answer at once.
    started = time.time()
    args, stored = get_args(argv, __doc__)
    import torch

    import augment
    import checkpoint
    import dataset
    import engine
    import learner as learning
    import metrics
    import records
    from features import evaluate, loader_workers, training_data

    # Device, data, network, run folder
    device = engine.start_processes(engine.pick_device(args.device), args.deterministic)
    precision = engine.pick_precision(args.precision, device, args.model)
    checkpoint.check_name(args)
    data = dataset.load(args)
    records.print_data(args, data, device, precision)
    learner = learning.build_learner(args, data, precision, device)
    folder, state = records.open_run(args, stored, data, learner)
    if stored and records.is_over(args, state) and checkpoint.run_facts(folder).get("status") == "finished":
        print(
            f"{folder} is finished: {state['epoch']} epochs, {state['stale']} of them since the best. To go on, raise"
        )
        print("--epochs or --patience")
        return 0
    args.name = folder.name
    writer = records.RunRecords(folder, args, data, learner, state) if engine.rank() == 0 else None
    val_criterion = engine.Criterion(data.task)  # validation loss stays unweighted
    size = args.crop or args.size
    prepare = functools.partial(augment.prepare_batch, device=device, recipe=args.augment, size=size)
    if args.bn == "batch" and engine.world() > 1 and device.type != "cuda":
        print(
            "BatchNorm moves, and a CPU has no synchronised BatchNorm: each process normalises by its own share"
        )

    # Epochs
    before = time.time() - state["seconds"]
    epochs = engine.progress(
        range(state["epoch"], args.epochs), folder.name, initial=state["epoch"], total=args.epochs
    )
    try:
        for epoch in epochs:
            if records.is_over(args, state):
                break
            frozen = not args.fine_tune or epoch < args.freeze_epochs
            learner.model.backbone.requires_grad_(not frozen)
            batches = learning.epoch_batches(args, data.train.targets, epoch)
            rows, module, mode = training_data(args, learner, data.train, epoch, batches)
            engine.train_mode(module, hold_batchnorm=args.bn != "batch")
            module = learner.distributed(module, frozen, args.compile)
            loader = engine.make_loader(rows, batches, loader_workers(args, device, rows), device)
            train_loss, *train_outputs = engine.train_one_epoch(module, loader, prepare, learner, epoch, mode)
            lr = learner.optimizer.param_groups[-1]["lr"]
            engine.share_buffers(learner.model)

            # Validation
            network = learner.evaluated()
            val_loss, probs = evaluate(
                args, network, learner.features, data.val, val_criterion, precision, device
            )
            engine.check_finite(val_loss, epoch)
            scores = metrics.scores(data.family, data.val.targets, probs, data.labels, ordered=data.ordered)
            own = metrics.scores(data.family, *train_outputs, data.labels, ordered=data.ordered)
            state["history"].append(records.history_row(epoch, lr, train_loss, val_loss, own, scores))
            learning.step_scheduler(args, learner.scheduler, val_loss)

            # Best epoch, files
            better = state["best"] is None or val_loss < state["best"]["loss"]
            state["stale"] = 0 if better else state["stale"] + 1
            kept = better or args.keep == "last"
            if kept:
                head = checkpoint.cpu_state(network.classifier, copy=True) if learner.trunk else None
                found = {
                    "epoch": epoch,
                    "loss": val_loss,
                    "scores": scores,
                    "classifier": head,
                    "thresholds": None,
                }
                state["best"] = {**found, "probs": torch.from_numpy(probs)}
                if args.calibration_fraction:
                    part = data.parts["calibration"]
                    seen = evaluate(args, network, learner.features, part, val_criterion, precision, device)[
                        1
                    ]
                    state["best"]["thresholds"] = metrics.learned_thresholds(part.targets, seen).tolist()
            state["epoch"], state["seconds"] = epoch + 1, time.time() - before
            if writer:
                epochs.set_postfix_str(writer.epoch(kept, silent=not epochs.disable))

        # Thresholds, learned on the training patients alone
        if args.folds:
            kept_after = state["best"]["epoch"] + 1
            state["best"]["thresholds"] = learning.learn_thresholds(args, data, learner, kept_after)
    except KeyboardInterrupt as stop:  # Ctrl-C or SIGTERM: last.pt holds the last whole epoch
        if writer:
            writer.interrupted()
        raise stop
    epochs.close()
    if writer:
        writer.end(time.time() - started)
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
