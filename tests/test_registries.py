"""Every implementation can be chosen, and nothing that has none: the names of keys are those of the
registries."""

import pytest

from zo.config.schema import EstimatorConfig, MemoryConfig, ModelConfig, UpdateConfig
from zo.errors import UserError
from zo.io.engines import ENGINES
from zo.method.estimator import ESTIMATORS
from zo.method.perturbation import Z
from zo.method.update import RULES, SCHEDULES
from zo.model.build import AUTO_CLASS

CHOICES = {
    "estimator.name": (EstimatorConfig, ESTIMATORS),
    "estimator.distribution": (EstimatorConfig, Z),
    "update.name": (UpdateConfig, RULES),
    "update.schedule": (UpdateConfig, SCHEDULES),
    "memory.disk_engine": (MemoryConfig, ENGINES),
    "model.task": (ModelConfig, {"auto": None, **AUTO_CLASS}),
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
