"""What the tests of the decoding loop share: shapes of drafts, drafts that often agree, plain and speculative runs."""

import torch
from transformers import (
    StoppingCriteria,
)

from draftdiff.llm import Chain, KBest, Sampled, speculative
from tests.llm.tiny_models import FAMILIES, tiny_model

SHAPES = {"chain": Chain(4), "best": KBest(4, 3, 20), "sampled": Sampled((3, 2, 1))}


def relative(model, noise=0.02):
    """A draft that often agrees: the model with noise on its weights."""
    draft = tiny_model(next(name for name in FAMILIES if name == model.family))
    generator = torch.Generator().manual_seed(1)
    for weight in draft.parameters():
        weight.data += noise * torch.randn(weight.shape, generator=generator)
    return draft


def family(name, **options):
    model = tiny_model(name, **options)
    model.family = name
    return model


def both(target, drafter, ids, **options):
    """(plain, speculative) output of generate, drafts as long as the drafter makes them unless there is a pace."""
    pace = options.pop("pace", None)
    options = {"do_sample": False, "max_new_tokens": 24} | options
    plain = target.generate(ids, **options)
    return plain, target.generate(ids, custom_generate=speculative, drafter=drafter, pace=pace, **options)


class EndsWith(StoppingCriteria):
    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -len(self.tokens) :] == self.tokens).all(-1)
