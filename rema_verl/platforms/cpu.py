"""verl platform ``cpu``: FSDP2 on gloo and vLLM's CPU build, for machines without an accelerator.

Registered with verl's ``PlatformRegistry`` and taken by itself where torch is built without an accelerator;
``VERL_PLATFORM`` overrides.

"Device memory" is the resident set of the process, so that verl's ``perf/*`` figures keep a meaning.
"""

import contextlib
import os
import resource
import types
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry, get_platform


def torch_is_cpu_build() -> bool:
    """Whether this torch could not use an accelerator if there was one.

    The build decides, not what is visible: a Ray actor that was given no GPU sees none on a GPU machine, and must not
    end up on another platform than the actor beside it.
    """
    return not (torch.version.cuda or torch.version.hip or hasattr(torch, "npu"))


def _rss() -> int:
    return psutil.Process().memory_info().rss  # bytes


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes


def _nothing(*args, **kwargs) -> None:
    """Stands in for calls that have no meaning without a device queue, cache or allocator."""


def _device_module() -> types.SimpleNamespace:
    """``torch.cpu`` plus those names of ``torch.cuda`` that verl calls on its device module."""
    names = {name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("_")}
    no_ops = (
        "set_device synchronize empty_cache ipc_collect manual_seed manual_seed_all reset_peak_memory_stats "
        "reset_max_memory_allocated set_per_process_memory_fraction"
    )
    names.update(dict.fromkeys(no_ops.split(), _nothing))
    names.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: "cpu",
        get_device_name=lambda *args: "CPU",
        memory_allocated=lambda *args: _rss(),
        memory_reserved=lambda *args: _rss(),
        max_memory_allocated=lambda *args: _peak_rss(),
        max_memory_reserved=lambda *args: _peak_rss(),
        mem_get_info=lambda *args: (psutil.virtual_memory().available, psutil.virtual_memory().total),
        get_rng_state=lambda *args: torch.get_rng_state(),
        set_rng_state=lambda state, *args: torch.set_rng_state(state),
    )
    return types.SimpleNamespace(**names)


_MODULE = _device_module()


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    """No accelerator: gloo, float32, one logical device per worker."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _MODULE

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return torch_is_cpu_build()

    def current_device(self) -> str:
        # Not an index: verl calls tensor.to(get_device_id()), and torch reads an int as "that accelerator".
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg: str):
        return contextlib.nullcontext()

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    # verl hard-codes Ray's "GPU" resource in its placement check and in vLLMReplica. Ray lets a machine declare
    # logical GPUs (ray.init(num_gpus=N)), which is what rema_verl/config/device/cpu.yaml does.
    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_resource_options(self, num_gpus: float) -> dict[str, Any]:
        return {"num_gpus": num_gpus}

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False  # selects shared memory for the weight sync into vLLM

    def rollout_env_vars(self) -> dict[str, str]:
        return {"VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind")}

    def cudart(self) -> None:
        return None


def chosen() -> bool:
    """Whether verl runs on this platform here."""
    return get_platform().device_name == "cpu"


if torch_is_cpu_build():
    # verl takes a machine with nvidia-smi for a CUDA one, whatever torch can do.
    os.environ.setdefault("VERL_PLATFORM", "cpu")
if chosen():
    # Children inherit the choice; verl registers its FSDP engine classes for "cuda" and "npu" only, though their code
    # is device-neutral, and has this override for that.
    os.environ["VERL_PLATFORM"] = "cpu"
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
