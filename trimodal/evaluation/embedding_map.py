"""A map of embeddings: places in the plane, by t-SNE that begins at the principal components.

    places_N2, kept, kept_pca = lay_out(features_NF)

Exact t-SNE (L. van der Maaten and G. Hinton, JMLR 9, 2008) in float64, without any draw: the same features give the
same map. For the few hundred points of a report it takes about a second; the principal components alone keep far fewer
neighbours together, which is what such a map is looked at for, and `lay_out` tells both shares.

Shape suffixes: N points, F feature width, P principal components, M neighbours.
"""

from typing import NamedTuple

import numpy as np

COMPONENTS = 50  # of which the distances are taken, as the authors do
PERPLEXITY = 30.0
NEIGHBOURS = 10
STEPS, EXAGGERATED_STEPS, EXAGGERATION = 500, 120, 12.0
FEWEST = 8  # points below which the components are the map


class Layout(NamedTuple):
    """Places between 0 and 1, and the mean share of a point's nearest neighbours that are its nearest there, too."""

    places_N2: np.ndarray
    kept: float
    kept_pca: float


def lay_out(features_NF: np.ndarray) -> Layout:
    """The places of N points, finite; alike features are close."""
    components_NP = principal_components(features_NF)
    start_N2 = np.pad(components_NP[:, :2], ((0, 0), (0, max(0, 2 - components_NP.shape[1]))))
    places_N2 = tsne(components_NP, start_N2) if len(features_NF) >= FEWEST else start_N2
    return Layout(_in_unit_square(places_N2), kept_neighbours(components_NP, places_N2),
                  kept_neighbours(components_NP, start_N2))


def principal_components(features_NF: np.ndarray) -> np.ndarray:
    """Coordinates on at most COMPONENTS principal axes, [N, P]; each axis points where its largest weight is positive,
    so that the signs do not depend on the library."""
    centred_NF = features_NF.astype(np.float64) - features_NF.mean(0)
    left_NP, scale_P, axes_PF = np.linalg.svd(centred_NF, full_matrices=False)
    largest_P = np.abs(axes_PF).argmax(1)
    signs_P = np.sign(axes_PF[np.arange(len(axes_PF)), largest_P])
    return (left_NP * scale_P * np.where(signs_P == 0, 1, signs_P))[:, :COMPONENTS]


def tsne(points_NP: np.ndarray, start_N2: np.ndarray) -> np.ndarray:
    """Places of points in the plane by t-SNE from `start_N2`, scaled down."""
    joint_NN = _affinities(_squared_distances(points_NP))
    places_N2 = start_N2 / max(float(start_N2.std()), 1e-12) * 1e-4
    velocity_N2, gains_N2 = np.zeros_like(places_N2), np.ones_like(places_N2)
    rate = max(len(places_N2) / EXAGGERATION / 4, 10.0)  # A. Belkina et al., Nature Communications 10, 2019
    for step in range(STEPS):
        early = step < EXAGGERATED_STEPS
        closeness_NN = 1 / (1 + _squared_distances(places_N2))
        np.fill_diagonal(closeness_NN, 0)
        force_NN = ((EXAGGERATION if early else 1) * joint_NN - closeness_NN / closeness_NN.sum()) * closeness_NN
        gradient_N2 = 4 * (force_NN.sum(1)[:, None] * places_N2 - force_NN @ places_N2)
        same = np.sign(gradient_N2) == np.sign(velocity_N2)
        gains_N2 = np.maximum(np.where(same, gains_N2 * 0.8, gains_N2 + 0.2), 0.01)
        velocity_N2 = (0.5 if early else 0.8) * velocity_N2 - rate * gains_N2 * gradient_N2
        places_N2 = places_N2 + velocity_N2
    return places_N2 - places_N2.mean(0)


def _affinities(squared_NN: np.ndarray) -> np.ndarray:
    """Symmetric affinities that sum to 1: each point's are Gaussian, as wide as gives its neighbours the perplexity."""
    count = len(squared_NN)
    wanted = np.log(min(PERPLEXITY, (count - 1) / 3))
    low_N, high_N = np.zeros(count), np.full(count, np.inf)
    precision_N = np.full(count, 1 / max(squared_NN.mean(), 1e-12))
    others_NN = np.where(np.eye(count, dtype=bool), np.inf, squared_NN)
    further_NN = others_NN - others_NN.min(1, keepdims=True)  # than the nearest, whose weight is 1
    for _ in range(60):
        weights_NN = np.exp(-further_NN * precision_N[:, None])
        shares_NN = weights_NN / weights_NN.sum(1, keepdims=True)
        entropy_N = -np.sum(shares_NN * np.log(np.maximum(shares_NN, 1e-300)), 1)
        too_wide_N = entropy_N > wanted
        low_N, high_N = np.where(too_wide_N, precision_N, low_N), np.where(too_wide_N, high_N, precision_N)
        precision_N = np.where(np.isinf(high_N), precision_N * 2, (low_N + np.where(np.isinf(high_N), 0, high_N)) / 2)
    return (shares_NN + shares_NN.T) / (2 * count)


def _squared_distances(points_NP: np.ndarray) -> np.ndarray:
    norms_N = (points_NP ** 2).sum(1)
    return np.maximum(norms_N[:, None] + norms_N[None] - 2 * points_NP @ points_NP.T, 0)


def kept_neighbours(features_NP: np.ndarray, places_N2: np.ndarray, most: int = NEIGHBOURS) -> float:
    """Mean share of each point's nearest neighbours in `features_NP` that are among as many nearest in `places_N2`."""
    count = min(most, len(features_NP) - 1)
    if count < 1:
        return 1.0
    nearest = []
    for points in (features_NP, places_N2):
        squared_NN = _squared_distances(points)
        np.fill_diagonal(squared_NN, np.inf)
        nearest.append(np.argsort(squared_NN, axis=1, kind="stable")[:, :count])
    return float(np.mean([len(np.intersect1d(*pair)) / count for pair in zip(*nearest, strict=True)]))


def _in_unit_square(places_N2: np.ndarray) -> np.ndarray:
    """Shifted and scaled alike in both directions to lie between 0 and 1, in the middle."""
    low_2, high_2 = places_N2.min(0), places_N2.max(0)
    return (places_N2 - (low_2 + high_2) / 2) / max(float((high_2 - low_2).max()), 1e-12) + 0.5
