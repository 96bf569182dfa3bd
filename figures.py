"""Every picture this repository draws: arrays in, a matplotlib Figure out.

    figures.roc(y_true, y_prob, labels, "multilabel").savefig("roc.png", dpi=110)

Built without pyplot: nothing global is touched, no screen is needed. Okabe-Ito and viridis suit the
colour-blind. A picture is uint8, (H, W, 3) or (H, W). `aspect` (width / height of the photograph as it was
taken) draws it in its own shape where preprocessing squashed it into a square.
"""

import math
import textwrap

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

import metrics

# Okabe-Ito without its yellow
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #333333".split()
STYLES = ("-", "--", "-.", ":")
SHARES = LinearSegmentedColormap.from_list("shares", ("#FFFFFF", "#0072B2"))
SOFT, RIGHT, PARTLY, WRONG = "#555555", "#00694D", "#5A4A00", "#A84300"
UNCERTAIN = (0.4, 0.6)  # a yes below 0.6 and a no above 0.4 are drawn as uncertain
TILE = 1.9  # inches of one picture among heat maps


def plain(text, width=60):
    """`text` wrapped. A `$` in a label would otherwise start a formula, and an odd one would raise."""
    return textwrap.fill(str(text), width).replace("$", r"\$")


def mark_rendered(fig, text="RENDERED stand-ins, not patients"):
    """Say in a line of its own above a figure what about it is drawn and not real; returns the figure."""
    fig.set_figheight(fig.get_figheight() + 0.3)
    fig.suptitle(text, color=WRONG, fontsize=11, weight="bold")
    return fig


def tidy(ax, epochs=False):
    ax.spines[["top", "right"]].set_visible(False)
    if epochs:
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(axis="y", color="#E5E5E5", lw=0.6)


def panels(count):
    """A figure with `count` panels, at most four a line -> (figure, axes)."""
    columns, lines = min(4, count), math.ceil(count / 4)
    fig = Figure((2.3 * columns + 0.6, 2.9 * lines + 0.2), layout="constrained")
    fig.get_layout_engine().set(h_pad=0.12)  # inches
    return fig, [fig.add_subplot(lines, columns, k + 1) for k in range(count)]


def draw_matrix(ax, counts, names, title, text="{count}"):
    """A confusion matrix (K, K) of counts, coloured by the share of its row; `text` goes into each cell."""
    shares = counts / np.maximum(
        counts.sum(1, keepdims=True), 1
    )  # a class that nobody has stays an empty row
    ax.imshow(shares, cmap=SHARES, vmin=0, vmax=1)
    for i, j in np.ndindex(counts.shape):
        words = text.format(count=counts[i, j], share=shares[i, j])
        colour = "white" if shares[i, j] > 0.6 else "black"
        ax.text(j, i, words, ha="center", va="center", fontsize=9, color=colour)
    shown = [plain(name, 14) for name in names]
    turned = len(names) > 2 and max(map(len, names)) > 4
    turn = {"rotation": 35, "ha": "right"} if turned else {}
    ax.set_xticks(range(len(names)), shown, fontsize=8, **turn)
    ax.set_yticks(range(len(names)), shown, fontsize=8)
    ax.set(xlabel="predicted", ylabel="true", title=plain(title, 22))


def confusion(y_true, y_prob, labels, task, threshold=0.5):
    """Confusion matrices. multilabel: y_true 0/1 and y_prob (n, L), a 2 x 2 matrix per label at
    `prob > threshold` (a number or (L,)), counts with the share of their row. multiclass: y_true (n,),
    y_prob (n, K), counts beside row-normalised."""
    y_true, y_prob = np.asarray(y_true), np.asarray(y_prob)
    if task == "multiclass":
        counts = metrics.confusion_matrix(y_true, y_prob.argmax(1), len(labels))
        side = max(3.4, 0.75 * len(labels) + 1)
        fig = Figure((2 * side, side), layout="constrained")
        draw_matrix(fig.add_subplot(1, 2, 1), counts, labels, "counts")
        draw_matrix(fig.add_subplot(1, 2, 2), counts, labels, "share of the true class", "{share:.2f}")
        return fig
    fig, axes = panels(len(labels))
    predicted = (y_prob > threshold).astype(int)
    for k, label in enumerate(labels):
        counts = metrics.confusion_matrix(y_true[:, k].astype(int), predicted[:, k], 2)
        draw_matrix(axes[k], counts, ("no", "yes"), label, "{count}\n{share:.0%}")
    return fig


