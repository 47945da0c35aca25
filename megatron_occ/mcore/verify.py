"""A converted checkpoint against transformers: logits of the trunk and of each MTP depth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_occ.config.identity import describe
from megatron_occ.convert.checkpoints import Checkpoint, read_checkpoint
from megatron_occ.convert.distributed import DistributedReader
from megatron_occ.convert.errors import FolderError
from megatron_occ.convert.families import family_of
from megatron_occ.convert.families.dense import MIMO
from megatron_occ.convert.plan import read_model
from megatron_occ.convert.slots import model_slots
from megatron_occ.convert.source import MTP_FILE, read_config
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint import load_weights
from megatron_occ.mcore.head_request import HeadRequest
from megatron_occ.mcore.startup import initialize, shutdown
from megatron_occ.mcore.verify_mimo import MiMoHeads
from megatron_occ.rl.batch import head_targets

ROWS, TOKENS = 4, 16
# of fp32 logits; a wrong convention gives differences of the size of the logits
LIMIT = 1e-3


@dataclass(frozen=True)
class Comparison:
    """Largest difference of log-probs, trunk first, and what could not be compared."""

    gaps: list[float]
    missing: str = ""

    def __str__(self) -> str:
        names = ["trunk", *(f"MTP depth {k}" for k in range(1, len(self.gaps)))]
        found = ", ".join(f"{n} {gap:.1e}" for n, gap in zip(names, self.gaps, strict=True))
        return (
            f"verified against transformers, largest difference of log-probs in fp32: {found}"
            + (f"; {self.missing}" if self.missing else "")
        )


def verify(folder: Path, checkpoint: Path) -> Comparison:
    """Compare random ids under both; whole models in memory, one process.

    Args:
        folder: Hugging Face's, that the checkpoint was made of; see :func:`check_reference`.
        checkpoint: the result.

    Raises:
        FolderError: they differ.
    """
    found = read_checkpoint(checkpoint)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, found.vocab_size, (ROWS, TOKENS), generator=generator)
    ours = _ours(found, ids)
    slots = model_slots(found.config.model, 0, found.vocab_size)
    dtype = DistributedReader(checkpoint).dtype(slots["embedding.word_embeddings.weight"])
    brought = found.meta["source"]["mtp_layers"]
    theirs, missing = _theirs(folder, ids, len(ours) - 1, dtype, brought=brought)
    gaps = []
    for depth, logits in enumerate(theirs):
        length = TOKENS - 1 - depth
        targets = ids[:, 1 + depth :].unsqueeze(-1)
        expected = logits[:, :length].float().log_softmax(-1).gather(-1, targets).squeeze(-1)
        gaps.append(float((ours[depth][:, :length] - expected).abs().max()))
    result = Comparison(gaps, missing)
    if not all(gap <= LIMIT for gap in gaps):
        raise FolderError(f"{checkpoint}: is not what transformers computes: {result}")
    return result


@torch.no_grad()
def _ours(checkpoint: Checkpoint, ids: Tensor) -> list[Tensor]:
    config = checkpoint.config
    config.model.max_position_embeddings = max(config.model.max_position_embeddings, TOKENS)
    layout = initialize(config)
    try:
        with torch.enable_grad():
            actor = MegatronGPTActor(
                config,
                checkpoint.vocab_size,
                layout,
                optimizer=config.rl.optimizer,
                total_updates=1,
                draws=False,
            )
        meta = describe(config, checkpoint.meta.get("tokenizer"), {})
        load_weights(checkpoint.folder, actor, meta)
        (model,) = actor.chunks
        on_device = ids.to(layout.device)
        places = torch.arange(TOKENS, device=layout.device).expand_as(on_device)
        request = HeadRequest(head_targets(on_device, actor.num_depths))
        outputs = model.eval()(on_device, places, None, request=request)
        heads = outputs.passes[0] if actor.num_depths else ()
        return [values.float().cpu() for values in (outputs.logprobs, *heads)]
    finally:
        shutdown()


def check_reference(folder: Path) -> None:
    """Whether transformers can run a folder's model here, before work is done.

    Raises:
        FolderError: it can't; says why.
    """
    content = read_config(folder)
    if content.get("quantization_config") is not None:
        raise FolderError(f"{folder}: transformers runs fp8 weights on GPUs alone: no --verify")
    try:
        _reference_config(folder)
    except (ValueError, OSError, ImportError) as error:
        raise FolderError(f"{folder}: transformers can't run it: no --verify ({error})") from None


def _reference_config(folder: Path) -> Any:
    """transformers' configuration; MiMo's trunk is Qwen2's, and needs none of its own code."""
    from transformers import AutoConfig, Qwen2Config

    content = read_config(folder)
    if family_of(content) is MIMO:
        own = ("model_type", "architectures", "auto_map")
        return Qwen2Config(**{key: value for key, value in content.items() if key not in own})
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@torch.no_grad()
def _theirs(
    folder: Path, ids: Tensor, depths: int, dtype: torch.dtype, *, brought: int
) -> tuple[list[Tensor], str]:
    """Logits by transformers on weights rounded to ``dtype``, and what it cannot run.

    Args:
        folder: Hugging Face's.
        ids: [rows, tokens].
        depths: MTP depths that we have.
        dtype: of our weights.
        brought: MTP depths of the folder.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # it tells of tensors that it leaves alone
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = _reference_config(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, local_files_only=True
    ).eval()
    _round(model, dtype)
    before: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    output = model(ids, output_hidden_states=True)
    found = [output.logits]
    if depths == 0:
        return found, ""
    if (folder / MTP_FILE).is_file():
        return found, f"MTP layers not compared: transformers does not read {MTP_FILE}"
    if not brought:
        return found, "MTP layers not compared: they were added"
    heads = _mtp_model(model, folder, depths)
    reads = read_model(folder, read_config(folder))[1].model.mtp_reads
    hidden = before[0] if reads == "before" else output.hidden_states[-1]
    if heads is None:
        return found, "MTP layers not compared: transformers has none for this architecture"
    _round(heads, dtype)
    note = ""
    if len(heads.layers) < depths:
        depths, note = len(heads.layers), "depths that were added have nothing to compare with"
    places = torch.arange(TOKENS).expand_as(ids)
    for depth in range(depths):
        ahead, hidden = slice(depth + 1, None), hidden[:, : TOKENS - depth - 1]
        hidden = heads.forward_layer(depth, hidden, places[:, ahead], None, input_ids=ids[:, ahead])
        found.append(model.lm_head(hidden))
    return found, note


def _round(module: torch.nn.Module, dtype: torch.dtype) -> None:
    for name, tensor in module.named_parameters():
        if "e_score_correction_bias" not in name:
            tensor.data = tensor.data.to(dtype).float()


def _mtp_model(model: Any, folder: Path, depths: int) -> Any:
    """MTP layers by transformers, of MiMo by its formula; None for a family without either."""
    from transformers.modeling_layers import MtpModel

    family = family_of(read_config(folder))
    if family is MIMO:
        return MiMoHeads(folder, model.model, depths)
    if family.mtp_prefix != family.layer_prefix:
        return None
    if getattr(model.config, "num_mtp_layers", None) is None:
        return None
    first = model.config.num_hidden_layers
    # where it looks for them; its classes name the layer numbers of the published sizes
    names = [rf"model\.layers\.{first + depth}\." for depth in range(depths)]
    model._keys_to_ignore_on_load_unexpected = names
    return MtpModel.from_pretrained(model, device_map={"": torch.device("cpu")}).eval()
