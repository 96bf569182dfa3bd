"""Every picture this repository draws: arrays in, a matplotlib Figure out.

    figures.roc(y_true, y_prob, labels, "multilabel").savefig("roc.png", dpi=120)

Built without pyplot: nothing global is touched, no screen is needed. Okabe-Ito and viridis suit the colour-blind.
"""

import math
import textwrap

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from metrics import confusion_matrix

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#333333")  # Okabe-Ito without its yellow
LINES = [{"color": colour, "ls": style, "lw": 1.6} for style in ("-", "--", "-.", ":") for colour in COLOURS]
SHARES = LinearSegmentedColormap.from_list("shares", ("#FFFFFF", "#0072B2"))


def plain(text, width=60):
    """`text` wrapped and as it stands: a `$` in a label would otherwise start a formula, and an odd one would raise."""
    return textwrap.fill(str(text), width).replace("$", r"\$")


def mark_rendered(fig, text="RENDERED stand-ins, not patients"):
    """Say over a figure what is drawn and not real about it; returns it."""
    fig.suptitle(text, color="#A84300", fontsize=10, weight="bold")
    return fig


def tidy(ax, epochs=False):
    ax.spines[["top", "right"]].set_visible(False)
    if epochs:
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)


def draw_matrix(ax, counts, names, title, text="{count}"):
    """A confusion matrix (K, K) of counts into `ax`, coloured by the share of its row; `text` goes into a cell."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # a class that nobody has stays an empty row
    ax.imshow(shares, cmap=SHARES, vmin=0, vmax=1)
    for i, j in np.ndindex(counts.shape):
        ax.text(j, i, text.format(count=counts[i, j], share=shares[i, j]), ha="center", va="center", fontsize=9,
                color="white" if shares[i, j] > 0.6 else "black")
    turn = {"rotation": 35, "ha": "right"} if len(names) > 2 and max(map(len, names)) > 4 else {}
    ax.set_xticks(range(len(names)), [plain(name, 14) for name in names], fontsize=8, **turn)
    ax.set_yticks(range(len(names)), [plain(name, 14) for name in names], fontsize=8)
    ax.set(xlabel="predicted", ylabel="true", title=plain(title, 22))


def confusion(y_true, y_prob, labels, task, threshold=0.5):
    """Confusion matrices. multilabel: y_true 0/1 and y_prob (n, L), one 2 x 2 matrix per label at `prob > threshold`,
    counts with the share of their row. multiclass: y_true (n,), y_prob (n, K), counts beside row-normalised."""
    y_true, y_prob = np.asarray(y_true), np.asarray(y_prob)
    if task == "multiclass":
        counts = confusion_matrix(y_true, y_prob.argmax(1), len(labels))
        side = max(3.4, 0.75 * len(labels) + 1)
        fig = Figure((2 * side, side), layout="constrained")
        draw_matrix(fig.add_subplot(1, 2, 1), counts, labels, "counts")
        draw_matrix(fig.add_subplot(1, 2, 2), counts, labels, "share of the true class", "{share:.2f}")
        return fig
    columns, rows = min(4, len(labels)), math.ceil(len(labels) / 4)
    fig = Figure((2.3 * columns + 0.6, 2.9 * rows + 0.2), layout="constrained")
    fig.get_layout_engine().set(h_pad=0.12)  # inches
    for k, label in enumerate(labels):
        counts = confusion_matrix(y_true[:, k].astype(int), (y_prob[:, k] > threshold).astype(int), 2)
        draw_matrix(fig.add_subplot(rows, columns, k + 1), counts, ("no", "yes"), label, "{count}\n{share:.0%}")
    return fig


def roc(y_true, y_prob, labels, task):
    """A panel with the ROC curve of each label (multiclass: of each class against the rest), its AUC in the title; shapes
    as in `confusion`. A label with one class only has no curve, and an undefined AUC."""
    from sklearn.metrics import auc, roc_curve  # here, because training draws no ROC curve and starts a second sooner
    y_true = np.asarray(y_true) if task == "multilabel" else np.asarray(y_true)[:, None] == np.arange(len(labels))
    columns, rows = min(4, len(labels)), math.ceil(len(labels) / 4)
    fig = Figure((2.3 * columns + 0.6, 2.9 * rows + 0.2), layout="constrained")
    fig.get_layout_engine().set(h_pad=0.12)  # inches
    for k, label in enumerate(labels):
        ax, found = fig.add_subplot(rows, columns, k + 1), "AUC undefined"
        ax.plot([0, 1], [0, 1], color="#999999", lw=0.8, ls=":")
        if len(np.unique(y_true[:, k])) == 2:
            fpr, tpr, _ = roc_curve(y_true[:, k], np.asarray(y_prob)[:, k])
            ax.plot(fpr, tpr, color=COLOURS[0], lw=1.6)
            found = f"AUC {auc(fpr, tpr):.3f}"
        ax.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect=1)
        ax.set_title(f"{plain(label, 22)}\n{found}", fontsize=10)
        tidy(ax)
    return fig


def show(ax, picture, cam=None, title="", place=None):
    """A picture uint8 (H, W) or (H, W, 3) into `ax`; over it a class-activation map (h, w) in 0..1 of any size.
    `place` (left, top, side): where in an axes that holds several; without it the axes is the picture's own."""
    height, width = picture.shape[:2]
    left, top, side = place or (-0.5, -0.5, max(height, width))
    extent = (left, left + side * width / max(height, width), top + side * height / max(height, width), top)
    ax.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=extent)
    if cam is not None:
        ax.imshow(cam, cmap="viridis", vmin=0, vmax=1, alpha=0.1 + 0.5 * np.clip(cam, 0, 1), interpolation="bilinear", extent=extent)
        if title and not np.any(cam):
            title += " (no evidence)"
    if place:
        ax.text((left + extent[1]) / 2, top - 0.04, plain(title, 20), ha="center", va="bottom", fontsize=9)
    else:
        ax.set_title(plain(title, 20), fontsize=9)
    ax.axis("off")