def roc(y_true, y_prob, labels, task):
    """A panel with the ROC curve of each label (multiclass: of each class against the rest), its AUC in the
    title; shapes as in `confusion`. A label with one class only has no curve, and an undefined AUC."""
    from sklearn.metrics import auc, roc_curve  # here: training draws no ROC curve and starts a second sooner

    y_true, y_prob = np.asarray(y_true), np.asarray(y_prob)
    if task == "multiclass":
        y_true = y_true[:, None] == np.arange(len(labels))
    fig, axes = panels(len(labels))
    for k, ax in enumerate(axes):
        found = "AUC undefined"
        ax.plot([0, 1], [0, 1], color="#999999", lw=0.8, ls=":")
        if len(np.unique(y_true[:, k])) == 2:
            fpr, tpr, _ = roc_curve(y_true[:, k], y_prob[:, k])
            ax.plot(fpr, tpr, color=COLOURS[0], lw=1.6)
            found = f"AUC {auc(fpr, tpr):.3f}"
        ax.set(xlabel="false positive rate", ylabel="true positive rate", aspect=1)
        ax.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
        ax.set_title(f"{plain(labels[k], 22)}\n{found}", fontsize=10)
        tidy(ax)
    return fig


def reliability(y_true, y_prob, bins=15):
    """How often the answers of each probability are right; below, how many answers there are.

    y_true (n, L) 0/1 with y_prob (n, L), or classes (n,) with (n, K): then of the strongest class alone.
    """
    confidence, accuracy, count = metrics.reliability(y_true, y_prob, bins)
    error = metrics.expected_calibration_error(y_true, y_prob, bins)
    of_classes = np.ndim(y_true) == 1
    fig = Figure((5, 5.4), layout="constrained")
    above, below = fig.subplots(2, 1, height_ratios=(3.4, 1), sharex=True)
    left = np.arange(bins) / bins
    above.bar(left, accuracy, 0.94 / bins, align="edge", color="#9CC4DE", label="measured")
    above.plot([0, 1], [0, 1], color="#333333", lw=1, ls="--", label="perfectly calibrated")
    above.plot(confidence, accuracy, "o", ms=4, color=COLOURS[0])
    above.set(xlim=(0, 1), ylim=(0, 1))
    above.set_ylabel("share of right answers" if of_classes else "share that has the label")
    above.set_title(f"expected calibration error {error:.3f}", fontsize=10)
    above.legend(frameon=False, fontsize=9, loc="upper left")
    below.bar(left, count, 0.94 / bins, align="edge", color="#B8C4CC")
    answer = "the strongest class" if of_classes else "a label"
    below.set(xlabel=f"probability of {answer}", ylabel="answers")
    tidy(above)
    tidy(below)
    return fig


def show(ax, picture, cam=None, aspect=None, place=(0, 0, 1)):
    """A picture into `ax`; over it a class-activation map (h, w) in 0..1 of any size.
    `place` (left, top, side): the square, in the units of the axes, that holds it."""
    left, top, side = place
    aspect = aspect or picture.shape[1] / picture.shape[0]
    width, height = side * min(1, aspect), side * min(1, 1 / aspect)
    extent = (left, left + width, top + height, top)
    ax.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=extent)
    if cam is not None:
        seen = 0.1 + 0.5 * np.clip(cam, 0, 1)
        look = {"cmap": "viridis", "vmin": 0, "vmax": 1, "alpha": seen, "interpolation": "bilinear"}
        ax.imshow(cam, extent=extent, **look)
    ax.axis("off")


def sample_words(row):
    """(verdict, its colour, lines) beside a sample: the truth, then every predicted or missed label."""
    truth, predicted = row["truth"], [label for label, _ in row["prediction"]]
    lines, doubts = [f"truth: {', '.join(truth) or 'none'}", f"predicted: {'' if predicted else 'none'}"], 0
    for label, prob in row["prediction"]:
        doubt = " (uncertain)" if prob <= UNCERTAIN[1] else ""
        doubts += bool(doubt)
        lines.append(f"{'✓' if label in truth else '✗'} {label}  {prob:.2f}{doubt}")
    for label in [label for label in truth if label not in predicted]:
        prob = row.get("probs", {}).get(label)
        doubts += prob is not None and prob >= UNCERTAIN[0]
        lines.append(f"– missed: {label}" + ("" if prob is None else f"  {prob:.2f}"))
    verdict, colour = ("◐ partly right", PARTLY) if set(truth) & set(predicted) else ("✗ wrong", WRONG)
    if set(truth) == set(predicted):
        verdict, colour = "✓ right", RIGHT
    if doubts:
        verdict, colour = f"? {verdict[2:]}, but uncertain", SOFT
    return verdict, colour, "\n".join(plain(line, 32) for line in lines)


