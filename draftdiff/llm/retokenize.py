"""One text in the tokens of two tokenizers: the bytes of every token, which tokens are the same, and a text as it
grows.

Bytes, because a token may end in the middle of a character. Special tokens have none: they stand for one another by
their text or their role.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from draftdiff.llm.checks import require

_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")
_WINDOW = 128  # tokens of the draft from which on the text before is left alone


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes of every id; None for special tokens and ids without a token.

    tokenizer: a fast one of transformers, byte-level, SentencePiece-like or plain.  Raises ValueError for a slow one.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    require(backend is not None, f"tokens of other tokenizers need fast tokenizers, got {type(tokenizer).__name__}")
    kinds = set(_kinds(json.loads(backend.to_str()).get("decoder")))
    vocabulary = tokenizer.get_vocab()
    found: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    special = set(tokenizer.all_special_ids)
    added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
    for token, id in vocabulary.items():
        if id in special or (id in added and tokenizer.added_tokens_decoder[id].special):
            continue
        found[id] = added[id].encode() if id in added else _bytes_of(token, kinds)
    return found


def _kinds(decoder: dict[str, Any] | None) -> Iterator[str]:
    """The kinds of a decoder and of those in it."""
    if decoder is not None:
        yield decoder["type"]
        for inner in decoder.get("decoders", ()):
            yield from _kinds(inner)


def _bytes_of(token: str, kinds: set[str]) -> bytes:
    if "ByteLevel" in kinds:
        if all(letter in _BYTE_LEVEL for letter in token):
            return bytes(_BYTE_LEVEL[letter] for letter in token)
        return token.encode()
    if "ByteFallback" in kinds and _is_byte(token):
        return bytes([int(token[3:5], 16)])
    if kinds & {"ByteFallback", "Metaspace", "Replace"}:
        return token.replace("\u2581", " ").encode()
    if "WordPiece" in kinds:
        return token[2:].encode() if token.startswith("##") else f" {token}".encode()
    return token.encode()


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _byte_level() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes as: printable ones as themselves, the others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level()


class Aligned(NamedTuple):
    """One token of the target, which begins at `place` of its text, and the draft's tokens of the same bytes, as places
    [start, stop) of the text in the draft's tokens."""

    token: int
    place: int
    start: int
    stop: int


class Vocabularies:
    """What a draft's tokenizer and a target's have in common. Of tokens with the same bytes one is taken, a plain one.

    direct: the target's token of each of the draft's, -1 where there is none.
    """

    def __init__(self, draft_tokenizer: Any, target_tokenizer: Any) -> None:
        self.tokenizer = draft_tokenizer
        self.draft, self.target = token_bytes(draft_tokenizer), token_bytes(target_tokenizer)
        by_bytes = _by_bytes(self.target, target_tokenizer)
        self.direct = [-1 if bytes is None else by_bytes.get(bytes, -1) for bytes in self.draft]
        self.special = _specials(target_tokenizer, draft_tokenizer)  # of the target's, the draft's
        for target, draft in self.special.items():
            if self.direct[draft] < 0:
                self.direct[draft] = target
        self._draft_ids = _by_bytes(self.draft, draft_tokenizer)
        probe = self._ids("a")
        # SentencePiece-like tokenizers begin a text with a space of their own.
        self._adds_space = b"".join(self.draft[id] or b"" for id in probe) == b" a"

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text else []

    def encode(self, text: bytes) -> list[int] | None:
        """The draft's ids of a text, or of a piece behind a special token; None where the draft has no byte tokens for
        what is no character."""
        ids: list[int] = []
        while text:
            try:
                good, bad, text = text.decode(), b"", b""
            except UnicodeDecodeError as error:
                good, bad, text = text[: error.start].decode(), text[error.start : error.end], text[error.end :]
            ids += self._ids(good.removeprefix(" ") if self._adds_space else good)
            singles = [self._draft_ids.get(bytes([byte]), -1) for byte in bad]
            if min(singles, default=0) < 0:
                return None
            ids += singles
        return ids


