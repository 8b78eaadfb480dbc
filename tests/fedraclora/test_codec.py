"""Tests of fedraclora.codec."""

import json

import numpy as np
import pytest
import torch

from fedraclora.codec import codec_of, codec_text
from fedraclora.compressors import COMPRESSORS
from fedraclora.plugins import UnknownPlugin, find, names

TENSORS = [torch.linspace(-1, 1, 12).reshape(3, 4), torch.tensor([0.5, -2.0])]
SHAPES = [(3, 4), (2,)]


def test_no_compression_is_no_text() -> None:
    assert codec_text("none", {}) == ""
    sent = codec_of("").encode(TENSORS, 0)
    assert sum(array.nbytes for array in sent.values()) == 4 * 14
    assert all(
        torch.equal(a, b) for a, b in zip(codec_of("").decode(sent, SHAPES, torch.float32, 0), TENSORS, strict=True)
    )


@pytest.mark.parametrize("name", [name for name in names(COMPRESSORS) if name != "none"])
def test_a_text_stands_for_the_compressor_that_its_plug_in_builds(name: str) -> None:
    config = find(COMPRESSORS, name).Config()
    text = codec_text(name, vars(config))
    assert json.loads(text) == [name, vars(config)]
    built, found = find(COMPRESSORS, name).build(config), codec_of(text)
    assert type(found) is type(built)
    expected = built.encode(TENSORS, 5)
    sent = found.encode(TENSORS, 5)
    assert sent.keys() == expected.keys()
    assert all(np.array_equal(sent[key], array) for key, array in expected.items())


def test_the_settings_in_the_text_count() -> None:
    few, many = (codec_of(codec_text("top_k", {"share": share})) for share in (0.1, 0.9))
    assert len(few.encode(TENSORS, 0)["values"]) < len(many.encode(TENSORS, 0)["values"])


def test_a_compressor_is_made_once() -> None:
    assert codec_of(codec_text("top_k", {"share": 0.5})) is codec_of(codec_text("top_k", {"share": 0.5}))


def test_what_is_no_compressor_is_refused() -> None:
    with pytest.raises(UnknownPlugin, match="no plug-in 'top_q'"):
        codec_of('["top_q", {}]')
    with pytest.raises(ValueError, match=r"compressor 'top_k' has other settings than \{'part': 0\.1\}"):
        codec_of('["top_k", {"part": 0.1}]')
    with pytest.raises(ValueError, match="share"):
        codec_of('["top_k", {"share": 2.0}]')
    with pytest.raises(ValueError, match="Expecting value"):
        codec_of("top_k")
