"""Compressors by text: what a plan or a link says of the one that was used, and the object it stands for."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from fedraclora.compressors import COMPRESSORS, Compressor
from fedraclora.plugins import find

PLAIN = "none"


def codec_text(name: str, config: Mapping[str, Any]) -> str:
    """Return a compressor and its settings as text; empty for `none`, which sends numbers as they are."""
    return "" if name == PLAIN else json.dumps([name, dict(config)], separators=(",", ":"))


@functools.cache
def codec_of(text: str) -> Compressor:
    """Return the compressor that a text names. Raises ValueError for one that is not there or has other settings."""
    name, config = json.loads(text) if text else (PLAIN, {})
    plugin = find(COMPRESSORS, name)
    try:
        settings = plugin.Config(**config)
    except TypeError as error:
        raise ValueError(f"compressor {name!r} has other settings than {config}: {error}") from error
    compressor: Compressor = plugin.build(settings)
    return compressor
