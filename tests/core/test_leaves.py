"""Parameters and buffers by name, as torch finds them."""

from __future__ import annotations

import torch
from torch import nn

from trimtab.core.leaves import buffers_of, parameters_of


def test_names_order_and_sharing_are_torchs() -> None:
    inner = nn.Linear(2, 2)
    model = nn.Sequential(inner, nn.BatchNorm1d(2), nn.Sequential(nn.Linear(2, 2, bias=False), inner), nn.Identity())
    model[3].weight = model[0].weight
    model.register_module("nothing", None)
    model.register_buffer("last", torch.zeros(1), persistent=False)
    assert len(parameters_of(model)) == 5
    for ours, theirs in ((parameters_of, model.named_parameters()), (buffers_of, model.named_buffers())):
        wanted = list(theirs)
        assert list(ours(model)) == [name for name, _ in wanted]
        assert all(mine is other for mine, (_, other) in zip(ours(model).values(), wanted, strict=True))
