"""Features of frozen towers, as a split reads them from the cache.

    features = split.frozen["image"]                          # made by trimodal.towers.features
    tokens_BND, valid_BN = features.read(rows, views)         # float32: the pooled feature first, then kept tokens

An item of an entry is what a tower has made of one picture, sound or caption: float32 [n, D], its valid tokens alone.

Shape suffixes: B items, N tokens with the pooled feature, D width of the tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimodal.data.cache import Entry

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Features:
    """What a frozen tower has made of the samples of a split, or of its captions, in V views.

    `places` says for each row of the table, or of its captions, where it is found: int64 [rows, 2], number of its set's
    entries and of the item in each of them; -1 where it has nothing that this tower reads.
    """

    width: int
    entries: Sequence[Sequence[Entry]]  # by set, then by view
    places: np.ndarray

    @property
    def views(self) -> int:
        return min(map(len, self.entries), default=1)

    def check(self, row: int, view: int) -> None:
        """Raises BrokenSample where the file of a row could not be read."""
        number, item = self.places[row].tolist()
        self.entries[number][view].check(item)

    def read(self, rows_B: np.ndarray, views_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens float32 [B, N, D], zeros behind the last one of each row, and which of them are real, bool [B, N].

        Raises:
            UserError: an entry cannot be read any more.
        """
        sets_B, items_B = self.places[rows_B].T
        groups = [(int(number), int(view)) for number, view in {*zip(sets_B.tolist(), views_B.tolist(), strict=True)}]
        parts = [(np.flatnonzero((sets_B == number) & (views_B == view)), self.entries[number][view])
                 for number, view in groups]
        bounds_B2 = np.zeros((len(rows_B), 2), np.int64)
        for places, entry in parts:
            first = entry.offsets[items_B[places]]
            bounds_B2[places] = np.stack([first, entry.offsets[items_B[places] + 1]], 1) // (FLOAT_BYTES * self.width)
        counts_B = bounds_B2[:, 1] - bounds_B2[:, 0]
        longest = int(counts_B.max(initial=1))
        valid_BN = np.arange(longest) < counts_B[:, None]
        found = np.zeros((*valid_BN.shape, self.width), np.float32)
        for places, entry in parts:
            tokens_ND = np.asarray(entry.content).view(np.float32).reshape(-1, self.width)
            index_BN = bounds_B2[places, :1] + np.arange(longest)
            own_BN = valid_BN[places]
            if own_BN.all() and len(parts) == 1:
                return tokens_ND[index_BN], valid_BN
            block = found[places]
            block[own_BN] = tokens_ND[index_BN[own_BN]]
            found[places] = block
        return found, valid_BN
