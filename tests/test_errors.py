import pickle

import pytest

from llava_ray import errors

LEAVES = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.LlavaRayError)
]


@pytest.mark.parametrize("kind", LEAVES)
def test_errors_survive_pickling(kind: type[errors.LlavaRayError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("what, seen, do")))
    assert type(copy) is kind
    assert str(copy) == "what, seen, do"


def test_the_tree_in_the_docstring_is_complete() -> None:
    for kind in LEAVES:
        assert kind.__name__ in (errors.__doc__ or "")
