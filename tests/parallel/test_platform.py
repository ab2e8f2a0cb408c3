"""The CPU platform: mcore's CUDA questions are answered inside the scope, and nothing stays behind outside it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from megatron.core.tensor_parallel import random as mcore_random

from oprd_megatron.errors import UserError
from oprd_megatron.platform import Platform, select_platform

CPU = Platform(torch.device("cpu"), "gloo")
REPLACED = [
    (torch.cuda, "current_device"),
    (torch.cuda, "synchronize"),
    (torch.cuda, "manual_seed"),
    (torch.cuda, "get_rng_state"),
    (torch.cuda, "set_rng_state"),
    (mcore_random, "_get_cuda_rng_state"),
    (mcore_random, "_set_cuda_rng_state"),
]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="shows that torch refuses CUDA where there is none")


def attributes() -> dict[str, dict[str, object]]:
    """Every attribute of the modules that mcore asks about CUDA, by identity."""
    modules = (torch, torch.cuda, torch.Tensor, mcore_random)
    return {module.__name__: dict(vars(module)) for module in modules}


def assert_untouched(before: dict[str, dict[str, object]]) -> None:
    after = attributes()
    for module, names in before.items():
        changed = [name for name in names if after[module].get(name) is not names[name]]
        assert not changed, f"{module}: {changed}"
    assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 3)])
def test_cuda_means_cpu_inside(device: str | torch.device) -> None:
    """Factories, `.to`, `.cuda` and modules that name CUDA give CPU tensors of the right dtype and values."""
    ones = torch.ones(2)
    with CPU.scope():
        tensors = [
            torch.ones(2, device=device),
            torch.tensor([1.0, 1.0], device=device),
            torch.full((2,), 1.0, device=device),
            torch.arange(1.0, 2.0, device=device).expand(2),
            torch.ones_like(ones, device=device),
            ones.new_ones(2, device=device),
            torch.empty(2, device=device).fill_(1),
            torch.as_tensor([1.0, 1.0], device=device),
            ones.to(device),
            ones.to(device=device),
            ones.cuda(),
            ones.cuda(device),
            ones.cuda(non_blocking=True),
        ]
        modules = [torch.nn.Linear(2, 2, device=device), torch.nn.Linear(2, 2).to(device), torch.nn.Linear(2, 2).cuda()]
        cast = ones.to(device, torch.float64)
    for tensor in tensors:
        assert tensor.device.type == "cpu" and torch.equal(tensor, ones)
    assert {parameter.device.type for module in modules for parameter in module.parameters()} == {"cpu"}
    assert cast.dtype == torch.float64 and cast.device.type == "cpu"


def test_cpu_stays_cpu_inside() -> None:
    """Calls that do not name CUDA are passed on with their arguments."""
    with CPU.scope():
        assert torch.zeros(3, 2, dtype=torch.int64, device="cpu").shape == (3, 2)
        assert torch.ones(2).to(torch.float16).dtype == torch.float16
        assert torch.ones(2, device="meta").device.type == "meta"
        assert torch.ones(2).to("meta").device.type == "meta"


def test_tensor_types_are_named_as_mcore_expects() -> None:
    """`tensor.type()` is the name of the CUDA type; with a dtype it still converts."""
    with CPU.scope():
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
        assert torch.zeros(1, dtype=torch.float16).type() == "torch.cuda.HalfTensor"
        assert torch.zeros(1).type(torch.int64).dtype == torch.int64
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_current_device_and_random_states() -> None:
    """The current device can be handed to factories; CUDA's random state is the CPU's, read and written."""
    with CPU.scope():
        assert torch.ones(1, device=torch.cuda.current_device()).device.type == "cpu"
        torch.cuda.synchronize()
        torch.cuda.manual_seed(7)
        state = torch.cuda.get_rng_state()
        assert torch.equal(state, torch.get_rng_state())
        first = torch.rand(4)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(4), first)
        mcore_random._set_cuda_rng_state(state)
        assert torch.equal(mcore_random._get_cuda_rng_state(), state)
        assert torch.equal(torch.rand(4), first)
    assert torch.equal(torch.rand(4, generator=torch.Generator().manual_seed(7)), first)


def test_every_attribute_is_put_back() -> None:
    """Inside, exactly the listed attributes are stand-ins; outside, everything is as it was."""
    before = attributes()
    with CPU.scope():
        inside = attributes()
        changed = {(m, name) for m, names in before.items() for name in names if names[name] is not inside[m].get(name)}
        assert changed == {(module.__name__, name) for module, name in REPLACED}
    assert_untouched(before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_raising_block_leaves_nothing_behind(error: type[BaseException]) -> None:
    """The scope is undone on every way out, also of a nested one."""
    before = attributes()
    with pytest.raises(error), CPU.scope(), CPU.scope():
        raise error
    assert_untouched(before)


def test_nested_scopes() -> None:
    """Leaving an inner scope leaves the outer one in force; the answers inside are the same at every depth."""
    before = attributes()
    with CPU.scope():
        with CPU.scope():
            assert torch.zeros(1, device="cuda").type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1, device="cuda").type() == "torch.cuda.FloatTensor"
        with torch.device("cpu"), CPU.scope():
            assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.cuda.current_device() == torch.device("cpu")
    assert_untouched(before)


def test_scope_can_be_entered_again_after_it_was_left() -> None:
    """One platform serves the whole run, one block at a time."""
    before = attributes()
    for _ in range(3):
        with CPU.scope():
            assert torch.ones(1, device="cuda").item() == 1
        assert_untouched(before)


@no_gpu
def test_cuda_is_refused_outside() -> None:
    """Before and after a scope torch says that there is no GPU, as it does for everybody."""
    requests = [
        lambda: torch.ones(1, device="cuda"),
        lambda: torch.ones(1).cuda(),
        lambda: torch.ones(1).to("cuda"),
        lambda: torch.cuda.current_device(),
    ]
    with CPU.scope():
        for request in requests:
            request()
    for request in requests:
        with pytest.raises((RuntimeError, AssertionError)):
            request()


def test_importing_the_package_changes_nothing() -> None:
    """Only a scope puts stand-ins in place, never an import."""
    code = (
        "import torch; from megatron.core.tensor_parallel import random as r;"
        "before = dict(vars(torch.cuda)), dict(vars(r));"
        "import oprd_megatron.platform, oprd_megatron.parallel, oprd_megatron.models;"
        "names = 'current_device', 'synchronize', 'manual_seed', 'get_rng_state', 'set_rng_state';"
        "assert all(vars(torch.cuda)[n] is before[0][n] for n in names);"
        "assert all(vars(r)[n] is before[1][n] for n in ('_get_cuda_rng_state', '_set_cuda_rng_state'))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_cuda_platform_puts_nothing_in_place() -> None:
    """On CUDA the scope does nothing at all."""
    before = attributes()
    with Platform(torch.device("cuda", 0), "cpu:gloo,cuda:nccl").scope():
        assert_untouched(before)


def test_select_platform() -> None:
    """cpu is gloo on the CPU, whatever the machine has."""
    platform = select_platform("cpu")
    assert platform == CPU and not platform.is_cuda
    platform.synchronize()


@no_gpu
def test_select_cuda_without_a_gpu() -> None:
    """auto falls back to the CPU; cuda is refused in one line that says what to do."""
    assert select_platform("auto") == CPU
    with pytest.raises(UserError, match=r"run\.device: cuda, but torch sees no GPU.*use device: cpu") as caught:
        select_platform("cuda")
    assert "\n" not in str(caught.value)
