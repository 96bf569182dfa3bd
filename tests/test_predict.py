"""predict.py: the probabilities of test.py, whatever the pictures come as; what is unreadable is named."""

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import checkpoint
import figures
import models
import predict
import predictor
import tables
import test
from augment import IMAGENET_MEAN, IMAGENET_STD
from errors import InputError, guard
from preprocess import load_picture

REAL = Path(os.environ.get("REAL_DATA", "absent"))


def run(*arguments):
    """predict.py's exit status, in this process."""
    return guard(predict.main, [*map(str, arguments), "--device", "cpu", "--workers", "0"])


def net_of(run_folder):
    return predictor.load(run_folder, "cpu", None, 0)


def read_probs(path, labels):
    sheet = (
        pd.read_excel(path, dtype={"ID": str})
        if path.suffix == ".xlsx"
        else pd.read_csv(path, dtype={"ID": str})
    )
    return sheet.set_index("ID")[labels].astype(float)


@pytest.fixture(scope="session")
def tested(trained, tmp_path_factory):
    """Probabilities by test.py of the validation part: name -> (data frame by ID, labels)."""
    made = {}

    def probs(name):
        if name not in made:
            out = tmp_path_factory.mktemp(f"tested-{name}")
            flags = [
                "--out",
                out,
                "--device",
                "cpu",
                "--resamples",
                5,
                "--workers",
                0,
                "--cache",
                out / "cache",
            ]
            assert guard(test.main, ["--ckpt", str(trained(name)), *map(str, flags)]) == 0
            labels = checkpoint.load_checkpoint(trained(name) / "best.pt")["labels"]
            made[name] = read_probs(out / "probs.xlsx", labels), labels
        return made[name]

    return probs


# ---------------------------------------------------------------- the same answers as test.py


@pytest.mark.parametrize("name", ["odir", "retina", "mrnet"])
def test_probabilities_are_those_of_test(name, trained, rendered, tested, tmp_path):
    expected, labels = tested(name)
    folder = {"odir": "images", "retina": "train", "mrnet": "valid"}[name]
    assert (
        run(
            "--ckpt",
            trained(name) / "best.pt",
            rendered(name) / folder,
            "--out",
            tmp_path,
            "--precision",
            "fp32",
        )
        == 0
    )
    ours = read_probs(tmp_path / "predictions.csv", labels)
    if name == "mrnet":
        expected.index = expected.index.str.removeprefix("valid-")
    assert len(expected) >= 2 and np.ptp(expected.to_numpy(), axis=0).max() > 1e-3, (
        "all rows alike: the comparison would say nothing"
    )
    np.testing.assert_allclose(ours.loc[expected.index], expected, atol=1e-6, rtol=1e-5)


def test_bf16_is_near_fp32_and_the_same_one_by_one(trained, rendered, tmp_path):
    frames, labels = [], ["diabetic retinopathy", "glaucoma", "normal"]
    for precision in ("bf16", "fp32"):
        out = tmp_path / precision
        assert (
            run(
                "--ckpt",
                trained("retina"),
                rendered("retina") / "test",
                "--out",
                out,
                "--precision",
                precision,
            )
            == 0
        )
        frames.append(read_probs(out / "predictions.csv", labels))
    net = predictor.load(trained("retina"), "cpu", "bf16", 0)
    alone = [net.predict(rendered("retina") / "test" / name) for name in frames[0].index]
    assert np.abs(pd.DataFrame(alone).to_numpy() - frames[0].to_numpy()).max() < 1e-4
    assert 0 < np.abs(frames[0] - frames[1]).to_numpy().max() < 0.2


