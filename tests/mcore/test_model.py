"""The GPT subclass against Megatron-Core's own GPTModel with the same weights."""

from __future__ import annotations

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec_for_backend
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper

from megatron_occ.losses.heads import JointTargets, Normalizers
from megatron_occ.losses.joint import JointLoss
from megatron_occ.losses.pretraining import PretrainLoss
from megatron_occ.losses.regime import PolicySettings, Regime
from megatron_occ.mcore.cpu.specs import CPUSpecProvider, cpu_layer_spec
from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.mcore.transformer_config import transformer_config
from megatron_occ.rl.batch import head_masks, head_targets
from tests.mcore.conftest import (
    VOCABULARY,
    build_model,
    gradients,
    positions,
    random_ids,
    small_config,
)

REGIMES = {
    "none": Regime(trunk="none", head="none"),
    "detach": Regime(trunk="none", head="ce", head_weight=0.1),
    "ce": Regime(trunk="ce", head="same_as_trunk", trunk_weight=0.1),
    "policy": Regime(trunk="policy", head="same_as_trunk", trunk_weight=1.0),
    "occ": Regime(trunk="policy", head="same_as_trunk", trunk_weight=None),
    "occ_decoupled": Regime(trunk="policy", head="ce", trunk_weight=None, head_weight=0.1),
}


def stock_model(config, weights):
    megatron = transformer_config(config)
    spec = cpu_layer_spec(megatron)
    model = GPTModel(
        config=megatron,
        transformer_layer_spec=spec,
        mtp_block_spec=get_gpt_mtp_block_spec_for_backend(megatron, spec, CPUSpecProvider()),
        vocab_size=VOCABULARY,
        max_sequence_length=config.model.max_position_embeddings,
        share_embeddings_and_output_weights=config.model.tie_embeddings,
        position_embedding_type="rope",
        rotary_base=config.model.rotary_base,
    )
    model.load_state_dict(weights)
    return model


def response_mask(ids):
    mask = torch.zeros(ids.shape)
    for row in range(ids.size(0)):
        mask[row, 4 + row % 2 : ids.size(1) - row] = 1.0
    return mask


def constants(ids, depths, advantages=None):
    generator = torch.Generator().manual_seed(5)
    old = -2.0 - torch.rand(1 + depths, *ids.shape, generator=generator)
    if advantages is None:
        advantages = torch.linspace(-1.0, 1.0, ids.size(0))
    return JointTargets(head_masks(response_mask(ids), depths), old, advantages)


def joint_gradients(model, ids, regime, *, advantages=None, coefficients=None):
    """Gradients of the joint loss; with zero advantages the MTP part alone is left of ce losses."""
    depths = model.config.mtp_num_layers
    targets = constants(ids, depths, advantages)
    distance = regime.head if regime.head in ("soft_ce", "tv") else None
    request = HeadRequest(head_targets(ids, depths), regime.passes, distance=distance)
    outputs = model(ids, positions(ids), None, request=request)
    normalizers = Normalizers.from_counts(Normalizers.count(targets.mask))
    loss, report = JointLoss(PolicySettings(), regime)(outputs, targets, normalizers, coefficients)
    model.zero_grad()
    loss.backward()
    return gradients(model), report


@pytest.mark.parametrize("tied", [True, False])
def test_logprobs_of_every_head_equal_those_of_the_stock_model(layout, tied):
    config = small_config(depths=2)
    config.model.tie_embeddings = tied
    model = build_model(config, VOCABULARY, layout.device)
    stock = stock_model(config, model.state_dict())
    ids, temperature = random_ids(), 0.7
    outputs = model(
        ids,
        positions(ids),
        None,
        request=HeadRequest(head_targets(ids, 2), temperature=temperature, entropy=True),
    )
    # Megatron's own forward returns the hidden states of all heads where it is an inner stage
    stock.post_process = False
    hidden = stock(ids, positions(ids), None)
    weight = stock.embedding.word_embeddings.weight if tied else stock.output_layer.weight
    for depth, states in enumerate(hidden.chunk(3, dim=0)):
        logits = (states @ weight.t()).transpose(0, 1) / temperature
        reference = logits.log_softmax(-1)
        got = outputs.logprobs if depth == 0 else outputs.passes[0][depth - 1]
        for t in range(ids.size(1) - 1 - depth):
            expected = reference[:, t].gather(1, ids[:, t + 1 + depth].unsqueeze(1)).squeeze(1)
            torch.testing.assert_close(got[:, t], expected, atol=1e-5, rtol=1e-5)
        if depth == 0:
            top = reference.argmax(-1)
            entropy = -(reference.exp() * reference).sum(-1)
            torch.testing.assert_close(outputs.entropy, entropy, atol=1e-5, rtol=1e-5)
        else:
            agreed = (reference.argmax(-1)[:, :-depth] == top[:, depth:]).float()
            assert torch.equal(outputs.agreement[depth - 1][:, :-depth], agreed)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("depths", [1, 2])
