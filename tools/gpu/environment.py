"""Section 1: device, versions, and what the product chooses with them."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata, util

import torch

from benchmarks.layout_cases import DENSE, read
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.capabilities import uses_transformer_engine
from megatron_occ.mcore.fusions import fusions, fusions_text
from megatron_occ.mcore.versions import installed_version
from tools.gpu.device import on_gpu, start
from tools.gpu.results import INFO, OK, Row
from tools.gpu.session import Session

_PACKAGES = ("transformer_engine", "apex", "flash_attn", "triton", "transformers")


def measure(session: Session) -> None:
    """Rows of the section."""
    for part, rows in (
        ("device", _device),
        ("versions", _versions),
        ("layers", _layers),
        ("attention", _attention),
    ):
        session.run(part, rows)


def _device() -> Iterator[Row]:
    if not on_gpu():
        yield Row("device", INFO, f"CPU, {os.cpu_count()} cores, {platform.machine()}")
        return
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except OSError:
        driver = "unknown"
    found = torch.cuda.get_device_properties(0)
    text = (
        f"{found.name}, {found.total_memory / 2**30:.0f} GiB, driver {driver}, "
        f"{os.cpu_count()} cores"
    )
    yield Row("device", OK, text, {"name": found.name, "memory": found.total_memory})


def _versions() -> Iterator[Row]:
    cuda = torch.version.cuda or "none"
    text = (
        f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {cuda}, "
        f"cuDNN {torch.backends.cudnn.version()}, megatron-core {installed_version()}"
    )
    yield Row("versions", INFO, text)
    found = {name: _version(name) for name in _PACKAGES}
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    yield Row("versions", INFO, text, found)


def _version(package: str) -> str:
    if util.find_spec(package) is None:
        return "not found"
    for name in (package, package.replace("_", "-")):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "found"


# the narrowest heads that every attention kernel takes
_SIZES = ("model.hidden_size=256", "model.init_std=0.02", "precision=bf16", "mtp.num_layers=1")


def _actor() -> MegatronGPTActor:
    config = read(DENSE, _SIZES)
    layout = start(config)
    return MegatronGPTActor(config, 64, layout, optimizer=config.rl.optimizer, total_updates=1)


def _layers() -> Iterator[Row]:
    chunk = _actor().chunks[0]
    specification = "TransformerEngine" if uses_transformer_engine() else "local layers"
    yield Row("layers", INFO, f"{specification}, {type(chunk.decoder.layers[0].mlp).__name__}")
    config = read(DENSE, _SIZES)
    yield Row("layers", INFO, f"fusions: {fusions_text(config)}", fusions(config))


def _attention() -> Iterator[Row]:
    """Which kernel answers in training: asked for, and as TransformerEngine logs it."""
    actor, said = _actor(), _Said()
    logging.getLogger().addHandler(said)
    ids = torch.zeros(2, 64, dtype=torch.long, device=actor.layout.device)
    arguments = {"temperature": 1.0, "parts": [[0, 1]]}
    for lengths in (None, [64, 64]):
        actor.get_inference_log_probs(ids, lengths=lengths, **arguments)
    logging.getLogger().removeHandler(said)
    asked = getattr(actor.chunks[0].config.attention_backend, "name", "unknown")
    answered = "; ".join(dict.fromkeys(said.lines)) or "torch's kernel, or none that says so"
    yield Row("attention", INFO, f"asked for {asked}: {answered}")


class _Said(logging.Handler):
    """Keeps the lines that name a backend."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "backend" in text.lower() and "running" in text.lower():
            self.lines.append(text)
