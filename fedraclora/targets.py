"""Which layers get low-rank factors, and which parameters are trained in full beside them."""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fedraclora.layers import check_trainable
from fedraclora.plugins import nearest

ALL_LAYERS = "all"


@dataclass(frozen=True)
class MatrixShape:
    """The weight of a target layer as a matrix: `out` rows, `in_` columns (a kernel is flattened into its columns)."""

    out: int
    in_: int


def find_targets(model: nn.Module, targets: str | Sequence[str]) -> dict[str, MatrixShape]:
    """Return the layers that get low-rank factors, in the model's order, with the shapes of their weights.

    `targets` is `all` (every `nn.Linear` and `nn.Conv2d`), a list of names or of their last parts (`["fc1", "query"]`
    matches `encoder.0.query`), or a regular expression that a whole name must match, as PEFT's `target_modules`.
    Raises ValueError where nothing matches, an entry of the list matches nothing, or a match cannot be adapted.
    """
    matched = {name: module for name, module in model.named_modules() if _is_target(name, module, targets)}
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not matched:
        raise ValueError(f"targets={targets!r} match no layer of the model; {nearest(str(targets), layers)}")
    for target in [] if isinstance(targets, str) else targets:
        if not any(_is_called(name, target) for name in matched):
            raise ValueError(
                f"targets names {target!r}, which is no layer of the model; {nearest(target, _names(layers))}"
            )
    return {name: _matrix_shape(model, name, module) for name, module in matched.items()}


def _is_target(name: str, module: nn.Module, targets: str | Sequence[str]) -> bool:
    if targets == ALL_LAYERS:
        return isinstance(module, nn.Linear | nn.Conv2d)
    if isinstance(targets, str):
        try:
            return bool(name) and re.fullmatch(targets, name) is not None
        except re.error as error:
            raise ValueError(f"targets={targets!r} is no regular expression: {error}") from error
    return any(_is_called(name, target) for target in targets)


def _names(layers: Sequence[str]) -> list[str]:
    """Return what the layers may be called: their names, and the last parts of these."""
    return sorted({*layers, *(layer.rpartition(".")[2] for layer in layers)})


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _matrix_shape(model: nn.Module, name: str, module: nn.Module) -> MatrixShape:
    if not name:
        raise ValueError(
            f"the model is a bare {type(module).__name__}, whose layer has no name; wrap it in nn.Sequential"
        )
    is_plain = type(module) in (nn.Linear, nn.Conv2d) and not _inside_attention(model, name)
    if not isinstance(module, nn.Linear | nn.Conv2d) or not is_plain:
        raise ValueError(
            f"layer {name!r} is a {type(module).__name__} that cannot take low-rank factors; "
            "targets must be nn.Linear or nn.Conv2d layers that are called as modules (nn.MultiheadAttention reads its "
            "weights directly: use separate query, key and value nn.Linear layers)"
        )
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros"):
        raise ValueError(
            f"layer {name!r} is a convolution with groups={module.groups} and padding_mode={module.padding_mode!r}; "
            "low-rank factors need groups=1 and padding_mode='zeros'"
        )
    weight: Tensor = module.weight
    return MatrixShape(out=weight.shape[0], in_=weight[0].numel())


def _inside_attention(model: nn.Module, name: str) -> bool:
    parent = name.rpartition(".")[0]
    return isinstance(model.get_submodule(parent), nn.MultiheadAttention)


def find_dense(model: nn.Module, patterns: Sequence[str], targets: Sequence[str]) -> list[str]:
    """Return the parameters trained in full: those whose names match a shell pattern such as `*.bias` or `head.*`.

    Raises ValueError where a pattern matches nothing, where a match is the weight of a low-rank target, or where the
    layer that owns a match has no cohort form.
    """
    names = [name for name, _ in model.named_parameters()]
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"dense pattern {pattern!r} matches no parameter; {nearest(pattern, names)}")
    for name in chosen:
        owner, _, _ = name.rpartition(".")
        if name.endswith(".weight") and owner in targets:
            raise ValueError(f"{name!r} is trained in full and by low-rank factors; take it out of dense or of targets")
    check_trainable(model, chosen)
    return chosen
