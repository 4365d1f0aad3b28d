"""Kernel calls that are made again and again at other addresses, as a decoding loop makes them."""

import re
import struct
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch

from mate.backends import gpu, native


class Prepared:
    """A call of a native kernel, all but the addresses of its tensors.

    Of its C structure what lies between the addresses is kept as it is, packed.
    """

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
        self.on_cpu = device.type == "cpu"
        if self.on_cpu:
            self.function = f"mate_{function}"
            places = (*places, len(fields) - 1)
        else:
            self.queue = gpu.Queue(f"mate_gpu_{function}", device)
            self.workspace = (None,) if function == "kda_forward" else ()
        order = sorted(range(len(places)), key=places.__getitem__)
        self._sort = itemgetter(*order)
        packed, at, end = layout.pack(*fields), _offsets(layout), 0
        self._pieces: list[bytes | int] = []
        layout_of_pieces = "="
        for place in self._sort(places):
            offset, kind = at[place]
            self._pieces += packed[end:offset], 0
            layout_of_pieces += f"{offset - end}s{kind}"
            end = offset + struct.calcsize(f"={kind}")
        self._pieces.append(packed[end:])
        self._pack = struct.Struct(f"{layout_of_pieces}{len(packed) - end}s").pack

    def run(self, addresses: list[int]) -> None:
        pieces = self._pieces.copy()
        if self.on_cpu:
            pieces[1::2] = self._sort([*addresses, torch.get_num_threads()])
            native.run(self.function, self._pack(*pieces))
        else:
            pieces[1::2] = self._sort(addresses)
            self.queue(self._pack(*pieces), *self.workspace)


def _offsets(layout: struct.Struct) -> list[tuple[int, str]]:
    """In bytes, of the fields of a structure, each with its standard format; P becomes Q."""
    found, before = [], "@"
    for count, kind in re.findall(r"(\d*)([a-zA-Z])", layout.format):
        for _ in range(int(count or 1)):
            found.append((struct.calcsize(f"{before}0{kind}"), "Q" if kind == "P" else kind))
            before += kind
        if count == "0":
            before += f"0{kind}"
    return found
