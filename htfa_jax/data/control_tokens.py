"""Text that looks like a control token stays text.

A tokenizer finds `<|im_end|>` wherever it stands. In a question or an answer it would end the turn,
so that whoever writes the text could write turns of others. Only a chat template may do that.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from htfa_jax.common.json_files import parse_json
from htfa_jax.data.tokenizer_file import calling_tokenizers
from htfa_jax.errors import DataError

# Characters that Unicode leaves to programs: one of HIDDEN stands for each control token in what
# was said, one of RENAMED for each that the template wrote. Repeated, so that no place moves.
HIDDEN, RENAMED, MOST = 0xF0000, 0x100000, 0xFFF0
PRIVATE = re.compile("[\U000f0000-\U0010ffff]")
MARKUP = re.compile(r"<\|.*\|>", re.DOTALL)


class ControlTokens:
    """The control tokens of a tokenizer, and how texts that hold them are encoded.

    Args:
      tokenizer: whose tokens they are.
      template: the text of its chat template: what it writes controls a conversation, too.
      named: those that the tokenizer's settings name.
      folder: of the tokenizer, for messages.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, template: str, named: Iterable[str], folder: Path
    ):
        self._tokenizer, self._folder = tokenizer, folder
        added, names = tokenizer.get_added_tokens_decoder(), set(named)
        self.ids: dict[str, int] = {
            token.content: number
            for number, token in added.items()
            if token.special
            or token.content in names
            or MARKUP.fullmatch(token.content)
            or (len(token.content) > 1 and token.content in template)
        }
        self._number = {content: i for i, content in enumerate(self.ids)}
        found = sorted(map(re.escape, self.ids), key=len, reverse=True)
        self._pattern = re.compile("|".join(found)) if found else None
        # Those are looked for in a text's normal form, which may hold more of them than the text.
        self._normal = tokenizer.normalizer is not None and any(
            added[number].normalized for number in self.ids.values()
        )

    def in_text(self, text: str) -> bool:
        """Whether the tokenizer would find a control token in what somebody said."""
        if self._pattern is None:
            return False
        if self._pattern.search(text):
            return True
        if not self._normal or text.isascii():
            return False
        known = set(self.ids.values())
        return not known.isdisjoint(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def hide(self, text: str) -> str:
        """What was said, as long as it was, with other characters where control tokens were.

        Raises DataError if it holds such characters itself.
        """
        if PRIVATE.search(text):
            raise DataError(
                "a conversation holds the text of a control token and characters of Unicode's "
                f"private planes: leave the latter out of {text[:80]!r}"
            )
        return self._replaced(text, HIDDEN)

    def encode(self, text: str) -> tokenizers.Encoding:
        """A rendered conversation whose turns were hidden: as the text that they were."""
        text = self._replaced(text, RENAMED)

        def shown(match: re.Match[str]) -> str:
            content = self._contents[ord(match[0][0]) - HIDDEN]
            return content * (len(match[0]) // len(content))

        text = re.sub("([\U000f0000-\U000fffff])\\1*", shown, text)
        return self._renamed.encode(text, add_special_tokens=False)

    @functools.cached_property
    def _contents(self) -> list[str]:
        return list(self.ids)

    def _replaced(self, text: str, first: int) -> str:
        def other(match: re.Match[str]) -> str:
            number = self._number[match[0]]
            if number >= MOST:
                raise DataError(f"the tokenizer in {self._folder} has too many control tokens")
            return chr(first + number) * len(match[0])

        return text if self._pattern is None else self._pattern.sub(other, text)

    @functools.cached_property
    def _renamed(self) -> tokenizers.Tokenizer:
        """The tokenizer with control tokens that no text holds, under their own numbers."""
        raw = parse_json(self._tokenizer.to_str(), f"the tokenizer in {self._folder}", DataError)
        new = {
            content: chr(RENAMED + i) * len(content)
            for i, content in enumerate(self.ids)
            if i < MOST
        }
        for token in raw["added_tokens"]:
            if token["content"] in new:
                token |= {"content": new[token["content"]], "normalized": False, "special": True}
        _rename(raw["model"], new)
        with calling_tokenizers(f"the tokenizer in {self._folder} fails", DataError):
            renamed = tokenizers.Tokenizer.from_str(json.dumps(raw))
        if any(renamed.token_to_id(name) != self.ids[content] for content, name in new.items()):
            raise DataError(
                f"the tokenizer in {self._folder} numbers its control tokens in a way that is not "
                "known here: a text that holds one cannot be encoded"
            )
        return renamed


def _rename(model: dict[str, Any], new: dict[str, str]) -> None:
    """Pieces of the model itself, which may have control tokens among them."""
    if isinstance(model["vocab"], list):  # Unigram's, with scores
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in model["vocab"]]
        return
    model["vocab"] = {new.get(piece, piece): number for piece, number in model["vocab"].items()}
    if model.get("unk_token") in new:
        model["unk_token"] = new[model["unk_token"]]

    def parts(merge: Any) -> list[str]:
        return merge.split(" ") if isinstance(merge, str) else merge

    model["merges"] = [
        merge
        for merge in model["merges"]
        if new.keys().isdisjoint({*parts(merge), "".join(parts(merge))})
    ]
