"""What an image, a text or a sound has become before a model encodes it."""

from typing import Any, NamedTuple


class Prepared(NamedTuple):
    """The inputs of one item. Items of one modality with equal `steps` are encoded side by side, so that hardly any
    of what is computed is padding."""

    value: Any  # what `features` of the model that prepared it takes
    steps: int = 1  # of 16 tokens of a text; windows of a sound: so many times the memory of one
    is_cut: bool = False  # a text, at the longest that the model reads
