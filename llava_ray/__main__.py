"""`python -m llava_ray` is the console script `llava-ray`."""

from llava_ray.cli import main

main()
