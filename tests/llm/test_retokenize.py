"""The same text in the tokens of two tokenizers, byte for byte, as it grows."""

import random

import pytest

from draftdiff.llm.retokenize import GrowingText, Vocabularies, token_bytes
from tests.llm.toy_tokenizers import TEXT, byte_level, metaspace, sentence_piece

TOKENIZERS = {
    "byte level": byte_level(300),
    "byte level, larger, added tokens": byte_level(420, ("<|end|>",), added=("<think>", "  ++")),
    "SentencePiece": sentence_piece(),
    "Unigram": metaspace(),
}
STRANGE = [
    "plain words and more words",
    "  two spaces, a tab\tand\n\nlines  ",
    "naïve café 漢字 😀 and 😃!",
    "<think>hm  ++ </think>",
    " ",
    "a",
]


@pytest.fixture(params=TOKENIZERS, name="draft")
def _draft(request):
    return TOKENIZERS[request.param]


@pytest.fixture(params=TOKENIZERS, name="target")
def _target(request):
    return TOKENIZERS[request.param]


def in_bytes(tokens, ids):
    return b"".join(tokens[id] or b"" for id in ids)


@pytest.mark.parametrize("text", STRANGE)
def test_the_bytes_of_tokens_are_those_of_the_text(target, text):
    ids = target(text, add_special_tokens=False).input_ids
    if target.unk_token_id in ids:
        pytest.skip("it has no tokens for this text")
    found = in_bytes(token_bytes(target), ids)
    assert found in (text.encode(), b" " + text.encode(), text.rstrip().encode(), b" " + text.rstrip().encode())


@pytest.mark.parametrize("text", STRANGE)
def test_a_text_is_the_same_in_the_drafts_tokens_after_every_token(draft, target, text):
    known, tokens = Vocabularies(draft, target), target(text, add_special_tokens=False).input_ids
    if target.unk_token_id in tokens:
        pytest.skip("the target has no tokens for this text")
    growing = GrowingText(known)
    for n in range(1, len(tokens) + 1):
        ids, aligned = growing.update(tokens[:n])
        if ids is None or (draft.unk_token_id is not None and draft.unk_token_id in ids):
            continue
        assert in_bytes(known.draft, ids).lstrip() == in_bytes(known.target, tokens[:n]).lstrip()
        for one in aligned:
            assert in_bytes(known.draft, ids[one.start : one.stop]).strip() == (known.target[one.token] or b"").strip()


def test_tokens_that_end_within_a_character_are_kept_as_bytes():
    known = Vocabularies(TOKENIZERS["SentencePiece"], TOKENIZERS["byte level"])
    tokens = TOKENIZERS["byte level"]("a😀").input_ids
    assert len(tokens) == 3
    for n in range(1, 4):
        ids, _ = GrowingText(known).update(tokens[:n])
        assert in_bytes(known.draft, ids).lstrip() == in_bytes(known.target, tokens[:n])
    assert GrowingText(Vocabularies(TOKENIZERS["Unigram"], TOKENIZERS["byte level"])).update(tokens[:2])[0] is None


def test_special_tokens_stand_for_those_of_their_role():
    draft, target = TOKENIZERS["SentencePiece"], TOKENIZERS["byte level"]
    known = Vocabularies(draft, target)
    assert known.direct[draft.eos_token_id] == target.eos_token_id
    ids, _ = GrowingText(known).update([*target(" and").input_ids, target.eos_token_id, *target(" dog").input_ids])
    assert ids.count(draft.eos_token_id) == 1


def test_byte_tokens_stand_for_tokens_only_where_there_is_no_other():
    draft = TOKENIZERS["SentencePiece"]
    known = Vocabularies(TOKENIZERS["byte level"], draft)
    letter = TOKENIZERS["byte level"].convert_tokens_to_ids("o")
    assert draft.convert_ids_to_tokens(known.direct[letter]) == "o"


@pytest.mark.parametrize("length", [700])
def test_a_long_text_is_encoded_in_a_window_and_reads_as_a_whole(draft, target, length):
    draws = random.Random(0)
    words = " ".join(TEXT[:2]).replace("\n", " \n ").split(" ")
    text = " ".join(draws.choice(words) for _ in range(length))
    known, tokens = Vocabularies(draft, target), target(text, add_special_tokens=False).input_ids
    growing, longest = GrowingText(known), 0
    for n in range(1, len(tokens), 7):
        ids, aligned = growing.update(tokens[:n])
        longest = max(longest, len(ids) - len(growing._settled))
    whole, everything = GrowingText(known).update(tokens[:n])
    assert ids == whole and len(everything) > 0.2 * n
    if draft.backend_tokenizer.pre_tokenizer is not None:  # else a text is one word, and has few places to cut it at
        assert len(growing._settled) > len(whole) - 300
    assert all(one.place >= n - 7 for one in aligned)


def test_slow_tokenizers_are_refused():
    with pytest.raises(ValueError, match="need fast tokenizers, got object"):
        token_bytes(object())
