"""Between parts and our models, for models that fit into memory; and how far two models are apart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from moefold.moe.config import ModelConfig
from moefold.moe.hf.families import FAMILIES, NATIVE, write_tensors
from moefold.moe.hf.matrix import Given, Matrix
from moefold.moe.hf.parts import part_shapes
from moefold.moe.model import Model

Arrays = Mapping[str, npt.NDArray[np.float32]]
"""Tensors of a model by the names of its state."""


def parts_of(config: ModelConfig, arrays: Arrays) -> dict[str, Matrix]:
    """The parts of a model, from the tensors of its state."""
    shapes, parts = part_shapes(config), dict[str, Matrix]()
    for name, layout in FAMILIES[NATIVE].tensors(config).items():
        rows = arrays[name].reshape(-1, arrays[name].shape[-1])
        first = 0
        for part in layout.parts:
            shape = shapes[part]
            count = int(np.prod(shape[:-1]))
            parts[part] = Given(rows[first : first + count].reshape(shape))
            first += count
        assert first == len(rows), f"{name} has rows that belong to no part"
    return {part: parts[part] for part in shapes}


def arrays_of(config: ModelConfig, parts: Mapping[str, Matrix]) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors of a model's state, from its parts."""
    tensors = write_tensors(FAMILIES[NATIVE], config, parts)
    return {name: np.array(matrix.rows(), np.float32).reshape(matrix.shape) for name, matrix in tensors.items()}


def model_of(config: ModelConfig, arrays: Arrays) -> Model:
    """A float32 model with these weights."""
    model = Model(config, init=False)
    model.load_state_dict({name: torch.from_numpy(np.array(values)) for name, values in arrays.items()})
    return model


@torch.inference_mode()
def distance(dense: Model, other: Model, tokens_BS: Tensor) -> tuple[float, float]:
    """(KL(dense || other) in nats, mean over positions; length of the logits' difference by that of the dense model's logits)."""
    wanted_TV, found_TV = (model(tokens_BS)[0].flatten(0, 1).double() for model in (dense, other))
    p_TV, q_TV = F.log_softmax(wanted_TV, -1), F.log_softmax(found_TV, -1)
    kl = float((p_TV.exp() * (p_TV - q_TV)).sum(-1).mean())
    return kl, float((found_TV - wanted_TV).norm() / wanted_TV.norm())
