"""The package ``models`` works under another name, under which it is installed, also beside ``models`` in one process."""

import importlib.util
import pickle
import sys
from pathlib import Path

import pytest
import timm
import torch

import models
from models import entrypoints, kernel_operator

FOLDER = Path(models.__file__).parent
NAME = "renamed_models"


@pytest.fixture
def renamed():
    spec = importlib.util.spec_from_file_location(NAME, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)])
    package = sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
        del sys.modules[name]


def test_a_second_import_under_another_name_has_its_own_classes_and_operators(renamed):
    model = renamed.create_model("flatten_deit_t", depth=1)
    assert {type(module).__module__.split(".")[0] for module in model.modules()} == {NAME, "timm", "torch"}
    renamed_operator = sys.modules[f"{NAME}.kernel_operator"]
    assert renamed_operator.attention_operator is not kernel_operator.attention_operator
    for operator in (renamed_operator, kernel_operator):
        assert hasattr(getattr(torch.ops, operator.NAMESPACE).focused_attention, "default")


def test_timm_creates_the_models_of_the_first_import(renamed):
    assert type(timm.create_model("flatten_deit_t", depth=1)).__module__ == "models.deit"
    assert type(sys.modules[f"{NAME}.entrypoints"].flatten_deit_t(depth=1)).__module__ == f"{NAME}.deit"


@pytest.mark.parametrize("name", models.list_models())
def test_an_entry_point_of_timm_can_be_pickled_and_describes_itself(name):
    function = timm.models.model_entrypoint(name)
    assert pickle.loads(pickle.dumps(function)) is function is getattr(entrypoints, name)
    assert function.__name__ == name
    assert name in function.__doc__
