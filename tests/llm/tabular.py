"""Language models whose next token depends on the last two by a table: their laws are known exactly.

They find the token before a token as attention does, among the keys that the mask shows, by position: a wrong mask,
position or cache changes what they say.
"""

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class TabularConfig(PretrainedConfig):
    model_type = "tabular"

    def __init__(self, vocab_size=8, **kwargs):
        self.vocab_size = vocab_size
        self.num_hidden_layers = self.num_attention_heads = 1
        self.hidden_size = 2 * vocab_size
        super().__init__(**kwargs)


class TabularModel(PreTrainedModel, GenerationMixin):
    config_class = TabularConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        vocabulary = config.vocab_size
        self.table = torch.nn.Parameter(torch.zeros(vocabulary + 1, vocabulary, vocabulary))
        self.embedding = torch.nn.Embedding(vocabulary, 2 * vocabulary)
        self.output = torch.nn.Linear(2 * vocabulary, vocabulary, bias=False)  # for heads; the model does without
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.output

    def _init_weights(self, module):
        pass

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        output_hidden_states=False,
        **kwargs,
    ):
        held = cache if cache is not None else past_key_values
        rows, new = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(new)[None].expand(rows, -1)
        # As wide as keys of one head, for drafters that read them.
        pair = (
            x[:, None, :, None].float().expand(-1, -1, -1, self.config.hidden_size) for x in (input_ids, position_ids)
        )
        tokens, positions = held.update(*pair, 0)
        tokens, positions = tokens[:, 0, :, 0].long(), positions[:, 0, :, 0].long()
        keys = tokens.shape[1]
        if attention_mask is None or attention_mask.ndim == 2:
            seen = (torch.arange(keys)[None] <= torch.arange(keys - new, keys)[:, None]).expand(rows, -1, -1)
            if attention_mask is not None:
                seen = seen & attention_mask[:, None, -keys:].bool()
        else:
            seen = attention_mask[:, 0]
        before = seen & (positions[:, None, :] == position_ids[:, :, None] - 1)
        assert (before.sum(-1) <= 1).all()
        vocabulary = self.config.vocab_size
        previous = torch.where(before.any(-1), tokens.gather(1, before.int().argmax(-1)), vocabulary)
        states = None
        if output_hidden_states:  # what the model knows of its text: the last two tokens
            pair = [torch.nn.functional.one_hot(x, vocabulary + 1)[..., :vocabulary] for x in (previous, input_ids)]
            states = (torch.cat(pair, dim=-1).float(),) * 2
        return CausalLMOutputWithPast(
            logits=self.table[previous, input_ids], past_key_values=held, hidden_states=states
        )


def tabular_model(seed=0, vocab_size=8, spread=1.5):
    model = TabularModel(TabularConfig(vocab_size)).eval()
    generator = torch.Generator().manual_seed(seed)
    model.table.data = spread * torch.randn(model.table.shape, generator=generator)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def tabular_pair(vocab_size=8, noise=1.0):
    """(target, draft): the draft is the target with noise."""
    target, draft = tabular_model(0, vocab_size), tabular_model(0, vocab_size)
    draft.table.data += tabular_model(1, vocab_size, spread=noise).table.data
    return target, draft


def pair_law(model, first, second, warp=lambda logits: logits):
    """Exact law of the two tokens after (first, second), [vocabulary, vocabulary]."""
    one = warp(model.table[first, second][None]).softmax(-1)[0]
    two = warp(model.table[second]).softmax(-1)
    return (one[:, None] * two).detach()


def next_pair_law(model, first, second):
    """Exact law of the third and fourth token after (first, second)."""
    law = pair_law(model, first, second)
    after = model.table[:-1].softmax(-1).detach()  # [a, b, c]
    three = torch.einsum("ab,abc->bc", law, after)
    return three[:, :, None].mul(after).sum(0)
