from __future__ import annotations

import pytest

from hoptim.checks import describe_type

NAMES = "an int, a float, a str, an Adam, an OrderedDict, an Unrolled, an Update, a UserDict, a uint8, a UUID, a NoneType"


@pytest.mark.parametrize("described", NAMES.split(", "))
def test_a_type_is_described_with_its_article(described: str) -> None:
    assert describe_type(type(described.split()[1], (), {})()) == described


def test_a_class_is_called_one() -> None:
    assert describe_type(int) == "the class int"
