"""Packages of CUDA kernels, out of Megatron-Core's sight on a machine without a CUDA device.

Megatron-Core asks whether such a package can be imported where it means whether there is a device:
rotation, norms, Adam, gradient norms and scaling, the router's product, the classes that a layer
may be of, recomputation, extra state in checkpoints. TransformerEngine imports well without a
device and stops in the first kernel. So Megatron gets the answer of a machine that has none of
these packages: of each choice there is one to test, whatever is installed.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec

import torch

# what Megatron-Core 0.16 and 0.19 look for: TransformerEngine, apex, and apex's extensions
PACKAGES = (
    "transformer_engine",
    "transformer_engine_torch",
    "apex",
    "amp_C",
    "fused_weight_gradient_mlp_cuda",
)

logger = logging.getLogger(__name__)


def hide_cuda_packages() -> None:
    """Make imports of :data:`PACKAGES` fail in this process where no CUDA device is.

    Does nothing where there is a device. To be called before Megatron-Core is imported.

    Raises:
        ValueError: Megatron-Core was imported before, and found one of them.
    """
    if torch.cuda.is_available():
        return
    loaded = [name for name in PACKAGES if sys.modules.get(name) is not None]
    if loaded and "megatron.core" in sys.modules:
        raise ValueError(
            f"megatron.core was imported before megatron_occ.mcore and found {', '.join(loaded)}, "
            "whose kernels need a CUDA device, and there is none: import megatron_occ.mcore first"
        )
    installed = [name for name in PACKAGES if _is_installed(name)]
    for name in [*PACKAGES, *(each for each in sys.modules if each.split(".")[0] in PACKAGES)]:
        # Python's own way to say that there is no such module; find_spec says None then
        sys.modules[name] = None
    if installed:
        logger.info("no CUDA device: %s left out", ", ".join(installed))


def _is_installed(name: str) -> bool:
    return name in sys.modules or find_spec(name) is not None