def test_pictures_are_preprocessed_as_in_training(trained, rendered, tmp_path):
    """A picture of another size, against the network fed by hand."""
    source = next((rendered("retina") / "train").glob("*.jpg"))
    large = tmp_path / "large.png"
    with Image.open(source) as image:
        wide = Image.new("RGB", (500, 300))
        wide.paste(image.resize((280, 280)), (150, 10))
        wide.save(large)
    ckpt = trained("retina") / "best.pt"
    saved = checkpoint.load_checkpoint(ckpt)
    model = models.AlexNet(3, saved["args"]["size"])
    model.load_state_dict(saved["model"])
    array, _ = load_picture(large, saved["args"]["preprocess"], saved["args"]["size"])
    image = torch.tensor(array).permute(2, 0, 1).float() / 255
    image = (image - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
    with torch.no_grad():
        model.eval()
        by_hand = model.classifier(model.backbone(image[None])).softmax(1)[0].numpy()
    shutil.copyfile(large, tmp_path / "other.png")
    assert run("--ckpt", ckpt, large, tmp_path / "other.png", "--out", tmp_path, "--precision", "fp32") == 0
    np.testing.assert_allclose(
        read_probs(tmp_path / "predictions.csv", saved["labels"]).loc["large.png"], by_hand, atol=1e-5
    )


# ---------------------------------------------------------------- one patient, on the terminal and as a picture


def test_one_pair(trained, rendered, tested, tmp_path, capsys, monkeypatch):
    expected, labels = tested("odir")
    patient = expected.index[0]
    seen = []
    drawn = figures.prediction
    monkeypatch.setattr(figures, "prediction", lambda *given: seen.append(given) or drawn(*given))
    images = rendered("odir") / "images"
    threshold = float(np.sort(expected.loc[patient])[-2:].mean())  # between the two strongest
    pair = [images / f"{patient}_left.jpg", images / f"{patient}_right.jpg"]
    capsys.readouterr()  # of the training, where this test is the first that asks for it
    assert (
        run(
            "--ckpt",
            trained("odir") / "best.pt",
            *pair,
            "--out",
            tmp_path,
            "--threshold",
            threshold,
            "--precision",
            "fp32",
        )
        == 0
    )
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0] in labels]
    lines = [[line[0], *line[2:]] for line in lines]  # without the label's word
    assert [line[0] for line in lines] == labels
    np.testing.assert_allclose([float(line[1]) for line in lines], expected.loc[patient], atol=1e-4)
    assert [line[0] for line in lines if line[-1] == "<--"] == [expected.loc[patient].idxmax()]
    assert "not a medical device" in text.lower() and "!! RENDERED pictures, in training or here" in text
    ((rows, _, note),) = seen
    assert "Not a medical device" in note and "RENDERED" in note and "its own maximum" in note
    assert [row["title"] for row in rows] == ["left eye", "right eye"]
    with Image.open(tmp_path / "prediction.png") as image:
        assert image.width > 1000 and np.asarray(image.convert("L")).std() > 20
    assert sorted(file.name for file in tmp_path.iterdir()) == ["prediction.png"]


def test_one_exam_as_folder_and_as_three_files(trained, rendered, tmp_path, capsys):
    valid, exam = rendered("mrnet") / "valid", tmp_path / "my knee"
    name = next((valid / "axial").iterdir()).name
    exam.mkdir()
    for plane in ("axial", "coronal", "sagittal"):
        shutil.copyfile(valid / plane / name, exam / f"{plane}.npy")
    tables = []
    for given in ([exam], [valid / plane / name for plane in ("axial", "coronal", "sagittal")]):
        assert run("--ckpt", trained("mrnet") / "best.pt", *given, "--out", tmp_path) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        tables.append([line for line in lines if line[:1] in (["abnormal"], ["acl"], ["meniscus"])])
    assert len(tables[0]) == 3 and tables[0] == tables[1]
    (exam / "coronal.npy").unlink()
    assert run("--ckpt", trained("mrnet") / "best.pt", exam, "--out", tmp_path) == 2
    assert "coronal.npy is missing" in capsys.readouterr().err


def test_marks_only_what_is_above_the_threshold(capsys):
    predict.print_table(["a", "bb"], [0.5, 0.501], [False, True], [0.5, 0.5])
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.split() == ["a", "0.5000", "#" * 20 + "|" + "." * 19]
    assert second.split() == ["bb", "0.5010", "#" * 20 + "|" + "." * 19, "<--"]
    predict.print_table(["a"], [1.0], [True], [1.0])  # the threshold's sign stays inside the bar
    assert capsys.readouterr().out.splitlines()[0].split()[2] == "#" * 39 + "|"


