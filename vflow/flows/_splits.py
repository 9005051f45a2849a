"""Which coordinates a stack of coupling layers holds fixed, layer by layer."""

import numpy as np

_CANDIDATES = 32
# Above this many coordinates random splits mix well enough, and the search below is slow.
_SEARCH_LIMIT = 128


def splits(dim: int, num_layers: int) -> np.ndarray:
    """Orders of the coordinates, one a layer: the first `dim // 2` are held fixed there.

    Consecutive layers swap roles (what one holds fixed, the next transforms), so every coordinate
    is transformed in each pair of layers. Beyond that, each split is the best of a few random ones:
    the one that brings the most ordered pairs (fixed, transformed) that no layer had before. All is
    a function of the two numbers, not of a key: a flow's structure can be rebuilt from its options.

    Args:
        dim: number of coordinates, at least 2.
        num_layers: number of layers.

    Returns:
        Integers of shape `(num_layers, dim)`; row 0 is 0, ..., dim - 1.
    """
    rng = np.random.default_rng(0)
    num_fixed = dim // 2
    orders = [np.arange(dim)]
    seen = np.zeros((dim, dim), dtype=bool)
    for layer in range(1, num_layers):
        fixed, moved = np.split(orders[-1], [num_fixed])
        seen[np.ix_(fixed, moved)] = True
        best, best_gain = orders[-1], -1
        for _ in range(_CANDIDATES if dim <= _SEARCH_LIMIT else 1):
            if layer % 2:  # the partner of the layer before: hold fixed what that one transformed
                shuffled = rng.permutation(moved)
                order = np.concatenate([shuffled[:num_fixed], fixed, shuffled[num_fixed:]])
            else:
                order = rng.permutation(dim)
            gain = np.sum(~seen[np.ix_(order[:num_fixed], order[num_fixed:])])
            if gain > best_gain:
                best, best_gain = order, gain
        orders.append(best)
    return np.stack(orders)


def permutations(orders: np.ndarray) -> np.ndarray:
    """The permutation after each layer, from its order to the next; the last one goes back to 0, 1, ...

    Args:
        orders: as `splits` returns them.

    Returns:
        Integers of the same shape: `y = x[p]` takes a vector from one order to the next.
    """
    following = np.concatenate([orders[1:], np.arange(orders.shape[1])[None]])
    return np.stack([np.argsort(a)[b] for a, b in zip(orders, following, strict=True)])
