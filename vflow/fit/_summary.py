"""The table of a posterior's sites."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """What draws say about one element of a site, in the unit of the site.

    Attributes:
        mean: the mean.
        sd: the standard deviation.
        q5: the 5% quantile.
        q50: the median.
        q95: the 95% quantile.
    """

    mean: float
    sd: float
    q5: float
    q50: float
    q95: float


class Summary(Mapping[str, Row]):
    """One `Row` for each element of each site: `summary["theta[2]"].mean`; printing it is a table.

    Args:
        rows: by `site` for scalars, by `site[i,j]` for elements of arrays.
    """

    def __init__(self, rows: dict[str, Row]):
        self._rows = dict(rows)

    def __getitem__(self, name: str) -> Row:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        return self.text()

    def text(self, max_rows: int | None = None) -> str:
        """The table; at most `max_rows` rows of it, then a line that says how many are left."""
        names = list(self)[:max_rows]
        width = max(map(len, ["site", *names]))
        lines = [f"{'site':<{width}}" + "".join(f"{title:>11}" for title in Row._fields)]
        lines += [f"{n:<{width}}" + "".join(f"{x:>11.4g}" for x in self[n]) for n in names]
        if len(names) < len(self):
            lines.append(f"... and {len(self) - len(names)} more: summary() has them all")
        return "\n".join(lines)


def summarise(draws: Mapping[str, np.ndarray]) -> Summary:
    """A row for each element of each site, from draws of shape (n, *site shape)."""
    rows = {}
    for site, values in draws.items():
        values = np.asarray(values, np.float64)
        with np.errstate(all="ignore"):  # a failed fit has infinite draws; its rows say nan
            quantiles = np.quantile(values, (0.05, 0.5, 0.95), axis=0)
            table = np.stack([values.mean(axis=0), values.std(axis=0, ddof=1), *quantiles])
        for index in np.ndindex(values.shape[1:]):
            label = f"{site}[{','.join(map(str, index))}]" if index else site
            rows[label] = Row(*(float(x) for x in table[:, *index]))
    return Summary(rows)
