"""What one machine's clients share: a replica of the chain, the model, the data, and the clients' own states.

A deployed machine has one client; the simulator has all of them, with one replica between them: each is still sent,
and charged for, exactly what it lacks.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clients.replica_store import ReplicaStore
from clients.state_store import ClientStore
from fedraclora.chain import Chain, Weights, merge_
from fedraclora.data import Examples, IndexArray
from fedraclora.delivery import NOTHING, Delivery, Received, VersionMismatch, receive
from fedraclora.gradients import GradientRules
from fedraclora.layers import CohortModel
from fedraclora.ledger import MIB
from fedraclora.link import Link, LowRank, Private, materialize
from fedraclora.local import Trainer
from fedraclora.plan import RoundPlan
from fedraclora.tasks import row_loss
from fedraclora.travel import Kept, kept_of

log = logging.getLogger("fedraclora")


@dataclass(frozen=True)
class LocalData:
    """The examples on this machine (on the training device, in the model's dtype) and each partition's rows.

    `held_out` are rows of a partition on which its client is scored and does not train.
    """

    examples: Examples
    partitions: dict[int, IndexArray]
    task: str
    held_out: dict[int, IndexArray] = field(default_factory=dict)


@dataclass(frozen=True)
class Memory:
    """Limits on a chunk of the cohort: its bytes, and its clients (0: the bytes alone decide; 1 for exact runs)."""

    chunk_bytes: int = 64 * MIB
    chunk_clients: int = 0


@dataclass
class Replica:
    """This machine's copy of the model and all that its clients train with.

    `files` is where it survives, None where it need not (a simulation in one process); `num_kept` counts the closed
    links that it holds there, `kept` are the factors of the open link of `open_version`.
    """

    model: nn.Module
    data: LocalData
    chain: Chain
    store: ClientStore = field(default_factory=ClientStore)
    memory: Memory = field(default_factory=Memory)
    files: ReplicaStore | None = None
    num_kept: int = 0
    kept: Kept = field(default_factory=dict)
    open_version: int = NOTHING
    _cohort_models: dict[tuple[str, ...], CohortModel] = field(default_factory=dict)

    def advance(self) -> None:
        """Take in what lies on this machine's disk: links that came while another process ran."""
        if self.files is not None:
            with self.files.locked():
                self.files.advance(self.chain)
                self.kept, self.open_version = self.files.read_open() or ({}, NOTHING)
        self.num_kept = self.chain.num_links

    def receive(self, deliveries: Iterable[Delivery]) -> None:
        """Bring the chain to the deliveries' common version; each brings what one client lacked.

        Raises VersionMismatch where that cannot be; what the disk holds of a chain that is not the server's is
        deleted then. A disk that refuses to keep what came is reported by `num_kept`, and training goes on.
        """
        for delivery in deliveries:
            try:
                received = receive(self.chain, delivery, kept=self.kept)
            except VersionMismatch as mismatch:
                if mismatch.has_diverged and self.files is not None:
                    with self.files.locked():
                        self.files.clear()
                raise
            self._keep(received)

    def _keep(self, received: Received) -> None:
        try:
            if self.files is not None:
                with self.files.locked():
                    self.files.keep(self.chain, received)
            self.num_kept = self.chain.num_links
            if self.chain.open is not None:
                self._keep_open(kept_of(self.chain.open), received.version)
        except OSError as error:
            log.warning("what came cannot be kept on this disk, and will be sent again: %s", error)

    def _keep_open(self, kept: Kept, version: int) -> None:
        self.open_version = NOTHING
        self.kept = {**self.kept, **kept} if self.files is None else kept
        if self.files is not None and kept:
            with self.files.locked():
                self.files.keep_open(kept, version)
        self.open_version = version

    @property
    def link(self) -> Link:
        """Return the open link."""
        assert self.chain.open is not None
        return self.chain.open

    def prepare(self, plan: RoundPlan) -> tuple[Trainer, dict[str, Tensor]]:
        """Return a trainer with the frozen weights and factors in place, and the tensors where training starts."""
        training, weights = plan.training, self._shared_weights(plan)
        model = self._cohort_model(plan)
        model.release()
        model.load_weights(weights)
        terms = self.link.low_rank_terms()
        trains_factors = [layer for layer in training.parts if layer not in training.full]
        model.set_scales({layer: terms[layer].scale for layer in trains_factors})
        factors = {key: self._factor(key, terms[layer]) for layer in trains_factors for key in terms[layer].factors}
        start = {key: factors.pop(key) for key in training.keys if key in factors}
        # A frozen factor that is private is bound for each client with its own.
        shared = {key: tensor for key, tensor in factors.items() if not isinstance(self.link.factors[key], Private)}
        model.bind(shared, num_clients=1)
        whole = [f"{layer}.weight" for layer in training.full] + list(training.dense)
        start |= {name: weights[name].to(self._device) for name in whole}
        trainer = Trainer(
            model,
            self.data.examples,
            row_loss(self.data.task),
            self.memory.chunk_bytes,
            self.memory.chunk_clients,
            self._rules(plan, terms),
        )
        return trainer, start

    @property
    def _device(self) -> torch.device:
        return self.data.examples.inputs.device

    def _rules(self, plan: RoundPlan, terms: Mapping[str, LowRank]) -> GradientRules:
        training, projections = plan.training, {}
        for layer in training.full if training.projects else ():
            key = next(key for key in self.link.drawn_names if key.rpartition(".")[0] == layer)
            projections[f"{layer}.weight"] = key.rpartition(".")[2], self._factor(key, terms[layer])
        return GradientRules(projections, training.blocks, training.block_steps, plan.example_clip, plan.example_noise)

    def own_factors(self, client: int, plan: RoundPlan) -> dict[str, Tensor]:
        """Return the factors of the open link that one client draws for itself, by key."""
        own, terms = self.link.of_client(client), self.link.low_rank_terms()
        private = [key for key, factor in self.link.factors.items() if isinstance(factor, Private)]
        used = [key for key in private if key.rpartition(".")[0] in plan.training.parts]
        return {
            key: materialize(own.factors[key], self.chain.merged[terms[key.rpartition(".")[0]].target]).to(self._device)
            for key in used
        }

    def _cohort_model(self, plan: RoundPlan) -> CohortModel:
        training = plan.training
        low_rank = [layer for layer in training.parts if layer not in training.full]
        dense = [f"{layer}.weight" for layer in training.full] + list(training.dense)
        key = (*low_rank, "+", *dense)
        if key not in self._cohort_models:
            model = CohortModel(self.model, low_rank=low_rank, dense=dense)
            self._cohort_models[key] = model
        return self._cohort_models[key]

    def _shared_weights(self, plan: RoundPlan) -> Weights:
        """Return the weights without those low-rank terms of the open link that train as factors."""
        training = plan.training
        low_rank = training.parts.keys() - set(training.full)
        trained = [term for layer, term in self.link.low_rank_terms().items() if layer in low_rank]
        terms = [term for term in self.link.terms if not any(term is other for other in trained)]
        changed = {term.target for term in terms}
        weights = {name: t.clone() if name in changed else t for name, t in self.chain.merged.items()}
        merge_(weights, terms)
        return weights

    def _factor(self, key: str, term: LowRank) -> Tensor:
        """Return a factor where clients train; zeros of its shape stand for a private one."""
        factor, like = term.factors[key], self.chain.merged[term.target]
        if isinstance(factor, Private):
            return torch.zeros(factor.shape, dtype=like.dtype, device=self._device)
        return materialize(factor, like).to(self._device)
