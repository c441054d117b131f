import io
import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests.support.tfds_writer import write_set
from train.data import evaluation_split, open_split
from train.data.directory import find, prepared


def features(**others):
    label = tfds.features.ClassLabel(names=["cat", "dog", "owl"])
    return tfds.features.FeaturesDict({"label": label, **others})


def encoded(height, width, seed, encoding="png"):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, encoding)
    return pixels, stream.getvalue()


def text_set(folder, name="reviews", examples=40, **wrong):
    rows = [{"text": f"text {i} " * 20, "label": i % 3} | wrong for i in range(examples)]
    return write_set(folder, name, features(text=tfds.features.Text()), {"train": rows})


@pytest.mark.parametrize(
    ("name", "lengths", "classes"),
    [
        ("cifar10", {"train": 50_000, "test": 10_000}, 10),
        ("cifar100", {"train": 50_000, "test": 10_000}, 100),
        ("glue/cola", {"train": 8551, "validation": 1043}, 2),
        ("glue/mrpc", {"train": 3668, "validation": 408}, 2),
    ],
)
def test_the_prepared_sets(shared, name, lengths, classes):
    for split, length in lengths.items():
        opened = open_split(name, split, shared / "data/tfds")
        assert (len(opened), opened.num_classes, opened.name.rpartition("/")[0]) == (length, classes, name)
        assert opened.label == "label"  # CIFAR-100 has coarse_label too
    assert evaluation_split(name, shared / "data/tfds") == list(lengths)[1]


def test_records_are_those_of_tfds(shared):
    split = open_split("cifar10", "train[100:200]", shared / "data/tfds")
    source = tfds.data_source("cifar10", split="train", data_dir=shared / "data/tfds", download=False)
    records = split.fetch(np.array([5, 0, 99]))
    expected = source.__getitems__([105, 100, 199])
    np.testing.assert_array_equal(records.inputs[0], [row["image"] for row in expected])
    assert records.labels.tolist() == [row["label"] for row in expected]
    assert (records.labels.dtype, records.inputs[0][0].dtype) == (np.int32, np.uint8)
    assert len(split) == 100


def test_sentences_of_glue(shared):
    mrpc = open_split("glue/mrpc", "validation", shared / "data/tfds")
    assert (mrpc.kind, mrpc.inputs) == ("text", ("sentence1", "sentence2"))
    first, second = mrpc.fetch([0]).inputs
    assert isinstance(first[0], str)
    assert first != second
    assert open_split("glue/cola", "train", shared / "data/tfds").inputs == ("sentence",)


def test_hidden_labels(shared):
    with pytest.raises(
        ValueError, match=r"example 3 of split 'test' of glue/mrpc/2.0.0 .* label -1, expected 0 to 1; "
    ):
        open_split("glue/mrpc", "test", shared / "data/tfds").fetch([3, 4])


def test_images_of_varying_size(tmp_path):
    pictures = [encoded(20 + i, 30 - i, seed=i) for i in range(5)]
    rows = [{"image": data, "label": i % 3, "file_name": f"{i}.png"} for i, (_, data) in enumerate(pictures)]
    others = {"image": tfds.features.Image(encoding_format="jpeg"), "file_name": tfds.features.Text()}
    write_set(tmp_path, "imagenet2012", features(**others), {"train": rows, "validation": rows[:2]})
    split = open_split("imagenet2012", "train", tmp_path)
    assert (split.kind, split.inputs, split.image_shape) == ("image", ("image",), (None, None, 3))
    assert split.label_names == ("cat", "dog", "owl")
    records = split.fetch(range(5))
    for image, (pixels, _) in zip(records.inputs[0], pictures, strict=True):
        np.testing.assert_array_equal(image, pixels)
    assert records.labels.tolist() == [0, 1, 2, 0, 1]
    assert evaluation_split("imagenet2012", tmp_path) == "validation"


def test_a_split_is_pickled_for_the_workers(tmp_path):
    text_set(tmp_path)
    split = open_split("reviews", "train[:10]", tmp_path)
    assert pickle.loads(pickle.dumps(split)).fetch([7]).inputs == split.fetch([7]).inputs


