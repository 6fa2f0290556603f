"""The memory that a warp sees: pieces of global memory with names, and the shared memory of its block."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

SECTOR = 32  # bytes that travel together
SHARED_WINDOW = 0x400  # the first of a block's own shared memory; what lies below is the system's


class BadAddress(Exception):
    """An access beside all memory, or one that is not aligned."""


@dataclass
class Piece:
    name: str
    address: int
    data: np.ndarray  # of bytes
    touched: np.ndarray = field(init=False)  # bytes that the warp has loaded: 1, stored: 2, or both

    def __post_init__(self) -> None:
        self.touched = np.zeros(len(self.data), np.uint8)


@dataclass(frozen=True)
class Access:
    """What the lanes of a warp loaded or stored by one instruction."""

    pieces: frozenset[str]
    stores: bool
    bytes: int  # different ones
    sectors: frozenset[int]


class Memory:
    def __init__(self, pieces: dict[str, tuple[int, bytes]]) -> None:
        """``pieces``: their addresses and bytes, by name."""
        found = sorted((address, name, content) for name, (address, content) in pieces.items())
        self.pieces = [Piece(name, at, np.frombuffer(content, np.uint8).copy()) for at, name, content in found]
        self._starts = [piece.address for piece in self.pieces]
        self.share(0)

    def share(self, bytes: int) -> None:
        """Before another block. Not zero: what nobody has written must not look like something."""
        self.shared = Piece("shared", SHARED_WINDOW, np.full(bytes, 0xA5, np.uint8))

    def piece_at(self, address: int, bytes: int) -> Piece:
        at = bisect_right(self._starts, address) - 1
        if at >= 0:
            piece = self.pieces[at]
            if address + bytes <= piece.address + len(piece.data):
                return piece
        raise BadAddress(f"{bytes} bytes at {address:#x} are no memory")

    def locate(self, addresses: np.ndarray, bytes: int, shared: bool) -> list[tuple[Piece, np.ndarray, np.ndarray]]:
        """Pieces, which lanes' addresses lie in each of them, and these lanes' indexes into it."""
        if np.any(addresses % np.uint64(bytes)):
            raise BadAddress(f"{bytes} bytes at {[hex(int(a)) for a in addresses if int(a) % bytes]}: not aligned")
        found, rest = [], np.ones(len(addresses), bool)
        while rest.any():
            lowest = int(addresses[rest].min())
            piece = self.shared if shared else self.piece_at(lowest, bytes)
            end = piece.address + len(piece.data) - bytes
            here = rest & (addresses <= np.uint64(max(end, 0)))
            if lowest < piece.address or not here.any():
                raise BadAddress(f"{bytes} bytes at {lowest:#x} are not in {piece.name}")
            first = (addresses[here] - np.uint64(piece.address)).astype(np.int64)
            found.append((piece, here, first[:, None] + np.arange(bytes)))
            rest &= ~here
        return found

    def forget(self) -> None:
        """Before another warp: nothing is touched."""
        for piece in self.pieces:
            piece.touched[:] = 0

    def load(self, addresses: np.ndarray, bytes: int, shared: bool) -> tuple[np.ndarray, Access]:
        """The bytes of each lane, a row each."""
        values = np.zeros((len(addresses), bytes), np.uint8)
        found = self.locate(addresses, bytes, shared)
        for piece, lanes, at in found:
            piece.touched[at] |= 1
            values[lanes] = piece.data[at]
        return values, _access(found, False, addresses, bytes)

    def store(self, addresses: np.ndarray, values: np.ndarray, shared: bool) -> Access:
        """``values``: the bytes of each lane, a row each."""
        found = self.locate(addresses, values.shape[1], shared)
        for piece, lanes, at in found:
            piece.touched[at] |= 2
            piece.data[at] = values[lanes]
        return _access(found, True, addresses, values.shape[1])


def _access(found: list[tuple[Piece, np.ndarray, np.ndarray]], stores: bool, at: np.ndarray, bytes: int) -> Access:
    pieces = frozenset(piece.name for piece, _, _ in found)
    return Access(pieces, stores, len(np.unique(at)) * bytes, frozenset(int(each) // SECTOR for each in at))
