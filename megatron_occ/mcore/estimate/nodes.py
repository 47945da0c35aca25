"""Groups of ranks that talk in every layer, and lie on several nodes."""

from __future__ import annotations

from megatron_occ.config.schema import Config

# what each group does in every layer, over the network between nodes where it crosses them
_TALK = {
    "tensor": "sums activations in every layer",
    "context": "exchanges keys and values in every layer",
    "expert tensor": "sums activations in every MoE layer",
    "expert": "sends tokens to their experts in every MoE layer",
}


def crossing_warnings(config: Config, world_size: int, node: int) -> list[str]:
    """A sentence for each kind of group of which some lie on more than one node.

    Args:
        config: a configuration that ``validate`` accepts.
        world_size: ranks in all.
        node: ranks of a node; rank r lies on node r // ``node``.
    """
    found = []
    for name, (size, stride) in _inner_axes(config).items():
        groups = _groups(size, stride, world_size)
        crossing = [group for group in groups if group[0] // node != group[-1] // node]
        if not crossing:
            continue
        group, nodes = crossing[0], [rank // node for rank in crossing[0]]
        count = f"{len(crossing)} of {len(groups)} groups, such as"
        if len(groups) == 1:
            count = "the group,"
        found.append(
            f"{name} ranks cross nodes of {node}: {count} {_spell(group)} on nodes "
            f"{nodes[0]} to {nodes[-1]}. Such a group {_TALK[name]}, and would do so over the "
            f"network. To keep it on a node give {_sizes(name)} a divisor of {node}"
        )
    return found


def _inner_axes(config: Config) -> dict[str, tuple[int, int]]:
    """Size of each axis, and the distance of its neighbours in ranks, in Megatron-Core's order.

    Dense layers: tensor, context, data, pipeline; experts: expert tensor, expert, expert data,
    pipeline, the first varying fastest (``parallel_state.initialize_model_parallel``).
    """
    parallel = config.parallel
    axes = {"tensor": (parallel.tensor, 1), "context": (parallel.context, parallel.tensor)}
    if config.model.moe.num_experts is not None:
        inner = parallel.expert_tensor or parallel.tensor
        axes |= {"expert tensor": (inner, 1), "expert": (parallel.expert, inner)}
    return axes


def _groups(size: int, stride: int, world_size: int) -> list[range]:
    """The groups of an axis: a block of ``size * stride`` ranks has ``stride`` of them."""
    block = size * stride
    return [
        range(first + offset, first + block, stride)
        for first in range(0, world_size, block)
        for offset in range(stride)
    ]


def _spell(group: range) -> str:
    if len(group) <= 4:
        return f"ranks {' '.join(map(str, group))}"
    return f"ranks {group[0]} {group[1]} ... {group[-1]}"


def _sizes(name: str) -> str:
    own = f"parallel.{name.replace(' ', '_')}"
    inner = {"context": "parallel.tensor", "expert": "parallel.expert_tensor"}.get(name)
    return f"{own} times {inner}" if inner else own
