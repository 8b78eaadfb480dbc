"""What one machine's clients share: a replica of the chain, the model, the data, and the clients' own states.

A deployed machine has one client; the simulator has all of them, with one replica between them: each is still sent,
and charged for, exactly what it lacks.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

from clients.replica_store import ReplicaStore
from clients.state_store import ClientStore
from fedraclora.chain import Chain, Weights, merge_
from fedraclora.data import Examples, IndexArray
from fedraclora.delivery import Delivery, Received, VersionMismatch, receive, sketch_digest
from fedraclora.layers import CohortModel
from fedraclora.ledger import MIB
from fedraclora.link import Link, LowRank, materialize
from fedraclora.local import Trainer
from fedraclora.plan import RoundPlan
from fedraclora.tasks import row_loss

log = logging.getLogger("fedraclora")


@dataclass(frozen=True)
class LocalData:
    """The examples on this machine (on the training device, in the model's dtype) and each partition's rows."""

    examples: Examples
    partitions: dict[int, IndexArray]
    task: str


@dataclass(frozen=True)
class Memory:
    """Limits on a chunk of the cohort: its bytes, and its clients (0: the bytes alone decide; 1 for exact runs)."""

    chunk_bytes: int = 64 * MIB
    chunk_clients: int = 0


@dataclass
class Replica:
    """This machine's copy of the model and all that its clients train with.

    `files` is where it survives, None where it need not (a simulation in one process); `num_kept` counts the closed
    links that it holds there.
    """

    model: nn.Module
    data: LocalData
    chain: Chain
    store: ClientStore = field(default_factory=ClientStore)
    memory: Memory = field(default_factory=Memory)
    files: ReplicaStore | None = None
    num_kept: int = 0
    _cohort_models: dict[tuple[str, ...], CohortModel] = field(default_factory=dict)

    def advance(self) -> None:
        """Take in what lies on this machine's disk: links that came while another process ran."""
        if self.files is not None:
            with self.files.locked():
                self.files.advance(self.chain)
        self.num_kept = self.chain.num_links

    def receive(self, deliveries: Iterable[Delivery]) -> None:
        """Bring the chain to the deliveries' common version; each brings what one client lacked.

        Raises VersionMismatch where that cannot be; what the disk holds of a chain that is not the server's is
        deleted then. A disk that refuses to keep what came is reported by `num_kept`, and training goes on.
        """
        for delivery in deliveries:
            try:
                received = receive(self.chain, delivery)
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
        except OSError as error:
            log.warning("what came cannot be kept on this disk, and will be sent again: %s", error)
            return
        self.num_kept = self.chain.num_links

    @property
    def link(self) -> Link:
        """Return the open link."""
        assert self.chain.open is not None
        return self.chain.open

    @property
    def sketches(self) -> str:
        """Return the digest of the factors that this machine drew for the open link."""
        return sketch_digest(self.link)

    def prepare(self, plan: RoundPlan) -> tuple[Trainer, dict[str, Tensor]]:
        """Return a trainer with the frozen weights and factors in place, and the tensors where training starts."""
        model = self._cohort_model(plan)
        weights = self._shared_weights(plan)
        model.release()
        model.load_weights(weights)
        terms = self.link.low_rank_terms()
        model.set_scales({layer: terms[layer].scale for layer in plan.trained})
        factors = {
            f"{layer}.lora_{side}": self._factor(terms[layer], side) for layer in plan.trained for side in ("a", "b")
        }
        start = {key: factors.pop(key) for key in plan.factors}
        model.bind(factors, num_clients=1)
        data, memory = self.data, self.memory
        start |= {name: weights[name].to(data.examples.inputs.device) for name in plan.dense}
        trainer = Trainer(model, data.examples, row_loss(data.task), memory.chunk_bytes, memory.chunk_clients)
        return trainer, start

    def _cohort_model(self, plan: RoundPlan) -> CohortModel:
        key = (*plan.trained, "+", *plan.dense)
        if key not in self._cohort_models:
            model = CohortModel(self.model, low_rank=list(plan.trained), dense=plan.dense)
            self._cohort_models[key] = model
        return self._cohort_models[key]

    def _shared_weights(self, plan: RoundPlan) -> Weights:
        """Return the weights without those low-rank terms of the open link that train as factors."""
        terms = [term for term in self.link.terms if not (isinstance(term, LowRank) and term.layer in plan.trained)]
        changed = {term.target for term in terms}
        weights = {name: t.clone() if name in changed else t for name, t in self.chain.merged.items()}
        merge_(weights, terms)
        return weights

    def _factor(self, term: LowRank, side: str) -> Tensor:
        factor = materialize(term.lora_a if side == "a" else term.lora_b, self.chain.merged[term.target])
        return factor.to(self.data.examples.inputs.device)
