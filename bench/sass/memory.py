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

    piece: str
    stores: bool
    bytes: int  # of all lanes
    sectors: frozenset[int]
    sizes: int  # bytes of one lane


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

    def locate(self, addresses: np.ndarray, bytes: int, shared: bool) -> tuple[Piece, np.ndarray]:
        """The piece in which all lanes' addresses lie, and each lane's indexes into it."""
        if np.any(addresses % np.uint64(bytes)):
            raise BadAddress(f"{bytes} bytes at {[hex(int(a)) for a in addresses if int(a) % bytes]}: not aligned")
        low, high = int(addresses.min()), int(addresses.max())
        piece = self.shared if shared else self.piece_at(low, bytes)
        if low < piece.address or high + bytes > piece.address + len(piece.data):
            raise BadAddress(f"{bytes} bytes at {low:#x} to {high:#x} are not all in {piece.name}")
        first = (addresses - np.uint64(piece.address)).astype(np.int64)
        return piece, first[:, None] + np.arange(bytes)

    def forget(self) -> None:
        """Before another warp: nothing is touched."""
        for piece in self.pieces:
            piece.touched[:] = 0

    def load(self, addresses: np.ndarray, bytes: int, shared: bool) -> tuple[np.ndarray, Access]:
        """The bytes of each lane, a row each."""
        piece, at = self.locate(addresses, bytes, shared)
        piece.touched[at] |= 1
        return piece.data[at], access(piece, False, addresses, bytes)

    def store(self, addresses: np.ndarray, values: np.ndarray, shared: bool) -> Access:
        """``values``: the bytes of each lane, a row each."""
        piece, at = self.locate(addresses, values.shape[1], shared)
        piece.touched[at] |= 2
        piece.data[at] = values
        return access(piece, True, addresses, values.shape[1])


def access(piece: Piece, stores: bool, addresses: np.ndarray, bytes: int) -> Access:
    sectors = frozenset(int(a) // SECTOR for a in addresses)
    return Access(piece.name, stores, len(addresses) * bytes, sectors, bytes)