def samples(rows):
    """Sample patients. rows: dicts {"title", "pictures": [...], "truth": [label, ...], "prediction": [(label,
    prob), ...] of the labels that were predicted, not of all; optional "aspect", "probs": {label: prob}}."""
    planes = max(len(row["pictures"]) for row in rows)
    columns = 1 if planes > 2 or len(rows) < 2 else 2
    lines = math.ceil(len(rows) / columns)
    widths = ([1.6] * planes + [2.5]) * columns
    fig = Figure((sum(widths), 1.75 * lines), layout="constrained")
    axes = fig.subplots(lines, columns * (planes + 1), squeeze=False, width_ratios=widths)
    for ax in axes.flat:
        ax.axis("off")
    for (*places, words), row in zip(axes.reshape(lines * columns, -1), rows, strict=False):
        for ax, picture in zip(places, row["pictures"], strict=False):
            show(ax, picture, aspect=row.get("aspect"))
        verdict, colour, body = sample_words(row)
        head = f"{plain(row['title'], 30)}\n{verdict}"
        words.text(0, 1, head, va="top", fontsize=9, weight="bold", color=colour, linespacing=1.4)
        words.text(0, 0.83 - 0.13 * head.count("\n"), body, va="top", fontsize=8, linespacing=1.25)
    return fig


def heatmaps(rows, random_trunk=False):
    """Pictures with their class-activation maps, a line for each: picture, three strongest labels, true ones.

    rows: dicts {"title", "picture", "maps": [(label, prob, cam (h, w) in 0..1), ...] of all labels, "truth":
    [label, ...], empty where it is not known; optional "aspect"}. random_trunk: the caption says so.
    """
    chosen = []
    for row in rows:
        maps = sorted(row["maps"], key=lambda one: -one[1])
        chosen.append(maps[:3] + [one for one in maps[3:] if one[0] in row["truth"]])
    flat = min(row.get("aspect") or 1 for row in rows)
    step = TILE / max(1, flat) + 0.5  # inches: two lines of words over each picture
    width = TILE * (1 + max(map(len, chosen)))
    fig = Figure((width, step * len(rows) + 0.3), layout="constrained")
    fig.get_layout_engine().set(w_pad=0, h_pad=0.04)
    ax = fig.add_subplot()  # one for all: a hundred axes would take seconds
    for i, (row, maps) in enumerate(zip(rows, chosen, strict=True)):
        for j, (label, prob, cam) in enumerate([(row["title"], None, None), *maps]):
            known = prob is not None and label in row["truth"]
            title = plain(label, 24)
            if prob is not None:
                title += f"\n{prob:.2f}{' (true)' if known else ''}{'' if np.any(cam) else ', no evidence'}"
            left, top = TILE * j + 0.05, step * i + 0.5
            show(ax, row["picture"], cam, row.get("aspect"), (left, top, TILE - 0.1))
            look = {"color": RIGHT, "weight": "bold"} if known else {}
            ax.text(left, top - 0.05, title, va="bottom", fontsize=9, **look)
    ax.set(xlim=(0, width), ylim=(step * len(rows), 0), aspect="equal")
    caption = "Yellow: what speaks for the label. No evidence: nothing in the picture speaks for it."
    if random_trunk:
        caption += " The trunk has random weights: these maps show its accidents, not what it learned."
    fig.supxlabel(plain(caption, int(13 * width)), fontsize=8, color=SOFT)
    return fig


def draw_answers(ax, labels, probs, threshold):
    """A bar per label, its threshold dashed; without one the strongest class is the answer."""
    places = np.arange(len(labels))
    limits = None if threshold is None else np.broadcast_to(threshold, len(labels))
    yes = places == probs.argmax() if threshold is None else probs > limits
    ax.barh(places, probs, color=["#D55E00" if y else "#B8C4CC" for y in yes], height=0.66)
    for k, prob in enumerate(probs):
        words, colour = (f"{prob:.2f}  ◀", WRONG) if yes[k] else (f"{prob:.2f}", "black")
        box = {"fc": "white", "ec": "none", "pad": 0.6}
        ax.text(prob + 0.015, k, words, va="center", fontsize=9, color=colour, bbox=box)
    if threshold is None:
        title = "◀ strongest class"
    else:
        ax.vlines(limits, places - 0.5, places + 0.5, color="#333333", ls="--", lw=1, zorder=0.5)
        words = "each label's threshold" if np.ptp(limits) else f"threshold {limits[0]:g}"
        ax.text(limits.mean(), -0.55, words, ha="center", va="bottom", fontsize=8, color="#333333")
        title = "◀ above the threshold" if yes.any() else "nothing is above the threshold"
    ax.set_yticks(places, [plain(label, 20) for label in labels], fontsize=9)
    ax.set(xlim=(0, 1.2), xticks=(0, 0.25, 0.5, 0.75, 1), xlabel="probability")
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.set_title(title, fontsize=9, loc="left", pad=16)
    tidy(ax)


