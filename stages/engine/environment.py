"""Library versions and hardware, which determine the last digits of a result."""

import platform
from importlib.metadata import version

import torch

LIBRARIES = ("accelerate", "numpy", "peft", "pyarrow", "tokenizers", "torch", "transformers")


def environment(device: torch.device) -> dict[str, str]:
    """Versions, processor and number of threads. Results are bit-identical only if all of these are equal."""
    # Without the local version, such as +cpu in 2.13.0+cpu: "device" says more.
    releases = {name: version(name).partition("+")[0] for name in LIBRARIES}
    versions = {"python": platform.python_version(), **releases}
    if device.type == "cuda":
        return {**versions, "device": f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"}
    bf16 = ", bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else ""
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}{bf16}"
    return {**versions, "device": f"{device.type}, {processor}, {torch.get_num_threads()} threads"}
