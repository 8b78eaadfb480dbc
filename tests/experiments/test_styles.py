"""Styles tell all names apart, and where compressors are compared they say method and compressor."""

import pytest

from experiments.styles import is_by_compressor, method_styles, run_styles, variants_of
from tests.made_runs import Made, make_runs


def made(name, method, *, up="none", down="none", feedback="none", **own):
    sent = {"uplink": {"name": up, **own}, "downlink": {"name": down}, "memory": {"feedback": feedback}}
    return Made(name, [0.1, 0.9], settings={"method": {"name": method}, **sent})


@pytest.mark.parametrize("num", [7, 20, 40])
def test_styles_of_many_methods_all_differ_by_dashes_and_by_marker(num):
    styles = method_styles([str(i) for i in range(num)]).values()
    assert len({(style.color, style.dashes) for style in styles}) == num
    assert len({(style.color, style.marker) for style in styles}) == num


def test_a_name_stands_for_a_method_and_what_compresses_its_messages(tmp_path):
    runs = make_runs(
        tmp_path,
        made("plain", "rac_lora"),
        made("fine", "rac_lora", up="top_k", share=0.1, feedback="ef"),
        made("coarse", "rac_lora", up="top_k", share=0.01, feedback="ef"),
        made("both", "full", up="int8", stochastic=True, down="float16"),
        Made("old", [0.1, 0.9]),
    )
    assert {name: (found.method, found.compressor) for name, found in variants_of(runs).items()} == {
        "plain": ("rac_lora", "none"),
        "fine": ("rac_lora", "top_k share=0.1 + ef"),
        "coarse": ("rac_lora", "top_k share=0.01 + ef"),
        # What no run has otherwise is not said.
        "both": ("full", "int8, down float16"),
        "old": ("old", "none"),
    }


def test_with_compressors_a_method_has_one_colour_and_a_compressor_one_marker_and_dash(tmp_path):
    mades = [made(f"{m}_{c}", m, up=c) for m in ("rac_lora", "full") for c in ("none", "int8", "int4")]
    styles = run_styles(make_runs(tmp_path, *mades))
    for method in ("rac_lora", "full"):
        assert len({style.color for name, style in styles.items() if name.startswith(method)}) == 1
    for compressor in ("none", "int8", "int4"):
        assert len({(s.marker, s.dashes) for name, s in styles.items() if name.endswith(compressor)}) == 1
    assert len(set(styles.values())) == 6


def test_variants_that_differ_in_something_else_have_styles_of_their_own(tmp_path):
    runs = make_runs(tmp_path, made("a", "rac_lora"), made("b", "rac_lora"), made("c", "rac_lora", up="int8"))
    assert not is_by_compressor(variants_of(runs))
    assert len({style.color for style in run_styles(runs).values()}) == 3