def samples(rows):
    """Sample patients. rows: dicts {"title", "pictures": [uint8 (H, W, 3), ...], "truth": [label, ...], "prediction":
    [(label, prob), ...]}; `prediction` holds the labels that were predicted, not all of them."""
    planes = max(len(row["pictures"]) for row in rows)
    columns = 1 if planes > 2 or len(rows) < 2 else 2
    height = math.ceil(len(rows) / columns)
    fig = Figure((columns * (1.6 * planes + 2.3), 1.75 * height), layout="constrained")
    axes = fig.subplots(height, columns * (planes + 1), squeeze=False, width_ratios=([1.6] * planes + [2.3]) * columns)
    for ax in axes.flat:
        ax.axis("off")
    for (*panels, words), row in zip(axes.reshape(-1, planes + 1), rows, strict=False):  # the last place may stay empty
        for ax, picture in zip(panels, row["pictures"], strict=False):
            show(ax, picture)
        truth, predicted = row["truth"], [label for label, _ in row["prediction"]]
        verdict, colour = (("✓ right", "#00694D") if set(truth) == set(predicted) else
                           ("◐ partly right", "#5A4A00") if set(truth) & set(predicted) else ("✗ wrong", "#A84300"))
        lines = [f"truth: {', '.join(truth) or 'none'}", f"predicted: {'' if predicted else 'none'}",
                 *(f"{'✓' if label in truth else '✗'} {label}  {prob:.2f}" for label, prob in row["prediction"]),
                 *(f"– missed: {label}" for label in truth if label not in predicted)]
        head, body = f"{plain(row['title'], 30)}\n{verdict}", "\n".join(plain(line, 32) for line in lines)
        words.text(0, 1, head, va="top", fontsize=9, weight="bold", color=colour, linespacing=1.4)
        words.text(0, 0.83 - 0.13 * head.count("\n"), body, va="top", fontsize=8, linespacing=1.25)
    return fig


def heatmaps(picture_list, cams, titles):
    """Pictures with their class-activation maps: a row per picture, the original first, then every class.

    picture_list: P pictures uint8 (H, W, 3). cams: cams[p][k] float (h, w) in 0..1, of any size. titles: K strings over
    the columns, or P lists of 1 + K strings (the picture's name first) when the rows are different patients."""
    rows, columns = len(picture_list), 1 + len(cams[0])
    if isinstance(titles[0], str):
        titles = [["picture", *titles]] + [[""] * columns] * (rows - 1)
    height = 2.1 * rows + 0.6  # inches: a line of words above and one below
    fig = Figure((1.75 * columns, height))
    fig.text(0.01, 0.08 / height, "[label]: true. No evidence: nothing in the picture speaks for it.", fontsize=8, color="#555555")
    ax = fig.add_axes((0, 0.3 / height, 1, 2.1 * rows / height))  # one for all: a hundred axes would take seconds
    for i, (picture, maps, names) in enumerate(zip(picture_list, cams, titles, strict=True)):
        for j, (cam, name) in enumerate(zip([None, *maps], names, strict=True)):
            show(ax, picture, cam, name, (1.75 * j + 0.05, 2.1 * i + 0.4, 1.65))
    ax.set(xlim=(0, 1.75 * columns), ylim=(2.1 * rows, 0), aspect="equal")
    return fig


