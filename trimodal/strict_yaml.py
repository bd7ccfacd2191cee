"""YAML for settings: plain values only, no key twice, and nothing that would fill the memory.

    parse("training: {epochs: 3}")      # {"training": {"epochs": 3}}
"""

from typing import Any

import yaml

MAX_CHARS = 100_000  # ten times what config.yaml has; parsing it takes seconds
MAX_VALUES = 10_000  # with aliases filled in: nine lines of nine aliases each are 9**9 values
MAX_VALUE_CHARS = 3_000  # below the digits (4,300) from which on Python refuses to print a whole number


def parse(text: str) -> Any:
    """Dicts, lists, numbers, texts, dates.

    Raises:
        yaml.YAMLError: no YAML, a key twice, or beyond the bounds above; one line.
    """
    if len(text) > MAX_CHARS:
        raise yaml.YAMLError(f"over {MAX_CHARS:,} characters")
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # PyYAML lets through what its constructors raise, for impossible dates for example
        raise yaml.YAMLError(" ".join(str(error).split())[:300]) from None


class _StrictLoader(yaml.SafeLoader):
    total = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        before, is_alias = self.total, self.check_event(yaml.AliasEvent)
        node: Any = super().compose_node(parent, index)
        self.total += getattr(node, "size", MAX_VALUES) if is_alias else 1  # without a size yet, it holds itself
        if self.total >= MAX_VALUES or (isinstance(node.value, str) and len(node.value) > MAX_VALUE_CHARS):
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: over {MAX_VALUES:,} values, those of aliases "
                                 f"(*name) filled in, or a value of over {MAX_VALUE_CHARS:,} characters")
        node.size = self.total - before
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # before `<<` merges keys that may be given again
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.value in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: key {key_node.value!r} is given twice")
            seen.add(str(key_node.value))
        return node
