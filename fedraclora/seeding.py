"""Seeds: every random number of a run is drawn from a generator whose seed is derived here from one root seed.

A seed is named by labels ("round", 3, "client", 17) instead of being taken from a running generator, so that a draw
depends on what it is for and not on what was drawn before it. The derivation is fixed for all time: golden values in
the tests guard it.
"""

import hashlib

import numpy as np

STREAMS = ("partition", "init", "sketch", "cohort", "batches", "noise")


def derive_seed(root: int, *labels: str | int) -> int:
    """Return the 63-bit seed that `root` and `labels` name.

    Labels are told apart by type, order and grouping: 1 is not "1", ("a", "b") is not ("ab",). The result is in
    [0, 2^63), so that it fits every signed 64-bit integer it is sent or stored as.
    Raises TypeError for a root or label that is neither a str nor an int (a bool is neither).
    """
    message = b"".join(_encoded(part) for part in (root, *labels))
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little") >> 1


def stream(root: int, name: str) -> int:
    """Return the seed of one named stream of a run, the only kind of seed that clients are sent.

    Raises ValueError when `name` is not one of `STREAMS`.
    """
    if name not in STREAMS:
        raise ValueError(f"unknown random stream {name!r}; the streams are {', '.join(STREAMS)}")
    return derive_seed(root, "stream", name)


def generator(seed: int) -> np.random.Generator:
    """Return a new NumPy generator on a Philox counter keyed by `seed`, a non-negative integer below 2^128.

    NumPy may change what the generator's methods draw between its versions; numbers that two machines must agree on
    are taken from the raw integers, as `fedraclora.sketch` does.
    """
    return np.random.Generator(np.random.Philox(key=seed))


def _encoded(part: str | int) -> bytes:
    if isinstance(part, bool) or not isinstance(part, str | int):
        raise TypeError(f"a seed is derived from str and int labels; found {part!r} of type {type(part).__name__}")
    payload = str(part).encode()
    tag = b"s" if isinstance(part, str) else b"i"
    return tag + len(payload).to_bytes(8, "little") + payload
