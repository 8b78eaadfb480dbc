"""Whatever follows `model=` becomes a module without numbers, or an error that says what is wrong."""

from dataclasses import replace

import pytest

from experiments.budget_models import known_model, shape_presets, split_model
from experiments.forecast import forecast
from experiments.settings import BudgetSettings
from fedraclora.ledger import MIB
from tests.helpers import federation, settings

KIB = 1024
ALL_BERT, ALL_LLAMA = (
    ["query", "key", "value", "dense"],
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)
# As published or counted by others, but for poolers and heads where the preset says so.
PARAMETERS = {
    "roberta_base": 124_645_632 - (768 * 768 + 768),
    "roberta_large": 355_359_744 - (1024 * 1024 + 1024),
    "llama_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "vit_base": 86_567_656,
    "distilbert": 66_362_880,
}


def chosen(**changes):
    return settings(BudgetSettings, num_clients=1, fraction=1.0, rounds=2, **changes)


def of(text, **changes):
    return known_model(text, chosen(**changes), has_targets="targets" in changes)


def test_every_preset_has_the_parameters_of_its_model():
    assert set(PARAMETERS) == set(shape_presets())
    for name, number in PARAMETERS.items():
        known, _ = of(name)
        assert sum(tensor.numel() for tensor in known.model.parameters()) == number
        assert all(tensor.is_meta for tensor in known.model.parameters())


@pytest.mark.parametrize(
    ("name", "rank", "targets", "method", "expected"),
    [
        ("roberta_base", 2, "presets", "rac_lora", 144 * KIB),
        ("roberta_base", 2, "presets", "fed_it", 288 * KIB),
        ("roberta_base", 2, ALL_BERT, "rac_lora", 648 * KIB),
        ("roberta_base", 8, ALL_BERT, "rac_lora", 4 * 648 * KIB),
        ("llama_7b", 1, "presets", "rac_lora", 1 * MIB),
        ("llama_7b", 16, "presets", "rac_lora", 16 * MIB),
        ("llama_7b", 16, "presets", "fed_it", 32 * MIB),
        ("llama_7b", 16, ALL_LLAMA, "rac_lora", 83 * MIB),
        ("roberta_base", 2, ALL_BERT, "fed_it", 1296 * KIB),
        ("llama_7b", 16, ALL_LLAMA, "fed_it", 152.5 * MIB),
    ],
)
def test_uplinks_are_those_that_arithmetic_gives(name, rank, targets, method, expected):
    """out x rank numbers of four bytes a layer for one factor, (in + out) x rank for two."""
    named = {} if targets == "presets" else {"targets": targets}
    known, own = of(name, rank=rank, method=method, **named)
    told = forecast(replace(own, label=None), known)
    assert {report.traffic.uplink_bytes for report in told.reports} == {expected}


def test_named_targets_are_kept():
    assert of("roberta_base", targets=["dense"])[1].targets == ["dense"]
    assert of("roberta_base", targets="all")[1].targets == "all"
    assert of("roberta_base")[1].targets == ["query", "value"]


def test_a_plug_in_is_built_for_its_data_and_tells_each_clients_examples():
    wanted = settings(BudgetSettings)
    known, own = known_model(None, wanted)
    assert own is wanted
    assert len(known.num_examples) == 6
    assert [tuple(tensor.shape) for tensor in known.model.parameters()] == [(12, 64), (12,), (10, 12), (10,)]
    assert all(tensor.is_meta for tensor in known.model.parameters())


def test_the_bytes_are_those_of_the_runs_number_type():
    uplinks = []
    for dtype in ("float32", "float64"):
        wanted = settings(BudgetSettings, dtype=dtype)
        known, own = known_model(None, wanted)
        uplinks.append(forecast(own, known).traffic.uplink_bytes)
        spent = federation(settings(dtype=dtype)).run()
        assert uplinks[-1] == sum(report.traffic.uplink_bytes for report in spent)
    assert uplinks[1] == 2 * uplinks[0]
    with pytest.raises(ValueError, match="dtype"):
        known_model(None, settings(BudgetSettings, dtype="bfloat16"))


