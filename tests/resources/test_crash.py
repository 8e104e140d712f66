"""What is left of a longer failure."""

import pytest

from llava_ray.resources.crash import last_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\nllava_ray.errors.ArtifactError: x has 3 bytes\nraised in y\n", "x has 3 bytes"),
        ("warning: b\nerror: no such file\nat c", "error: no such file"),
        ("torch.OutOfMemoryError: CUDA out of memory\nTraceback", "OutOfMemoryError: CUDA"),
        ("only this\n\n", "only this"),
        ("", "no message"),
    ],
)
def test_the_line_that_says_why_is_found(text: str, line: str) -> None:
    assert line in last_line(text)
