"""Pictures: the right figures stand in them, odd labels do no harm, nothing global is touched."""

import io
import sys
import warnings

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from sklearn.metrics import roc_auc_score

import figures
import metrics

LABELS = ["N", "D", "a $label with one dollar", "<b>"]


@pytest.fixture
def answers():
    rng = np.random.default_rng(0)
    y_true = rng.integers(0, 2, (60, 4))
    y_true[:, 3] = 0  # one class only
    return y_true, np.clip(0.3 * y_true + 0.7 * rng.random((60, 4)), 0, 1)


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
    figure = figures.confusion([0, 0, 1], y_prob, list("abc"), "multiclass")
    never = "0\n0%"  # nobody has c: its row stays empty
    assert texts(figure) == ["1\n50%", "1\n50%", never, never, "1\n100%", never, never, never, never]


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_roc_names_what_is_undefined(answers, task):
    y_true, y_prob = answers
    figure = figures.roc(y_true if task == "multilabel" else y_true[:, 0], y_prob, LABELS, task)
    drawn(figure)
    auc = roc_auc_score(y_true[:, 0] == (task == "multilabel"), y_prob[:, 0])  # has label N, or is of class 0
    titles = [ax.get_title() for ax in figure.axes]
    assert (
        len(titles) == 4
        and titles[0] == f"N\nAUC {auc:.3f}"
        and titles[3] == "<b>\nAUC undefined"
        and titles[2].startswith("a \\$label")
    )
    curves = [len(ax.lines) - 1 for ax in figure.axes]  # besides the line of chance
    assert curves == ([1, 1, 1, 0] if task == "multilabel" else [1, 1, 0, 0]), "a line for an undefined label"


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_samples_say_right_and_wrong_in_words(planes):
    picture = np.tile(np.arange(64, dtype=np.uint8)[:, None, None] * 3, (1, 64, 3))
    answers = [
        (["N"], [("N", 0.9)]),
        (["N"], [("D", 0.8)]),
        ([], []),
        (["N", "D"], [("N", 0.7)]),
        (["G"], []),
        (["N"], [("N", 0.5005)]),
        (["N"], [("D", 0.55)]),
    ]
    rows = []
    for i, (truth, predicted) in enumerate(answers):
        row = {"title": f"patient {i} $", "pictures": [picture] * planes, "truth": truth}
        probs = {"N": 0.1, "D": 0.1, "G": 0.2} | dict(predicted)
        rows.append(row | {"prediction": list(dict(predicted)), "probs": probs})
    text = texts(figures.samples(rows))
    verdicts = ["✓ right", "✗ wrong", "✓ right", "◐ partly right", "✗ wrong"]
    verdicts += ["? right, but uncertain", "? wrong, but uncertain"]
    assert [head.split("\n")[1] for head in text[::2]] == verdicts
    assert text[3] == "truth: N\npredicted:\n✗ D  0.80\n– missed: N  0.10"
    assert text[5] == "truth: none\npredicted: none"
    assert text[9] == "truth: G\npredicted: none\n– missed: G  0.20"
    assert text[11] == "truth: N\npredicted:\n✓ N  0.50"


def test_a_missed_label_just_below_the_threshold_is_uncertain():
    row = {"title": "1", "truth": ["G"], "prediction": []}
    verdicts = []
    for prob in (0.39, 0.45):
        verdicts.append(figures.sample_words(row | {"probs": {"G": prob}})[0])
    assert verdicts == ["✗ wrong", "? wrong, but uncertain"]


def extents(ax):
    """(left, top, width, height) of the pictures of an axes, each with its map in it."""
    found = []
    for image in ax.images:
        left, right, bottom, top = image.get_extent()
        found.append((left, top, right - left, bottom - top))
    return found


def heat_row(title, truth, probs, shape=(64, 64, 3)):
    maps = [(label, prob, np.eye(7)) for label, prob in probs.items()]
    return {"title": title, "picture": np.zeros(shape, np.uint8), "maps": maps, "truth": truth}


