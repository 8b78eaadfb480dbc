"""Cohort layers: one frozen weight for all clients, and a small trained tensor for each of them.

The clients of a round start from the same weights `W` and share the drawn factor, so one matrix product serves all of
them and only the trained factor is batched: `y = x W^T + scale * (x A^T) B_c^T` for client `c`. The rows of a
cohort's input are its clients' batches, one after the other, all of the same length. A single real client is a cohort
of one.

Full weights, biases and the affine parts of norms can be trained per client too (what FedAvg and trained heads need).
An active `nn.Dropout` draws each client's masks from a generator of that client's own. Left out: layers that mix the
rows of a batch, other dropouts, grouped convolutions with low-rank factors.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedraclora.link import FACTORS


class CohortLayer(nn.Module):
    """What every cohort layer holds: shared tensors, and the tensors of the current cohort.

    `lora_a` is `[rank, in]` where shared and `[clients, rank, in]` where each client has its own, `lora_b` likewise
    `[out, rank]` or `[clients, out, rank]`, and `core` between them, where there is one, `[rank, rank]` or `[clients,
    rank, rank]`; `own_weight` and `own_bias` carry a leading client axis. All are None until bound.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        for name in ("weight", "bias"):
            tensor = getattr(original, name)
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())
        self.num_clients = 1
        self.scale = 1.0
        self.release()

    def release(self) -> None:
        """Forget the cohort's tensors, so that the layer computes what the original did."""
        self.lora_a: Tensor | None = None
        self.lora_b: Tensor | None = None
        self.core: Tensor | None = None
        self.own_weight: Tensor | None = None
        self.own_bias: Tensor | None = None

    def by_client(self, x: Tensor) -> Tensor:
        """Return `x` `[clients * batch, ...]` as `[clients, rows, features]`, its last axis kept."""
        return x.reshape(self.num_clients, -1, x.shape[-1])


