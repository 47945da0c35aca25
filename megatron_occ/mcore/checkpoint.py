"""Checkpoints by Megatron-Core's distributed checkpointing: what is in them, and reading them.

A checkpoint is written to ``step_000100.tmp`` and renamed when every rank is done: a folder under
its final name is complete (see ``checkpoint_writer.py``). Beside Megatron's files lies
``meta.json``: versions, architecture, tokenizer and data fingerprints, compared before a tensor is
read, and the parallel layout.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.fp8_utils import get_fp8_recipe
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_occ.config.schema import Config
from megatron_occ.convert.kinds import CHECKPOINT_FILE, what_it_is
from megatron_occ.mcore.actor import MegatronGPTActor
from megatron_occ.mcore.checkpoint_folder import damage
from megatron_occ.mcore.fp8_state import has_scaling_state, load_scaling_state, scaling_state
from megatron_occ.mcore.optimizer_state import reload_main_weights
from megatron_occ.mcore.versions import check_written_by, installed_version

logger = logging.getLogger(__name__)


class DamagedCheckpointError(ValueError):
    """A checkpoint that can't be read, whatever run asks for it."""


# of the optimizer's state; weights of any format can be read
FORMAT = 2
# of each rank, like its random state; in meta.json: whether it is there
_FP8 = "fp8_scaling"
_REFERENCE = "reference"
# beside the files of tensors
_FILES = (".metadata", "metadata.json")
# of what two descriptions differ in, how much an error names
_SHOWN = 5


