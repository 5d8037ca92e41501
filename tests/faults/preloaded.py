"""Imported once by the process that the children are forked from: what a conversion imports.

A first reduction without data makes torch import its symbolic shapes, which takes a second.
"""

import torch

import convert.cli
import convert.pipeline  # noqa: F401

torch.set_num_threads(1)
torch.empty(1, device="meta").mean(0)
