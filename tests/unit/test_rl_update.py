"""The updater on its own: old log-probs, reports, and that nothing waits for the device."""

from __future__ import annotations

import pytest
import torch

from megatron_occ.losses.calibration import CalibrationSums
from megatron_occ.losses.heads import HeadOutputs, LossReport
from megatron_occ.rl.batch import MiniBatch, RolloutBatch
from megatron_occ.rl.correction import Corrections
from megatron_occ.rl.reports import on_host
from megatron_occ.rl.update import PolicyUpdater
from tests.unit.fake_layouts import FakeLayout
from tests.unit.fakes import FakeActor, FakeStep
from tests.unit.rl_setup import OPEN, PRESETS, rl_config

EXTRAS = (
    "rl.loss.entropy_coefficient=0.1",
    "rl.loss.kl_coefficient=0.2",
    "rl.correction.weights=token",
    "rl.correction.high=2.0",
)


def small_batch(rows=4, width=6, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 10, (rows, width), generator=generator)
    mask = (torch.arange(width) > 1).float().expand(rows, width).clone()
    return RolloutBatch(ids, mask, -mask, torch.linspace(-1, 1, rows)).map(lambda v: v.to(device))


class MetaLayout(FakeLayout):
    device = torch.device("meta")


class MetaActor(FakeActor):
    """Runs the loss on tensors without values: whoever reads one gets an error."""

    def __init__(self):
        super().__init__(layout=MetaLayout())

    def get_loss_and_metrics(self, micro_batches, loss, *, forward_only=False, balanced=True):
        for batch in micro_batches:
            shape, depths = batch.ids.shape, self.num_depths
            each = torch.empty(depths, *shape, device="meta")
            main = torch.empty(shape, device="meta", requires_grad=not forward_only)
            passes = tuple(each.clone() for _ in batch.passes)
            value, report = loss(HeadOutputs(main, passes, each, main * 1, each), batch.payload)
            assert value.device.type == "meta"
            assert {metric.device.type for metric in report.metrics.values()} <= {"meta"}
        return LossReport({"loss": torch.ones(())}, CalibrationSums.zeros(depths))

    def finish_training_step(self, mix=None):
        return FakeStep(1.0, 1.0, 0.1, False)


def on_the_host(metrics):
    """In place of the one transfer of a report, which has no values here."""

    def there(*given):
        found = metrics(*given)
        assert {value.device.type for value in found.values()} <= {"meta"}
        return {name: torch.ones(()) for name in found}

    return there


@pytest.mark.parametrize("lengths", [None, [6, 4, 5, 6]])
@pytest.mark.parametrize(
    "overrides",
    [
        *((f"mtp.preset={preset}",) for preset in PRESETS),
        ("mtp.preset=occ", "mtp.trunk.statistics=current"),
        ("mtp.preset=occ", "mtp.trunk.estimator=released", OPEN),
        ("mtp.trunk.signal=policy", "mtp.head.signal=soft_ce", *EXTRAS),
        ("mtp.preset=occ", "rl.algorithm=gspo", *EXTRAS),
        ("mtp.preset=detach", "rl.correction.reject=geometric", "rl.correction.veto=0.1"),
        *(("mtp.preset=detach", f"rl.algorithm={name}") for name in ("cispo", "sapo", "dppo")),
        ("mtp.preset=occ", "rl.algorithm=grpo"),
    ],
    ids=str,
)
def test_constants_counts_and_loss_never_wait_for_the_device(overrides, lengths, monkeypatch):
    monkeypatch.setattr(Corrections, "metrics", on_the_host(Corrections.metrics))
    updater = PolicyUpdater(rl_config(*overrides), MetaActor())
    batch = small_batch(device="meta")
    logprobs = torch.empty(batch.ids.shape, device="meta")
    mini = MiniBatch(batch.with_logprobs(logprobs, logprobs), [3, 1], lengths)
    assert updater.run_update(mini).metrics["loss"] == 1.0


def test_a_report_reaches_the_host_unchanged():
    sums = CalibrationSums.from_tensor(torch.arange(1.0, 11.0))
    metrics = {"a": torch.tensor(0.5), "b": torch.tensor(7, dtype=torch.long)}
    report = on_host(LossReport(metrics, sums))
    assert {name: float(value) for name, value in report.metrics.items()} == {"a": 0.5, "b": 7.0}
    assert report.calibration.to_tensor().tolist() == list(range(1, 11))
    assert report.calibration.to_tensor().dtype == torch.float64
    assert on_host(LossReport({"a": torch.ones(())})).calibration is None


@pytest.mark.parametrize("lengths", [None, [6, 4, 5, 6]])
def test_old_logprobs_come_in_the_micro_batches_of_the_updates(lengths):
    """Two mini-batches, of micro-batches of 1 and 2, and of 1, in one call."""
    actor, seen = FakeActor(), []
    compute = actor.get_inference_log_probs
    actor.get_inference_log_probs = lambda ids, **given: seen.append(given) or compute(ids, **given)
    batch = small_batch()
    first = MiniBatch(batch.rows(0, 3), [1, 2], lengths and lengths[:3])
    second = MiniBatch(batch.rows(3, 4), [1], lengths and lengths[3:])
    updater = PolicyUpdater(rl_config("rl.rollout.temperature=0.7"), actor)
    minis = updater.compute_logprobs([first, second])
    (given,) = seen
    assert [list(part) for part in given["parts"]] == [[0], [1, 2], [3]]
    assert (given["lengths"], given["temperature"]) == (lengths, 0.7)
    whole = compute(batch.ids, parts=[range(4)], lengths=lengths, temperature=0.7)
    together = torch.cat([mini.rows.old_logprobs for mini in minis])
    assert torch.equal(together.nan_to_num(9.0), whole.nan_to_num(9.0))
    assert [mini.sizes for mini in minis] == [[1, 2], [1]]
    assert minis[0].rows.ref_logprobs is None
