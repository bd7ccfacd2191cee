"""What an image, a text or a sound has become before a model encodes it."""

from typing import Any, NamedTuple


class Prepared(NamedTuple):
    """The inputs of one item, as `features` of the model that prepared it takes them.

    Items with equal `steps` are encoded side by side, so that little of what is computed is padding: of texts their
    length, of sounds their windows. `weight` is how many times the memory of the shortest one an item takes.
    """

    value: Any
    steps: Any = 1
    weight: int = 1
    is_cut: bool = False  # a text, at the longest that the model reads


BROKEN = Prepared(None, "broken")  # in place of what cannot be read