def load_checkpoint(path: Path, actor: MegatronGPTActor, meta: dict[str, Any]) -> dict[str, Any]:
    """Restore weights, optimizer and random state; returns the trainer's state.

    Another parallel layout may load it, but without the random state, which is one of each rank.
    Nothing in a run draws from it once the model is initialised.

    Raises:
        ValueError: the checkpoint is missing, or was written for another model, tokenizer or data.
    """
    found = check_meta(path, {"format": FORMAT, **meta})
    stored, now = found.get("layout"), describe_layout(actor.config, actor.layout.world_size)
    wanted = sharded_state(actor, loading=True)
    if not found.get(_FP8):
        # written with another scaling of FP8, or none
        wanted.pop(_FP8, None)
    if stored != now:
        logger.info("%s: layout was %s, is %s: leaving out random state", path, stored, now)
        for name in ("rng", _FP8):
            wanted.pop(name, None)
    state = _load(wanted, path)
    load_model(actor, state)
    actor.optimizer.load_state_dict(state)
    if _FP8 in wanted:
        recipe = get_fp8_recipe(actor.chunks[0].config)
        load_scaling_state(actor.chunks, state[_FP8], recipe)
    if _REFERENCE in wanted:
        actor.reference.load(state[_REFERENCE])
    if "rng" in wanted:
        torch.set_rng_state(state["rng"]["cpu"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(state["rng"]["cuda"])
    return state["trainer"]


def load_weights(path: Path, actor: MegatronGPTActor, meta: dict[str, Any]) -> None:
    """Restore the weights alone, as the start of another phase.

    Raises:
        ValueError: as :func:`load_checkpoint`; the data may differ.
    """
    check_weights(path, meta)
    wrong = damage(path)
    if wrong is not None:
        raise DamagedCheckpointError(f"{path}: {wrong}")
    load_model(actor, _load(model_state(actor), path))
    reload_main_weights(actor.optimizer.megatron)


def _tensors_of(chunk: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in chunk.items() if not isinstance(value, ShardedObject)}


def _load(wanted: dict[str, Any], path: Path) -> dict[str, Any]:
    missing = [name for name in _FILES if not (path / name).is_file()]
    if missing:
        raise DamagedCheckpointError(f"{path}: {', '.join(missing)} is missing")
    try:
        return dist_checkpointing.load(wanted, str(path))
    # the last is how 0.16 misses common.pt, which newer versions don't write
    except (CheckpointException, CheckpointingException, AttributeError) as error:
        # torch's message is a traceback of each rank, and ends with what was wrong
        reason = str(error).strip().rpartition("\n")[2]
        raise DamagedCheckpointError(
            f"{path}: can't be read, a file is damaged or missing ({reason})"
        ) from error


def read_plain(path: Path) -> dict[str, Any]:
    """Weights, optimizer and trainer state by key, whole tensors, without a model; one process.

    Not by Megatron's ``load_plain_tensors``: that of 0.19 and torch 2.15 do not fit together.
    """
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
        tensors = _read_tensors(path)
    finally:
        torch.distributed.destroy_process_group()
    return {**common, **tensors}


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Whole tensors by key, those of equal layers stacked; in memory of the CPU."""
    entries = checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata.items()
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries
        if isinstance(entry, TensorStorageMetadata)
    }
    checkpoint.load(tensors, checkpoint_id=path)
    return tensors


def check_meta(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Compare a checkpoint's ``meta.json`` with what this run expects; returns it.

    Raises:
        ValueError: names the file, what differs and both values.
    """
    file = path / CHECKPOINT_FILE
    if not file.is_file():
        found = what_it_is(
            path,
            other="A run starts from it with model.from_hf in place of rl.init_from; `megatron-occ "
            "convert import` makes a checkpoint of it",
            usual="A complete one is a folder such as .../checkpoints/rl/step_000100",
        )
        raise DamagedCheckpointError(f"{path} is not a complete checkpoint: {found}")
    try:
        found = json.loads(file.read_text())
        check_written_by(found.get("megatron_core"), installed_version())
    except json.JSONDecodeError as error:
        raise DamagedCheckpointError(f"{file}: is not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    pairs = [(name, found.get(name), value) for name, value in expected.items()]
    differences = [line for pair in pairs for line in _compare(*pair)]
    if differences:
        shown, more = differences[:_SHOWN], len(differences) - _SHOWN
        shown += [f"and {more} more"] if more > 0 else []
        raise ValueError(
            f"{file}: {'; '.join(shown)}: give the checkpoint's configuration, or another "
            "checkpoint"
        )
    return found


def _compare(name: str, before: Any, now: Any) -> list[str]:
    """What two entries differ in, a line for each value; nested ones under dotted names."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [f"{name} is {before!r}, this run has {now!r}"]
    pairs = [(key, before.get(key), now.get(key)) for key in dict.fromkeys((*before, *now))]
    return [line for key, *values in pairs for line in _compare(f"{name}.{key}", *values)]


def check_weights(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """Compare what the weights depend on: model, depths and tokenizer, not the data.

    A converted checkpoint that came without a tokenizer goes with any.

    Raises:
        ValueError: as :func:`check_meta`.
    """
    found = check_meta(path, {name: meta[name] for name in ("model", "mtp_layers")})
    if found.get("tokenizer") is not None or "source" not in found:
        check_meta(path, {"tokenizer": meta["tokenizer"]})
    return found


def describe_layout(config: Config, world_size: int) -> dict[str, Any]:
    """What the random state of a rank belongs to."""
    parallel = config.parallel
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
    return {"world_size": world_size, **{name: getattr(parallel, name) for name in names}}


def model_state(actor: MegatronGPTActor) -> dict[str, Any]:
    """Sharded state of each chunk; its keys number layers through the model, not the chunk.

    A pipeline layout may leave a chunk without any parameter: such a chunk has no entry. What
    layers have besides tensors is left out: see ``fp8_state.py``.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"dp_cp_group": group}
    return {
        f"model{index}": _tensors_of(chunk.sharded_state_dict(metadata=metadata))
        for index, chunk in enumerate(actor.chunks)
        if any(True for _ in chunk.parameters())
    }


def load_model(actor: MegatronGPTActor, state: dict[str, Any]) -> None:
    """Take over what was loaded for :func:`model_state`."""
    for index, chunk in enumerate(actor.chunks):
        found = state.get(f"model{index}", {})
        # of layers that have a state besides their tensors, None leaves it as it is
        rest = {k: None for k in chunk.state_dict() if k.endswith("_extra_state")}
        chunk.load_state_dict(rest | found)
    actor.has_weights = True


def sharded_state(actor: MegatronGPTActor, *, loading: bool) -> dict[str, Any]:
    """Weights, optimizer and random state of this rank, as Megatron saves and loads them."""
    weights = model_state(actor)
    random_state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_state["cuda"] = torch.cuda.get_rng_state()
    of_ranks = {"rng": random_state}
    if has_scaling_state(actor.config):
        of_ranks[_FP8] = scaling_state(actor.chunks)
    # one that stays what RL began with is read from there again
    moves = actor.reference.is_kept and actor.config.rl.loss.kl_reference_every is not None
    reference = {_REFERENCE: actor.reference.sharded_state(weights)} if moves else {}
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return {
        **weights,
        **reference,
        **actor.optimizer.sharded_state_dict(weights, loading=loading),
        **{k: ShardedObject(k, v, (world,), (rank,), replica_id=0) for k, v in of_ranks.items()},
    }
