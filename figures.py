"""Every picture this repository draws: arrays in, a matplotlib Figure out.

    figures.save(figures.roc(y_true, y_prob, labels, "multilabel"), "roc.png")

Built without pyplot: no screen is needed. Colours suit the colour-blind. Pictures are uint8 (S, S, 3)."""

import math
import re
import textwrap

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from PIL import Image

import metrics
from cache import replace_file
from tables import SUFFIX

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#B8C4CC"
SOFT, RIGHT, PARTLY, WRONG = "#555555", "#00694D", "#5A4A00", "#A84300"
TILE = 1.9  # inches of one picture among heat maps


def plain(text, width=60):
    """`text` wrapped. A `$` would start a formula, and an odd one would raise."""
    return textwrap.fill(str(text), width).replace("$", r"\$")


def mark_rendered(fig):
    """Say in a line of its own above a figure that it is of drawn pictures; returns the figure."""
    words = plain("RENDERED stand-ins, not patients", int(9 * fig.get_figwidth()))
    fig.set_figheight(fig.get_figheight() + 0.1 + 0.2 * (1 + words.count("\n")))
    fig.suptitle(words, color=WRONG, fontsize=11, weight="bold")
    return fig


def caption(fig, text):
    """Say below a figure, in small grey letters, what it is of; what already stands there stays above."""
    above, words = fig.get_supxlabel(), plain(text, int(13 * fig.get_figwidth()))
    fig.set_figheight(fig.get_figheight() + 0.1 + 0.14 * (1 + words.count("\n")))
    fig.supxlabel(f"{above}\n{words}".strip(), fontsize=8, color=SOFT)


def file_names(names):
    """Names as .png files, without a picture's suffix and what no file name holds; a second one gets -2."""
    taken, files = set(), []
    for name in names:
        stem, number = re.sub(r"[^\w.-]+", "_", SUFFIX.sub("", str(name))).lstrip("."), 1
        file = f"{stem}.png"
        while file.lower() in taken:
            number += 1
            file = f"{stem}-{number}.png"
        taken.add(file.lower())
        files.append(file)
    return files


def save(fig, path, dpi=110):
    """`fig` as a PNG, as a whole or not at all. Its own `savefig` would lay it out and draw it twice."""
    fig.set_dpi(dpi)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    replace_file(path, lambda stream: image.save(stream, "PNG", compress_level=3))  # 6 takes twice as long


def panels(count):
    """A figure with `count` panels, at most four a line -> (figure, axes)."""
    columns, lines = min(4, count), math.ceil(count / 4)
    fig = Figure((2.3 * columns + 0.6, 2.9 * lines + 0.2), layout=ConstrainedLayoutEngine(h_pad=0.12))
    return fig, [fig.add_subplot(lines, columns, k + 1) for k in range(count)]


