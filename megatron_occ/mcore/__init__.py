"""Everything that touches Megatron-Core: start-up, model, actor, optimizer, checkpoints."""

import logging
import warnings

# Megatron-Core tells everyone who imports it that apex and TransformerEngine are missing, and that
# parts of torch which it uses itself are deprecated; start-up says once which back end is in force.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core|torch\.")
logging.getLogger("megatron.core").setLevel(logging.WARNING)
