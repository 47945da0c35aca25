"""The language of ``parallel.pipeline_layout``, and what a layout must satisfy."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_occ.config import limits
from megatron_occ.config.schema import Config
from megatron_occ.config.words import counted

_KEY = "parallel.pipeline_layout"
_LONGEST = 10 * limits.LAYERS  # characters of a repetition: layers, ends of chunks, inner counts


def parse_layout(text: str) -> list[str]:
    """Chunks of the model in pipeline order, each a string of E, t, m and L.

    ``t*3`` stands for ``ttt``, ``(tt|)*2`` for ``tt|tt|``, commas are ignored (Megatron-Core's
    language for pipeline layouts).

    Raises:
        ValueError: another character, or more layers than a model has.
    """
    unrolled = text.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"(.)\*(\d+)"):
        repeats = [(len(part), count) for part, count in re.findall(pattern, unrolled)]
        # by digits first: Python refuses to read thousands of them
        if any(len(n) > 9 or size * int(n) > _LONGEST for size, n in repeats):
            raise ValueError(
                f"{_KEY}={text}: repeats more than the {limits.LAYERS:,} layers that a model may "
                "have. Give fewer"
            )
        unrolled = re.sub(pattern, lambda m: m.group(1) * int(m.group(2)), unrolled)
    strange = sorted(set(unrolled) - set("EtmL|"))
    if strange:
        raise ValueError(
            f"{_KEY}={text}: {' '.join(strange)} has no meaning there. Use E (embedding), t "
            "(transformer layer), m (MTP layer), L (loss), | between chunks, x*n and (...)*n for "
            "repetition"
        )
    return unrolled.split("|")


def spell_chunk(chunk: str) -> str:
    """``Ettt`` as ``E t*3``."""
    runs = re.finditer(r"(.)\1*", chunk)
    return " ".join(run[1] if len(run[0]) == 1 else f"{run[1]}*{len(run[0])}" for run in runs)


def model_chunks(config: Config) -> list[str]:
    """Contents of all chunks in pipeline order; chunk i lies on stage i modulo the stages.

    Args:
        config: a configuration without problems.
    """
    parallel = config.parallel
    if parallel.pipeline_layout is not None:
        return parse_layout(parallel.pipeline_layout)
    count = parallel.pipeline * parallel.virtual_pipeline
    chunks = ["t" * (config.model.num_layers // count)] * count
    chunks[0] = "E" + chunks[0]
    chunks[-1] += "m" * config.mtp.num_layers + "L"
    return chunks


def drafts_on_last_stage(config: Config) -> bool:
    """Whether MTP layers lie beside the output layer, where drafts are made."""
    return config.mtp.num_layers > 0 and "m" in model_chunks(config)[-1]


def what_parts_drafts(config: Config) -> str | None:
    """Why MTP layers make no drafts although there are some; None where they do."""
    if config.mtp.num_layers == 0 or drafts_on_last_stage(config):
        return None
    return (
        f"{_KEY}={config.parallel.pipeline_layout} has the MTP layers and the output layer (L) in "
        "different chunks, and drafts need both"
    )


def pipeline_problems(config: Config) -> Iterator[str]:
    """Problems of the pipeline keys, one message each."""
    parallel = config.parallel
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline={parallel.virtual_pipeline}: with parallel.pipeline=1 "
            "there is nothing to interleave. Give parallel.pipeline=2 or more, or "
            "parallel.virtual_pipeline=1"
        )
    if parallel.pipeline_layout is not None:
        yield from _layout(config, parallel.pipeline_layout)
        return
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if config.model.num_layers % chunks:
        yield (
            f"model.num_layers={config.model.num_layers}: is not divisible by the {chunks} chunks "
            f"of parallel.pipeline={parallel.pipeline} and parallel.virtual_pipeline="
            f"{parallel.virtual_pipeline}. Change one of them, or name the layers of each chunk in "
            f"{_KEY}"
        )


def _layout(config: Config, text: str) -> Iterator[str]:
    parallel = config.parallel
    if parallel.pipeline == 1:
        yield f"{_KEY}={text}: parallel.pipeline=1 has one stage. Set {_KEY}=null"
        return
    try:
        chunks = parse_layout(text)
    except ValueError as error:
        yield str(error)
        return
    wanted = parallel.pipeline * parallel.virtual_pipeline
    if len(chunks) != wanted:
        yield (
            f"{_KEY}={text}: has {counted(len(chunks), 'chunk')}, but "
            f"parallel.pipeline={parallel.pipeline} and "
            f"parallel.virtual_pipeline={parallel.virtual_pipeline} make {wanted}. Change one of "
            "them"
        )
        return
    order = "".join(chunks)
    wrong = list(_wrong_counts(config, text, order))
    yield from wrong
    expected = "E" + "t" * config.model.num_layers + "m" * config.mtp.num_layers + "L"
    if not wrong and order != expected:
        yield (
            f"{_KEY}={text}: its layers in order are {spell_chunk(order)}, the model's are "
            f"{spell_chunk(expected)}. Give these in this order"
        )
    elif not wrong:
        yield from _mtp_place(text, chunks, parallel.pipeline)


def _wrong_counts(config: Config, text: str, order: str) -> Iterator[str]:
    """Layers that the layout has too many or too few of, with both numbers."""
    model, mtp = config.model.num_layers, config.mtp.num_layers
    kinds = {"t": ("transformer", "model.num_layers", model), "m": ("MTP", "mtp.num_layers", mtp)}
    for letter, (name, key, wanted) in kinds.items():
        found = order.count(letter)
        if found != wanted:
            yield (
                f"{_KEY}={text}: has {found} {name} layer{'s' * (found != 1)} ({letter}), and the "
                f"model has {wanted} ({key}={wanted}). Change one of them"
            )


def _mtp_place(text: str, chunks: list[str], stages: int) -> Iterator[str]:
    """Where Megatron-Core computes MTP layers, and computes them right."""
    holding = [index for index, chunk in enumerate(chunks) if "m" in chunk]
    if not holding:
        return
    if len(holding) > 1:
        yield f"{_KEY}={text}: the MTP layers lie in {len(holding)} chunks. Put all into one"
        return
    (index,) = holding
    if index == len(chunks) - 1:
        return
    if set(chunks[index]) != {"m"}:
        # Megatron-Core accepts this and gives the MTP layers an embedding of zeros
        yield (
            f"{_KEY}={text}: MTP layers share chunk {chunks[index]} with other layers, and the "
            "loss is in another. Put them next to L, or into a chunk of their own before it"
        )
    elif index < len(chunks) - stages or index % stages == 0:
        yield (
            f"{_KEY}={text}: the chunk of MTP layers must be the last chunk of its stage, and not "
            "on the first stage. Move it"
        )
