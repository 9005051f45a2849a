"""Estimators of the extreme value index of a sample, in numpy on the host."""

import numpy as np
from numpy.typing import NDArray

_CHUNK = 2_000_000  # bootstrap draws held in memory at once


def hill(top: NDArray, k: int) -> float:
    r"""Hill's $\hat\xi = M_1 = \frac1k\sum_{i\le k}\log x_{(i)} - \log x_{(k+1)}$.

    Args:
        top: positive values in descending order, at least k + 1.
        k: how many of the largest are used.

    Source:
        Hill 1975, A simple general approach to inference about the tail of a distribution.
    """
    return float(np.mean(np.log(top[:k])) - np.log(top[k]))


def moments(top: NDArray, k: int) -> float:
    r"""The moments estimator, $\hat\xi = M_1 + 1 - \tfrac12(1 - M_1^2/M_2)^{-1}$; may be negative.

    Args:
        top: positive values in descending order, at least k + 1.
        k: how many of the largest are used.

    Source:
        Dekkers, Einmahl & de Haan 1989, A moment estimator for the index of an extreme-value
        distribution, equation 1.7.
    """
    d = np.log(top[:k]) - np.log(top[k])
    first, second = np.mean(d), np.mean(d * d)
    return float(first + 1 - 0.5 / (1 - first**2 / second))


def kernel_estimator(top: NDArray, n: int, k: int, alpha: float = 0.6) -> float:
    r"""The kernel-type estimator with biweight $K$ and bandwidth $h = k/n$; may be negative.

    With $K_h(u) = K(u/h)/h$, $K(u) = \tfrac{15}8(1 - u^2)^2$ and the spacings
    $e_i = \log x_{(i)} - \log x_{(i+1)}$,

    $$\hat\xi = \sum_i \tfrac in K_h(\tfrac in)e_i - 1 + q_2/q_1, \quad
      q_1 = \sum_i (\tfrac in)^\alpha K_h(\tfrac in) e_i, \quad
      q_2 = \sum_i \frac{d}{du}\left[u^{\alpha+1}K_h(u)\right]_{u=i/n} e_i.$$

    Args:
        top: positive values in descending order, at least k + 1.
        n: sample size.
        k: bandwidth times the sample size.
        alpha: a number above 1/2.

    Source:
        Groeneboom, Lopuhaa & de Wolf 2003, Kernel-type estimators for the extreme value index,
        Annals of Statistics 31(6).
    """
    h = k / n
    u = np.arange(1, k + 1) / n
    spacing = -np.diff(np.log(top[: k + 1]))
    rest = 1 - (u / h) ** 2
    kernel = 15 / 8 * rest**2 / h
    slope = -15 / 2 * (u / h) * rest / h**2
    positive = np.sum(u * kernel * spacing)
    q1 = np.sum(u**alpha * kernel * spacing)
    q2 = np.sum(((alpha + 1) * u**alpha * kernel + u ** (alpha + 1) * slope) * spacing)
    return float(positive - 1 + q2 / q1)


def double_bootstrap(top: NDArray, rng: np.random.Generator, resamples: int = 200) -> int:
    r"""The number of order statistics that minimises the mean squared error of Hill's estimator.

    The bootstrap mean of $(M_2 - 2M_1^2)^2$ is minimised for samples of size $n_1 = n^{0.8}$ at
    $k_1$ and of size $n_2 = n_1^2/n$ at $k_2$; with the second-order parameter estimated from $k_1$,

    $$k = \frac{k_1^2}{k_2}\left(\frac{\log k_1}{2\log n_1 - \log k_1}\right)^{
      2(\log n_1 - \log k_1)/\log n_1}.$$

    Args:
        top: the whole sample, positive, in descending order.
        rng: source of the resamples.
        resamples: how many resamples of each size.

    Returns:
        k, at least 10 and below the sample size.

    Source:
        Danielsson, de Haan, Peng & de Vries 2001, Using a bootstrap method to choose the sample
        fraction in tail index estimation, Journal of Multivariate Analysis 76(2).
    """
    n = top.size
    log_top = np.log(top)
    n1 = round(n**0.8)
    n2 = max(round(n1**2 / n), 40)
    k1, k2 = (_best_k(log_top, rng, size, resamples) for size in (n1, n2))
    base = np.log(k1) / (2 * np.log(n1) - np.log(k1))
    k = k1**2 / k2 * base ** (2 * (np.log(n1) - np.log(k1)) / np.log(n1))
    return int(np.clip(round(k), 10, n - 1))


def _best_k(log_top: NDArray, rng: np.random.Generator, size: int, resamples: int) -> int:
    n, most = log_top.size, size // 2
    count = np.arange(1, most + 1)
    total, done = np.zeros(most), 0
    while done < resamples:
        rows = min(resamples - done, max(1, _CHUNK // size))
        # Descending order statistics of a resample: ordered ranks, from exponential spacings.
        steps = np.cumsum(rng.exponential(size=(rows, size + 1)), axis=1)
        ranks = (steps[:, : most + 1] / steps[:, -1:] * n).astype(int)
        logs = log_top[np.minimum(ranks, n - 1)]
        shifted = logs - logs[:, :1]
        threshold = shifted[:, 1:]
        first = np.cumsum(shifted[:, :-1], axis=1) / count
        second = np.cumsum(shifted[:, :-1] ** 2, axis=1) / count
        m1 = first - threshold
        m2 = second - 2 * threshold * first + threshold**2
        total += np.sum((m2 - 2 * m1**2) ** 2, axis=0)
        done += rows
    least = min(10, most - 1)
    return int(least + np.argmin(total[least - 1 :]))
