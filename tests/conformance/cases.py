"""The runs on which laws are tried that hold for all: each method by its defaults, and what those leave out."""

from experiments.settings import MemorySettings, PrivacySettings, ServerSettings, SketchSettings
from tests.helpers import METHODS

EPOCHS = {"local_epochs": 1, "batch_size": 40}
RANKS = {"client_ranks": [1, 2, 3, 1, 2, 3], "rank": 3, "alpha": 3.0}
BY_METHOD = {name: {"method": name} for name in METHODS}
# Options of single methods, the local optimiser's state, other links and sides, heads trained in full.
OPTIONS = {
    "side a, two rounds a link": {"method": ("rac_lora", {"side": "a", "rounds_per_link": 2})},
    "carried moments": {
        "method": ("rac_lora", {"side": "auto", "moments": "carry"}), "momentum": 0.9, "proximal": 0.1, **EPOCHS,
    },
    "transported moments": {
        "method": ("rac_lora", {"moments": "transport"}), "optimizer": "adamw", "lr": 0.01, "clip_norm": 1.0, **EPOCHS,
    },
    "uniform weights": {"method": "fed_it", "weighting": "uniform", **EPOCHS},
    "trained heads": {"method": "rac_lora", "dense": ["*.bias"], "alpha": 3.0},
    "private draws of unlike ranks": {"method": "rac_lora", "sketch": SketchSettings(shared=False), **RANKS},
    "ranks by their contributors": {"method": ("rac_lora", {"contributors": "rows"}), **RANKS},
    "flexlora of unlike ranks": {"method": "flexlora", **RANKS},
    "truncated residuals": {
        "method": ("fedex_lora", {"residual": "truncated", "residual_rank": 1}), "dense": ["*.bias"],
    },
    "random outer factors": {"method": ("fed_sb", {"init": "random"})},
    "projected updates": {"method": ("fed_slop", {"upload": "factor", "moments": "reset"}), "momentum": 0.5},
}  # fmt: skip
# What the server's optimiser, compressors and control variates remember. A compressor's numbers jump where a number
# lies between two of its own, so that rounding elsewhere is not what it was.
REMEMBERED = {
    "replayed Adam": {"method": "rac_lora", "server": ServerSettings("adam", lr=0.03)},
    "momentum of factors": {"method": "fed_it", "server": ServerSettings("momentum", lr=0.5)},
    "top_k with error feedback": {
        "method": "rac_lora", "uplink": ("top_k", {"share": 0.3}), "memory": MemorySettings("ef"),
    },
    "EF21": {"method": "ffa_lora", "uplink": ("top_k", {"share": 0.3}), "memory": MemorySettings("ef21")},
    "MARINA": {
        "method": "rac_lora", "uplink": ("rand_k", {"share": 0.5}),
        "memory": MemorySettings("marina", whole_probability=0.4),
    },
    "SCAFFOLD": {"method": "rac_lora", "scaffold": True},
    "compressed downlink": {"method": "rac_lora", "downlink": "int8"},
    "clients' privacy": {
        "method": "rac_lora",
        "privacy": PrivacySettings("client", clip=0.5, noise=0.1, adaptive=True, count_noise=1.0),
    },
}  # fmt: skip
ALL = BY_METHOD | OPTIONS | REMEMBERED


def has_jumps(case: dict[str, object]) -> bool:
    """Return whether a compressor makes steps of what rounding moves."""
    return "uplink" in case or "downlink" in case