@pytest.mark.parametrize(
    ("texts", "arguments", "expected"),
    [
        (("text",), {}, ("text",)),
        (("sentence1", "sentence2"), {}, ("sentence1", "sentence2")),
        (("hypothesis", "premise"), {}, ("premise", "hypothesis")),
        (("question", "sentence"), {}, ("question", "sentence")),
        (("a", "b", "c"), {"sentences": ("c", "a")}, ("c", "a")),
    ],
)
def test_which_texts_are_read(tmp_path, texts, arguments, expected):
    row = {"label": 0} | {name: f"the {name}" for name in texts}
    write_set(tmp_path, "texts", features(**{name: tfds.features.Text() for name in texts}), {"train": [row]})
    split = open_split("texts", "train", tmp_path, **arguments)
    assert split.inputs == expected
    assert split.fetch([0]).inputs == tuple([f"the {name}"] for name in expected)


def test_features_that_do_not_say_what_to_read(tmp_path):
    texts = {name: tfds.features.Text() for name in "abc"}
    write_set(tmp_path, "three", features(**texts), {"train": [{"label": 0, "a": "", "b": "", "c": ""}]})
    with pytest.raises(
        ValueError, match=r"text features \['a', 'b', 'c'\], expected one image, or one or two texts; name"
    ):
        open_split("three", "train", tmp_path)
    with pytest.raises(ValueError, match=r"sentences: got \['d'\], expected one or two of \['a', 'b', 'c'\]"):
        open_split("three", "train", tmp_path, sentences=["d"])
    with pytest.raises(ValueError, match=r"label: got 'a', expected one of \['label'\], the class labels of three"):
        open_split("three", "train", tmp_path, sentences=["a"], label="a")
    write_set(
        tmp_path, "unlabelled", tfds.features.FeaturesDict({"text": tfds.features.Text()}), {"train": [{"text": ""}]}
    )
    with pytest.raises(ValueError, match=r"expected one of \[\], .* take a classification set"):
        open_split("unlabelled", "train", tmp_path)


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        ("train", "train[90%:]", 4),
        ("train[:90%]", "train[90%:]", 0),
        ("train[:20]", "train[15:30]", 5),
        ("train[:5]+train[30:]", "train[4:31]", 2),
        ("train", "test", 0),
        ("test", "train+test", 6),
    ],
)
def test_examples_in_common(tmp_path, one, other, common):
    rows = {split: [{"text": "x", "label": 0}] * n for split, n in (("train", 40), ("test", 6))}
    write_set(tmp_path, "reviews", features(text=tfds.features.Text()), rows)
    first, second = (open_split("reviews", split, tmp_path) for split in (one, other))
    assert first.overlap(second) == second.overlap(first) == common


def test_the_only_class_label_is_the_label(tmp_path):
    spec = {"text": tfds.features.Text(), "topic": tfds.features.ClassLabel(num_classes=4)}
    write_set(tmp_path, "topics", tfds.features.FeaturesDict(spec), {"train": [{"text": "x", "topic": 3}]})
    split = open_split("topics", "train", tmp_path)
    assert (split.label, split.num_classes, split.fetch([0]).labels.tolist()) == ("topic", 4, [3])


def test_directory_that_is_not_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"data_dir: .*nowhere is not a directory.*tfds build cifar10 --data_dir"
    ):
        open_split("cifar10", "train", tmp_path / "nowhere")


