"""The random projections of the hash."""

from __future__ import annotations

import torch
from torch import Tensor


def make_rotation(
    dim: int, hashes: int, width: int, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """rotation_HPD: for each of `hashes` functions, `width` orthonormal rows of length `dim`, uniformly distributed.

    The first rows of a random rotation, as cross-polytope hashing uses it in low dimensions (Andoni et al. 2015, arXiv
    1509.02897, sections 3 and 5). Drawn and orthogonalised on the CPU in fp64 whatever the device and dtype, so that every
    rank and device has the same values.

    Args:
        width: P, a power of two, at most dim.
        seed: of the generator, 0 or more; different layers need different ones.

    Raises:
        ValueError: sizes that cannot be.
    """
    if hashes < 1 or width < 1 or width & (width - 1) or width > dim:
        raise ValueError(
            f"make_rotation: {hashes} hashes of width {width} for dim {dim}; need at least one hash, and a width that is a "
            f"power of two of at most dim"
        )
    generator = torch.Generator().manual_seed(seed)
    gauss_HDP = torch.randn(hashes, dim, width, generator=generator, dtype=torch.float64)
    q_HDP, r_HPP = torch.linalg.qr(gauss_HDP)
    # QR leaves the signs open; with a positive diagonal of r the columns of q are uniform over rotations
    signs_HP = torch.where(r_HPP.diagonal(dim1=1, dim2=2) < 0, -1.0, 1.0)
    return (q_HDP * signs_HP[:, None, :]).transpose(1, 2).to(dtype=dtype, device=device).contiguous()
