"""A run of a next-scale pipeline whose cache is looked at after every scale."""

import torch


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def watched(pipe, *arguments, **call):
    """Latents, and after each scale the cache's bytes and its keys per layer."""
    seen = []

    def look(_pipe, _scale, _step, tensors):
        cache = tensors["cache"]
        seen.append((cache.nbytes, [cache.tokens(layer) for layer in sorted(cache.keys, key=str)]))
        return {}

    latents = pipe(
        *arguments,
        generator=seeded(),
        output_type="latent",
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["cache"],
        **call,
    ).images
    return latents, seen
