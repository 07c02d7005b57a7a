"""Entry points for torch.hub, one for every model: ``torch.hub.load(DIRECTORY, "flatten_swin_t", source="local")``.

``models`` is imported under the name of the installed package, because the caller may have a package ``models`` of its own.
torch.hub lists every callable of this file whose name does not start with an underscore.
"""

import importlib.util
import pathlib
import sys
import types

dependencies = ["torch", "timm", "safetensors"]


def _import_models() -> types.ModuleType:
    """Import ``models`` of this directory as ``flatten_transformer``, unless a package of that name is already imported."""
    name, directory = "flatten_transformer", pathlib.Path(__file__).parent / "models"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, directory / "__init__.py", submodule_search_locations=[str(directory)])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # so that a second attempt imports it again, for example after timm was installed
        raise
    return module


_models = _import_models()
globals().update({name: getattr(_models.entrypoints, name) for name in _models.list_models()})