def test_heat_maps_show_the_three_strongest_labels_and_the_true_ones():
    probs = {"N": 0.5, "D": 0.9, "G": 0.05, "C": 0.7, "A": 0.1}
    rows = [
        heat_row("12 left eye", ["G"], probs),
        heat_row("12 right $", ["D"], probs),
        heat_row("13", [], probs),
    ]
    rows[1]["maps"][3] = ("C", 0.7, np.zeros((3, 3)))
    figure = figures.heatmaps(rows)
    assert texts(figure) == [
        *("12 left eye", "D\n0.90", "C\n0.70", "N\n0.50", "G\n0.05 (true)"),
        *("12 right \\$", "D\n0.90 (true)", "C\n0.70, no evidence", "N\n0.50"),
        *("13", "D\n0.90", "C\n0.70", "N\n0.50"),
    ]
    bold = [text.get_text() for text in figure.axes[0].texts if text.get_weight() == "bold"]
    assert bold == ["G\n0.05 (true)", "D\n0.90 (true)"]
    assert "random" not in figure.get_supxlabel()
    caption = figures.heatmaps(rows, random_trunk=True).get_supxlabel()
    assert "random weights" in caption.replace("\n", " ")


def test_heat_maps_lie_over_the_whole_picture_and_never_over_another():
    probs = {"N": 0.5, "D": 0.9}
    both = figures.heatmaps([heat_row("a", [], probs), heat_row("b", [], probs, (64, 64))])
    drawn(both)
    places = extents(both.axes[0])
    assert len(places) == len(set(places)) == 6
    assert places[0][2] == pytest.approx(places[0][3]), "a square, as the network sees it"
    for above, below in ((0, 3), (1, 4)):
        assert places[below][1] > places[above][1] + places[above][3], "pictures lie over one another"


def test_a_map_is_mixed_into_its_picture():
    """Yellow where it is 1, the picture nearly as it was where it is 0; smooth between; grey pictures too."""
    for shape in ((64, 96), (64, 96, 3)):
        row = heat_row("a", [], {"N": 0.5}) | {"picture": np.full(shape, 100, np.uint8)}
        row["maps"] = [("N", 0.5, np.array([[0.0, 1.0]]))]
        plain, mixed = (np.asarray(image.get_array()) for image in figures.heatmaps([row]).axes[0].images)
        assert (plain == 100).all() and mixed.shape == (64, 96, 3)
        yellow, dark = (np.multiply(colormaps["viridis"](value)[:3], 255) for value in (1.0, 0.0))
        np.testing.assert_allclose(mixed[:, -1], np.tile(0.6 * yellow + 0.4 * 100, (64, 1)), atol=1)
        np.testing.assert_allclose(mixed[:, 0], np.tile(0.1 * dark + 0.9 * 100, (64, 1)), atol=1)
        assert np.abs(np.diff(mixed.astype(int), axis=1)).max() < 20, "steps"


def test_the_mark_stands_above_every_word_and_picture():
    rows = [heat_row(f"{i}", ["N"], {"N": 0.5, "D": 0.9, "G": 0.1}) for i in range(6)]
    figure = figures.mark_rendered(figures.heatmaps(rows))
    array = drawn(figure)
    assert array.shape[1] < 1000 * 60 / 110, "wider than a page"
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    mark = figure._suptitle.get_window_extent(renderer)
    words = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    assert mark.y0 > max(word.y1 for word in words)
    assert all(text.get_fontsize() >= 9 for text in figure.axes[0].texts)


GRADES = ["0 none", "1 mild", "2 moderate", "3 severe", "4 proliferative"]
SMALL = {
    "grades": lambda: figures.confusion([0, 1, 2, 3, 4], np.eye(5), GRADES, "multiclass"),
    "one matrix": lambda: figures.confusion(np.eye(2)[:, :1], np.eye(2)[:, :1], ["a"], "multilabel"),
    "one curve": lambda: figures.roc(np.eye(2)[:, :1], np.eye(2)[:, :1], ["a"], "multilabel"),
    "reliability": lambda: figures.reliability(np.eye(2), np.eye(2)),
    "one map": lambda: figures.heatmaps([heat_row("1", ["N"], {"N": 0.5})], random_trunk=True),
    "one answer": lambda: figures.prediction([heat_row("1", [], {"N": 0.5})], 0.5, "No medical device."),
}