def test_real_data_is_not_called_rendered(trained, rendered, tmp_path, capsys):
    state = checkpoint.load_checkpoint(trained("retina") / "best.pt")
    state["data"] = {**state["data"], "rendered": False}
    checkpoint.save_checkpoint(
        tmp_path / "real.pt",
        state.pop("kind"),
        **{key: value for key, value in state.items() if key != "format"},
    )
    capsys.readouterr()
    assert run("--ckpt", tmp_path / "real.pt", rendered("retina") / "test", "--out", tmp_path) == 0
    text = capsys.readouterr().out
    assert "RENDERED" in text and "Not a medical device" in text  # the pictures are
    assert set(pd.read_csv(tmp_path / "predictions.csv")["note"]) == {
        "RENDERED pictures, in training or here"
    }
    shutil.copytree(rendered("retina") / "test", tmp_path / "elsewhere")
    assert run("--ckpt", tmp_path / "real.pt", tmp_path / "elsewhere", "--out", tmp_path) == 0
    assert "RENDERED" not in capsys.readouterr().out
    assert "note" not in pd.read_csv(tmp_path / "predictions.csv")


def test_the_picture_is_of_the_network_that_gave_the_number(trained, rendered, tmp_path, monkeypatch):
    """Bars and heat maps: one forward pass of the network in front of the table."""
    seen, drawn = [], figures.prediction
    monkeypatch.setattr(figures, "prediction", lambda *given: seen.append(given) or drawn(*given))
    eye = sorted((rendered("retina") / "test").iterdir())[0]
    assert run("--ckpt", trained("retina"), eye, "--out", tmp_path, "--precision", "bf16") == 0
    net = predictor.load(trained("retina"), "cpu", "bf16", 0)
    ((_, picture, maps),) = net.heatmap(eye)
    (row,), thresholds, _ = seen[0]
    names, probs, cams = zip(*row["maps"], strict=True)
    np.testing.assert_array_equal(row["picture"], picture)
    np.testing.assert_array_equal(cams, list(maps.values()))
    np.testing.assert_allclose(probs, list(net.predict(eye).values()), atol=1e-7)
    assert list(names) == net.labels and thresholds is None


def test_right_before_left_is_noticed(trained, rendered, tmp_path, capsys):
    images = rendered("odir") / "images"
    left = sorted(images.glob("*_left.jpg"))[0]
    right = images / left.name.replace("left", "right")
    assert run("--ckpt", trained("odir"), right, left, "--out", tmp_path) == 2
    assert "Give LEFT RIGHT" in capsys.readouterr().err


def test_learned_thresholds_are_those_of_the_checkpoint(trained, rendered, tmp_path, capsys):
    state = checkpoint.load_checkpoint(trained("mrnet") / "best.pt")
    (tmp_path / "a").mkdir()
    checkpoint.save_checkpoint(tmp_path / "a/best.pt", **{**state, "thresholds": [0.0, 1.0, 0.25]})
    valid = rendered("mrnet") / "valid"
    assert run("--ckpt", tmp_path / "a", valid, "--out", tmp_path, "--learned") == 0
    found = pd.read_csv(tmp_path / "predictions.csv")
    assert ("abnormal" == found["predicted"].str.split(";").str[0]).all(), "every probability is above 0"
    assert not found["predicted"].str.contains("acl").any()
    assert list(found["predicted"].str.contains("meniscus")) == list(found["meniscus"] > 0.25)
    both = ["--learned", "--threshold", 0.9]
    assert run("--ckpt", tmp_path / "a", valid, "--out", tmp_path, *both) == 2
    assert "leave out --threshold" in capsys.readouterr().err
    assert run("--ckpt", trained("mrnet"), valid, "--out", tmp_path, "--learned") == 2
    assert "--folds" in capsys.readouterr().err
    assert run("--ckpt", tmp_path / "a", trained("mrnet"), valid, "--out", tmp_path, "--learned") == 2
    assert "one network" in capsys.readouterr().err


def test_several_networks_give_their_mean(trained, rendered, tmp_path, capsys):
    """Two checkpoints of the same labels, a folder and a file; what is no checkpoint is a picture."""
    state = checkpoint.load_checkpoint(trained("odir") / "best.pt")
    model = {
        name: value * 0.5 if name.startswith("classifier") else value
        for name, value in state["model"].items()
    }
    checkpoint.save_checkpoint(tmp_path / "other.pt", **{**state, "model": model})
    images, answers = rendered("odir") / "images", []
    for ckpt in ([trained("odir")], [tmp_path / "other.pt"], [trained("odir"), tmp_path / "other.pt"]):
        assert run("--ckpt", *ckpt, images, "--out", tmp_path) == 0
        answers.append(read_probs(tmp_path / "predictions.csv", state["labels"]))
    np.testing.assert_allclose(answers[2], (answers[0] + answers[1]) / 2, atol=2e-7)
    assert np.abs(answers[0] - answers[1]).to_numpy().max() > 1e-3
    assert run("--ckpt", trained("odir"), trained("retina"), images, "--out", tmp_path) == 2
    assert "other labels" in capsys.readouterr().err