def test_set_that_is_not_there(tmp_path):
    text_set(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no set 'cifar10' is prepared in .*\['reviews/1.0.0'\]; .*tfds build"):
        open_split("cifar10", "train", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no set 'reviews:2.0.0'"):
        open_split("reviews:2.0.0", "train", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="none at all"):
        evaluation_split("cifar10", tmp_path / "empty")


def test_the_default_directory_is_that_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    text_set(tmp_path)
    assert len(open_split("reviews")) == 40


def test_the_newest_version_is_taken_unless_one_is_named(tmp_path):
    spec = features(text=tfds.features.Text())
    for version, examples in (("1.9.0", 1), ("1.10.0", 2)):
        write_set(tmp_path, "sets/one", spec, {"train": [{"text": "", "label": 0}] * examples}, version=version)
    assert prepared(tmp_path) == ["sets/one/1.10.0", "sets/one/1.9.0"]
    assert len(open_split("sets/one", "train", tmp_path)) == 2
    assert len(open_split("sets", "train", tmp_path)) == 2  # the only configuration
    assert (
        len(open_split("sets/one:1.9.0", "train", tmp_path))
        == len(open_split("sets/one/1.9.0", "train", tmp_path))
        == 1
    )
    write_set(tmp_path, "sets/two", spec, {"train": [{"text": "", "label": 0}]})
    with pytest.raises(ValueError, match=r"'sets' stands for 2 sets in .*\['sets/one', 'sets/two'\]"):
        find("sets", tmp_path)


@pytest.mark.parametrize("split", ["validation", "train[:x]", "train[50:]", "train+no"])
def test_split_that_is_not_there(tmp_path, split):
    text_set(tmp_path)
    with pytest.raises(ValueError, match=r"split: got '.*' of reviews/1.0.0, expected one of \{'train': 40\}"):
        open_split("reviews", split, tmp_path)


def test_no_split_for_the_evaluation(tmp_path):
    text_set(tmp_path)
    with pytest.raises(
        ValueError, match=r"splits \['train'\], expected 'validation' or 'test'.*'train\[:90%\]'.*'train\[90%:\]'"
    ):
        evaluation_split("reviews", tmp_path)


def test_file_that_is_not_there(tmp_path):
    file = next(text_set(tmp_path).glob("*train*"))
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"reviews-train.array_record-00000-of-00001, a file of split 'train'"):
        open_split("reviews", "train", tmp_path)


def test_set_in_another_format(tmp_path):
    rows = {"train": [{"text": "", "label": 0}]}
    write_set(tmp_path, "old", features(text=tfds.features.Text()), rows, file_format="tfrecord")
    with pytest.raises(ValueError, match=r"stored as tfrecord, expected array_record.*convert_format"):
        open_split("old", "train", tmp_path)


@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_damaged_description(tmp_path, file):
    (text_set(tmp_path) / file).write_text('{"name": ')
    with pytest.raises(ValueError, match=r"reviews/1.0.0 cannot be opened: .*; copy the directory again"):
        open_split("reviews", "train", tmp_path)


def test_corrupted_record(tmp_path):
    file = next(text_set(tmp_path).glob("*train*"))
    data = bytearray(file.read_bytes())
    middle = data.index(b"text 20 ")
    data[middle : middle + 8] = bytes(byte ^ 0xFF for byte in data[middle : middle + 8])
    file.write_bytes(data)
    split = open_split("reviews", "train", tmp_path)
    assert split.fetch([0, 39]).inputs[0][0].startswith("text 0 ")
    with pytest.raises(
        ValueError, match=r"example 20 of split 'train' of reviews/1.0.0 in .* cannot be read: .*; copy"
    ):
        split.fetch(range(40))


def test_truncated_file(shared, tmp_path):
    shutil.copytree(shared / "data/tfds/glue/mrpc", tmp_path / "glue/mrpc", copy_function=shutil.copyfile)
    file = next(tmp_path.glob("glue/mrpc/*/*validation*"))
    file.write_bytes(file.read_bytes()[:100_000])
    split = open_split("glue/mrpc", "validation", tmp_path)
    with pytest.raises(ValueError, match=r"example 0 of split 'validation' of glue/mrpc/2.0.0 .* cannot be read"):
        split.fetch(range(10))


def test_image_that_is_no_image(tmp_path):
    rows = [{"image": encoded(4, 4, 0)[1], "label": 0}, {"image": b"not a picture", "label": 1}]
    spec = features(image=tfds.features.Image(shape=(4, 4, 3), encoding_format="png"))
    write_set(tmp_path, "pictures", spec, {"train": rows})
    with pytest.raises(ValueError, match=r"example 1 of split 'train' of pictures/1.0.0 .* cannot be read"):
        open_split("pictures", "train", tmp_path).fetch([0, 1])


def test_text_that_is_no_text(tmp_path):
    text_set(tmp_path, text=b"\xff\xfe")
    with pytest.raises(ValueError, match=r"example 2 .* cannot be read: UnicodeDecodeError"):
        open_split("reviews", "train", tmp_path).fetch([2])


@pytest.mark.parametrize("label", [-1, 3])
def test_label_out_of_range(tmp_path, label):
    text_set(tmp_path, label=label)
    with pytest.raises(
        ValueError, match=rf"example 5 of split 'train' of reviews/1.0.0 .* label {label}, expected 0 to 2"
    ):
        open_split("reviews", "train", tmp_path).fetch([5])


@pytest.mark.parametrize("index", [-1, 40])
def test_index_out_of_range(tmp_path, index):
    text_set(tmp_path)
    with pytest.raises(IndexError, match=f"indices: got {index}, expected 0 to 39"):
        open_split("reviews", "train", tmp_path).fetch([0, index])