def draw_matrix(ax, counts, names, title=""):
    """A confusion matrix (K, K): in each cell the count, and its share of the row, which colours it."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)  # a class that nobody has: an empty row
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")  # else the layout forgets long names
    for (i, j), share in np.ndenumerate(shares):
        words, colour = f"{counts[i, j]}\n{share:.0%}", "white" if share > 0.6 else "black"
        ax.text(j, i, words, ha="center", va="center", fontsize=9, color=colour)
    shown = [plain(name, 14) for name in names]
    ax.set_xticks(range(len(names)), shown, fontsize=8)
    if len(names) > 2 and max(map(len, names)) > 4:
        ax.tick_params("x", rotation=35)
    ax.set_yticks(range(len(names)), shown, fontsize=8)
    ax.set(xlabel="predicted", ylabel="true", title=plain(title, 22))


def confusion(y_true, y_prob, labels, task, threshold=0.5):
    """Confusion matrices. multilabel: y_true 0/1 and y_prob (n, L), a 2 x 2 matrix per label at
    `prob > threshold` (a number or (L,)). multiclass: y_true (n,), y_prob (n, K), one matrix (K, K)."""
    from sklearn.metrics import confusion_matrix  # here, as below: training starts a second sooner

    if task == "multiclass":
        side = max(3.4, 0.75 * len(labels) + 1)
        fig = Figure((side, side), layout="constrained")
        counts = confusion_matrix(y_true, y_prob.argmax(1), labels=range(len(labels)))
        draw_matrix(fig.add_subplot(), counts, labels)
        return fig
    fig, axes = panels(len(labels))
    for ax, label, truth, answer in zip(axes, labels, y_true.T, (y_prob > threshold).T, strict=True):
        draw_matrix(ax, confusion_matrix(truth, answer, labels=[0, 1]), ("no", "yes"), label)
    return fig


def roc(y_true, y_prob, labels, task):
    """The ROC curve and AUC of each label, or of each class against the rest; shapes as in `confusion`."""
    from sklearn.metrics import auc, roc_curve

    if task == "multiclass":
        y_true = y_true[:, None] == np.arange(len(labels))
    fig, axes = panels(len(labels))
    for k, ax in enumerate(axes):
        ax.plot([0, 1], [0, 1], color="#999999", lw=0.8, ls=":")
        found = "AUC undefined"
        if len(np.unique(y_true[:, k])) == 2:
            fpr, tpr, _ = roc_curve(y_true[:, k], y_prob[:, k])
            ax.plot(fpr, tpr, color=BLUE, lw=1.6)
            found = f"AUC {auc(fpr, tpr):.3f}"
        ax.set(xlabel="false positive rate", ylabel="true positive rate", aspect=1)
        ax.set_title(f"{plain(labels[k], 22)}\n{found}", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
    return fig


def reliability(y_true, y_prob, bins=15):
    """How often the answers of each probability are right; below, how many answers there are.
    y_true (n, L) 0/1 with y_prob (n, L), or classes (n,) with (n, K): then of the strongest class alone."""
    confidence, accuracy, count = metrics.reliability(y_true, y_prob, bins)
    error = metrics.expected_calibration_error(y_true, y_prob, bins)
    answer, share = "a label", "share that has the label"
    if np.ndim(y_true) == 1:
        answer, share = "the strongest class", "share of right answers"
    fig = Figure((5, 5.4), layout="constrained")
    above, below = fig.subplots(2, 1, height_ratios=(3.4, 1), sharex=True)
    middle, width = (np.arange(bins) + 0.5) / bins, 0.94 / bins
    above.bar(middle, accuracy, width, color="#9CC4DE", label="measured")
    above.plot([0, 1], [0, 1], color="#333333", lw=1, ls="--", label="perfectly calibrated")
    above.plot(confidence, accuracy, "o", ms=4, color=BLUE)
    above.set(xlim=(0, 1), ylim=(0, 1), ylabel=share)
    above.set_title(f"expected calibration error {error:.3f}", fontsize=10)
    above.legend(frameon=False, fontsize=9, loc="upper left")
    below.bar(middle, count, width, color=GREY)
    below.set(xlabel=f"probability of {answer}", ylabel="answers")
    return fig


def show(ax, picture, cam=None, place=(0, 0, 1)):
    """A picture, under a map (h, w) in 0..1 of any size, in the square `place` (left, top, side) of `ax`."""
    if cam is not None:  # mixed here: matplotlib would take twice as long
        cam = Image.fromarray(np.clip(cam, 0, 1)).resize(picture.shape[1::-1], Image.BILINEAR)
        colours = 255 * colormaps["viridis"](np.asarray(cam))[:, :, :3]
        opacity = 0.1 + 0.5 * np.asarray(cam)[:, :, None]
        picture = (opacity * colours + (1 - opacity) * np.atleast_3d(picture)).astype(np.uint8)
    left, top, side = place
    ax.imshow(picture, cmap="gray", vmin=0, vmax=255, extent=(left, left + side, top + side, top))
    ax.axis("off")


def sample_words(row):
    """(verdict, its colour, lines) beside a sample: the truth, then every predicted or missed label."""
    truth, predicted, probs = row["truth"], row["prediction"], row["probs"]
    missed = [label for label in truth if label not in predicted]
    lines = [f"truth: {', '.join(truth) or 'none'}", f"predicted: {'' if predicted else 'none'}"]
    lines += [f"{'✓' if label in truth else '✗'} {label}  {probs[label]:.2f}" for label in predicted]
    lines += [f"– missed: {label}  {probs[label]:.2f}" for label in missed]
    verdict, colour = ("◐ partly right", PARTLY) if len(missed) < len(truth) else ("✗ wrong", WRONG)
    if set(truth) == set(predicted):
        verdict, colour = "✓ right", RIGHT
    if any(probs[label] <= 0.6 for label in predicted) or any(probs[label] >= 0.4 for label in missed):
        verdict, colour = f"? {verdict[2:]}, but uncertain", SOFT
    return verdict, colour, "\n".join(plain(line, 32) for line in lines)


def samples(rows):
    """Sample patients: dicts of title, pictures, truth, prediction (labels), probs {label: prob}."""
    planes = max(len(row["pictures"]) for row in rows)
    columns = 1 if planes > 2 or len(rows) < 2 else 2
    lines, widths = math.ceil(len(rows) / columns), ([1.6] * planes + [2.5]) * columns
    fig = Figure((sum(widths), 1.75 * lines), layout="constrained")
    axes = fig.subplots(lines, columns * (planes + 1), squeeze=False, width_ratios=widths)
    for ax in axes.flat:
        ax.axis("off")
    for (*places, words), row in zip(axes.reshape(lines * columns, -1), rows, strict=False):
        for ax, picture in zip(places, row["pictures"], strict=False):
            show(ax, picture)
        verdict, colour, body = sample_words(row)
        head = f"{plain(row['title'], 30)}\n{verdict}"
        words.text(0, 1, head, va="top", fontsize=9, weight="bold", color=colour, linespacing=1.4)
        words.text(0, 0.83 - 0.13 * head.count("\n"), body, va="top", fontsize=8, linespacing=1.25)
    return fig


def draw_maps(ax, rows):
    """A line for each of `heatmaps`' rows -> (width, height) in inches, the units of the axes."""
    step, columns = TILE + 0.5, 1  # inches: two lines of words over each picture
    for i, row in enumerate(rows):  # all in one axes: a hundred would take seconds
        maps = sorted(row["maps"], key=lambda one: -one[1])
        maps = maps[:3] + [one for one in maps[3:] if one[0] in row["truth"]]
        columns = max(columns, 1 + len(maps))
        for j, (label, prob, cam) in enumerate([(row["title"] or "picture", None, None), *maps]):
            left, top = TILE * j + 0.05, step * i + 0.5
            show(ax, row["picture"], cam, (left, top, TILE - 0.1))
            title, look = plain(label, 24), {}
            if prob is not None:
                title += f"\n{prob:.2f}"
                if label in row["truth"]:
                    title, look = f"{title} (true)", {"color": RIGHT, "weight": "bold"}
                title += "" if np.any(cam) else ", no evidence"
            ax.text(left, top - 0.05, title, va="bottom", fontsize=9, **look)
    width, height = TILE * columns, step * len(rows)
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    return width, height


