"""An update under homomorphic encryption: CKKS ciphertexts that add up without being opened.

CKKS (Cheon et al., ePrint 2016/421, by TenSEAL) encrypts vectors of fixed-point numbers so that
the sum of ciphertexts is a ciphertext of the sum. Nothing here is ever multiplied while it is
encrypted: each site multiplies by its weight before, and divides by the sum of the weights after.
So one prime below the key's is enough (`COEFFICIENT_BITS`), and a number takes 32 bytes where
the customary chain for one multiplication (60, 40, 40) takes 57, and plain float32 takes 4.

    piece_k = Enc(w_k / UNIT * x_k),    sum of pieces = Enc(sum w_k x_k / UNIT)

`seal` gives two tensors of bytes, so that what carries tensors carries ciphertexts as well:

    sealed.ciphertext  uint8 (pieces, bytes)  8 bytes of length, the piece, zeros to the end
    sealed.weight      uint8 (8,)             the weight (or sum of weights) as a float64

**Keys.** All sites have one secret key, made when the federation is provisioned; the server gets
the parameters without it. Encryption hides a site from the server, not from another site that
hands its key or its copy of a ciphertext to the server.

**Approximate.** A sum is off by about 1e-10 of UNIT / (sum of weights), below float32's own steps.
Ciphertexts are drawn anew each time, so equal seeds give equal adapters only up to that. Li and
Micciancio (ePrint 2020/1533): who sees many decrypted values beside their ciphertexts may find
the key. Do not publish adapters of single rounds where the server is hostile.

**No integrity.** A ciphertext can be changed, or hold what a guard would refuse; nobody sees it
before the sum is open. Then the sites' own guard refuses what is not finite or too large.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flap_nvflare.adapter.update import UpdateSpec

CIPHERTEXT, WEIGHT = "sealed.ciphertext", "sealed.weight"
SEALED = frozenset({CIPHERTEXT, WEIGHT})

# 128 bits of security allow 218 bits of primes at this degree (homomorphicencryption.org).
POLY_DEGREE = 8192
COEFFICIENT_BITS = (60, 60)
SCALE_BITS = 45
# Weights are counts; in units of this a sum of them stays small beside the largest number.
UNIT = 1024.0
# Sums of more updates could leave the range of numbers, unseen.
MOST_SITES = 256


class CipherError(ValueError):
    """Something can't be sealed, added or opened; the message names it and the mend."""


def make_keys() -> tuple[bytes, bytes]:
    """TenSEAL contexts for a site (with the secret key) and for the server (without).

    FLARE's `HEBuilder` makes the same for a provisioned federation.
    """
    ts = _tenseal()
    context = ts.context(
        ts.SCHEME_TYPE.CKKS,
        poly_modulus_degree=POLY_DEGREE,
        coeff_mod_bit_sizes=list(COEFFICIENT_BITS),
        encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC,
    )
    context.global_scale = 2**SCALE_BITS

    def public(secret: bool) -> bytes:
        return bytes(
            context.serialize(
                save_public_key=False,
                save_secret_key=secret,
                save_galois_keys=False,
                save_relin_keys=False,
            )
        )

    return public(True), public(False)


