"""Every implementation can be chosen, and nothing that has none: the names of keys are those of the
registries."""

import subprocess
import sys

import pytest

from zo.config.schema import EstimatorConfig, MemoryConfig, ModelConfig, UpdateConfig
from zo.errors import UserError
from zo.io.engines import ENGINES
from zo.method.estimator import ESTIMATORS
from zo.method.perturbation import STORED_DTYPES, Z
from zo.method.update import RULES, SCHEDULES
from zo.model.build import AUTO_CLASS

CHOICES = {
    "estimator.name": (EstimatorConfig, ESTIMATORS),
    "estimator.distribution": (EstimatorConfig, Z),
    "update.name": (UpdateConfig, RULES),
    "update.schedule": (UpdateConfig, SCHEDULES),
    "memory.disk_engine": (MemoryConfig, ENGINES),
    "model.task": (ModelConfig, {"auto": None, **AUTO_CLASS}),
    "model.dtype": (ModelConfig, [str(t).removeprefix("torch.") for t in STORED_DTYPES]),
}


@pytest.mark.parametrize("key", CHOICES)
def test_the_legal_names_of_a_key_are_those_of_its_registry(key):
    group, registry = CHOICES[key]
    field = key.partition(".")[2]
    for name in registry:
        assert getattr(group(**{field: name}), field) == name
    with pytest.raises(UserError) as error:
        group(**{field: "none such"})
    assert str(error.value).partition("use one of ")[2].split(", ") == sorted(registry)


def test_the_configuration_takes_the_names_of_the_registries_without_torch():
    """--help and a mistyped value answer before torch and transformers are imported."""
    look = "import sys, zo.config.cli; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


@pytest.mark.parametrize(
    "key", ["estimator.name", "update.name", "update.schedule", "memory.disk_engine"]
)
def test_a_new_entry_of_a_registry_is_a_legal_name_at_once(monkeypatch, key):
    group, registry = CHOICES[key]
    monkeypatch.setitem(registry, "added", next(iter(registry.values())))
    group(**{key.partition(".")[2]: "added"})