def heatmaps(rows, random_trunk=False):
    """Pictures with their class-activation maps, a line for each: picture, three strongest labels, true ones.
    rows: dicts {"title", "picture", "maps": [(label, prob, cam (h, w) in 0..1), ...] of all labels, "truth":
    [label, ...], empty where it is not known}. random_trunk: the caption says so."""
    fig = Figure(layout=ConstrainedLayoutEngine(w_pad=0, h_pad=0.04))
    fig.set_size_inches(draw_maps(fig.add_subplot(), rows))
    words = "Yellow speaks for the label; each map is scaled to its own maximum. No evidence: nothing does."
    if random_trunk:
        words += " The trunk has random weights: these maps show its accidents, not what it learned."
    caption(fig, words)
    return fig


def draw_answers(ax, labels, probs, threshold):
    """A bar per label, its threshold dashed; without one the strongest class is the answer."""
    places = np.arange(len(labels))
    if threshold is None:
        yes, title = places == probs.argmax(), "◀ strongest class"
    else:
        limits = np.broadcast_to(threshold, len(labels))
        yes = probs > limits
        title = "◀ above the threshold" if yes.any() else "nothing is above the threshold"
        ax.vlines(limits, places - 0.5, places + 0.5, color="#333333", ls="--", lw=1, zorder=0.5)
        words = "each label's threshold" if np.ptp(limits) else f"threshold {limits[0]:g}"
        ax.text(limits.mean(), -0.55, words, ha="center", va="bottom", fontsize=8, color="#333333")
    ax.barh(places, probs, color=np.where(yes, ORANGE, GREY), height=0.66)
    for k, prob in enumerate(probs):
        words, colour = (f"{prob:.2f}  ◀", WRONG) if yes[k] else (f"{prob:.2f}", "black")
        box = {"fc": "white", "ec": "none", "pad": 0.6}
        ax.text(prob + 0.015, k, words, va="center", fontsize=9, color=colour, bbox=box)
    ax.set_yticks(places, [plain(label, 20) for label in labels], fontsize=9)
    ax.set(xlim=(0, 1.2), ylim=(len(labels) - 0.4, -0.6), xticks=np.arange(5) / 4, xlabel="probability")
    ax.set_title(title, fontsize=9, loc="left", pad=16)
    ax.spines[["top", "right"]].set_visible(False)


def prediction(rows, threshold, note):
    """One patient's answer: pictures, the heat maps of the three strongest labels, a bar per label with its
    threshold (a number, (L,), or None: exclusive classes), `note` below. rows: as in `heatmaps`."""
    labels, probs, _ = zip(*rows[0]["maps"], strict=True)
    fig = Figure(layout="constrained")
    left, bars = fig.add_subplot(), 0.38 * len(labels) + 1.1  # inches
    width, height = draw_maps(left, rows)
    rest = max(height - bars, 0.01)  # three bars beside three planes: the rest stays empty
    fig.set_size_inches(width + 4.2, bars + rest)
    grid = fig.add_gridspec(2, 2, width_ratios=(width, 4.2), height_ratios=(bars, rest))
    left.set(subplotspec=grid[:, 0], anchor="NW")
    draw_answers(fig.add_subplot(grid[0, 1]), labels, np.array(probs), threshold)
    caption(fig, note)
    return fig
