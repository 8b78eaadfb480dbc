"""First moments across links: they were gathered in the old link's basis, and the new link has another.

For a trained B the gradient lives in the rows of A, so a moment `m` stands for the direction `m A_old` in weight
space; `transport` takes the closest direction that the new basis holds, `m A_old A_new^T (A_new A_new^T)^+`. For a
trained A it is the mirror image.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fedraclora.link import Link, LowRank, materialize
from fedraclora.optim import Moments


def carry_over(moments: Moments, old: Link, new: Link, *, mode: str) -> Moments:
    """Return the moments with which the round in `new` starts: as they are for `carry`, re-projected for `transport`.

    Within one link the basis is the same and nothing changes.
    """
    if mode == "carry" or old.index == new.index:
        return moments
    before, after = old.low_rank_terms(), new.low_rank_terms()
    return Moments({key: _transport(key, m, before, after) for key, m in moments.tensors.items()}, moments.num_steps)


def _transport(key: str, moment: Tensor, old: Mapping[str, LowRank], new: Mapping[str, LowRank]) -> Tensor:
    layer, _, factor = key.rpartition(".")
    if layer not in new or factor not in ("lora_a", "lora_b"):
        return moment
    other = "lora_a" if factor == "lora_b" else "lora_b"
    basis_old = materialize(getattr(old[layer], other), moment)
    back: Tensor = torch.linalg.pinv(materialize(getattr(new[layer], other), moment))
    return moment @ basis_old @ back if factor == "lora_b" else back @ basis_old @ moment
