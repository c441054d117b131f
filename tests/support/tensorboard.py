"""Reads what was written for TensorBoard."""

import importlib
import struct


def events_in(folder):
    """The entries of the one file of a folder of TensorBoard."""
    event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
    (file,) = folder.iterdir()
    content, events = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return events


def read_tensorboard(folder):
    """What is in a folder of TensorBoard: a scalar or a text for each step and name."""
    found = []
    for event in events_in(folder):
        for value in event.summary.value:
            texts = [text.decode() for text in value.tensor.string_val]
            found.append((event.step, value.tag.partition("/")[0], texts[0] if texts else value.simple_value))
    return found
