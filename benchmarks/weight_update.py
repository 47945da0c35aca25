"""What an update of a server's weights costs, by the ways that weights can take.

One process trains nothing: it has a model of random weights and brings it to a server again and
again, by each way in turn, in one run. The server is a process of its own that copies what arrives
into tensors of its own, as an engine does; or a real vLLM. Medians, and ratios to the folder:

    OMP_NUM_THREADS=1 python benchmarks/weight_update.py [--rounds 7] [--megabytes 400]

On a real vLLM (start it on the folder as docs/rollout-servers.md says, with the worker extension):

    python benchmarks/weight_update.py --export FOLDER --megabytes 100
    python benchmarks/weight_update.py --url http://127.0.0.1:8000 --megabytes 100
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_occ.config import load_config
from megatron_occ.data.tokenizers import Tokenizer, build_tokenizer
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.export import HuggingFaceExport
from megatron_occ.mcore.main_rank import MainRank
from megatron_occ.mcore.memory_export import MemoryExport
from megatron_occ.mcore.startup import initialize, shutdown
from megatron_occ.rollout.remote import RemoteEngine, RemoteSettings
from megatron_occ.rollout.remote.arrival import opened, tensors_of
from megatron_occ.rollout.remote.bucket_server import BucketServer
from megatron_occ.rollout.remote.carriers import MemoryCarrier
from megatron_occ.rollout.remote.manifest import read_manifest
from megatron_occ.rollout.remote.vllm import EXTENSION

WIDTH, INNER, VOCABULARY = 512, 2048, 4096
# bytes of a layer in fp32, and of embedding, output layer and MTP layer
LAYER = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
FIXED = 4 * 2 * WIDTH * VOCABULARY + 2 * LAYER
WAYS = ("folder", "folder in /dev/shm", "memory", "network")


class Receiver(BaseHTTPRequestHandler):
    """What ``VllmServer`` asks of a server, with copies in the place of a model."""

    held: dict[str, Tensor] = {}
    identity = ""

    def log_message(self, *args: object) -> None:
        """Nothing is logged."""

    def do_GET(self) -> None:
        """Health and configuration."""
        config = {
            "model_config": {"logprobs_mode": "raw_logprobs"},
            "parallel_config": {"worker_extension_cls": EXTENSION},
            "speculative_config": None,
        }
        self._answer({"data": [{"id": "copies"}], "vllm_config": config})

    def do_POST(self) -> None:
        """Calls of workers."""
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        found: dict[str, Any] = {}
        if body.get("method") == "reload_weights":
            self._copy(of_folder(Path(body["kwargs"]["weights_path"])))
        if body.get("method") == "fetch_weights":
            manifest = read_manifest(body["kwargs"]["manifest"])
            with opened(manifest, body["kwargs"]["source"]) as source:
                count = self._copy(tensors_of(manifest, source))
            found = {"trunk": count, "drafter": 0, "held": 0, "identity": manifest.identity}
        self._answer({"results": [found]})

    def _copy(self, tensors: Iterable[tuple[str, Tensor]]) -> int:
        count = 0
        for name, tensor in tensors:
            if name not in self.held:
                self.held[name] = torch.empty_like(tensor)
            self.held[name].copy_(tensor)
            count += 1
        return count

    def _answer(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def of_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a Hugging Face folder, one after the other."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened_file:
            for name in opened_file.keys():  # noqa: SIM118 (no dictionary)
                yield name, opened_file.get_tensor(name)


def receive(port: Connection) -> None:
    """Serve until killed; tells the port first."""
    torch.set_num_threads(1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    port.send(server.server_address[1])
    server.serve_forever()


def build_actor(megabytes: int, tokenizer: Tokenizer) -> MegatronGPTActor:
    """A dense model with an MTP layer, of about so many megabytes of fp32."""
    layers = max(1, round((megabytes * 1e6 - FIXED) / LAYER))
    sizes = {
        "num_layers": layers,
        "hidden_size": WIDTH,
        "ffn_hidden_size": INNER,
        "num_attention_heads": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
    }
    keys = [f"model.{name}={value}" for name, value in sizes.items()]
    config = load_config([], ["mtp.num_layers=1", "rl.rollout.engine=vllm", *keys])
    return MegatronGPTActor(
        config,
        VOCABULARY,
        initialize(config),
        optimizer=config.rl.optimizer,
        total_updates=1,
    )


def updater(
    way: str, url: str, folder: Path, actor: MegatronGPTActor, tokenizer: Tokenizer
) -> Callable[[int], None]:
    """Brings the weights of the actor to the server, by one of the ways."""
    transfer = way.partition(" ")[0]
    settings = RemoteSettings("vllm", (url,), folder, VOCABULARY, transfer=transfer)
    main = MainRank()
    if transfer == "folder":
        written = HuggingFaceExport(actor, main, folder / "staged", tokenizer)
        stage, engine = written.stage, RemoteEngine(settings, written.write)
    else:
        kept = MemoryExport(actor, main, tokenizer)
        server = BucketServer() if transfer == "network" else None
        stage, engine = kept.stage, RemoteEngine(settings, MemoryCarrier(kept.take, server))

    def update(version: int) -> None:
        stage()
        engine.update_weights(version)

    return update


def measure(url: str, rounds: int, actor: MegatronGPTActor, tokenizer: Tokenizer) -> None:
    """Print medians and ratios."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with (
        tempfile.TemporaryDirectory() as disk,
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
    ):
        folders = {way: Path(memory if "shm" in way else disk) / way[:6] for way in WAYS}
        updates = {way: updater(way, url, folders[way], actor, tokenizer) for way in WAYS}
        for number in range(rounds + 1):
            for way, update in updates.items():
                start = time.perf_counter()
                update(number)
                # the first one is a warm-up
                if number:
                    seconds[way].append(time.perf_counter() - start)
    size = sum(p.numel() for p in actor.chunks[0].parameters()) * 4 / 1e6
    print(f"{size:.0f} MB of fp32, {rounds} updates by each way in turn, medians")
    base = statistics.median(seconds["folder"])
    print("| way | seconds | of the folder's time | fastest, slowest |\n|---|---|---|---|")
    for way, found in seconds.items():
        middle = statistics.median(found)
        ends = f"{min(found):.2f}, {max(found):.2f}"
        print(f"| {way} | {middle:.2f} | {middle / base:.2f} | {ends} |")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--url", help="a vLLM started on the folder of --export")
    parser.add_argument("--export", type=Path, help="write the model for a vLLM, and end")
    options = parser.parse_args()
    tokenizer = build_tokenizer("char", alphabet="0123456789+*= ")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    receiver = context.Process(target=receive, args=(theirs,), daemon=True)
    url = options.url
    if url is None and options.export is None:
        receiver.start()
        url = f"http://127.0.0.1:{ours.recv()}"
    actor = build_actor(options.megabytes, tokenizer)
    with torch.no_grad():
        if options.export is not None:
            options.export.mkdir(parents=True)
            export = HuggingFaceExport(actor, MainRank(), options.export / "staged", tokenizer)
            export.stage()
            export.write(options.export)
        else:
            measure(url, options.rounds, actor, tokenizer)
    shutdown()
    if receiver.is_alive():
        receiver.kill()


if __name__ == "__main__":
    main()