def prediction(pictures, cams, labels, probs, threshold, note):
    """One patient's answer: pictures (uint8), the heat maps of the three strongest labels, a bar per label with the
    threshold's line (None for exclusive classes: the strongest is the answer), `note` below. cams as in `heatmaps`."""
    probs = np.asarray(probs, dtype=float)
    strongest = np.argsort(-probs, kind="stable")[:3]
    width = 1.9 * (1 + len(strongest))  # inches
    fig = Figure((width + 4.2, max(2.1 * len(pictures), 0.34 * len(labels) + 0.9) + 0.5), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=(width, 4.2))
    for p, line in enumerate(left.subplots(len(pictures), 1 + len(strongest), squeeze=False)):
        show(line[0], pictures[p], title="picture" if p == 0 else "")
        for ax, k in zip(line[1:], strongest, strict=True):
            show(ax, pictures[p], cams[p][k], f"{labels[k]}  {probs[k]:.2f}" if p == 0 else "")
    ax = right.subplots()
    yes = np.arange(len(probs)) == probs.argmax() if threshold is None else probs > threshold
    ax.barh(range(len(labels)), probs, color=["#D55E00" if y else "#B8C4CC" for y in yes], height=0.66)
    for k, prob in enumerate(probs):
        ax.text(prob + 0.015, k, f"{prob:.2f}{'  ◀' if yes[k] else ''}", va="center", fontsize=9,
                color="#A84300" if yes[k] else "black", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    title = "strongest class" if threshold is None else f"above the threshold {threshold:g} (dashed)"
    if threshold is not None:
        ax.axvline(threshold, color="#333333", ls="--", lw=1, zorder=0.5)
    ax.set_yticks(range(len(labels)), [plain(label, 20) for label in labels], fontsize=9)
    ax.set(xlim=(0, 1.2), xticks=(0, 0.25, 0.5, 0.75, 1), ylim=(max(len(labels), 4) - 0.4, -0.6), xlabel="probability")
    ax.set_title(f"◀ {title}", fontsize=9, loc="left")
    tidy(ax)
    fig.supxlabel(plain(note, 120), fontsize=9, color="#555555")
    return fig


def curves(history):
    """One run: loss, scores and learning rate over the epochs; `history` is the DataFrame of train_results.xlsx.
    Training is dashed, validation solid; the dotted upright marks the lowest validation loss."""
    fig = Figure((10, 3.6), layout="constrained")
    axes = fig.subplots(1, 3, width_ratios=(1, 1.15, 0.85))
    scores = [column.removeprefix("val_") for column in history if column.startswith("val_") and column != "val_loss"]
    for ax, columns in zip(axes, (["loss"], scores), strict=False):
        for k, column in enumerate(columns):
            ax.plot(history["epoch"], history[f"val_{column}"], ".-", ms=3, color=COLOURS[k % 7], label=plain(column))
            ax.plot(history["epoch"], history[f"train_{column}"], ".--", ms=1, lw=0.9, color=COLOURS[k % 7])
    axes[1].legend(frameon=False, fontsize=8)
    axes[2].plot(history["epoch"], history["lr"], ".-", ms=3, color=COLOURS[6])
    for ax, title in zip(axes, ("loss", "scores", "learning rate"), strict=True):
        ax.set_title(title + " (dashed: train)" * (ax is not axes[2]), fontsize=10)
        tidy(ax, epochs=True)
        ax.axvline(history["epoch"][history["val_loss"].idxmin()], color="#999999", ls=":", lw=1)
    return fig


def compare_curves(histories, columns):
    """All runs of a study in one picture: {name: history}, a panel per column, e.g. ["val_loss", "val_final_score"].
    The legend follows the order of the lines' ends; a dot marks the epoch of the lowest validation loss."""
    fig = Figure((10, max(3.3, 0.17 * len(histories) + 0.8) * len(columns)), layout="constrained")
    for ax, column in zip(fig.subplots(len(columns), 1, squeeze=False)[:, 0], columns, strict=True):
        ends = {}
        for k, (name, history) in enumerate(histories.items()):
            if column in history and history[["val_loss", column]].notna().any().all():
                line, = ax.plot(history["epoch"], history[column], label=plain(name), **LINES[k % 28])
                best = history["val_loss"].idxmin()
                ax.plot(history["epoch"][best], history[column][best], "o", ms=4, color=COLOURS[k % 7])
                ends[line] = history[column].dropna().iloc[-1]
        title, high = plain(column.replace("val_", "validation ").replace("_", " ")), [h[column].max() for h in histories.values() if column in h]
        if column == "val_loss" and high and max(high) > 5 * np.median(high):
            ax.set_ylim(top=3 * np.median(high))  # one run that diverged would flatten all others
            title += " (the highest cut off)"
        ax.set_title(title, fontsize=11, loc="left")
        tidy(ax, epochs=True)
        ax.grid(axis="y", color="#E5E5E5", lw=0.6)
        ax.legend(handles=sorted(ends, key=ends.get, reverse=True), loc="upper left", bbox_to_anchor=(1.01, 1.03),
                  frameon=False, fontsize=8, handlelength=3.2, labelspacing=0.35)
    return fig