def test_mirrored_pictures(trained, rendered, tmp_path):
    """--tta is the mean with the mirrored pair, whose eyes change sides."""
    images = rendered("odir") / "images"
    name = sorted(images.glob("*_left.jpg"))[0].name
    pair = [np.asarray(Image.open(images / name.replace("left", side))) for side in ("left", "right")]
    net = net_of(trained("odir"))
    plain = net.predict(*pair)
    both, mirrored = net.predict(*pair, tta=True), net.predict(pair[1][:, ::-1], pair[0][:, ::-1])
    for label in net.labels:
        assert (
            abs(both[label] - (plain[label] + mirrored[label]) / 2) < 2e-3
        )  # mirrored before it is scaled down


# ---------------------------------------------------------------- many, some of them unreadable


def test_several_pictures_give_a_sheet_and_say_so(trained, rendered, tmp_path, capsys):
    """Two photographs, named alike in two folders: a sheet, and with --figures a picture each."""
    eye = sorted((rendered("retina") / "test").iterdir())[0]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copyfile(eye, tmp_path / folder / "eye.jpg")
    shutil.copyfile(eye, tmp_path / "b" / "eye.png")
    given = [tmp_path / "a" / "eye.jpg", tmp_path / "b" / "eye.jpg"]
    assert run("--ckpt", trained("retina"), *given, "--out", tmp_path / "out", "--figures") == 0
    assert f"{tmp_path / 'out/predictions.csv'} written: 2 predicted" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.png"))) == 2 and not (tmp_path / "out/prediction.png").exists()
    assert run("--ckpt", trained("retina"), tmp_path / "b", "--out", tmp_path / "two", "--figures") == 0
    assert sorted(file.name for file in (tmp_path / "two").glob("*.png")) == ["eye-2.png", "eye.png"]


def test_unreadable_ones_are_named_and_the_others_predicted(trained, rendered, tmp_path, capsys):
    folder, whole, part = tmp_path / "eyes", tmp_path / "whole", tmp_path / "part"
    folder.mkdir()
    patients = sorted({file.name.split("_")[0] for file in (rendered("odir") / "images").iterdir()})[:4]
    for patient in patients:
        for side in ("left", "right"):
            shutil.copyfile(
                rendered("odir") / "images" / f"{patient}_{side}.jpg", folder / f"{patient}_{side}.jpg"
            )
    ckpt = trained("odir") / "best.pt"
    assert run("--ckpt", ckpt, folder, "--out", whole) == 0
    (folder / f"{patients[0]}_right.jpg").unlink()
    cut = folder / f"{patients[1]}_left.jpg"
    cut.write_bytes(cut.read_bytes()[:1500])
    (folder / f"._{patients[2]}_left.jpg").write_bytes(b"what macOS leaves beside a file")
    capsys.readouterr()
    assert run("--ckpt", ckpt, folder, "--out", part) == 1
    errors = capsys.readouterr().err
    assert (
        f"{patients[0]}_right" in errors
        and cut.name in errors
        and "2 of 4 cannot be read" in errors
        and patients[2] + "_" not in errors
    )
    before, after = (
        pd.read_csv(out / "predictions.csv", dtype={"ID": str}).set_index("ID") for out in (whole, part)
    )
    assert sorted(after.index) == sorted(patients[2:])
    np.testing.assert_allclose(after.iloc[:, :8], before.loc[after.index].iloc[:, :8], atol=1e-6)
    assert set(after["note"]) == {"RENDERED pictures, in training or here"}
    net = predictor.load(ckpt, "cpu")
    assert set(after["network"]) == {f"{net.title()}, {net.digest[:10]}"}


