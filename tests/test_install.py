"""The models installed as ``flatten_transformer``, and loaded with torch.hub, beside modules of the user with our names.

The examples of docs/models.md run with the wheel. The installed files are those that pip would write: the wheel has no scripts,
so that installing it means extracting it. Requirements come from the environment that runs the tests.
"""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from models import build_model, create_model
from scripts import export
from tests.conftest import fill_with_seeded_weights, seeded_image
from tests.launch import run_script
from tests.server import serve
from utils.config.loading import load_config, to_dict

ROOT = Path(__file__).parent.parent
# Modules of the user, and packages that the models must not need.
USER_MODULES = ("models/__init__.py", "data/__init__.py", "utils.py", "weights.py", "engine.py", "jobs.py")
ABSENT = ("yacs", "tensorboard", "termcolor", "sklearn", "scipy", "matplotlib")


def lines(name: str) -> list[str]:
    """The lines of a file of requirements, without comments."""
    return [text for line in (ROOT / name).read_text().splitlines() if (text := line.split("#")[0].strip())]


def build(tmp_path: Path, hook: str) -> Path:
    """Copy what the package is built from, and build a wheel with the hook (PEP 517, 660) that pip calls."""
    source = tmp_path / "source"
    source.mkdir(parents=True)
    shutil.copytree(ROOT / "models", source / "models", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    program = f"from setuptools import build_meta; build_meta.{hook}({str(tmp_path)!r})"
    completed = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr
    return next(tmp_path.glob("*.whl"))


def install(wheel: Path, folder: Path) -> Path:
    """Create a virtual environment with the wheel and the packages of this environment. Returns its interpreter."""
    venv.create(folder, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "requirements.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin/python"


def run_as_user(python: Path | str, program: str, folder: Path, *launcher: str, **environment: str) -> None:
    """Run a program in a directory with modules that have the names of ours, optionally with another script as launcher."""
    for name in USER_MODULES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("OWNER = 'user'\n")
    names = ", ".join(name.removesuffix(".py").removesuffix("/__init__") for name in USER_MODULES)
    before = f"import sys, {names}\nsys.modules.update(dict.fromkeys({ABSENT}))\n"
    after = f"import {names}\nassert all(module.OWNER == 'user' for module in ({names}))\n"
    (folder / "program.py").write_text(before + program + after)
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    completed = subprocess.run(
        [python, *launcher, "program.py"], cwd=folder, env=inherited | environment, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr[-4000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"), "build_wheel")


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    """The metadata that pip reads: name, version and requirements."""
    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(file.read(name))


def test_the_wheel_contains_the_library_and_nothing_else(wheel):
    installed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {path.relative_to(ROOT / "models").as_posix() for path in (ROOT / "models").rglob("*.py")}
    assert installed == {f"flatten_transformer/{name}" for name in files}


def test_the_version_is_the_date_of_the_newest_changes(metadata):
    date = re.search(r"^## (\d+)-(\d+)-(\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert metadata["Version"] == ".".join(str(int(part)) for part in date.groups())


def test_the_models_require_torch_timm_and_safetensors_in_the_versions_of_the_repository(metadata):
    requirements = metadata.get_all("Requires-Dist")
    assert {Requirement(text).name for text in requirements} == {"torch", "timm", "safetensors"}
    assert set(requirements) <= set(lines("requirements.txt"))


def test_the_lock_has_an_allowed_version_of_every_requirement_and_no_address():
    locked = dict(line.split("==") for line in lines("requirements.lock"))
    for requirement in map(Requirement, lines("requirements.txt")):
        assert requirement.specifier.contains(locked[requirement.name]), requirement


def names_of_installed(requirements: list[str]) -> set[str]:
    """Names of the packages that are installed with the given ones, on this machine, without extras."""
    names, todo = set(), list(requirements)
    while todo:
        requirement = Requirement(todo.pop())
        if requirement.name.lower() not in names and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            names.add(requirement.name.lower())
            todo += importlib.metadata.requires(requirement.name) or []
    return names


def test_the_models_import_only_packages_that_are_installed_with_them(metadata):
    installed = names_of_installed(metadata.get_all("Requires-Dist"))
    for path in (ROOT / "models").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:  # imports inside functions and under a condition are optional
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert {name.split(".")[0] for name in names} <= installed | sys.stdlib_module_names, path


def test_an_editable_installation_refers_to_the_models_of_the_repository(tmp_path):
    python = install(build(tmp_path, "build_editable"), tmp_path / "environment")
    program = "from importlib.util import find_spec; print(find_spec('flatten_transformer').origin)"
    completed = subprocess.run([python, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert completed.stdout.strip() == str(tmp_path / "source/models/__init__.py"), completed.stderr


def examples() -> tuple[str, str]:
    """The Python examples of README.md and of docs/models.md, "Use in your own code", and the launcher of timm's scripts.

    In the examples, a small model replaces Swin-T.
    """
    section = (ROOT / "docs/models.md").read_text().partition("## Use in your own code")[2].partition("\n##")[0]
    pages = (ROOT / "README.md").read_text() + section
    *blocks, launcher = re.findall(r"^```python\n(.*?)^```", pages, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    program = "\n".join(blocks).replace("flatten_swin_t", "flatten_pvt_v2_b0").replace("path/to/this/repository", str(ROOT))
    return program, launcher


DOWNLOAD = """
import os
from flatten_transformer.checkpoints.download import fetch
fetch(os.environ["URL"], "flatten_pvt_v2_b0")  # into the cache, from which the examples read the released weights
"""
# Run after the examples, in the same process.
CHECKS = """
assert flatten_transformer.__file__.startswith(os.environ["ENVIRONMENT"])
assert attention(*torch.randn(3, 2, 196, 192)).shape == (2, 196, 192)
assert tokens.shape == (2, 197, 192) and logits.shape == (2, 3)
maps = backbone(torch.randn(1, 3, 64, 64))
assert [tuple(each.shape[1:]) for each in maps] == [(64, 16, 16), (128, 8, 8), (320, 4, 4), (512, 2, 2)]

trained = flatten_transformer.create_model("flatten_deit_t", img_size=32, depth=2)
trained(torch.randn(2, 3, 32, 32)).square().mean().backward()
assert all(parameter.grad.isfinite().all() for parameter in trained.parameters())

# What timm's train.py does with a model: its arguments, data config, optimizer with layer decay, average, one update.
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
options = dict.fromkeys(("drop_path_rate", "drop_block_rate", "global_pool", "bn_momentum", "bn_eps"))
options |= {"in_chans": 3, "num_classes": 4, "drop_rate": 0.1, "scriptable": False, "checkpoint_path": ""}
model = timm.create_model("flatten_pvt_v2_b0", **options)
assert timm.data.resolve_data_config({"img_size": 64}, model=model)["input_size"] == (3, 64, 64)
optimizer, average = create_optimizer_v2(model, "adamw", lr=1e-3, layer_decay=0.7), ModelEmaV3(model, decay=0.5)
LabelSmoothingCrossEntropy()(model(torch.randn(2, 3, 64, 64)), torch.tensor([0, 1])).backward()
optimizer.step()
average.update(model)
assert not torch.equal(average.module.head.weight, model.head.weight)

images = torch.load("images.pt")
sources = {
    "released": {"model_name": "flatten_pvt_v2_b0"},
    "local-dir": {"model_name": "local-dir:exported"},
    "hf-hub": {"model_name": "hf-hub:user/model"},
}
with torch.no_grad():
    results = {name: timm.create_model(**source, pretrained=True).eval()(images[name]) for name, source in sources.items()}
torch.save(results, "results.pt")
"""


def test_the_examples_run_with_the_installed_models_beside_other_modules_of_the_same_names(wheel, toy_config, tmp_path):
    user, caches = tmp_path / "user", tmp_path / "caches"
    user.mkdir()
    exported = fill_with_seeded_weights(build_model(load_config(toy_config))).eval()
    torch.save({"model": exported.state_dict(), "config": to_dict(load_config(toy_config))}, tmp_path / "best.pth")
    assert run_script(export, [tmp_path / "best.pth", user / "exported"], tmp_path / "log").exit_codes == [0]
    commit, hub_model = "0" * 40, caches / "hub/models--user--model"
    shutil.copytree(user / "exported", hub_model / "snapshots" / commit)
    (hub_model / "refs").mkdir()
    (hub_model / "refs/main").write_text(commit)
    released = fill_with_seeded_weights(create_model("flatten_pvt_v2_b0")).eval()
    torch.save({"model": released.state_dict()}, tmp_path / "released.pth")

    toy_images = seeded_image(0, (2, 3, 40, 40))
    images = {"released": seeded_image(1, (1, 3, 224, 224)), "local-dir": toy_images, "hf-hub": toy_images}
    torch.save(images, user / "images.pt")
    python = install(wheel, tmp_path / "environment")
    with serve({"released.pth": (tmp_path / "released.pth").read_bytes()}) as server:
        environment = {"URL": f"{server.url}/released.pth", "ENVIRONMENT": str(tmp_path / "environment")}
        environment |= {"TORCH_HOME": str(caches), "HF_HOME": str(caches), "HF_HUB_OFFLINE": "1"}
        program, launcher = examples()
        (user / "with_flatten.py").write_text(launcher)
        run_as_user(python, DOWNLOAD + program + CHECKS, user, "with_flatten.py", **environment)
    results = torch.load(user / "results.pt")
    with torch.no_grad():
        expected = {name: (released if name == "released" else exported)(image) for name, image in images.items()}
    torch.testing.assert_close(results, expected, rtol=0, atol=1e-5)


# torch.hub.list and help accept only repositories on GitHub: pretend that it was downloaded.
HUB = """
import inspect, os, timm, torch

torch.hub._get_cache_or_reload = lambda *_, **__: os.environ["ROOT"]
names = torch.hub.list("owner/repository")
assert len(names) > 20 and sorted(names) == sorted(timm.list_models("flatten_*"))
assert "flatten_pvt_v2_b0" in torch.hub.help("owner/repository", "flatten_pvt_v2_b0")
model = torch.hub.load(os.environ["ROOT"], "flatten_pvt_v2_b0", source="local", trust_repo=True, num_classes=3)
assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
assert inspect.getfile(type(model)).startswith(os.path.join(os.environ["ROOT"], "models"))
"""


def test_torch_hub_lists_and_loads_every_model_beside_other_modules_of_the_same_names(tmp_path):
    run_as_user(sys.executable, HUB, tmp_path, ROOT=str(ROOT))