@pytest.mark.parametrize("name", SMALL)
def test_mark_and_caption_touch_nothing_on_small_figures(name):
    figure = figures.mark_rendered(SMALL[name]())
    said = figure.get_supxlabel()
    figures.caption(figure, "a-$-name (aptos, efficientnet-b1, bf16), test: 366 rows, 366 patients")
    array = drawn(figure)
    assert figure.get_supxlabel().startswith(said) and "366 rows" in figure.get_supxlabel().replace("\n", " ")
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    drawings = [ax.get_tightbbox(renderer) for ax in figure.axes]
    words, mark = (text.get_window_extent(renderer) for text in (figure._supxlabel, figure._suptitle))
    assert words.y1 <= min(box.y0 for box in drawings) and mark.y0 >= max(box.y1 for box in drawings)
    for box in (words, mark):
        assert 0 <= box.x0 and box.x1 <= figure.bbox.width and 0 <= box.y0 and box.y1 <= figure.bbox.height
    assert (array[0] == 255).all() and (array[-1] == 255).all(), "words are cut"


def patient(labels, probs, planes):
    """What `prediction` takes of a patient: a line for each picture."""
    return [
        heat_row("picture", [], dict(zip(labels, probs, strict=True)), (32, 32, 3)) for _ in range(planes)
    ]


@pytest.mark.parametrize(("threshold", "marked"), [(0.5, ["0.70  ◀", "0.60  ◀"]), (None, ["0.70  ◀"])])
def test_prediction_marks_the_answers(threshold, marked):
    rows = patient(LABELS, [0.1, 0.7, 0.6, 0.5], 2)
    figure = figures.prediction(rows, threshold, "No medical device.")
    assert [text for text in texts(figure) if "◀" in text] == marked
    titles = [text.get_text() for text in figure.axes[0].texts]
    assert titles == 2 * ["picture", "D\n0.70", "a \\$label with one dollar\n0.60", "<b>\n0.50"]
    assert figure.get_supxlabel() == "No medical device."
    assert ("threshold 0.5" in texts(figure)) == (threshold is not None), "the dashed line has no label"
    assert answers_of(figure).get_title("left") == (
        "◀ above the threshold" if threshold else "◀ strongest class"
    )


def answers_of(figure):
    """The axes with the bars."""
    return next(ax for ax in figure.axes if ax.patches and ax.get_xlabel() == "probability")


def test_prediction_for_knees_has_no_empty_band_and_no_key_of_nothing():
    figure = figures.prediction(patient("abc", [0.1, 0.4, 0.3], 3), 0.5, "")
    drawn(figure)
    bars = answers_of(figure)
    assert bars.get_title("left") == "nothing is above the threshold"
    low, high = bars.get_ylim()
    assert (low, high) == (2.6, -0.6), "a band under the bars"
    assert bars.get_window_extent().height < 0.4 * figure.bbox.height, "three bars as tall as three planes"


def test_prediction_with_a_threshold_per_label():
    thresholds = [0.05, 0.8, 0.6, 0.4]
    figure = figures.prediction(patient(LABELS, [0.1, 0.7, 0.6, 0.5], 1), thresholds, "")
    assert [text for text in texts(figure) if "◀" in text] == ["0.10  ◀", "0.50  ◀"]
    assert "each label's threshold" in texts(figure)


@pytest.mark.parametrize("of_classes", [False, True])
def test_reliability_shows_the_bins_of_the_metric(answers, of_classes):
    y_true, y_prob = answers
    if of_classes:
        y_true, y_prob = y_true[:, 0], y_prob / y_prob.sum(1, keepdims=True)
    figure = figures.reliability(y_true, y_prob, bins=10)
    drawn(figure)
    _, accuracy, count = metrics.reliability(y_true, y_prob, 10)
    above, below = figure.axes
    heights = [bar.get_height() for bar in above.patches]
    assert np.array_equal(heights, accuracy, equal_nan=True)
    assert [bar.get_height() for bar in below.patches] == list(count)
    assert f"{metrics.expected_calibration_error(y_true, y_prob, 10):.3f}" in above.get_title()


def test_grades_come_in_words():
    figure = SMALL["grades"]()
    drawn(figure)
    ticks = [tick.get_text().replace("\n", " ") for tick in figure.axes[0].get_yticklabels()]
    assert ticks == GRADES


def test_rendered_pictures_say_so():
    figure = figures.mark_rendered(figures.confusion([0, 1], np.eye(2), ["a", "b"], "multiclass"))
    assert "RENDERED" in figure.get_suptitle() and drawn(figure)[:12].std() > 5, (
        "the words are not in the picture"
    )


def test_nothing_global_is_touched():
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
    assert "pyplot" not in open(figures.__file__).read().replace("without pyplot", "")
