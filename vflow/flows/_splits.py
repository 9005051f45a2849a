"""Orders of the coordinates in a stack of layers, and what coupling layers hold fixed."""

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


def orders(dim: int, num_layers: int) -> np.ndarray:
    """Orders of the coordinates, one a layer, each second one the reverse of the one before it.

    So in each pair of layers every coordinate meets every other. The first is 0, 1, ..., the others
    are drawn, with a fixed seed: a flow's structure is a function of its options.

    Args:
        dim: number of coordinates.
        num_layers: number of layers.

    Returns:
        Integers of shape `(num_layers, dim)`.
    """
    rng = np.random.default_rng(0)
    rows = [np.arange(dim)]
    for layer in range(1, num_layers):
        rows.append(rows[-1][::-1] if layer % 2 else rng.permutation(dim))
    return np.stack(rows)


def swaps(dim: int, num_layers: int) -> np.ndarray:
    """The permutation after each coupling layer: from one split to the next, the last one back.

    Args:
        dim: number of coordinates; one or none has nothing to permute.
        num_layers: number of layers.

    Returns:
        Integers of shape `(num_layers, dim)`: `y = x[p]` goes from one order of `splits` to the next.
    """
    if dim < 2:
        return np.zeros((num_layers, dim), int)
    rows = splits(dim, num_layers)
    following = np.concatenate([rows[1:], np.arange(dim)[None]])
    return np.stack([np.argsort(a)[b] for a, b in zip(rows, following, strict=True)])
