"""Small tokenizers made in the test: whatever a real one does with bytes, spaces and added tokens, in a few lines."""

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "def read(self, size=-1):\n    return self.file.read(size)\n",
    "for name in names:\n    print(name, end=' ')\n",
    "naïve café über straße 漢字 emoji 😀😃 done\n",
    "the quick brown fox jumps over the lazy dog and the other dog\n",
] * 4


def greedy_tokenizer(vocabulary):
    """Plain text, the longest token first."""
    ids = {token: i for i, token in enumerate([*vocabulary, "[UNK]"])}
    model = models.WordPiece(ids, unk_token="[UNK]", continuing_subword_prefix="", max_input_chars_per_word=10**6)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def byte_level(size=320, special=("<eos>",), added=()):
    """As GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])


def sentence_piece(size=400, special=("</s>",)):
    """As Llama's: spaces are letters, a text begins with one, and what no token has is bytes."""
    spaces = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = spaces
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=40, max_token_length=6, show_progress=False)
    trained.train_from_iterator(TEXT, trainer)
    learned = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    tokenizer = Tokenizer(
        models.BPE(
            {token: id for id, token in enumerate(tokens)},
            [tuple(pair) for pair in learned["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], unk_token="<unk>")


def metaspace(size=300, special=("<end>",)):
    """As T5's: a Unigram model."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=[*special, "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0], unk_token="<unk>")
