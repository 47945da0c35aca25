"""The rotary embedding in ``config.json``, from where any release of transformers puts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_occ.config.schema_model import RotaryScalingConfig

_PLAIN = frozenset(("rope_type", "type", "rope_theta", "partial_rotary_factor"))
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rotary_settings(hf: Mapping[str, Any], usual_part: float = 1.0) -> dict[str, Any]:
    """Base, part and scaling of grouped-query attention's rotary embedding.

    Args:
        hf: content of ``config.json``.
        usual_part: of a head that is turned where nothing is said.

    Raises:
        ValueError: no base, or a scaling other than that of Llama 3.1.
    """
    kind, entries = rotary_entries(hf)
    part = rotary_part(hf, entries, usual_part)
    found = {"rotary_base": rotary_base(hf, entries), "rotary_percent": part}
    if kind == "default":
        check_entries(entries, ())
        return found
    if kind != "llama3":
        raise ValueError(
            f"rope_scaling has the type {kind!r}: this architecture's rotary embedding is not "
            "scaled so here, and every position would be wrong. Only unscaled ones and 'llama3' "
            "can be converted"
        )
    check_entries(entries, LLAMA3)
    # Megatron-Core has no such tables: they are made as transformers makes them
    return found | {f"rotary_scaling.{key}": _number(entries, key) for key in LLAMA3}


def describe_rotary_scaling(scaling: RotaryScalingConfig) -> dict[str, Any]:
    """Entry of ``config.json``; none where there is no scaling."""
    if scaling.factor is None:
        return {}
    entries = {key: getattr(scaling, key) for key in LLAMA3}
    return {"rope_scaling": {**entries, "rope_type": "llama3"}}


def rotary_entries(hf: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Kind of scaling, ``default`` where there is none, and its entries.

    As transformers reads them: ``rope_scaling`` of old releases or ``rope_parameters`` of new ones,
    ``type`` of old ones or ``rope_type``.

    Raises:
        ValueError: two of them contradict each other.
    """
    old, new = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    if old and new and old != new:
        raise ValueError(
            f"rope_scaling={old!r}, and rope_parameters={new!r}: they say different things. Leave "
            "one of them out"
        )
    entries = old or new
    if not isinstance(entries, Mapping):
        raise ValueError(f"rope_scaling={entries!r}: is no object")
    kinds = {entries[key] for key in ("rope_type", "type") if entries.get(key) is not None}
    if len(kinds) > 1:
        raise ValueError(
            f"rope_scaling has rope_type={entries['rope_type']!r} and type={entries['type']!r}: "
            "leave one of them out"
        )
    unscaled = "default" if not _given(entries) - _PLAIN else "not given"
    return kinds.pop() if kinds else unscaled, entries


def check_entries(entries: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    """Refuse entries of the rotary embedding that nobody reads.

    Args:
        entries: as they are in ``config.json``.
        allowed: read beside kind, base and part.

    Raises:
        ValueError: names them.
    """
    unknown = sorted(_given(entries) - _PLAIN - set(allowed))
    if unknown:
        listed = ", ".join(f"{key}={entries[key]!r}" for key in unknown)
        raise ValueError(
            f"rope_scaling has {listed}: nothing here is computed with it, and positions would be "
            "wrong"
        )


def rotary_base(hf: Mapping[str, Any], entries: Mapping[str, Any]) -> int:
    """Base of the rotary embedding; what stands beside the scaling comes first.

    Raises:
        ValueError: there is no base, or it is no whole number.
    """
    outer, inner = hf.get("rope_theta"), entries.get("rope_theta")
    base = outer if inner is None else inner
    if base is None:
        raise ValueError(
            "rope_theta is missing. transformers takes 10000.0 then: write into config.json what "
            "the model was trained with"
        )
    if base != int(base):
        raise ValueError(f"rope_theta={base}: is no whole number")
    return int(base)


def rotary_part(hf: Mapping[str, Any], entries: Mapping[str, Any], usual: float) -> float:
    """Part of a head that is turned; what stands beside the scaling comes first.

    Args:
        hf: content of ``config.json``.
        entries: of the rotary embedding.
        usual: where neither says anything.
    """
    outer, inner = hf.get("partial_rotary_factor"), entries.get("partial_rotary_factor")
    part = outer if inner is None else inner
    return usual if part is None else float(part)


def whole_heads(hf: Mapping[str, Any]) -> None:
    """Refuse what turns a part of a head, in families whose code turns all of it.

    Raises:
        ValueError: says where it stands.
    """
    _, entries = rotary_entries(hf)
    part = rotary_part(hf, entries, 1.0)
    if part != 1.0:
        raise ValueError(f"partial_rotary_factor={part!r}: only 1.0 can be converted")


def _given(entries: Mapping[str, Any]) -> set[str]:
    return {key for key, value in entries.items() if value is not None}


def _number(entries: Mapping[str, Any], key: str) -> float:
    if entries.get(key) is None:
        raise ValueError(f"rope_scaling lacks {key}, which 'llama3' has")
    return entries[key] if key.startswith("original") else float(entries[key])
