"""Fits the space of a mini model's queries to clips: two linear maps in closed form.

The features of clips are whitened along their principal components; word vectors are mapped to the clips they caption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_SPREAD = 1e-2  # added to the deviation of the trunk's features: some of its channels are always 0


def balanced(labels: Sequence[str]) -> Tensor:
    """Return a weight for each clip, such that a label of n clips counts √n: float64 `[clips]`, of mean 1."""
    count = Counter(labels)
    weights = torch.tensor([count[label] ** -0.5 for label in labels], dtype=torch.float64)
    return weights / weights.mean()


def fit_sounds(heard: Tensor, weights: Tensor, dim: int, whitening: float) -> tuple[Tensor, Tensor]:
    """Fit the map that whitens the features of clips.

    Args:
        heard: features of each clip, float64 `[clips, features]`.
        weights: from `balanced`.
        dim: how many principal components are kept.
        whitening: share of the mean variance that is added to each component's.

    Returns:
        The matrix, float64 `[features, dim]`, and the offset, `[dim]`.
    """
    centre, spread = weights @ heard / len(heard), heard.std(0) + SMALLEST_SPREAD
    centred = (heard - centre) / spread
    variances, components = torch.linalg.eigh((centred * weights[:, None]).T @ centred / len(heard))
    variances, components = variances.flip(0).clamp(min=0), components.flip(1)  # the largest first
    matrix = components[:, :dim] / (variances[:dim] + whitening * variances.mean()).sqrt() / spread[:, None]
    return matrix, -centre @ matrix


def fit_words(words: Tensor, points: Tensor, weights: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Fit the map from word vectors to the clips they caption, by ridge regression.

    The mean of the vectors is mapped to the origin, around which whitened clips lie.

    Args:
        words: vector of each caption, float64 `[captions, columns]`.
        points: where its clip lies in the space, `[captions, dim]`.
        weights: of the captions, `[captions]`.
        ridge: weight of the penalty on the size of the map.

    Returns:
        The matrix, float64 `[columns, dim]`, and the offset, `[dim]`.
    """
    mean = weights @ words / weights.sum()
    centred = words - mean
    weighted = (centred * weights[:, None]).T
    size = torch.eye(words.shape[1], dtype=words.dtype)
    matrix: Tensor = torch.linalg.solve(weighted @ centred + ridge * size, weighted @ points)
    return matrix, -mean @ matrix