@pytest.mark.parametrize("fault", ["absent", "empty", "no picture", "black"])
def test_one_unreadable_picture_stops(fault, trained, tmp_path, capsys):
    file = tmp_path / "eye.jpg"
    if fault == "black":
        Image.new("RGB", (100, 100)).save(file)
    elif fault != "absent":
        file.write_bytes(b"" if fault == "empty" else b"hello " * 50)
    assert run("--ckpt", trained("retina") / "best.pt", file, "--out", tmp_path) == 2
    assert "eye.jpg" in capsys.readouterr().err and not (tmp_path / "prediction.png").exists()
    folder = tmp_path / "folder"
    folder.mkdir()
    if fault != "absent":
        shutil.copyfile(file, folder / "eye.jpg")
    assert run("--ckpt", trained("retina") / "best.pt", folder, "--out", tmp_path) == 2, (
        "a folder of which nothing is left"
    )
    assert not (tmp_path / "predictions.csv").exists()


def test_refused_arguments(trained, rendered, tmp_path, capsys):
    eye = next((rendered("retina") / "test").iterdir())
    for ckpt, arguments, said in (
        (tmp_path / "none.pt", [eye], "none.pt is missing"),
        (eye, [eye], "checkpoint"),
        (trained("retina") / "last.pt", [eye], "best.pt"),
        (trained("retina") / "best.pt", [eye, "--threshold", "0.3"], "exclude each other"),
        (trained("retina") / "best.pt", [eye, "--threshold", "1.3"], "0 to 1"),
        (trained("odir") / "best.pt", [eye], "LEFT RIGHT"),
        (trained("mrnet") / "best.pt", [eye, "b.npy"], "sagittal.npy"),
        (trained("odir") / "best.pt", [eye, eye], "twice"),
    ):
        assert run("--ckpt", ckpt, *arguments, "--out", tmp_path) == 2
        assert said in capsys.readouterr().err


# ---------------------------------------------------------------- which pictures are meant


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_picture_beside_a_missing_one_is_not_accused(trained, tmp_path):
    Image.fromarray(np.full((32, 32, 3), 90, np.uint8)).save(tmp_path / "a_left.jpg")
    part, faults = net_of(trained("odir")).open_rows([(tmp_path / "a_left.jpg", tmp_path / "a_rihgt.jpg")])
    assert len(part) == 0 and list(faults.values()) == [
        f"{tmp_path / 'a_rihgt.jpg'}: No such file or directory"
    ]


def test_rows_of_folders_and_command_lines(tmp_path, capsys):
    for name in ("7_LEFT.jpg", "7_right.PNG", "08_left.jpg", "notes.txt", "other.jpg"):
        write(tmp_path / "eyes" / name)
    table, many = tables.given_rows("odir", [tmp_path / "eyes"])
    assert many and list(table["ID"]) == ["7", "08"]  # digits count as numbers
    assert table["files"][0] == (str(tmp_path / "eyes/7_LEFT.jpg"), str(tmp_path / "eyes/7_right.PNG"))
    assert "2 file(s)" in capsys.readouterr().out and table["files"][1][1].endswith("08_right.*")
    table, many = tables.given_rows("aptos", [tmp_path / "eyes"])
    assert many and list(table["ID"]) == ["7_LEFT.jpg", "7_right.PNG", "08_left.jpg", "other.jpg"]
    table, many = tables.given_rows("odir", ["a/5_left.jpg", "b/5_right.jpg"])
    assert not many and table["ID"][0] == "5" and table["files"][0] == ("a/5_left.jpg", "b/5_right.jpg")
    table, many = tables.given_rows("dr", ["a/1.jpg", "b/1.jpg"])
    assert many and list(table["ID"]) == ["a/1.jpg", "b/1.jpg"]
    write(tmp_path / "eyes" / "7_left.png")
    with pytest.raises(InputError, match="two pictures of one eye"):
        tables.given_rows("odir", [tmp_path / "eyes"])
    (tmp_path / "empty").mkdir()
    for name in ("odir", "aptos", "mrnet"):
        with pytest.raises(InputError, match="holds nothing"):
            tables.given_rows(name, [tmp_path / "empty"])


# ---------------------------------------------------------------- real photographs


@pytest.mark.skipif(not REAL.is_dir(), reason="REAL_DATA is not set")
def test_real_photographs(trained, tmp_path, capsys):
    assert (
        run(
            "--ckpt",
            trained("retina") / "best.pt",
            REAL / "fullsize" / "IDRiD_046.jpg",
            "--out",
            tmp_path / "one",
        )
        == 0
    )
    assert (
        run(
            "--ckpt",
            trained("retina") / "best.pt",
            *sorted((REAL / "fullsize").glob("*.jpg"))[:3],
            "--out",
            tmp_path / "three",
        )
        == 0
    )
    assert len(pd.read_csv(tmp_path / "three" / "predictions.csv")) == 3
    eyes = [REAL / "odir" / "images" / f"0_{side}.jpg" for side in ("left", "right")]
    assert run("--ckpt", trained("odir") / "best.pt", *eyes, "--out", tmp_path / "pair") == 0
    assert "0, by odir" in capsys.readouterr().out
    for name in ("one", "pair"):
        with Image.open(tmp_path / name / "prediction.png") as image:
            assert image.width > 1000


