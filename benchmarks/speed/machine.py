"""The machine that a benchmark ran on."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def describe() -> str:
    """Processor, cores that may be used, and versions, in one line."""
    info = Path("/proc/cpuinfo")
    models = (
        [x for x in info.read_text().splitlines() if x.startswith("model name")]
        if info.exists()
        else []
    )
    processor = models[0].split(": ")[1] if models else platform.processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "scvi-tools"))
    return f"{processor}, {cores} cores{gpu}, Python {platform.python_version()}, {versions}"
