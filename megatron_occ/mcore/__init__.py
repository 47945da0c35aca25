"""Everything that touches Megatron-Core: start-up, model, actor, optimizer, checkpoints."""

import logging
import warnings

from megatron_occ.mcore.cpu.hidden import hide_cuda_packages
from megatron_occ.mcore.versions import require_tested_version

require_tested_version()
# before Megatron-Core looks for them
hide_cuda_packages()

# Megatron-Core tells everyone who imports it that apex and TransformerEngine are missing, that
# parts of torch which it uses itself are deprecated, and (0.19) that GPTModel and the way it writes
# checkpoints will be; start-up says once which back end is in force.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core|torch\.")
logging.getLogger("megatron.core").setLevel(logging.WARNING)
for module in ("models.gpt.gpt_model", "dist_checkpointing.strategies.torch"):
    logging.getLogger(f"megatron.core.{module}").setLevel(logging.ERROR)
# imported by Megatron-Core from 0.17 on: a torch for CUDA says that there is none
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
