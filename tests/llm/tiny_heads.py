"""Small draft heads with random weights for any target of the tests."""

import torch
from transformers import LlamaConfig

from draftdiff.llm import (
    Beams,
    EagleDrafter,
    FalconDrafter,
    HydraDrafter,
    LongSpecDrafter,
    MedusaDrafter,
    Reranked,
    StaticTree,
)
from draftdiff.llm.heads.eagle import EagleConfig, EagleHead
from draftdiff.llm.heads.hydra import HydraConfig, HydraHeads, prefix_fields
from draftdiff.llm.heads.medusa import MedusaConfig, MedusaHeads


def randomised(module, spread=0.3, seed=0):
    """The module with random weights, those of norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        weight.data = spread * torch.randn(weight.shape, generator=generator) + ("norm" in name)
    return module.eval()


def hydra(target, *, layers=1, prefix=False, heads=3, tree=None, **options):
    text = target.config.get_text_config()
    fields = prefix_fields(target) if prefix else None
    config = HydraConfig(text.hidden_size, text.vocab_size, heads, layers, fields, **options)
    return HydraDrafter(randomised(HydraHeads(config, target)), tree or StaticTree.from_widths((3, 2, 1)[:heads]))


def medusa(target, *, heads=3, tree=None):
    text = target.config.get_text_config()
    config = MedusaConfig(text.hidden_size, text.vocab_size, heads)
    return MedusaDrafter(randomised(MedusaHeads(config, target)), tree or StaticTree.from_widths((3, 2, 1)[:heads]))


def eagle_head(target, *, vocabulary=None, layers=None, **options):
    """A head that can emit the last `vocabulary` tokens of the target's."""
    text = target.config.get_text_config()
    size = vocabulary or text.vocab_size
    width = text.hidden_size
    layer = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_attention_heads=2, num_hidden_layers=1, **options
    )
    read = tuple(range(min(3, text.num_hidden_layers))) if layers is None else layers
    head = randomised(EagleHead(EagleConfig(layer.to_dict(), size, read, width), target))
    head.d2t[:] = text.vocab_size - size
    head.t2d[:] = torch.arange(text.vocab_size) >= text.vocab_size - size
    return head


def eagle(target, shape=None, **options):
    return EagleDrafter(eagle_head(target, **options), shape or Reranked(4, 3, 8))


def longspec(target, shape=None, *, window=6):
    drafter = LongSpecDrafter.from_target(target, shape or Beams((2, 3)), window)
    randomised(drafter.head)
    return drafter


def falcon(target, *, k=2, recurrent=False, tree=None):
    tree = tree or StaticTree([[0], [1], [0, 0], [1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0, 0]])
    drafter = FalconDrafter.from_target(target, k, tree=tree, recurrent=recurrent)
    randomised(drafter.head)
    return drafter