def test_pretraining_and_ce_regime_have_the_gradients_of_megatrons_own_mtp_path(
    layout, depths, tied
):
    config = small_config(depths)
    config.model.tie_embeddings = tied
    model = build_model(config, VOCABULARY, layout.device)
    stock = stock_model(config, model.state_dict()).train()
    ids = random_ids()
    masks = head_masks(response_mask(ids), depths)
    count = masks[0].sum()
    MTPLossLoggingHelper.tracker.clear()  # class-global, sized by the last model's depths
    MTPLossAutoScaler.set_loss_scale(1.0 / count)

    def stock_gradients(main_weight):
        stock.zero_grad()
        labels, mask = head_targets(ids, 0)[0], masks[0].clone()
        losses = stock(ids, positions(ids), None, labels=labels, loss_mask=mask.clone())
        (main_weight * (losses * mask).sum() / count).backward()
        return gradients(stock)

    # Megatron divides every depth by the main head's count under per-token loss
    normalizers = Normalizers(count.repeat(1 + depths), torch.ones(1 + depths))
    request = HeadRequest(head_targets(ids, depths))
    factor = stock.config.mtp_loss_scaling_factor

    outputs = model(ids, positions(ids), None, request=request)
    loss, _ = PretrainLoss(factor)(outputs, masks, normalizers)
    loss.backward()
    assert_same_gradients(gradients(model), stock_gradients(1.0))

    model.zero_grad()
    regime = Regime(trunk="ce", head="same_as_trunk", trunk_weight=factor)
    targets = constants(ids, depths, advantages=torch.zeros(ids.size(0)))
    outputs = model(ids, positions(ids), None, request=request)
    loss, _ = JointLoss(PolicySettings(), regime)(outputs, targets, normalizers)
    loss.backward()
    assert_same_gradients(gradients(model), stock_gradients(0.0))


def assert_same_gradients(got, expected, tolerance=1e-6):
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[name], gradient, atol=tolerance, rtol=0, msg=name)


def is_head(name):
    return name.startswith("mtp.")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["none", "detach"])
def test_cut_regimes_leave_trunk_embedding_and_output_layer_without_any_gradient(
    layout, name, tied
):
    config = small_config()
    config.model.tie_embeddings = tied
    model = build_model(config, VOCABULARY, layout.device)
    grads, _ = joint_gradients(model, random_ids(), REGIMES[name], advantages=torch.zeros(4))
    shared = {n: g for n, g in grads.items() if not is_head(n)}
    assert "embedding.word_embeddings.weight" in shared
    assert tied or "output_layer.weight" in shared
    for parameter, gradient in shared.items():
        assert torch.count_nonzero(gradient) == 0, parameter
    heads = [g.abs().max() for n, g in grads.items() if is_head(n)]
    assert (len(heads) == 0) if name == "none" else min(heads) > 0


@pytest.mark.parametrize("head", ["ce", "soft_ce", "tv", "policy"])
def test_own_head_loss_trains_the_head_when_lambda_is_zero_and_leaves_the_trunk_alone(layout, head):
    model = build_model(small_config(), VOCABULARY, layout.device)
    regime = Regime(trunk="policy", head=head, trunk_weight=None, head_weight=0.1)
    ids = random_ids()
    with_mtp, _ = joint_gradients(model, ids, regime, coefficients=torch.zeros(2))
    without, _ = joint_gradients(model, ids, REGIMES["none"])
    for name, gradient in with_mtp.items():
        if is_head(name):
            assert gradient.abs().max() > 0, name
        else:
            torch.testing.assert_close(gradient, without[name], atol=1e-7, rtol=0)