class CohortMatrix(CohortLayer):
    """A layer whose weight is a matrix, or a kernel that can be seen as one: it may have low-rank factors."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output with each client's own tensors applied to its own rows."""
        y = self._dense(x)
        return y if self.lora_a is None or self.lora_b is None else self._add_low_rank(x, y, self.lora_a, self.lora_b)

    def _dense(self, x: Tensor) -> Tensor:
        """Return the output by the shared weight and bias, or by the clients' own."""
        raise NotImplementedError

    def _add_low_rank(self, x: Tensor, y: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        """Return `y` plus what the factors add to it for the input `x`."""
        raise NotImplementedError


class CohortLinear(CohortMatrix):
    """`nn.Linear` for a cohort; inputs `[clients * batch, ..., in]`, outputs `[clients * batch, ..., out]`."""

    def _dense(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        if self.own_weight is None:
            if self.own_bias is None:
                return F.linear(x, self.weight, self.bias)
            return (self.by_client(F.linear(x, self.weight)) + self.own_bias.unsqueeze(1)).view(*x.shape[:-1], -1)
        rows, weight = self.by_client(x), self.own_weight.transpose(1, 2)
        if self.own_bias is not None:
            y = torch.baddbmm(self.own_bias.unsqueeze(1), rows, weight)
        else:
            y = torch.bmm(rows, weight)
            y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], -1)

    def _add_low_rank(self, x: Tensor, y: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        if lora_a.ndim == 2:
            hidden = self.by_client(F.linear(x, lora_a))
        else:
            hidden = torch.bmm(self.by_client(x), lora_a.transpose(1, 2))
        if self.core is not None:
            hidden = hidden @ self.core.transpose(-2, -1)
        if lora_b.ndim == 2:
            rows = torch.addmm(y.reshape(-1, y.shape[-1]), hidden.flatten(0, 1), lora_b.t(), alpha=self.scale)
        else:
            rows = torch.baddbmm(self.by_client(y), hidden, lora_b.transpose(1, 2), alpha=self.scale)
        return rows.view_as(y)


class CohortConv2d(CohortMatrix):
    """`nn.Conv2d` for a cohort; its low-rank pair is a convolution to `rank` channels, then one of size 1 x 1."""

    def __init__(self, original: nn.Conv2d) -> None:
        super().__init__(original)
        if original.padding_mode != "zeros":
            raise ValueError(f"padding_mode={original.padding_mode!r} has no cohort form; use 'zeros'")
        self.stride, self.padding, self.dilation = original.stride, original.padding, original.dilation
        self.groups = original.groups

    def _dense(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        if self.own_weight is None:
            bias = self.bias if self.own_bias is None else None
            y = F.conv2d(x, self.weight, bias, self.stride, self.padding, self.dilation, self.groups)
        else:
            y = self._per_client(x, self.own_weight, self.groups)
            y = y if self.bias is None or self.own_bias is not None else y + self.bias[:, None, None]
        if self.own_bias is None:
            return y
        by_client: Tensor = y.unflatten(0, (self.num_clients, -1))
        return (by_client + self.own_bias[:, None, :, None, None]).flatten(0, 1)

    def _per_client(self, x: Tensor, kernels: Tensor, groups: int) -> Tensor:
        """Convolve each client's rows with its own kernels `[clients, channels, in / groups, height, width]`."""
        clients = self.num_clients
        side_by_side = x.unflatten(0, (clients, -1)).transpose(0, 1).flatten(1, 2)
        y = F.conv2d(
            side_by_side, kernels.flatten(0, 1), None, self.stride, self.padding, self.dilation, clients * groups
        )
        by_client: Tensor = y.unflatten(1, (clients, -1))
        return by_client.transpose(0, 1).flatten(0, 1)

    def _add_low_rank(self, x: Tensor, y: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        assert self.weight is not None
        kernel = self.weight.shape[1:]
        if lora_a.ndim == 2:
            hidden = F.conv2d(x, lora_a.unflatten(1, kernel), None, self.stride, self.padding, self.dilation)
        else:
            hidden = self._per_client(x, lora_a.unflatten(2, kernel), 1)
        pixels = hidden.flatten(2).unflatten(0, (self.num_clients, -1))
        if self.core is not None:
            pixels = (self.core if self.core.ndim == 2 else self.core.unsqueeze(1)) @ pixels
        mixed: Tensor = (lora_b if lora_b.ndim == 2 else lora_b.unsqueeze(1)) @ pixels
        return y + self.scale * mixed.flatten(0, 1).view_as(y)


class CohortNorm(CohortLayer):
    """`nn.GroupNorm` or `nn.LayerNorm` whose affine part each client may own; it normalises row by row."""

    def __init__(self, original: nn.GroupNorm | nn.LayerNorm) -> None:
        super().__init__(original)
        self.plain = copy.deepcopy(original)
        self.plain.weight = self.plain.bias = None  # type: ignore[assignment]
        self.is_channels_first = isinstance(original, nn.GroupNorm)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input, scaled and shifted by the shared or the client's own affine part."""
        y: Tensor = self.plain(x)
        weight = self._broadcast(self.own_weight if self.own_weight is not None else self.weight, x)
        bias = self._broadcast(self.own_bias if self.own_bias is not None else self.bias, x)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def _broadcast(self, affine: Tensor | None, x: Tensor) -> Tensor | None:
        if affine is None:
            return None
        assert self.weight is not None
        if affine.ndim > self.weight.ndim:
            affine = affine.repeat_interleave(x.shape[0] // self.num_clients, dim=0)
            missing = x.ndim - affine.ndim
            return (
                affine[(..., *[None] * missing)] if self.is_channels_first else affine[(slice(None), *[None] * missing)]
            )
        return affine[(..., *[None] * (x.ndim - 2))] if self.is_channels_first else affine


@dataclass(frozen=True)
class Draws:
    """Where one step's dropout masks come from: a generator for each client, in the order of the cohort's rows.

    Of the `width` rows that each client has in the input, its first `sizes[client]` are its batch and the rest is
    padding. Only for the batch is anything drawn, so that a client's later masks do not depend on who pads it.
    """

    generators: Sequence[torch.Generator]
    sizes: Sequence[int]
    width: int

    def mask(self, x: Tensor, p: float) -> Tensor:
        """Return what multiplies `x` `[clients * rows, ...]`: 0 with probability `p`, else `1 / (1 - p)`.

        `rows` is a multiple of `width` (a layer may see each row's tokens one by one). Raises ValueError where it is
        not. The numbers are drawn in float32 on the CPU: the same masks for every dtype and device.
        """
        rows, rest = divmod(len(x), len(self.sizes) * self.width)
        if rest:
            raise ValueError(
                f"an nn.Dropout sees {len(x)} rows of {len(self.sizes)} clients with batches of {self.width}; its "
                "first axis must be the batch"
            )
        drawn = torch.ones(len(self.sizes), rows * self.width, *x.shape[1:])
        for own, size, generator in zip(drawn, self.sizes, self.generators, strict=True):
            own[: rows * size].uniform_(generator=generator)
        kept = (drawn >= p).flatten(0, 1).to(x.device)
        return kept.to(x.dtype) / (1 - p if p < 1 else 1)


class CohortDropout(nn.Module):
    """`nn.Dropout` for a cohort. It is off until it is given the draws of a step."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.draws: Draws | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` with each client's numbers dropped by its own masks."""
        return x if self.draws is None else x * self.draws.mask(x, self.p)


_COHORT_LAYERS: dict[type[nn.Module], type[CohortLayer]] = {
    nn.Linear: CohortLinear,
    nn.Conv2d: CohortConv2d,
    nn.GroupNorm: CohortNorm,
    nn.LayerNorm: CohortNorm,
}


_MIXING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def check_trainable(model: nn.Module, dense: Sequence[str]) -> None:
    """Raise ValueError for a parameter that cannot be trained in full, because its layer has no cohort form."""
    for name in dense:
        owner, _, _ = name.rpartition(".")
        layer = model.get_submodule(owner)
        if not owner or type(layer) not in _COHORT_LAYERS:
            kinds = ", ".join(kind.__name__ for kind in _COHORT_LAYERS)
            raise ValueError(
                f"parameter {name!r} belongs to a {type(layer).__name__}; what is trained in full must belong to one "
                f"of {kinds} inside the model"
            )


def check_rows_stay_apart(model: nn.Module) -> None:
    """Raise ValueError for a layer that mixes the rows of a batch, or draws noise that depends on the cohort."""
    for name, module in model.named_modules():
        if isinstance(module, _MIXING) and module.training:
            raise ValueError(
                f"layer {name!r} is a {type(module).__name__} in training mode, which mixes the examples of different "
                "clients; use nn.GroupNorm, or freeze it with .eval() when the model is built"
            )
        if isinstance(module, _DROPOUTS) and type(module) is not nn.Dropout and module.p > 0 and module.training:
            raise ValueError(
                f"layer {name!r} is an active {type(module).__name__} (p={module.p}), whose masks would depend on "
                "which clients train together; use nn.Dropout, or set p=0"
            )


class CohortModel:
    """A copy of a model whose trained layers serve a whole cohort; the rest of its forward pass is the user's own.

    `low_rank` names layers, `dense` names parameters. Tensors are bound by key: `fc1.lora_a`, `fc1.lora_b` for factors
    (`fc1.core` between them) and the parameter's own name for what is trained in full.
    """

    def __init__(self, model: nn.Module, *, low_rank: Sequence[str], dense: Sequence[str]) -> None:
        check_rows_stay_apart(model)
        check_trainable(model, dense)
        self.module = copy.deepcopy(model).requires_grad_(False)
        owners = [*low_rank, *(name.rpartition(".")[0] for name in dense)]
        self._layers = {owner: self._replace(owner) for owner in dict.fromkeys(owners)}
        self._dropouts = self._replace_dropouts()

    def _replace(self, name: str) -> CohortLayer:
        original = self.module.get_submodule(name)
        layer = _COHORT_LAYERS[type(original)](original)
        self._put(name, layer)
        return layer

    def _replace_dropouts(self) -> list[CohortDropout]:
        """Replace every active dropout, under each of its names where it has several."""
        named = self.module.named_modules(remove_duplicate=False)
        dropouts = {name: module for name, module in named if type(module) is nn.Dropout}
        found = {name: CohortDropout(own.p) for name, own in dropouts.items() if own.p > 0 and own.training}
        for name, layer in found.items():
            self._put(name, layer)
        return list(found.values())

    def _put(self, name: str, layer: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.module.get_submodule(parent), child, layer)

    @property
    def has_dropout(self) -> bool:
        """Return whether the model drops anything while it trains."""
        return bool(self._dropouts)

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the named weights (a model's `state_dict`) into the shared tensors."""
        self.module.load_state_dict(weights)

    def release(self) -> None:
        """Forget every cohort's tensors."""
        for layer in self._layers.values():
            layer.release()

    def bind(self, tensors: Mapping[str, Tensor], *, num_clients: int) -> None:
        """Let the layers compute with `tensors`, shared ones and those with a leading axis of `num_clients`."""
        for layer in self._layers.values():
            layer.num_clients = num_clients
        for key, tensor in tensors.items():
            owner, _, attribute = key.rpartition(".")
            setattr(self._layers[owner], attribute if attribute in FACTORS else f"own_{attribute}", tensor)

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Set `scale = alpha / rank` of each named layer."""
        for name, scale in scales.items():
            self._layers[name].scale = scale

    def __call__(self, inputs: Tensor, draws: Draws | None = None) -> Tensor:
        """Return the outputs of `inputs` `[clients * batch, ...]`, with dropout by `draws`, or without."""
        for layer in self._dropouts:
            layer.draws = draws
        outputs: Tensor = self.module(inputs)
        return outputs

    def activation_floats(self, start: Mapping[str, Tensor], inputs: Tensor) -> int:
        """Return how many numbers the layers put out for one row, measured on the first row of `inputs`.

        `start` are the trained tensors of one client, bound for the measurement.
        """
        self.bind({key: tensor.unsqueeze(0) for key, tensor in start.items()}, num_clients=1)
        sizes: list[int] = [inputs[:1].numel()]
        leaves = [module for module in self.module.modules() if not list(module.children())]
        hooks = [leaf.register_forward_hook(lambda _m, _i, output: sizes.append(_numel(output))) for leaf in leaves]
        try:
            with torch.no_grad():
                self(inputs[:1])
        finally:
            for hook in hooks:
                hook.remove()
        return sum(sizes)


def _numel(output: object) -> int:
    return output.numel() if isinstance(output, Tensor) else 0
