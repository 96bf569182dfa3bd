"""Pictures: the right figures stand in them, odd labels do no harm, nothing global is touched."""

import io
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import figures

LABELS = ["N", "D", "a $label with one dollar", "<b>"]


@pytest.fixture
def answers():
    rng = np.random.default_rng(0)
    y_true = rng.integers(0, 2, (60, 4))
    y_true[:, 3] = 0  # one class only
    return y_true, np.clip(0.3 * y_true + 0.7 * rng.random((60, 4)), 0, 1)


def history(epochs=5):
    frame = pd.DataFrame({"epoch": range(epochs), "lr": 0.1})
    for column in ("train_loss", "val_loss", "train_f1", "val_f1"):
        frame[column] = np.linspace(1, 0.5, epochs)
    return frame


def drawn(figure):
    """The figure as an array; every warning (a clipped layout, a missing sign) is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(buffer := io.BytesIO(), dpi=60)
    array = np.asarray(Image.open(buffer).convert("RGB"))
    assert array.std() > 5, "an empty picture"
    return array


def texts(figure):
    drawn(figure)
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_confusion_multilabel_by_hand():
    y_true = np.array([[1, 0], [1, 0], [0, 1], [0, 0]])
    y_prob = np.array([[0.9, 0.1], [0.5, 0.1], [0.8, 0.7], [0.2, 0.6]])
    figure = figures.confusion(y_true, y_prob, ["a", "b"], "multilabel")  # 0.5 is not above 0.5
    assert texts(figure) == ["1\n50%", "1\n50%", "1\n50%", "1\n50%", "2\n67%", "1\n33%", "0\n0%", "1\n100%"]
    assert [ax.get_title() for ax in figure.axes] == ["a", "b"]
    lower = figures.confusion(y_true, y_prob, ["a", "b"], "multilabel", threshold=0.4)
    assert texts(lower)[2:4] == ["0\n0%", "2\n100%"]


def test_confusion_multiclass_by_hand():
    y_prob = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1]])
    figure = figures.confusion([0, 0, 1], y_prob, list("abc"), "multiclass")  # nobody has c: its row stays empty
    assert texts(figure) == [*"110010000", "0.50", "0.50", "0.00", "0.00", "1.00", "0.00", "0.00", "0.00", "0.00"]


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_roc_names_what_is_undefined(answers, task):
    y_true, y_prob = answers
    figure = figures.roc(y_true if task == "multilabel" else y_true[:, 0], y_prob, LABELS, task)
    drawn(figure)
    auc = roc_auc_score(y_true[:, 0] == (task == "multilabel"), y_prob[:, 0])  # has label N, or is of class 0
    titles = [ax.get_title() for ax in figure.axes]
    assert len(titles) == 4 and titles[0] == f"N\nAUC {auc:.3f}" and titles[3] == "<b>\nAUC undefined" and titles[2].startswith("a \\$label")
    curves = [len(ax.lines) - 1 for ax in figure.axes]  # besides the line of chance
    assert curves == ([1, 1, 1, 0] if task == "multilabel" else [1, 1, 0, 0]), "a line for an undefined label"


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_samples_say_right_and_wrong_in_words(planes):
    picture = np.tile(np.arange(64, dtype=np.uint8)[:, None, None] * 3, (1, 64, 3))
    answers = [(["N"], [("N", 0.9)]), (["N"], [("D", 0.8)]), ([], []), (["N", "D"], [("N", 0.6)]), (["G"], [])]
    rows = [{"title": f"patient {i} $", "pictures": [picture] * planes, "truth": truth, "prediction": prediction}
            for i, (truth, prediction) in enumerate(answers)]
    text = texts(figures.samples(rows))
    assert [head.split("\n")[1] for head in text[::2]] == ["✓ right", "✗ wrong", "✓ right", "◐ partly right", "✗ wrong"]
    assert text[3] == "truth: N\npredicted:\n✗ D  0.80\n– missed: N"
    assert text[5] == "truth: none\npredicted: none"


def test_heat_maps_of_any_size_lie_over_the_whole_picture():
    pictures = [np.zeros((64, 96, 3), np.uint8), np.zeros((64, 96), np.uint8)]
    cams = [[np.eye(7), np.zeros((3, 3))]] * 2
    figure = figures.heatmaps(pictures, cams, ["N 0.9", "D $0.1"])
    assert texts(figure) == ["picture", "N 0.9", "D \\$0.1 (no evidence)", "", "", ""]
    places = [tuple(image.get_extent()) for image in figure.axes[0].images]
    assert len(places) == 10 and places[1] == places[2] and places[3] == places[4] and len(set(places)) == 6
    left, right, bottom, top = places[0]
    assert (right - left) / (bottom - top) == pytest.approx(96 / 64), "a picture keeps its shape"
    assert places[1][0] > right and places[5][3] > bottom, "pictures lie over one another"
    assert texts(figures.heatmaps(pictures, cams, [["p1", "N", "D"], ["p2", "N", "[D]"]]))[4:] == ["N", "[D] (no evidence)"]


@pytest.mark.parametrize(("threshold", "marked"), [(0.5, ["0.70  ◀", "0.60  ◀"]), (None, ["0.70  ◀"])])
def test_prediction_marks_the_answers(threshold, marked):
    picture = np.full((32, 32, 3), 120, np.uint8)
    probs = [0.1, 0.7, 0.6, 0.5]
    figure = figures.prediction([picture] * 2, [[np.eye(4)] * 4] * 2, LABELS, probs, threshold, "No medical device.")
    assert [text for text in texts(figure) if "◀" in text] == marked
    assert [ax.get_title() for ax in figure.axes[:4]] == [
        "picture", "D  0.70", "a \\$label with one\ndollar  0.60", "<b>  0.50"]
    assert figure.get_supxlabel() == "No medical device."


def test_curves_of_one_epoch_and_of_many_runs():
    assert len(figures.curves(history(1)).axes) == 3
    drawn(figures.curves(history(1)))
    runs = {f"odir-{k:02}": history(3 + k % 4) for k in range(28)} | {"no-score": history().drop(columns="val_f1")}
    figure = figures.compare_curves(runs, ["val_loss", "val_f1"])
    drawn(figure)
    loss, score = ([text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes)
    assert len(loss) == 29 and len(score) == 28 and "no-score" not in score
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[1].lines if line.get_marker() == "None"}
    assert len(styles) == 28, "two of the runs look alike"


def test_rendered_pictures_say_so():
    figure = figures.mark_rendered(figures.confusion([0, 1], np.eye(2), ["a", "b"], "multiclass"))
    assert "RENDERED" in figure.get_suptitle() and drawn(figure)[:12].std() > 5, "the words are not in the picture"


def test_nothing_global_is_touched():
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    assert "pyplot" not in open(figures.__file__).read().replace("without pyplot", "")
