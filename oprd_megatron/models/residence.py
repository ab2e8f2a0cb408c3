"""A frozen model that waits in host memory while others are at work.

The first `leave` copies the weights to host memory and takes a checksum of every tensor's bytes; after that a model leaves by
freeing its device memory alone, since its weights do not change. `come_back` copies them to the device and compares the
checksums there, so that neither the copy's way nor its wait can change a weight unnoticed. The exponents of weights in fp8
(weight_only.py) go and come with them.

Memory moves storage by storage: tensors that share one (tied weights, views) are copied once and share one again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from checkpoints_conversion.live.weights import canonical_parameters
from oprd_megatron.errors import TeacherWeightsError
from oprd_megatron.models.build import Model
from oprd_megatron.models.weight_only import weight_only_modules

AT_ONCE = 1 << 22
"""Words of a checksum that are widened at a time."""


@dataclass(frozen=True)
class Placed:
    """A parameter's (or exponents') place in its storage."""

    parameter: torch.Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Luggage:
    """A storage that was copied to host memory.

    Attributes:
        name: of its first tensor.
        tensors: that lie in it.
        host: its bytes.
        checksum: of the bytes on the device.
    """

    name: str
    tensors: list[Placed]
    host: torch.Tensor
    checksum: int


class Residence:
    """Where a model's weights are. Nothing here is collective.

    Args:
        model: frozen; on ranks off its grid nothing happens.
        name: of the teacher, for messages.

    Attributes:
        is_home: the weights are on the device.
        luggage: the host copies, once there are some.
    """

    def __init__(self, model: Model, name: str) -> None:
        self.name, self.is_home, self.luggage = name, True, list[Luggage]()
        self._parameters: dict[str, torch.Tensor] = {**canonical_parameters(model.chunks)}
        for number, module in enumerate(weight_only_modules(model.chunks)):
            self._parameters[f"exponents of linear layer {number} of this rank"] = module.exponents
        self._device = next((p.device for p in self._parameters.values()), torch.device("cpu"))

    @torch.no_grad()
    def leave(self) -> None:
        """Free the device's memory. The parameters are empty until `come_back`."""
        if not self.luggage:
            self.luggage = self._pack()
        for item in self.luggage:
            for placed in item.tensors:
                placed.parameter.data = placed.parameter.new_empty(0)
        self.is_home = False

    @torch.no_grad()
    def come_back(self) -> None:
        """Bring the weights back to the device.

        Raises:
            TeacherWeightsError: they are not what they were at the first `leave`.
        """
        for item in () if self.is_home else self.luggage:
            data = torch.empty_like(item.host, device=self._device)
            data.copy_(item.host)
            if checksum(data) != item.checksum:
                raise TeacherWeightsError(
                    f"teacher {self.name}: {item.name} came back from host memory with other bytes than it left with; this "
                    "machine's memory is not to be trusted: start again on another one, or leave teaching.host_budget out"
                )
            storage = data.untyped_storage()
            for placed in item.tensors:
                tensor = torch.empty(0, dtype=placed.parameter.dtype, device=self._device)
                placed.parameter.data = tensor.set_(storage, placed.offset, placed.size, placed.stride)
        self.is_home = True

    def _pack(self) -> list[Luggage]:
        by_storage: dict[int, list[tuple[str, torch.Tensor]]] = {}
        for name, parameter in self._parameters.items():
            by_storage.setdefault(parameter.untyped_storage().data_ptr(), []).append((name, parameter))
        return [self._copied(tensors) for tensors in by_storage.values()]

    def _copied(self, tensors: list[tuple[str, torch.Tensor]]) -> Luggage:
        storage = tensors[0][1].untyped_storage()
        data = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
        host = torch.empty(len(data), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        host.copy_(data)
        places = [Placed(p, p.size(), p.stride(), int(p.storage_offset())) for _, p in tensors]
        return Luggage(tensors[0][0], places, host, checksum(data))


def checksum(data: torch.Tensor) -> int:
    """Of bytes [N] uint8, on their own device: sum of (2 i + 1) x word i, modulo 2^64, over words of four bytes and then the
    rest. Every weight is odd, so a change of any one word changes it; that the weights differ tells words that changed
    places."""
    whole = len(data) // 4 * 4
    parts = [*data[:whole].view(torch.int32).split(AT_ONCE), data[whole:]]
    total, first = torch.zeros((), dtype=torch.int64, device=data.device), 0
    for part in parts:
        places = torch.arange(first, first + len(part), device=data.device)
        total += (part.long() * (2 * places + 1)).sum()
        first += len(part)
    return int(total)