def test_examples_that_clients_hold_out_are_not_counted():
    whole, _ = known_model(None, settings(BudgetSettings))
    kept, _ = known_model(None, settings(BudgetSettings, personal_fraction=0.5))
    assert all(few < many for few, many in zip(kept.num_examples, whole.num_examples, strict=True))


def test_a_file_of_shapes_is_read(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("layers:\n  fc: {out: 3, in: 4, bias: true}\n")
    known, own = of(str(path))
    assert {name: tuple(tensor.shape) for name, tensor in known.model.named_parameters()} == {
        "fc.weight": (3, 4), "fc.bias": (3,),
    }  # fmt: skip
    assert own.targets == "all"
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match="no mapping"):
        of(str(path))
    path.write_text("layers:\n  fc: {out: 3, in: 4}\n  fc: {out: 3, in: 4}\n")
    with pytest.raises(ValueError, match=r"mine\.yaml cannot be read: .*\n?(.*\n)*.*duplicate key fc"):
        of(str(path))
    path.write_text("layers: {fc: 3}\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: layer 'fc'"):
        of(str(path))


def test_anything_that_gives_a_module_will_do(monkeypatch, tmp_path):
    (tmp_path / "own_models.py").write_text(
        "from torch import nn\nclass Plain(nn.Sequential):\n    def __init__(self): super().__init__(nn.Linear(5, 4))\n"
        "THREE = 3\ndef needs(width): return nn.Linear(width, 1)\ndef number(): return 3\nclass Looks(nn.Linear):\n"
        "    def __init__(self):\n        super().__init__(2, 2)\n        self.total = float(self.weight.sum())\n"
        "class Counts(nn.Linear):\n    def __init__(self):\n        super().__init__(2, 2)\n"
        "        self.total = self.weight.detach().numpy().sum()\n"
        "def fails(): return {}['missing']\nmade = nn.Linear(2, 2)\n"
    )
    (tmp_path / "broken_models.py").write_text("undefined_thing\n")
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "plug.py").write_text("import not_installed_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert [tuple(tensor.shape) for tensor in of("own_models.Plain")[0].model.parameters()] == [(4, 5), (4,)]
    for name in ("Looks", "Counts"):
        assert all(tensor.is_meta for tensor in of(f"own_models.{name}")[0].model.parameters())
    assert split_model(["model=broken_models.Thing"])[0] == "broken_models.Thing"
    for path, reason in {
        "own_models.needs": r"without arguments \(it needs width\)",
        "own_models.fails": "cannot be made: KeyError: 'missing'",
        "own_models.made": "is a Linear; expected a function or class",
        "broken_models.Thing": "cannot be imported: NameError",
        "own_package.plug": "not_installed_library",
        "own_models.number": "torch.nn.Module; found int",
        "own_models.THREE": "is a int",
        "own_models.Nothing": "cannot be imported",
        "no_such_module.Thing": "cannot be imported",
    }.items():
        with pytest.raises(ValueError, match=reason):
            of(path)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="roberta_base"):
        of("roberta-base")
    with pytest.raises(ValueError, match="no such file"):
        of("missing.yaml")


def test_only_what_is_no_plug_in_is_taken_off_the_command_line():
    assert split_model(["rounds=3", "model=mlp"]) == (None, ["rounds=3", "model=mlp"])
    assert split_model(["rounds=3"]) == (None, ["rounds=3"])
    assert split_model(["model=llama_7b", "rounds=3"]) == ("llama_7b", ["rounds=3"])
    assert split_model(["model=fedraclora.models.mlp"]) == (None, ["model=fedraclora.models.mlp"])
    assert split_model(["model=x/y.yaml"]) == ("x/y.yaml", [])
    with pytest.raises(ValueError, match=r"model=llama_7b has no settings.*model\.hidden"):
        split_model(["model=llama_7b", "model.hidden=[5]"])
    assert split_model(["model=torch.nn.Identity"]) == ("torch.nn.Identity", [])