@pytest.mark.parametrize(
    "name, text, ids, files",
    [
        ("odir", "LEFT,RIGHT\na.jpg,sub/b.jpg\n", ["a.jpg"], ("a.jpg", "sub/b.jpg")),
        (
            "odir",
            "ID,Left-Fundus,Right-Fundus,N\n007,7_left.jpg,7_right.jpg,1\n",
            ["007"],
            ("7_left.jpg", "7_right.jpg"),
        ),
        ("retina", "file\n x.jpg\ny.png\n", ["x.jpg", "y.png"], ("x.jpg",)),
        (
            "mrnet",
            "axial,coronal,sagittal,ID\n1a.npy,1c.npy,1s.npy,01\n",
            ["01"],
            ("1a.npy", "1c.npy", "1s.npy"),
        ),
    ],
)
def test_rows_of_a_csv_are_relative_to_it(name, text, ids, files, tmp_path):
    table, many = tables.given_rows(name, [write(tmp_path / "list" / "these.csv", text)])
    assert many and list(table["ID"]) == ids
    assert table["files"][0] == tuple(str(tmp_path / "list" / file) for file in files)


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("odir", "LEFT,left\na,b\n", "RIGHT"),
        ("odir", "a,b\n1,2\n", "Left-Fundus"),
        ("odir", "LEFT,RIGHT\na.jpg,\n", "empty RIGHT .* row.* 2"),
        ("aptos", "file\na.jpg\nb.jpg\na.jpg\n", "doubled ID .* 4"),
        ("aptos", "ID,file\n,b.jpg\n", "empty ID"),
        ("aptos", "file\n", "no row"),
    ],
)
def test_a_csv_that_is_not_as_expected(name, text, said, tmp_path):
    with pytest.raises(InputError, match=said):
        tables.given_rows(name, [write(tmp_path / "these.csv", text)])


def test_planes_in_another_order_or_of_two_exams_are_refused(tmp_path):
    for planes, exams, said in (
        ("coronal axial sagittal", "777", "another order"),
        ("axial coronal sagittal", "787", "different exams"),
    ):
        for layout in ("{plane}/{exam}.npy", "{exam}/{plane}.npy"):
            pairs = zip(planes.split(), exams, strict=True)
            files = [layout.format(plane=plane, exam=exam) for plane, exam in pairs]
            sheet = write(tmp_path / "these.csv", "axial,coronal,sagittal\n" + ",".join(files) + "\n")
            for given in (files, [sheet]):
                with pytest.raises(InputError, match=said):
                    tables.given_rows("mrnet", given)


def test_a_csv_that_slipped_by_a_row_is_told(tmp_path, capsys):
    sheet = write(tmp_path / "these.csv", "LEFT,RIGHT\n1_left.jpg,2_right.jpg\n2_left.jpg,2_right.jpg\n")
    tables.given_rows("odir", [sheet])
    assert f"eyes of two patients in 1 row(s), first {sheet}, sheet row 2" in capsys.readouterr().out


def test_csv_end_to_end(trained, rendered, tmp_path, capsys):
    eyes = sorted((rendered("retina") / "test").iterdir())[:3]
    sheet = write(tmp_path / "these.csv", "file\n" + "\n".join([*map(str, eyes), "gone.jpg"]) + "\n")
    assert run("--ckpt", trained("retina") / "best.pt", sheet, "--out", tmp_path) == 1
    assert "gone.jpg: No such file or directory" in capsys.readouterr().err
    result = pd.read_csv(tmp_path / "predictions.csv")
    assert list(result["ID"]) == list(map(str, eyes))
    probs = result[["diabetic retinopathy", "glaucoma", "normal"]]
    np.testing.assert_allclose(probs.sum(axis=1), 1, atol=1e-5)
    assert list(probs.idxmax(axis=1)) == list(result["predicted"])
