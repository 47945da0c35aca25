"""Servers of a real vLLM on the CPU; ``make test-vllm`` makes the environment that they run in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_occ.cli import main
from megatron_occ.rollout.remote.http import Client
from tests.e2e.conftest import ROOT, Runner
from tests.mcore.distributed import free_port

ENVIRONMENT = os.environ.get("VLLM_ENVIRONMENT")
# the narrowest heads that vLLM's CPU kernels take
MODEL = ("model.hidden_size=64", "model.num_attention_heads=2", "model.ffn_hidden_size=128")
EXTENSION = "megatron_occ.rollout.remote.vllm_worker.ReloadExtension"
MTP = {"method": "mtp", "num_speculative_tokens": 1}
STARTS_WITHIN = 300.0


def pytest_collection_modifyitems(items):
    """Skip all of them where there is no such environment."""
    if ENVIRONMENT:
        return
    reason = "VLLM_ENVIRONMENT names no environment with vLLM: make test-vllm"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


class VllmProcess:
    """A server that can be killed and started again under its URL.

    Args:
        model: Hugging Face folder.
        log: file of its output.
        drafting: what it drafts a token with.
        more: options of its command.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        drafting: Mapping[str, Any] | None = MTP,
        more: Sequence[str] = (),
    ) -> None:
        self.model, self.log = model, log
        self.more = list(more)
        if drafting is not None:
            self.more += ["--speculative-config", json.dumps(drafting)]
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        """Start, without waiting."""
        command = [f"{ENVIRONMENT}/bin/vllm", "serve", str(self.model), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        command += ["--max-num-seqs", "64", "--worker-extension-cls", EXTENSION]
        command += self.more
        settings = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + STARTS_WITHIN
        client = Client(self.url, timeout=5.0, max_bytes=1000)
        while not client.answers("/health", 5.0):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def kill(self) -> None:
        """As ``kill -9`` of the whole server."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def at(*servers: VllmProcess, model: Sequence[str] = MODEL) -> list[str]:
    """Overrides that name the servers, and the model that they serve."""
    urls = json.dumps([server.url for server in servers])
    keys = {"urls": urls, "update_timeout": 300}
    own = ["rl.rollout.engine=vllm", "rl.rollout.batch_size=512", *model]
    return [*own, *(f"rl.rollout.server.{key}={value}" for key, value in keys.items())]


def train(folder: Path, steps: int, *model: str) -> tuple[Path, Path]:
    """A pretrained checkpoint, and its Hugging Face folder."""
    run = Runner(folder)("pretrain", "run", f"pretrain.steps={steps}", *model)
    checkpoint = run / "checkpoints" / "pretrain" / f"step_{steps:06}"
    main(["convert", "export", str(checkpoint), str(folder / "exported")])
    return checkpoint, folder / "exported"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A checkpoint that earns some reward, and its Hugging Face folder."""
    return train(tmp_path_factory.mktemp("trained"), 150, *MODEL)


@pytest.fixture(scope="session")
def servers(trained, tmp_path_factory):
    """Two servers that draft a token each; a test leaves both up."""
    folder = tmp_path_factory.mktemp("servers")
    started = [VllmProcess(trained[1], folder / f"{i}.log") for i in range(2)]
    try:
        for server in started:
            server.wait()
        yield started
    finally:
        for server in started:
            server.kill()


@pytest.fixture
def run(tmp_path):
    return Runner(tmp_path)
