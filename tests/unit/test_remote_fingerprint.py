"""Fingerprints of weights: by hand, and what changes them; the extension that takes them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_occ.rollout.remote.fingerprint import _CHUNK, _PRIME, fingerprint
from megatron_occ.rollout.remote.http import Client
from megatron_occ.rollout.remote.settings import RemoteSettings
from megatron_occ.rollout.remote.vllm import EXTENSION, VllmServer
from tests.unit.fake_servers import FakeVllm

ROOT = Path(__file__).resolve().parents[2]


def test_by_hand():
    # (2 * 1 + 5 * 2) + 1 = 13; then 13 * 31 + 7 * 1 + 1 = 411
    tensors = [torch.tensor([2, 5], dtype=torch.int32), torch.tensor([[7]], dtype=torch.int64)]
    assert fingerprint(tensors) == 411
    assert fingerprint([]) == 0


@pytest.mark.parametrize(
    "kind", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
)
def test_a_bit_or_an_order_changes_it(kind):
    values = torch.linspace(-2, 2, 40).to(kind).view(5, 8)
    first, other = fingerprint([values]), values.clone()
    assert fingerprint([values.t().contiguous().t()]) == first
    other.view(-1).view(torch.uint8)[7] ^= 1
    assert fingerprint([other]) != first
    assert fingerprint([values.flip(0)]) != first
    assert fingerprint([values[:2], values[2:]]) != first


def test_chunks_are_one_tensor():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-(2**31), 2**31, (_CHUNK + 3,), generator=generator).int()
    places = range(1, values.numel() + 1)
    pairs = zip(values.tolist(), places, strict=True)
    assert fingerprint([values]) == (sum(value * place for value, place in pairs) + 1) % _PRIME


def test_the_extension_of_vllm_needs_nothing_but_torch():
    hidden = ("omegaconf", "transformers", "safetensors", "megatron.core")
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden}))\n"
    code += "import megatron_occ.rollout.remote.vllm_worker"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("drafting", "extension", "method"),
    [
        (True, EXTENSION, "reload_trunk_and_head"),
        (False, EXTENSION, "reload_trunk"),
        (False, None, "reload_weights"),
        (False, "another.Extension", "reload_weights"),
    ],
)
def test_weights_are_loaded_by_the_extension_where_there_is_one(
    tmp_path, monkeypatch, drafting, extension, method
):
    fake = FakeVllm(speculative=drafting, extension=extension)
    settings = RemoteSettings("vllm", (fake.url,), tmp_path, 16)
    server = VllmServer(Client(fake.url, 5.0, 10**6), settings)
    server.inspect()
    fake.close()
    asked = []

    def post(path, body, timeout):
        asked.append((path, body["method"]))
        return {"results": [{"drafter": 3, "held": 5} if drafting else None]}

    monkeypatch.setattr(server.client, "post", post)
    server._reload(tmp_path)
    assert asked == [("/collective_rpc", method)]
