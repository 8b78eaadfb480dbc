"""The size of a Flower message as it is serialised, without serialising its arrays.

Flower cuts a message into objects (the message, its records, arrays and chunks of at most 5 MB), each with a header
that names its children by 64-digit hashes, and sends them with a tree of those names and an envelope. Only lengths
matter for the size, so nothing is hashed here. Arrays with equal contents are counted each time: Flower would send
them once, and a B of zeros must not look cheap.

This file and the in-process runtime are the only ones that use private names of Flower; its tests compare every
size with the real serialisation.
"""

import json
from collections.abc import Mapping
from math import ceil

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK_BYTES
from flwr.common.serde import message_to_proto

_ID = "0" * 64
_TREE_ID_BYTES = 2 + len(_ID)

Record = ArrayRecord | ConfigRecord | MetricRecord
Size = tuple[int, int]


def record_bytes(message: Message, *, content: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return the serialised bytes of a message: by array record, and under `""` for all that is not an array record.

    The sum over the parts is the size of the whole message. `content` is the `content_bytes` of its content, where
    another message with the same one has been counted before.
    """
    bare = remove_content_from_message(message)
    envelope = _envelope(bare)
    # Without its content a message keeps an empty record as its child, so its own object has the same size.
    own = len(bare.deflate())
    if not message.has_content():
        return {"": own + envelope + _TREE_ID_BYTES}
    parts = dict(content or content_bytes(message.content))
    parts[""] += own + envelope
    return parts


def content_bytes(content: RecordDict) -> dict[str, int]:
    """Return the serialised bytes of a message's content alone, by array record and under `""` for the rest."""
    sizes = {name: _record(record) for name, record in content.items()}
    own = _object("RecordDict", len(sizes), len(json.dumps(dict.fromkeys(sizes, _ID))))
    tree = _tree([_tree([tree for _, tree in sizes.values()])])
    parts = {name: sizes[name][0] for name, record in content.items() if isinstance(record, ArrayRecord)}
    rest = sum(size for name, (size, _) in sizes.items() if name not in parts)
    return {**parts, "": own + rest + tree}


def _envelope(bare: Message) -> int:
    """Return the size of a message's metadata as sent; Flower gives a message its id only then."""
    proto = message_to_proto(bare)
    proto.metadata.message_id = _ID
    return int(proto.ByteSize())


def _record(record: Record) -> Size:
    """Return a record's size in bytes with everything below it, and the size of its tree of names."""
    if not isinstance(record, ArrayRecord):
        return len(record.deflate()), _TREE_ID_BYTES
    arrays = [_array(array) for array in record.values()]
    body = len(json.dumps(dict.fromkeys(record, _ID)))
    total = _object("ArrayRecord", len(arrays), body) + sum(size for size, _ in arrays)
    return total, _tree([tree for _, tree in arrays])


def _array(array: Array) -> Size:
    num_chunks = ceil(len(array.data) / CHUNK_BYTES)
    manifest = {
        "dtype": array.dtype,
        "shape": array.shape,
        "stype": array.stype,
        "arraychunk_ids": list(range(num_chunks)),
    }
    total = _object("Array", num_chunks, len(json.dumps(manifest)))
    for start in range(0, len(array.data), CHUNK_BYTES):
        total += _object("ArrayChunk", 0, min(CHUNK_BYTES, len(array.data) - start))
    return total, _tree([_TREE_ID_BYTES] * num_chunks)


def _object(name: str, num_children: int, body: int) -> int:
    """Return the size of one object: `name value-divider children value-divider body-length body-divider body`."""
    children = num_children * len(_ID) + max(0, num_children - 1)
    return len(name) + children + len(str(body)) + 3 + body


def _tree(children: list[int]) -> int:
    """Return the size of a protobuf tree node: its own name, and each child as a length-prefixed message."""
    return _TREE_ID_BYTES + sum(1 + _varint(child) + child for child in children)


def _varint(value: int) -> int:
    return max(1, ceil(value.bit_length() / 7))
