"""Tests of fedraclora.targets: names to layers with low-rank factors, patterns to parameters trained in full."""

import copy

import pytest
from torch import nn

from fedraclora.models import cnn
from fedraclora.targets import MatrixShape, find_dense, find_targets


def _cnn() -> nn.Module:
    config = cnn.Config(channels=[4, 8], groups=2, hidden=6)
    return cnn.build(config, input_shape=(2, 8, 8), num_outputs=3)


# ---- targets ----


def _encoder() -> nn.Module:
    block = nn.ModuleDict({"query": nn.Linear(4, 4), "value": nn.Linear(4, 6), "query_norm": nn.LayerNorm(4)})
    return nn.ModuleDict({"encoder": nn.ModuleList([block, copy.deepcopy(block)]), "head": nn.Conv2d(3, 5, (2, 7))})


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all", ["encoder.0.query", "encoder.0.value", "encoder.1.query", "encoder.1.value", "head"]),
        (["query"], ["encoder.0.query", "encoder.1.query"]),
        (["head", "1.value"], ["encoder.1.value", "head"]),
        (["encoder.0.query"], ["encoder.0.query"]),
        (r"encoder\.\d\.(query|value)", ["encoder.0.query", "encoder.0.value", "encoder.1.query", "encoder.1.value"]),
        (r".*value", ["encoder.0.value", "encoder.1.value"]),
    ],
)
def test_targets_name_layers_in_model_order(targets: str | list[str], expected: list[str]) -> None:
    assert list(find_targets(_encoder(), targets)) == expected


def test_target_shapes_flatten_kernels_into_columns() -> None:
    found = find_targets(_encoder(), ["0.value", "head"])
    assert found == {"encoder.0.value": MatrixShape(out=6, in_=4), "head": MatrixShape(out=5, in_=3 * 2 * 7)}


@pytest.mark.parametrize("targets", ["hed", ["hed"]])
def test_targets_that_match_nothing_are_answered_with_the_nearest_names(targets: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"hed.*match no layer.*valid: encoder\.0\.query.*head"):
        find_targets(_encoder(), targets)


def test_a_regular_expression_has_to_match_the_whole_name() -> None:
    with pytest.raises(ValueError, match="match no layer"):
        find_targets(_encoder(), "query")


@pytest.mark.parametrize("targets", ["all", ["out_proj"]])
def test_the_inner_layers_of_multihead_attention_are_refused(targets: str | list[str]) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(ValueError, match=r"attention\.out_proj.*separate query, key and value"):
        find_targets(model, targets)


def test_a_plain_linear_inside_attention_is_refused_too() -> None:
    attention = nn.MultiheadAttention(4, 2)
    attention.out_proj = nn.Linear(4, 4)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"attention\.out_proj.*called as modules"):
        find_targets(nn.ModuleDict({"attention": attention}), "all")


def test_targets_without_a_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"encoder\.0\.query_norm.*LayerNorm.*must be nn\.Linear or nn\.Conv2d"):
        find_targets(_encoder(), ["query_norm"])


@pytest.mark.parametrize("options", [{"groups": 2}, {"padding_mode": "reflect", "padding": 1}])
def test_convolutions_without_a_plain_low_rank_form_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"'0'.*need groups=1 and padding_mode='zeros'"):
        find_targets(nn.Sequential(nn.Conv2d(2, 2, 3, **options)), "all")  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", ["all", ""])
def test_a_bare_layer_has_no_name_to_train_it_by(targets: str) -> None:
    with pytest.raises(ValueError, match="bare Linear.*wrap it in nn.Sequential" if targets else "match no layer"):
        find_targets(nn.Linear(4, 3), targets)


def test_each_entry_of_a_list_has_to_match() -> None:
    with pytest.raises(
        ValueError, match=r"targets names 'encoder\.0\.qurey', which is no layer.*did you mean 'encoder\.0\.query'"
    ):
        find_targets(_encoder(), ["head", "encoder.0.qurey"])


def test_an_invalid_regular_expression_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"targets='\(query' is no regular expression: missing \)"):
        find_targets(_encoder(), "(query")


# ---- what is trained in full ----


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["fc2.*"], ["fc2.weight", "fc2.bias"]),
        (["norm?.weight"], ["norm1.weight", "norm2.weight"]),
        (
            ["*.bias", "fc2.weight"],
            ["conv1.bias", "norm1.bias", "conv2.bias", "norm2.bias", "fc1.bias", "fc2.weight", "fc2.bias"],
        ),
        ([], []),
    ],
)
def test_dense_patterns_name_parameters_in_model_order(patterns: list[str], expected: list[str]) -> None:
    assert find_dense(_cnn(), patterns, ["fc1"]) == expected


def test_a_dense_pattern_that_matches_nothing_is_answered_with_names() -> None:
    with pytest.raises(ValueError, match=r"'fc2\.wieght' matches no parameter; did you mean 'fc2\.weight'"):
        find_dense(_cnn(), ["*.bias", "fc2.wieght"], [])


def test_a_weight_is_not_trained_in_two_ways() -> None:
    with pytest.raises(ValueError, match=r"'fc1\.weight' is trained in full and by low-rank factors"):
        find_dense(_cnn(), ["fc1.*"], ["fc1"])


def test_parameters_of_layers_without_a_cohort_form_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    with pytest.raises(
        ValueError, match=r"'0\.weight' belongs to a Embedding; .* one of Linear, Conv2d, GroupNorm, LayerNorm"
    ):
        find_dense(model, ["*.weight"], [])


def test_parameters_of_a_bare_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'weight' belongs to a Linear; .*inside the model"):
        find_dense(nn.Linear(4, 2), ["weight"], [])
