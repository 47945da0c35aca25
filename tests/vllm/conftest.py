"""Servers of a real vLLM on the CPU; ``make test-vllm`` makes the environment that they run in."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron_occ.cli import main
from megatron_occ.rollout.remote.http import Client
from tests.e2e.conftest import ROOT, Runner
from tests.mcore.distributed import free_port

ENVIRONMENT = os.environ.get("VLLM_ENVIRONMENT")
# the narrowest heads that vLLM's CPU kernels take
MODEL = ("model.hidden_size=64", "model.num_attention_heads=2", "model.ffn_hidden_size=128")
EXTENSION = "megatron_occ.rollout.remote.vllm_worker.ReloadExtension"
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
    """A server, drafting a token, that can be killed and started again under its URL.

    Args:
        model: Hugging Face folder.
        log: file of its output.
    """

    def __init__(self, model: Path, log: Path) -> None:
        self.model, self.log = model, log
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        """Start, without waiting."""
        command = [f"{ENVIRONMENT}/bin/vllm", "serve", str(self.model), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--dtype", "float32", "--enforce-eager"]
        command += ["--max-num-seqs", "64", "--worker-extension-cls", EXTENSION]
        command += ["--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}']
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


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A checkpoint that earns some reward, and its Hugging Face folder."""
    folder = tmp_path_factory.mktemp("trained")
    run = Runner(folder)("pretrain", "run", "pretrain.steps=150", *MODEL)
    checkpoint = run / "checkpoints" / "pretrain" / "step_000150"
    main(["convert", "export", str(checkpoint), str(folder / "exported")])
    return checkpoint, folder / "exported"


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
