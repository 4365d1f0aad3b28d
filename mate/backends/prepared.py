"""Kernel calls that are made again and again at other addresses, as a decoding loop makes them."""

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from mate.backends import gpu, native


class Prepared:
    """A call of a native kernel, all but the addresses of its tensors."""

    def __init__(
        self,
        function: str,
        layout: struct.Struct,
        fields: Sequence[Any],
        places: Sequence[int],
        device: torch.device,
    ) -> None:
        """``fields``: of the C structure, the last one the number of threads; ``places``: where
        the addresses are among them."""
        self.layout = layout
        self.fields = list(fields)
        self.places = places
        self.on_cpu = device.type == "cpu"
        if self.on_cpu:
            self.function = f"mate_{function}"
        else:
            self.queue = gpu.Queue(f"mate_gpu_{function}", device)
            self.workspace = (None,) if function == "kda_forward" else ()

    def run(self, addresses: Iterable[int]) -> None:
        fields = self.fields.copy()
        for place, address in zip(self.places, addresses, strict=True):
            fields[place] = address
        if self.on_cpu:
            fields[-1] = torch.get_num_threads()
            native.run(self.function, self.layout.pack(*fields))
        else:
            self.queue(self.layout.pack(*fields), *self.workspace)
