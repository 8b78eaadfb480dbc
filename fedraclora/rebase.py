"""What a client or a server remembers, across links: it lives in the old link's basis, and the new link has another.

For a trained B the gradient lives in the rows of A, so a remembered `m` (a first moment, a compressor's residual, a
control variate) stands for the direction `m A_old` in weight space; `transport` takes the closest direction that the
new basis holds, `m A_old A_new^T (A_new A_new^T)^+`. For a trained A it is the mirror image. Second moments are not
linear in the basis: they are never transported, and go on as they are, or anew.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedraclora.link import Drawn, Given, Link, Stack, materialize
from fedraclora.sketch import SketchKey

DROP, CARRY, TRANSPORT, KEEP = "drop", "carry", "transport", "keep"
OTHER = {"lora_a": "lora_b", "lora_b": "lora_a"}

Remembered = Mapping[str, Tensor]


def rebase(remembered: Remembered, old: Link, new: Link, *, mode: str) -> tuple[dict[str, Tensor], float]:
    """Return what is remembered with which the round in `new` starts, and the share of it that is lost.

    `mode` is `drop`, `carry` or `keep` (both: as it is), or `transport`; where a tensor's basis is the same nothing
    changes. The loss is the Frobenius norm, in weight space, of what is no longer there over that of what was: 0 for
    nothing lost, 1 for all; what is carried into an unrelated basis points elsewhere, which is a loss of up to 2.
    """
    kept: dict[str, Tensor] = {}
    before, gone = 0.0, 0.0
    for key, tensor in remembered.items():
        basis, other = _basis(key, old), _basis(key, new)
        if basis is None or other is None:
            # Without a drawn factor beside it in both links there are no two bases to compare.
            basis = other = None
        was = _in_weight_space(key, tensor, basis)
        kept[key] = tensor if other is None or basis == other else _move(key, tensor, was, other, mode)
        lost = was - _in_weight_space(key, kept[key], other)
        before += float(was.double().square().sum())
        gone += float(lost.double().square().sum())
    return kept, (gone / before) ** 0.5 if before else 0.0


def _basis(key: str, link: Link) -> Drawn | None:
    """Return the drawn factor whose rows (columns) a remembered factor lives in.

    None for whole tensors and cores, and beside a factor that trains too, which moves a little in each round.
    """
    layer, _, name = key.rpartition(".")
    factor = link.factors.get(f"{layer}.{OTHER[name]}") if name in OTHER else None
    factor = factor.key if isinstance(factor, Given) else factor
    return factor if isinstance(factor, SketchKey | Stack) else None


def _in_weight_space(key: str, tensor: Tensor, basis: Drawn | None) -> Tensor:
    if basis is None:
        return tensor
    matrix = materialize(basis, tensor)
    return tensor @ matrix if key.endswith("lora_b") else matrix @ tensor


def _move(key: str, tensor: Tensor, was: Tensor, basis: Drawn, mode: str) -> Tensor:
    if mode == DROP:
        return torch.zeros_like(tensor)
    if mode in (CARRY, KEEP):
        return tensor
    back: Tensor = torch.linalg.pinv(materialize(basis, tensor))
    return was @ back if key.endswith("lora_b") else back @ was