class Cipher:
    """Seals and opens with a site's context; adds with anybody's.

    Args:
        context: a TenSEAL context as bytes, or one that is loaded.

    Attributes:
        slots: numbers in a piece.

    Raises:
        CipherError: if it is none of CKKS with a scale.
    """

    def __init__(self, context: Any) -> None:
        self._ts = _tenseal()
        try:
            if isinstance(context, bytes):
                context = self._ts.context_from(context)
            data = context.seal_context().data.first_context_data()
            self._scale = float(context.global_scale)
            self.slots = int(data.parms().poly_modulus_degree()) // 2
            primes = int(data.chain_index()) + 1
            # In the middle of the range, for the sum of `MOST_SITES`.
            self._largest = 2.0 ** (data.total_coeff_modulus_bit_count() - 2) / self._scale
        except Exception as error:  # TenSEAL raises several types for a damaged file
            raise CipherError(
                f"no CKKS context ({str(error)[:100]}); provision the federation again"
            ) from error
        self._context = context
        # Two polynomials of 8 bytes a coefficient and prime, and their envelope.
        self._row = 8 + 2 * primes * 8 * 2 * self.slots + 1024

    @property
    def opens(self) -> bool:
        """Whether there is a secret key."""
        return bool(self._context.has_secret_key())

    def spec(self, plain: UpdateSpec) -> UpdateSpec:
        """What sealed updates of the spec `plain` look like."""
        shapes = {CIPHERTEXT: (self.pieces(plain), self._row), WEIGHT: (8,)}
        return UpdateSpec(plain.method, plain.rank, plain.base_sha256, shapes, "uint8")

    def pieces(self, plain: UpdateSpec) -> int:
        """Pieces that an update takes."""
        return math.ceil(plain.parameters / self.slots)

    def seal(
        self, tensors: Mapping[str, Tensor], plain: UpdateSpec, weight: float
    ) -> dict[str, Tensor]:
        """The update times its weight, encrypted.

        Raises:
            CipherError: without the secret key, if the tensors are not as `plain` says, or if a
                weighted value is not finite or too large.
        """
        self._need_key("seal")
        numbers = _vector(tensors, plain) * (weight / UNIT)
        most = float(numbers.abs().max()) if len(numbers) else 0.0
        if not (weight > 0 and most <= self._largest / MOST_SITES):
            raise CipherError(
                f"weight {weight!r} times the largest value is {most * UNIT:.6g}; at most "
                f"{self._largest / MOST_SITES * UNIT:g} can be added up, and no infinity: set "
                "weight_by to 'cases' or 'equal', or lower the learning rate"
            )
        padded = torch.zeros(self.pieces(plain) * self.slots, dtype=torch.float64)
        padded[: len(numbers)] = numbers
        rows = [
            self._ts.ckks_vector(self._context, piece.numpy()).serialize()
            for piece in padded.split(self.slots)
        ]
        return self._packed(rows, weight)

    def open(self, sealed: Mapping[str, Tensor], plain: UpdateSpec) -> dict[str, Tensor]:
        """The weighted mean that `sealed` holds, as float32 tensors sorted by name.

        Raises:
            CipherError: without the secret key, or if `sealed` is not as it should be.
        """
        self._need_key("open")
        pieces, weight = self.read(sealed, plain)
        key = self._context.secret_key()
        numbers = torch.cat(
            [torch.tensor(piece.decrypt(key), dtype=torch.float64) for piece in pieces]
        )
        numbers = numbers[: plain.parameters] * (UNIT / weight)
        dtype = getattr(torch, plain.dtype)
        tensors, first = {}, 0
        for name, shape in plain.shapes.items():
            size = math.prod(shape)
            tensors[name] = numbers[first : first + size].view(shape).to(dtype, copy=True)
            first += size
        return tensors

    def read(self, sealed: Any, plain: UpdateSpec) -> tuple[list[Any], float]:
        """Every check that needs no secret key: the pieces as TenSEAL vectors, and the weight.

        Raises:
            CipherError: if names, sizes or dtypes are not those of `spec(plain)`, a piece does not
                parse, has other parameters, another length or scale, or the weight is no positive
                finite number.
        """
        expected = self.spec(plain).shapes
        if type(sealed) is not dict or set(sealed) != SEALED:
            found = sorted(map(str, sealed))[:2] if isinstance(sealed, Mapping) else type(sealed)
            raise CipherError(f"found {str(found)[:100]}, expected exactly {sorted(SEALED)}")
        for name, shape in expected.items():
            tensor = sealed[name]
            if type(tensor) is not Tensor or tensor.dtype != torch.uint8:
                raise CipherError(f"{name} is no tensor of bytes")
            if tuple(tensor.shape) != tuple(shape):
                raise CipherError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        (weight,) = struct.unpack("<d", sealed[WEIGHT].numpy().tobytes())
        if not (math.isfinite(weight) and weight > 0):
            raise CipherError(f"{WEIGHT} {weight!r} is no positive number")
        rows = sealed[CIPHERTEXT].numpy()
        return [self._piece(index, row.tobytes()) for index, row in enumerate(rows)], weight

    def pack(self, pieces: list[Any], weight: float) -> dict[str, Tensor]:
        """The inverse of `read`."""
        return self._packed([piece.serialize() for piece in pieces], weight)

    def _packed(self, rows: list[bytes], weight: float) -> dict[str, Tensor]:
        packed = torch.zeros(len(rows), self._row, dtype=torch.uint8)
        for row, content in zip(packed, rows, strict=True):
            framed = struct.pack("<Q", len(content)) + content
            if len(framed) > self._row:
                raise CipherError(f"a piece of {len(content)} bytes, expected {self._row - 8}")
            row[: len(framed)] = torch.frombuffer(bytearray(framed), dtype=torch.uint8)
        number = torch.frombuffer(bytearray(struct.pack("<d", weight)), dtype=torch.uint8)
        return {CIPHERTEXT: packed, WEIGHT: number}

    def _piece(self, index: int, row: bytes) -> Any:
        (length,) = struct.unpack("<Q", row[:8])
        if length > len(row) - 8:
            raise CipherError(f"piece {index} claims {length} bytes of {len(row) - 8}")
        try:
            piece = self._ts.ckks_vector_from(self._context, row[8 : 8 + length])
            sound = piece.size() == self.slots and all(
                one.size() == 2 and float(one.scale) == self._scale for one in piece.ciphertext()
            )
        except Exception as error:  # what a peer sends may raise anything
            raise CipherError(f"piece {index}: {str(error)[:100]}") from error
        if not sound or len(piece.ciphertext()) != 1:
            raise CipherError(f"piece {index} is not one fresh ciphertext of {self.slots} numbers")
        return piece

    def _need_key(self, what: str) -> None:
        if not self.opens:
            raise CipherError(f"this context has no secret key, so it can't {what}; use a site's")


def _vector(tensors: Mapping[str, Tensor], plain: UpdateSpec) -> Tensor:
    """All numbers in the order of the spec's names, in float64."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(set(found) | set(plain.shapes)):
        if found.get(name) != plain.shapes.get(name):
            raise CipherError(
                f"{name!r} is {found.get(name, 'missing')}, its spec says "
                f"{plain.shapes.get(name, 'nothing of it')}"
            )
    flat = [tensors[name].detach().cpu().double().reshape(-1) for name in plain.shapes]
    return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64)


def _tenseal() -> Any:
    try:
        import tenseal
    except ImportError as error:
        raise CipherError(
            "encryption needs the package tenseal: pip install 'flap_nvflare[privacy]'"
        ) from error
    return tenseal
