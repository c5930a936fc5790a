"""The mesh of a config, as numbers."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from rpt_jax.config import MeshConfig
from rpt_jax.distributed.mesh import mesh_fields, resharding_axis_sizes, resolve_sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSizes:
    """Devices along each mesh axis.

    Attributes:
      available: devices that the description was asked for; may differ from `devices`.
      rollout_tensor: devices that share one copy of the policy during sampling.
    """

    data: int
    fsdp: int
    tensor: int
    rollout_tensor: int
    available: int

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return self.data * self.fsdp * self.tensor

    @property
    def batch_shards(self) -> int:
        """Shards of a training batch."""
        return self.data * self.fsdp

    @property
    def weight_shards(self) -> int:
        """Shards of each weight matrix."""
        return self.fsdp * self.tensor

    @property
    def rollout_replicas(self) -> int:
        """Shards of a batch during sampling."""
        return self.batch_shards * self.tensor // self.rollout_tensor

    def max_per_batch_shard(self, count: int) -> int:
        """Return the largest number of `count` batch elements that a batch shard holds."""
        return -(-count // self.batch_shards)


def resolve_mesh(config: MeshConfig, devices: int) -> MeshSizes:
    """Replace the axis of size -1 and `rollout_tensor=0` by their values; the mesh may need more devices than there are.

    Raises: UserError for an invalid mesh.
    """
    sizes = resolve_sizes({"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}, devices, exact=False)
    mesh = MeshSizes(**sizes, rollout_tensor=config.rollout_tensor or sizes["tensor"], available=devices)
    resharding_axis_sizes(mesh.fsdp, mesh.tensor, mesh.rollout_tensor)
    return mesh


def mesh_sizes(mesh: Mesh) -> MeshSizes:
    """Return the sizes of a mesh of devices."""
    return MeshSizes(**mesh_fields(mesh), available=mesh.size)