def test_depth_two_trains_depth_one(layout):
    model = build_model(small_config(), VOCABULARY, layout.device)
    ids = random_ids()
    request = HeadRequest(head_targets(ids, 2), passes=((False, True),))
    model(ids, positions(ids), None, request=request).passes[0][1].sum().backward()
    first = [g.abs().max() for n, g in gradients(model).items() if n.startswith("mtp.layers.0.")]
    assert first
    assert min(first) > 0


def test_a_pass_without_the_main_head_has_the_same_depths(layout):
    model = build_model(small_config(), VOCABULARY, layout.device)
    ids, found = random_ids(), []
    for main_head in (True, False):
        request = HeadRequest(head_targets(ids, 2), ((True, True),), 0.7, main_head=main_head)
        outputs = model(ids, positions(ids), None, request=request)
        model.zero_grad()
        outputs.passes[0].sum().backward()
        found.append((outputs, gradients(model)))
    (whole, expected), (alone, gradient) = found
    assert alone.logprobs is None and alone.agreement is None
    torch.testing.assert_close(alone.passes[0], whole.passes[0], atol=0, rtol=0)
    for name, value in gradient.items():
        torch.testing.assert_close(value, expected[name], atol=1e-7, rtol=1e-6, msg=name)


def test_split_passes_send_each_loss_where_it_belongs(layout):
    """Trunk gradients come from the one loss, head gradients from the other."""
    model = build_model(small_config(), VOCABULARY, layout.device)
    ids, coefficients = random_ids(), torch.tensor([0.7, -0.3])
    split, _ = joint_gradients(model, ids, REGIMES["occ_decoupled"], coefficients=coefficients)
    shared, _ = joint_gradients(model, ids, REGIMES["occ"], coefficients=coefficients)
    own, _ = joint_gradients(model, ids, REGIMES["detach"])
    for name, gradient in split.items():
        expected = own[name] if is_head(name) else shared[name]
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5, msg=name)


def test_lambda_scales_the_loss_and_never_the_advantage(layout):
    """Weak point 8: the gradient is odd in lambda, so its sign can't move the clipped side."""
    model = build_model(small_config(), VOCABULARY, layout.device)
    ids = random_ids()
    base, _ = joint_gradients(model, ids, REGIMES["none"])
    plus, _ = joint_gradients(model, ids, REGIMES["occ"], coefficients=torch.tensor([2.0, 2.0]))
    minus, _ = joint_gradients(model, ids, REGIMES["occ"], coefficients=torch.tensor([-2.0, -2.0]))
    for name in base:
        torch.testing.assert_close(
            plus[name] - base[name], base[name] - minus[name], atol=2e-6, rtol=1e-4
        )


def test_entropy_bonus_does_not_displace_the_mtp_loss(layout):
    """Weak point 6 of the released code."""
    model = build_model(small_config(), VOCABULARY, layout.device)
    ids = random_ids()
    targets = constants(ids, 2)
    normalizers = Normalizers.from_counts(Normalizers.count(targets.mask))

    def head_gradients(entropy_coefficient):
        request = HeadRequest(head_targets(ids, 2), REGIMES["ce"].passes, entropy=True)
        outputs = model(ids, positions(ids), None, request=request)
        settings = PolicySettings(entropy_coefficient=entropy_coefficient)
        loss, _ = JointLoss(settings, REGIMES["ce"])(outputs, targets, normalizers)
        model.zero_grad()
        loss.backward()
        return gradients(model)

    without, with_bonus = head_gradients(0.0), head_gradients(0.5)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert not torch.allclose(without[name], with_bonus[name], atol=1e-6)
    for name, gradient in without.items():
        if is_head(name):
            torch.testing.assert_close(with_bonus[name], gradient, atol=1e-8, rtol=0)
