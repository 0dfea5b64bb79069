"""Orthogonal matrices that spread every channel over all: Hadamard's, or random ones (QuaRot, arXiv 2404.00456)."""

import torch
from torch import Tensor


def rotation(size: int, seed: int = 0) -> Tensor:
    """An orthogonal matrix that mixes `size` channels.

    A Hadamard matrix with random signs of its rows where one is known, divided by the root of its size, so that every
    channel goes into every other with the same magnitude; otherwise the orthogonal factor of a Gaussian matrix.

    Args:
        size: number of channels d.
        seed: of the signs, or of the Gaussian matrix.

    Returns:
        float64 [d, d], Q with Q Q^T = 1.
    """
    random = torch.Generator().manual_seed(seed)
    found = hadamard_matrix(size)
    if found is not None:
        signs = torch.randint(0, 2, (size, 1), generator=random, dtype=torch.float64) * 2 - 1
        return (signs * found).div(size**0.5)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))
    return torch.mul(q, r.diagonal().sign())  # which makes it uniformly distributed, and the same for every LAPACK


def factored_rotation(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two small rotations whose Kronecker product mixes `size` channels, for a product that is made at every call.

    Rows as matrices X [a, b] become A^T X B, which takes a + b multiplications a channel in the place of `size`. Of the
    factorizations of the size those into Hadamard matrices come first, and of these the one with the least a + b.

    Args:
        size: number of channels.
        seed: of the signs, or of Gaussian matrices where no Hadamard matrix is known.

    Returns:
        A and B, float64 [a, a] and [b, b], a * b = size and a <= b.
    """
    pairs = [(a, size // a) for a in range(1, int(size**0.5) + 1) if size % a == 0]
    first, second = min(pairs, key=lambda pair: (not all(map(_known, pair)), sum(pair)))
    return rotation(first, seed), rotation(second, seed + 1)


def hadamard_matrix(size: int) -> Tensor | None:
    """A matrix of 1 and -1 with orthogonal rows, float64 [size, size]; None where no construction here makes one.

    Sylvester's doubling of a matrix of Paley's: of order q + 1 for a prime q = 3 modulo 4, of order 2 (q + 1) for a
    prime q = 1 modulo 4.
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    found = _paley(size)
    if found is None and size % 2 == 0 and (half := hadamard_matrix(size // 2)) is not None:
        found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    return found


def _known(size: int) -> bool:
    """Whether `hadamard_matrix` makes one."""
    return size == 1 or _first_kind(size) or _second_kind(size) or (size % 2 == 0 and _known(size // 2))


def _first_kind(size: int) -> bool:
    """Whether it is q + 1 for a prime q = 3 modulo 4."""
    return size % 4 == 0 and _is_prime(size - 1)


def _second_kind(size: int) -> bool:
    """Whether it is 2 (q + 1) for a prime q = 1 modulo 4."""
    q = size // 2 - 1
    return size % 4 == 0 and q % 4 == 1 and _is_prime(q)


def _paley(size: int) -> Tensor | None:
    if _first_kind(size):
        q = size - 1
        ones = torch.ones(q, dtype=torch.float64)
        top = torch.cat([torch.zeros(1, dtype=torch.float64), ones])[None]
        skew = torch.cat([top, torch.cat([-ones[:, None], _residues(q)], 1)])
        return skew + torch.eye(size, dtype=torch.float64)
    if _second_kind(size):
        q = size // 2 - 1
        ones = torch.ones(q, dtype=torch.float64)
        top = torch.cat([torch.zeros(1, dtype=torch.float64), ones])[None]
        symmetric = torch.cat([top, torch.cat([ones[:, None], _residues(q)], 1)])
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(symmetric, plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)
    return None


def _residues(q: int) -> Tensor:
    """Jacobsthal's matrix: 1 where i - j is a square modulo the prime q, -1 where it is none, 0 on the diagonal."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[(torch.arange(1, q) ** 2) % q] = 1.0
    character[0] = 0.0
    at = torch.arange(q)
    return character[(at[:, None] - at[None]) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