def _by_bytes(tokens: Sequence[bytes | None], tokenizer: Any) -> dict[bytes, int]:
    """Ids by their bytes; those of byte tokens only where no other token has them."""
    ids = sorted(
        (id for id, known in enumerate(tokens) if known),
        key=lambda id: (not _is_byte(tokenizer.convert_ids_to_tokens(id)), -id),
    )
    return {tokens[id]: id for id in ids}  # type: ignore[misc]


def _specials(a: Any, b: Any) -> dict[int, int]:
    """Special tokens of `a` and those of `b` of the same role or text; an unknown text is not the same text."""
    mine, theirs = ({id: str(t) for id, t in one.added_tokens_decoder.items() if t.special} for one in (a, b))
    by_text = {text: id for id, text in theirs.items() if id != b.unk_token_id}
    found = {id: by_text[text] for id, text in mine.items() if text in by_text and id != a.unk_token_id}
    for role in reversed(_ROLES):  # a padding token is often another one too
        ids = getattr(a, role, None), getattr(b, role, None)
        if None not in ids:
            found[ids[0]] = ids[1]
    return found


class GrowingText:
    """A row's text in the draft's tokens, kept up as the target's tokens come. Tokens far from the end are left
    alone."""

    def __init__(self, vocabularies: Vocabularies) -> None:
        self._known = vocabularies
        self._tokens: list[int] = []  # the target's
        self._settled: list[int] = []  # the draft's, up to the anchor
        self._anchor = 0  # a place in the target's tokens
        self._learned = 0

    def update(self, tokens: Sequence[int]) -> tuple[list[int] | None, list[Aligned]]:
        """(the text in the draft's tokens, what is newly aligned) for all tokens of the target so far.

        None where the draft has no tokens for it. Raises no error for tokens that the tokenizer does not know.
        """
        self._tokens = list(tokens)
        ids, aligned = self._window()
        if ids is None:
            return None, []
        new = [one for one in aligned if one.place >= self._learned]
        self._learned = len(tokens)
        whole = self._settled + ids
        if len(ids) > 2 * _WINDOW:
            self._settle(ids, aligned)
        return whole, new

    def _window(self) -> tuple[list[int] | None, list[Aligned]]:
        """The draft's ids from the anchor on, and the target's tokens that are whole numbers of them."""
        known, ids, aligned = self._known, list[int](), list[Aligned]()
        piece, places = b"", list[tuple[int, int]]()  # of the target's tokens in the piece: (place, bytes before)
        for place in range(self._anchor, len(self._tokens) + 1):
            token = self._tokens[place] if place < len(self._tokens) else -1
            text = known.target[token] if 0 <= token < len(known.target) else None
            if text is not None:
                places.append((place, len(piece)))
                piece += text
                continue
            found = known.encode(piece)
            if found is None:
                return None, []
            aligned += self._align(piece, places, found, len(self._settled) + len(ids))
            ids += found
            piece, places = b"", []
            if token in known.special:
                ids.append(known.special[token])
        return ids, aligned

    def _align(self, piece: bytes, places: list[tuple[int, int]], ids: list[int], before: int) -> list[Aligned]:
        ends, end = {0: 0}, 0
        texts = [self._known.draft[id] or b"" for id in ids]
        if texts and b"".join(texts) == b" " + piece:
            texts[0] = texts[0][1:]
        if b"".join(texts) != piece:  # a tokenizer that changes text
            return []
        for count, text in enumerate(texts, 1):
            end += len(text)
            ends[end] = count
        stops = [*(start for _, start in places[1:]), len(piece)]
        return [
            Aligned(self._tokens[place], place, before + ends[start], before + ends[stop])
            for (place, start), stop in zip(places, stops)
            if start in ends and stop in ends and stop > start
        ]

    def _settle(self, ids: list[int], aligned: list[Aligned]) -> None:
        """Leave the first half of the window alone, if what is behind reads the same without it."""
        before = len(self._settled)
        for one in aligned:
            cut = one.start - before
            if not len(ids) - _WINDOW - 32 <= cut <= len(ids) - _WINDOW:
                continue
            anchor, self._anchor = self._anchor, one.place
            settled, self._settled = self._settled, self._settled + ids[:cut]
            if self._window()[0] == ids[cut:]:
                return
            self._anchor, self._settled = anchor, settled
