"""TransformerEngine's FusedAdam on the CPU, for tests: its states, scales and rounding.

After its ``pytorch/optimizers/fused_adam.py`` (2.20.2) and the kernel ``AdamFunctor`` in
``common/multi_tensor/adam.cu``: arithmetic in fp32, moments rounded where they are stored. Left out
are states in FP8, which are tensors of a class of its own, and CUDA graphs.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from unittest import mock

import torch
from megatron.core import optimizer, utils
from megatron.core.optimizer import distrib_optimizer
from torch import Tensor

from megatron_occ.mcore import capabilities

STATES = ("exp_avg", "exp_avg_sq", "master_param")
MOMENTS = (torch.float32, torch.float16, torch.bfloat16)


class FusedAdam(torch.optim.Optimizer):
    """With its arguments, attributes and methods."""

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        amsgrad=False,
        *,
        bias_correction=True,
        adam_w_mode=True,
        capturable=False,
        master_weights=False,
        master_weight_dtype=torch.float32,
        exp_avg_dtype=torch.float32,
        exp_avg_sq_dtype=torch.float32,
        use_decoupled_grad=False,
        store_param_remainders=False,
        set_grad_none=None,
    ):
        assert not amsgrad and not capturable and set_grad_none is None
        assert exp_avg_dtype in MOMENTS and exp_avg_sq_dtype in MOMENTS
        defaults = dict(
            lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay
        )
        super().__init__(params, defaults)
        self.adam_w_mode = 1 if adam_w_mode else 0
        self.master_weights = master_weights
        self.name_to_dtype_map = dict(
            zip(STATES, (exp_avg_dtype, exp_avg_sq_dtype, master_weight_dtype), strict=True)
        )
        self._scales = {}
        self.use_decoupled_grad = use_decoupled_grad
        self.store_param_remainders = (
            store_param_remainders and master_weights and master_weight_dtype == torch.float32
        )
        self.fuse_unscale = exp_avg_dtype == exp_avg_sq_dtype == torch.bfloat16

    def zero_grad(self, set_to_none=None):
        name = "decoupled_grad" if self.use_decoupled_grad else "grad"
        for parameter in (p for group in self.param_groups for p in group["params"]):
            setattr(parameter, name, None)

    def get_unscaled_state(self, param, state_name, skip_unscale=False) -> Tensor:
        state, dtype = self.state[param][state_name], self.name_to_dtype_map[state_name]
        if dtype == torch.float16:
            return state.float().mul_(self._scales[param][state_name])
        if dtype == torch.bfloat16:
            return state if skip_unscale else state.float()
        return state

    def set_scaled_state(self, param, state_name, unscaled_state) -> None:
        remainders = self._has_remainders(param) and state_name == "master_param"
        assert unscaled_state.dtype == (torch.int16 if remainders else torch.float32)
        if state_name not in self.state[param]:
            self._initialize_state(param, state_name, False, remainders)
        state = self.state[param][state_name]
        if self.name_to_dtype_map[state_name] == torch.float32:
            state.copy_(unscaled_state)
        else:
            self._apply_scale(unscaled_state, state, self._scales[param][state_name])

    def _apply_scale(self, unscaled, scaled, scale):
        if scaled.dtype == torch.bfloat16:
            scaled.copy_(unscaled.bfloat16())
            return
        torch.div(unscaled.abs().max(), torch.finfo(torch.float16).max / 2, out=scale[0])
        unscaled.mul_(torch.where(scale > 0, scale.reciprocal(), 0.0))
        scaled.copy_(unscaled)

    def _has_remainders(self, param):
        return self.store_param_remainders and param.dtype == torch.bfloat16

    def _initialize_state(self, param, state_name, zero_buffer, store_param_remainders=False):
        dtype = self.name_to_dtype_map[state_name]
        kept = torch.int16 if store_param_remainders else dtype
        # without a value that happens to be 0
        fill = 0 if zero_buffer or store_param_remainders else 77
        self.state[param][state_name] = torch.full_like(param.data, fill, dtype=kept)
        if dtype != torch.float32:
            self._scales.setdefault(param, {})[state_name] = torch.ones(1)

    # the second argument has no default there: Megatron's init_state_fn fails
    def initialize_state(self, param, store_param_remainders):
        self._initialize_state(param, "exp_avg", zero_buffer=True)
        self._initialize_state(param, "exp_avg_sq", zero_buffer=True)
        if self.master_weights:
            self._initialize_state(param, "master_param", False, store_param_remainders)
            if not store_param_remainders:
                self.set_scaled_state(param, "master_param", param.clone().detach().float())

    @torch.no_grad()
    def step(self, closure=None, grad_scaler=None):
        name = "decoupled_grad" if self.use_decoupled_grad else "grad"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if len(self.state[param]) == 0:
                    self.initialize_state(param, self._has_remainders(param))
                gradient = getattr(param, name, None)
                if gradient is not None:
                    self._update(param, gradient.float(), group)

    def _update(self, param, gradient, group):
        assert not self.master_weights and self.adam_w_mode and param.dtype == torch.float32
        (beta1, beta2), step = group["betas"], group["step"]
        for name in STATES[:2]:
            # read where a state is not fp32, also where the kernel rounds by itself
            assert self.name_to_dtype_map[name] == torch.float32 or name in self._scales[param]
        first, second = (self.get_unscaled_state(param, name).float() for name in STATES[:2])
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient * gradient
        correction = [1 - beta**step if group["bias_correction"] else 1 for beta in (beta1, beta2)]
        denominator = (second / correction[1]).sqrt() + group["eps"]
        change = first / correction[0] / denominator + group["weight_decay"] * param.data
        param.data.sub_(group["lr"] * change)
        for name, value in zip(STATES[:2], (first, second), strict=True):
            self.set_scaled_state(param, name, value)


@contextlib.contextmanager
def transformer_engine() -> Iterator[None]:
    """Megatron-Core takes this Adam for TransformerEngine's, in optimizers that are made here."""
    with (
        _package(),
        mock.patch.object(utils, "_te_version", None),
        mock.patch.multiple(optimizer, Adam=FusedAdam, USING_PYTORCH_OPTIMIZER=False),
        mock.patch.object(distrib_optimizer, "Adam", FusedAdam),
        # of the checks alone: layers stay Megatron's own
        mock.patch.object(capabilities, "uses_transformer_engine", return_value=True),
    ):
        yield


@contextlib.contextmanager
def _package() -> Iterator[None]:
    """A package with this Adam alone; other modules that are imported meanwhile stay."""
    names = ("", ".pytorch", ".pytorch.optimizers")
    modules = {name: types.ModuleType(name) for name in map("transformer_engine{}".format, names)}
    modules["transformer_engine"].__version__ = "2.20.2"
    modules["transformer_engine.pytorch.optimizers"].FusedAdam = FusedAdam
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        # None: hidden, as everywhere without a device
        sys.modules.update(before)
