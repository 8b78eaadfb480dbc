"""The settings of a run and of a comparison: one dataclass each, every key with its meaning beside it.

Hydra composes them from the command line; `method`, `model`, `dataset`, `partition`, `runtime`, `uplink` and `downlink`
are groups, one plug-in a file, each with settings of its own (`method.side=a`, `uplink.share=0.1`).
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SketchSettings:
    """How the frozen random factors are drawn."""

    law: str = "orthonormal"
    # Whether all clients draw the same ones, or each its own (rac_lora).
    shared: bool = True


@dataclass
class ServerSettings:
    """The server's optimiser."""

    rule: str = "sgd"
    lr: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3


@dataclass
class MemorySettings:
    """What is done about a compressor's error, and what becomes of what is remembered when a new link opens."""

    feedback: str = "none"
    at_new_link: str = "transport"
    # MARINA: how likely a round is in which everything is sent.
    whole_probability: float = 0.1


@dataclass
class RobustSettings:
    """What takes the place of the mean."""

    aggregate: str = "mean"
    trim: int = 1
    num_attackers: int = 1
    num_chosen: int = 2
    # A bound on the Euclidean norm of a client's difference, to which a longer one is scaled; 0: none.
    max_norm: float = 0.0


@dataclass
class PrivacySettings:
    """Differential privacy of clients or of examples; `level=none` switches it off."""

    level: str = "none"
    clip: float = 1.0
    noise: float = 1.0
    delta: float = 1e-5
    adaptive: bool = False
    quantile: float = 0.5
    clip_lr: float = 0.2
    count_noise: float = 0.0


@dataclass
class Settings:
    """Everything that decides a run's result, and where it is written."""

    # The groups: a name, and the settings of that plug-in.
    method: Any = None
    model: Any = None
    dataset: Any = None
    partition: Any = None
    runtime: Any = None
    uplink: Any = None
    downlink: Any = None

    # The federation.
    seed: int = 0
    rounds: int = 20
    num_clients: int = 50
    fraction: float = 0.2
    min_replies: int = 1
    weighting: str = "examples"
    # How a client that missed links is brought up to date, and whether those outside the cohort get links each round.
    catch_up: str = "cheapest"
    broadcast: str = "lazy"
    # A reply whose tensors' Euclidean norm is larger is refused.
    max_norm: float = 1e6
    # Seconds: a round's deadline, and how long the server waits for all clients before it begins without some.
    timeout_s: float = 3600.0
    connect_s: float = 120.0

    # Ranks of single clients: one a client ([4, 8, ...]), or shares of them by rank ({4: 0.5, 8: 0.5}).
    client_ranks: Any = None
    # Factors on the learning rate of single clients: one a client.
    client_lr_scales: list[float] = field(default_factory=list)

    # What is trained: target layers get factors of this rank (`ranks` by layer name), `dense` names tensors trained
    # in full.
    rank: int = 8
    ranks: dict[str, int] = field(default_factory=dict)
    alpha: float | None = None
    targets: Any = "all"
    dense: list[str] = field(default_factory=list)
    sketch: SketchSettings = field(default_factory=SketchSettings)

    # Local training; `lr` left out is the method's own default.
    lr: float | None = None
    optimizer: str = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    local_steps: int = 20
    local_epochs: int = 0
    batch_size: int = 32
    proximal: float = 0.0
    clip_norm: float = 0.0
    # SCAFFOLD's control variates.
    scaffold: bool = False

    # The server, and what travels.
    server: ServerSettings = field(default_factory=ServerSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    robust: RobustSettings = field(default_factory=RobustSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)

    # Limits on tensor bytes, in MiB: of all traffic, of the uplink, and of any one client.
    budget_mib: float | None = None
    uplink_mib: float | None = None
    per_client_mib: float | None = None

    # Evaluation on the server; `validation` holds out this share of the training examples and leaves the test set
    # alone.
    eval_every: int = 1
    eval_split: str = "test"
    validation_fraction: float = 0.1
    target_accuracies: list[float] = field(default_factory=lambda: [0.8, 0.9])
    # The share of its own examples that each client holds out to score its own model on.
    personal_fraction: float = 0.0
    # Measure in each round how far what is merged is from the mean of the clients' products.
    verify: bool = False

    # Weights to start from: a finished run's folder or a .safetensors file; left out: those the model is built with.
    start_from: str | None = None

    # Simulated time: the clients' devices (a preset's name or a CSV file; none: no time is simulated), and after how
    # many simulated seconds a round goes on without those who have not answered (0: it waits for all).
    devices: str = "none"
    deadline_s: float = 0.0

    # The machine. More than one thread pays for large models only, and changes the last bits (0: what PyTorch chooses).
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    exact: bool = False
    chunk_mib: float = 64.0

    # What the run is called in tables and curves; left out, by its method.
    label: str | None = None

    # The files; `out` left out is runs/<name>/<date_time>.
    name: str = "run"
    out: str | None = None
    resume: bool = False
    keep_versions: str = "all"
    snapshot_every: int = 100


@dataclass
class CompareSettings(Settings):
    """A comparison: the same settings for every method and seed."""

    name: str = "compare"
    methods: list[str] = field(default_factory=lambda: ["rac_lora", "ffa_lora", "fed_it", "full"])
    # Seeds 0, 1, ... (added to `seed`), each with its own split, initial weights, cohorts and batch orders.
    seeds: int = 3
    # Settings of single methods: {fed_it: {lr: 0.1}, rac_lora: {side: auto}}.
    method_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    # More names for `methods`: any settings under a label, {rac_int8: {method: rac_lora, uplink: int8}}.
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    # A learning-rate grid for all methods ([0.1, 0.3]) or by method; it is extended until the best is interior.
    tune: Any = None
    tune_seeds: int = 1
    # How many rounds each learning rate is tried for; 0: as many as the runs have.
    tune_rounds: int = 0
    # A model for all to start from, trained first, once a seed: changes of the settings for that run, as in `variants`
    # ({method: full, num_clients: 1, rounds: 10}).
    pretrain: dict[str, Any] = field(default_factory=dict)
    # How often the grid may be extended at either end, and how often it is made finer around its best value.
    tune_extensions: int = 6
    tune_refinements: int = 0


@dataclass
class BudgetSettings(CompareSettings):
    """A forecast of what a comparison would cost."""

    name: str = "budget"
    # The setting to choose so that all rounds fit the limits: rank, local_steps or rounds_per_link.
    fit: str | None = None


def name_of(settings: Settings) -> str:
    """Return what a run is called in tables and curves."""
    return settings.label or str(settings.method.name)
