"""What the bits of a result depend on besides code, data and parameters."""

import platform
from importlib.metadata import version

import torch

LIBRARIES = ("numpy", "pyarrow", "tokenizers", "torch", "transformers")


def environment(device: torch.device, processes: str | None = None) -> dict[str, str]:
    """Versions, processor and number of threads: where two of these differ, results may differ in their last digits.

    Args:
        processes: how many there are and what each holds, where there are several.
    """
    # Without what a wheel's source adds, as in 2.13.0+cpu: the device says more.
    releases = {name: version(name).partition("+")[0] for name in LIBRARIES}
    versions = {"python": platform.python_version(), **releases}
    if processes:
        versions["processes"] = processes
    if device.type == "cuda":
        return {**versions, "device": f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"}
    bf16 = ", bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{bf16}"
    return {**versions, "device": f"{device.type}, {processor}, {torch.get_num_threads()} threads"}