def prediction(pictures, cams, labels, probs, threshold, note, aspect=None):
    """One patient's answer: pictures, the heat maps of the three strongest labels, a bar per label with its
    threshold (a number, (L,), or None: exclusive classes), `note` below. cams[p][k]: (h, w) in 0..1."""
    probs = np.asarray(probs, dtype=float)
    strongest = np.argsort(-probs, kind="stable")[:3]
    width, bars = TILE * (1 + len(strongest)), 0.38 * len(labels) + 1.1  # inches
    height = max(2.1 * len(pictures), bars)
    fig = Figure((width + 4.2, height + 0.5), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=(width, 4.2))
    for p, line in enumerate(left.subplots(len(pictures), 1 + len(strongest), squeeze=False)):
        show(line[0], pictures[p], aspect=aspect)
        line[0].set_title("picture" if p == 0 else "", fontsize=9)
        for ax, k in zip(line[1:], strongest, strict=True):
            show(ax, pictures[p], cams[p][k], aspect)
            nothing = "" if np.any(cams[p][k]) else "(no evidence)"
            title = f"{plain(labels[k], 20)}  {probs[k]:.2f} {nothing}" if p == 0 else nothing
            ax.set_title(title.strip(), fontsize=9)
    ratios = (bars, max(height - bars, 0.01))  # three bars beside three planes: the rest stays empty
    draw_answers(right.subplots(2, 1, height_ratios=ratios)[0], labels, probs, threshold)
    right.axes[1].axis("off")
    fig.supxlabel(plain(note, 120), fontsize=9, color=SOFT)
    return fig


def curves(history):
    """One run: every column that is validated and the learning rate, as `compare_curves` draws them."""
    columns = [column for column in history if column.startswith("val_")] + ["lr"]
    lines = math.ceil(len(columns) / 2)
    fig = Figure((10, 3.2 * lines), layout="constrained")
    for k, column in enumerate(columns):
        draw_runs(fig.add_subplot(lines, 2, k + 1), {"validation": history}, column)
    return fig


def compare_curves(histories, columns):
    """Several runs in one picture: {name: DataFrame of train_results.xlsx}, a panel per column, e.g.
    ["val_loss", "val_final_score"]. The legend follows the lines' ends, a dot marks the epoch of the lowest
    validation loss. Of one run or two, training is drawn too, dashed."""
    height = max(4, 0.19 * len(histories) + 0.8)
    fig = Figure((10, height * len(columns)), layout="constrained")
    for k, column in enumerate(columns):
        draw_runs(fig.add_subplot(len(columns), 1, k + 1), histories, column)
    return fig


def draw_runs(ax, histories, column):
    """One panel of `compare_curves`."""
    ends, highest, trained = {}, [], column.replace("val_", "train_")
    for k, (name, history) in enumerate(histories.items()):
        if column not in history or history[["val_loss", column]].isna().all().any():
            continue
        colour, look = COLOURS[k % 7], {"ls": STYLES[k // 7 % 4], "lw": 1.6, "label": plain(name)}
        (line,) = ax.plot(history["epoch"], history[column], color=colour, **look)
        best = history["val_loss"].idxmin()
        ax.plot(history["epoch"][best], history[column][best], "o", ms=5, color=colour)
        if len(histories) <= 2 and trained != column and trained in history:
            ax.plot(history["epoch"], history[trained], ls="--", lw=0.9, color=colour)
        ends[line] = history[column].dropna().iloc[-1]
        highest.append(history[column].max())
    title = plain(column.removeprefix("val_").replace("_", " "))
    title += " (dashed: training)" if len(histories) <= 2 and column != "lr" else ""
    if column == "val_loss" and highest and max(highest) > 5 * np.median(highest):
        ax.set_ylim(0, 3 * np.median(highest))  # one run that diverged would flatten all others
        title += " (the highest cut off)"
    ax.set_title(title, fontsize=11, loc="left")
    tidy(ax, epochs=True)
    if len(histories) > 1:
        lines = sorted(ends, key=ends.get, reverse=True)
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.03)}
        ax.legend(handles=lines, frameon=False, fontsize=9, handlelength=3.2, labelspacing=0.35, **place)
