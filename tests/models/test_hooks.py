"""Code outside this project that changes modules: hooks, pruning, offloading, averaging, construction elsewhere."""

import threading

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

from models.linear_attention import DepthwiseFilters, FocusedLinearAttention
from tests.models.tiny import OPTIONS, tiny, tiny_images

FAMILIES = list(OPTIONS)


def with_own_parameters(model):
    return {name: module for name, module in model.named_modules() if list(module.parameters(recurse=False))}


def filters(model):
    return [module for module in model.modules() if isinstance(module, DepthwiseFilters)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_module_with_parameters_of_its_own_runs_its_forward_hooks(name, fused):
    for softmax in (False, True):
        model = tiny(name, softmax=softmax)
        fired: list[str] = []
        for module_name, module in with_own_parameters(model).items():
            module.register_forward_hook(lambda *_, name=module_name, fired=fired: fired.append(name))
            if isinstance(module, FocusedLinearAttention):
                module.fused = fused
        model(tiny_images())
        assert sorted(fired) == sorted(with_own_parameters(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_used_only_during_the_forward_pass_of_their_own_module(name):
    """Offloading and sharding: a module has its parameters only between its pre-hook and its hook, and then loses them."""
    model = tiny(name, softmax=True).eval()
    with torch.no_grad():
        expected = model(tiny_images())

        def load(module, inputs):
            for parameter_name, value in module.stored.items():
                setattr(module, parameter_name, torch.nn.Parameter(value.clone()))

        def unload(module, inputs, output):
            for parameter_name in module.stored:
                getattr(module, parameter_name).fill_(torch.nan)  # also spoils outputs that share memory with the parameter
                setattr(module, parameter_name, torch.nn.Parameter(torch.empty(0, device="meta")))

        for module in with_own_parameters(model).values():
            module.stored = {key: value.detach().clone() for key, value in module.named_parameters(recurse=False)}
            module.register_forward_pre_hook(load)
            module.register_forward_hook(unload)
            for parameter_name in module.stored:
                setattr(module, parameter_name, torch.nn.Parameter(torch.empty(0, device="meta")))
        assert torch.equal(model(tiny_images()), expected)


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.(weight|spectral)_norm. is deprecated")
@pytest.mark.parametrize("change", ["pruned", "old spectral norm", "spectral norm", "weight norm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_reparametrised_filters_are_used_and_trained(name, change):
    apply = {
        "pruned": lambda module: prune.l1_unstructured(module, "weight", amount=0.5),
        "old spectral norm": torch.nn.utils.spectral_norm,
        "spectral norm": torch.nn.utils.parametrizations.spectral_norm,
        "weight norm": torch.nn.utils.parametrizations.weight_norm,
    }[change]
    model, plain = tiny(name), tiny(name)
    for module in filters(model):
        apply(module)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(tiny_images()).square().sum().backward()
        optimizer.step()
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    dead = {key for key in before if "deit" in name and key.startswith("blocks.1.attn.dwc")}  # see test_zoo
    assert set(before) - changed <= dead | {key for key in before if "original0" in key and "deit" in name}
    assert len(filters(model)) == len(filters(plain)) > 0
    model.eval()  # in training mode, every access to a weight with spectral norm changes it
    with torch.no_grad():  # the filters of the changed model, copied to one without reparametrisation, give the same logits
        logits = model(tiny_images())
        model_filters = [[value.clone() for value in (module.weight, module.bias)] for module in filters(model)]
        values = {key: value for key, value in model.state_dict().items() if key in plain.state_dict()}
        plain.load_state_dict(values, strict=False)
        for module, (weight, bias) in zip(filters(plain), model_filters, strict=True):
            module.weight.copy_(weight)
            module.bias.copy_(bias)
        torch.testing.assert_close(plain(tiny_images()), logits)
        if change == "pruned":
            assert all((weight == 0).double().mean() == pytest.approx(0.5, abs=0.05) for weight, _ in model_filters)


def test_parametrised_filters_are_computed_once_per_forward_pass():
    class Double(torch.nn.Module):
        count = 0

        def forward(self, weight):
            Double.count += 1
            return 2 * weight

    model = tiny("flatten_deit_t")
    parametrize.register_parametrization(filters(model)[0], "weight", Double())
    Double.count = 0
    model(tiny_images())
    assert Double.count == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_averaged_models_with_averaged_buffers_equal_a_model_with_averaged_parameters(name):
    models = [tiny(name, softmax=True, img_size=40).eval() for _ in range(2)]  # with padding and masks at 40 pixels
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(-0.5)
    averaged = AveragedModel(models[0], use_buffers=True)
    for model in models:
        averaged.update_parameters(model)
    expected = tiny(name, softmax=True, img_size=40).eval()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(0.25)
        images = torch.randn(2, 3, 40, 40)
        torch.testing.assert_close(averaged(images), expected(images))
    assert not list(expected.buffers())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_whose_parameters_alone_are_created_on_the_meta_device_runs_after_they_are_assigned(name, monkeypatch):
    """accelerate's ``init_empty_weights`` moves each parameter to the meta device when a module registers it.

    Its ``load_checkpoint_and_dispatch`` then replaces the parameters one by one, without ``load_state_dict``.
    """
    source = tiny(name, softmax=True).eval()
    register = torch.nn.Module.register_parameter

    def register_on_meta(module, key, value):
        register(module, key, None if value is None else torch.nn.Parameter(value.to("meta")))

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "register_parameter", register_on_meta)
        empty = tiny(name, softmax=True).eval()
    assert all(parameter.is_meta for parameter in empty.parameters())
    for module, full in zip(empty.modules(), source.modules(), strict=True):
        for key, value in full.named_parameters(recurse=False):
            setattr(module, key, torch.nn.Parameter(value.detach().clone()))
    with torch.no_grad():
        assert torch.equal(empty(tiny_images()), source(tiny_images()))


@pytest.mark.parametrize("name", FAMILIES)
def test_overlapping_constructions_in_threads_do_not_affect_each_other_or_other_threads(name, monkeypatch):
    """Both threads meet within their constructors, before they create the first linear layer and the head."""
    barrier, lock = threading.Barrier(2, timeout=60), threading.Lock()
    models, defaults, meetings = {}, set(), {}
    linear = torch.nn.Linear.__init__

    def meet_first(module, *args, **kwargs):
        thread = threading.current_thread()
        with lock:
            meetings[thread] = meetings.get(thread, 0) + 1
            number = meetings[thread]
        if number <= 3:
            barrier.wait()
        defaults.add((torch.get_default_dtype(), torch.tensor(1.0).device.type))
        linear(module, *args, **kwargs)

    def construct(dtype, device):
        model = tiny(name, dtype=dtype, device=device)
        model.reset_classifier(5)
        models[dtype] = model

    monkeypatch.setattr(torch.nn.Linear, "__init__", meet_first)
    choices = [(torch.bfloat16, "meta"), (torch.float32, "cpu")]
    threads = [threading.Thread(target=construct, args=choice) for choice in choices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert defaults == {(torch.float32, "cpu")}
    for dtype, device in choices:
        assert {(p.dtype, p.device.type) for p in models[dtype].parameters()} == {(dtype, device)}


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_every_layer_can_be_sharded_by_itself(tmp_path):
    """FSDP2 frees the parameters of a sharded module after its forward pass."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for name in FAMILIES:
            model, sharded = tiny(name), tiny(name)
            modules = [module for module in with_own_parameters(sharded).values() if module is not sharded]
            for module in [*reversed(modules), sharded]:  # inner modules first
                fully_shard(module)
            expected, actual = model(tiny_images()), sharded(tiny_images())
            torch.testing.assert_close(actual, expected)
            expected.square().sum().backward()
            actual.square().sum().backward()
            for one, other in zip(sharded.parameters(), model.parameters(), strict=True):
                torch.testing.assert_close(one.grad.full_tensor(), other.grad)
    finally:
        torch.distributed.destroy_process_group()
