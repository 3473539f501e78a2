"""The version of torch, where tests state what one version does and another does not."""

import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
