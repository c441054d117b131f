"""Texts of files and of TFDS sets with and without labels; what holds none is refused by its line."""

import pytest
import tensorflow_datasets as tfds

from tests.support.tfds_writer import write_set
from train.data.language import texts


def test_lines_of_a_file_are_texts(tmp_path):
    file = tmp_path / "lines.txt"
    file.write_text("One.\n\n  Two \u2028 still two.\n", "utf-8")
    assert texts.read_file(file) == texts.Texts(["", ""], ["One.", "  Two \u2028 still two."])
    file = tmp_path / "lines.jsonl"
    file.write_text('{"text": "One."}\n{"prompt": "Two", "completion": " three."}\n', "utf-8")
    assert texts.read_file(file) == texts.Texts(["", "Two"], ["One.", " three."])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n", r"data: .*a.txt holds no text"),
        ("a.csv", "x", r"data: got .*a.csv, expected a file named \*.txt or \*.jsonl"),
        (
            "a.jsonl",
            '{"text": "x"}\n{"prompt": "y"}',
            r"data: line 2 of .*a.jsonl is '.\"prompt\": \"y\".', exp",
        ),
        ("a.jsonl", '{"text": 3}', r"data: line 1 of .* with strings"),
        ("a.jsonl", "[1]", r"data: line 1 of "),
        ("a.jsonl", "{", r"data: line 1 of "),
    ],
)
def test_what_holds_no_texts_is_refused(name, content, message, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data: .* is not there"):
        texts.read_file(tmp_path / name)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        texts.read_file(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [False, True])
def test_fields_of_a_set_are_texts_of_their_own_whether_it_has_labels_or_not(labelled, tmp_path):
    rows = [{"first": "a", "second": "b"}, {"first": " ", "second": "c"}]
    features = {name: tfds.features.Text() for name in ("first", "second")}
    if labelled:  # hidden ones, as in the test splits of GLUE
        rows = [row | {"label": -1} for row in rows]
        features["label"] = tfds.features.ClassLabel(num_classes=2)
    write_set(tmp_path, "pairs", tfds.features.FeaturesDict(features), {"train": rows})
    split = texts.open_texts("pairs", "train", tmp_path)
    assert texts.read_split(split) == texts.Texts(["", "", ""], ["a", "b", "c"])
    assert split.num_classes == 0
    images = tfds.features.FeaturesDict({"image": tfds.features.Image(shape=(2, 2, 3))})
    write_set(tmp_path, "images", images, {"train": [{"image": b"never decoded"}]})
    with pytest.raises(ValueError, match=r"data: .* holds images, expected texts"):
        texts.open_texts("images", "train", tmp_path)
