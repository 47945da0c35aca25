"""The pretended CUDA device, and the engine on it: every tensor is where a GPU wants it."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.config import load_config
from megatron_occ.mcore.inference.engine import Speculation, gather_shares
from megatron_occ.mcore.inference.slots import Slots
from megatron_occ.mcore.layout import Layout
from megatron_occ.mcore.startup import initialize
from megatron_occ.rollout import Generation
from tests.mcore.distributed import run_ranks
from tests.mcore.simulated_cuda import CUDA, Far, simulated_cuda, to_cuda
from tests.mcore.test_generation import make_engine, prompts, requests, respond, settings
from tests.mcore.test_speculation import KINDS, model_of

MIXED = "to be on the same device"


def test_results_are_on_the_side_of_what_they_are_made_of():
    with simulated_cuda():
        host, device = torch.ones(2, 3), torch.ones(2, 3, device="cuda")
        assert (host.device.type, device.device) == ("cpu", CUDA)
        for made in (device + 1, device.sum(), device[0], torch.cat((device, device)), host.cuda()):
            assert made.device == CUDA
        for made in (host + 1, device.cpu(), device.to("cpu"), torch.zeros_like(host)):
            assert made.device.type == "cpu"
        # a number, or an index, may come from the host
        assert (device * torch.tensor(2.0)).device == CUDA
        assert device[torch.tensor([1])].device == CUDA
        device[torch.tensor([0])] = 5.0
        assert device.cpu()[0, 0] == 5
    assert type(device) is Far


@pytest.mark.parametrize(
    "call",
    [
        lambda host, device: device + host,
        lambda host, device: torch.cat((host, device)),
        lambda host, device: device.gather(0, torch.zeros(1, 3, dtype=torch.long)),
        lambda host, device: host[torch.zeros(1, dtype=torch.long).cuda()],
        lambda host, device: device.index_copy_(0, torch.tensor([1]), device[:1]),
        lambda host, device: device.__setitem__(0, host[0]),
    ],
)
def test_a_call_that_mixes_the_sides_is_refused(call):
    with simulated_cuda(), pytest.raises(RuntimeError, match=MIXED):
        call(torch.ones(2, 3), torch.ones(2, 3, device="cuda"))


def test_an_array_of_a_far_tensor_is_refused():
    with simulated_cuda(), pytest.raises(TypeError, match="cuda:0"):
        torch.ones(2, device="cuda").numpy()


def test_a_collective_wants_far_tensors(layout):
    with simulated_cuda():
        torch.distributed.all_reduce(torch.ones(2, device="cuda"))
        with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
            torch.distributed.all_reduce(torch.ones(2))
        asked = torch.distributed.new_group(backend="gloo")
        torch.distributed.all_reduce(torch.ones(2), group=asked)


def test_gradients_are_those_of_the_host():
    def gradient(module):
        inputs = torch.ones(2, 3, device=module.weight.device)
        module(inputs).square().sum().backward()
        return module.weight.grad.tolist()

    torch.manual_seed(0)
    module = torch.nn.Linear(3, 4)
    expected = gradient(module)
    module.zero_grad()
    with simulated_cuda():
        assert gradient(module.to(torch.device("cuda"))) == expected


def on_cuda(model, slots, speculation, **changes):
    """Responses of the engine there, and what the host waited for."""
    with simulated_cuda() as device:
        engine = make_engine(to_cuda(model), slots=slots, speculation=speculation)
        engine.layout = Layout.of_this_rank(CUDA)
        return engine.generate(requests(prompts()), settings(**changes)), device.waits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coupled", [True, False])
def test_the_engine_responds_as_on_the_host(layout, kind, coupled):
    drafts, cuts = Speculation(3, coupled=coupled), dict(top_p=0.9, stop_strings=("ab",))
    model = model_of(layout, kind)
    expected = respond(model, prompts(), slots=4, speculation=drafts, keep_states=True, **cuts)
    found, _ = on_cuda(model, 4, drafts, keep_states=True, **cuts)
    assert found.tokens == expected.tokens
    # masks are a little wider there, which rounds otherwise
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert all(states.device.type == "cpu" for states in found.states)


@pytest.mark.parametrize("drafts", [0, 3])
def test_the_host_waits_once_a_cycle_and_not_for_each_token_or_layer(layout, drafts, monkeypatch):
    commits = []
    own = Slots.commit
    monkeypatch.setattr(Slots, "commit", lambda *args: commits.append(args) or own(*args))
    long = dict(max_response_length=30, stop_ids=())
    found, waits = on_cuda(model_of(layout), 6, Speculation(drafts), **long)
    # for tokens and accepted drafts; and for what the finished rows hold, tokens and log-probs
    assert waits.pop("cpu") == len(commits)
    # for rows that come, end and move; how far rows have come goes by itself
    assert waits.pop("sent") <= 5 * len(found.tokens)
    assert waits.pop("tolist") <= 2 * len(found.tokens)
    assert not waits


def gather_there():
    """Shares of two context-parallel ranks of two groups, and what the host waited for."""
    with simulated_cuda() as device:
        layout = initialize(load_config([], ["parallel.context=2", "parallel.tensor=2"]))
        device.waits.clear()
        rank = layout.context_parallel_rank
        states = [torch.full((3 + rank, 4), rank, dtype=torch.bfloat16), torch.empty(0)]
        mine = Generation([[rank], []], [[-1.0], []], ["stop", "abort"], states=states)
        return gather_shares(layout, mine), device.waits


def test_shares_of_context_parallel_ranks_do_not_go_through_the_device():
    for shares, waits in run_ranks(gather_there, 4):
        assert not waits
        assert [share.tokens for share in shares] == [[[0], []], [[1], []]]
        for rank, share in enumerate(shares):
            full, none = share.states
            assert torch.equal(full, torch.full((3 + rank, 4), rank, dtype=torch.bfloat16))
            assert len(none) == 0
