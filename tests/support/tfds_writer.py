"""Writes small TFDS directories, as TFDS itself would, without TensorFlow."""

import json
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2


def write_set(
    data_dir: Path, name: str, features, splits: dict, *, version="1.0.0", file_format="array_record"
) -> Path:
    """Writes a set of one file per split.

    Args:
        data_dir: Where to.
        name: Such as ``tiny`` or ``tiny/config``.
        features: A ``tfds.features.FeaturesDict``.
        splits: A list of examples for each split; examples hold bytes (images: the encoded ones), strings and integers.
        version: Of the set.
        file_format: What the set's description says that it is stored as.
    """
    folder = data_dir / name / version
    folder.mkdir(parents=True)
    stem = name.partition("/")[0]
    for split, examples in splits.items():
        file = folder / f"{stem}-{split}.{file_format}-00000-of-00001"
        writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")
        for example in examples:
            writer.write(_serialised(example))
        writer.close()
    features.save_config(folder)
    info = {
        "name": stem,
        "version": version,
        "fileFormat": file_format,
        "moduleName": "nowhere",
        "splits": [
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": "1",
                "shardLengths": [str(len(examples))],
            }
            for split, examples in splits.items()
        ],
    }
    if "/" in name:
        info["configName"] = name.partition("/")[2]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def _serialised(example: dict) -> bytes:
    proto = tf_example_pb2.Example()
    for field, value in example.items():
        feature = proto.features.feature[field]
        if isinstance(value, int):
            feature.int64_list.value.append(value)
        else:
            feature.bytes_list.value.append(value.encode() if isinstance(value, str) else value)
    return proto.SerializeToString()
