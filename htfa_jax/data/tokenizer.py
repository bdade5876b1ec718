"""Text: a Hugging Face tokenizer folder, its chat template, labels on assistant turns only."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tokenizers

from htfa_jax.common.files import write_whole
from htfa_jax.common.json_files import read_json
from htfa_jax.data.chat_template import ChatTemplate, template_text
from htfa_jax.data.control_tokens import ControlTokens
from htfa_jax.data.records import Record, Turn
from htfa_jax.data.tokenizer_file import calling_tokenizers, open_tokenizer
from htfa_jax.errors import DataError

# InternLM2's turns: <|im_start|>role, a line break, the text, <|im_end|>, a line break.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
# Stands for each character of an answer where it is looked for in a template's text.
MARK = "\U0010fffd"


@dataclass(frozen=True)
class Encoded:
    """A conversation as numbers.

    Attributes:
      tokens: int32 [length].
      learned: bool [length], tokens that an assistant says, its end of turn included.
      ends: number of tokens up to the end of each assistant turn.
    """

    tokens: np.ndarray
    learned: np.ndarray
    ends: tuple[int, ...]

    def within(self, limit: int) -> Encoded:
        """The conversation, or as many of its answers as are whole within `limit` tokens.

        What follows the last of them goes with the answers that do not fit: a question without
        its answer teaches nothing, and half an answer teaches to stop nowhere.
        """
        if len(self.tokens) <= limit:
            return self
        ends = tuple(end for end in self.ends if end <= limit)
        length = max(ends, default=0)
        return Encoded(self.tokens[:length], self.learned[:length], ends)


class ChatTokenizer:
    """A fast tokenizer and its chat template, read without the `transformers` package.

    Args:
      folder: holds tokenizer.json and tokenizer_config.json (with `chat_template`, or
        chat_template.jinja beside it).
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        path, settings_path = (
            self.folder / name for name in ("tokenizer.json", "tokenizer_config.json")
        )
        for needed in (path, settings_path):
            if not needed.is_file():
                raise DataError(
                    f"no {needed.name} in {self.folder}: expected a Hugging Face tokenizer "
                    "folder (AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER) "
                    "writes one)"
                )
        self._tokenizer = open_tokenizer(path, DataError)
        settings = read_json(settings_path, DataError, allow_nan=True)
        self._special = {
            name: text
            for name, value in settings.items()
            if name.endswith("_token")
            and isinstance(text := value.get("content") if isinstance(value, dict) else value, str)
        }
        template = template_text(self.folder, settings, DataError)
        self._template = ChatTemplate(template, self.folder, DataError)
        self._control = ControlTokens(
            self._tokenizer, template, self._special.values(), self.folder
        )
        self.pad_id = self._id_of("pad_token", self._id_of("eos_token", 0))
        self._in_parts = False
        self._in_parts = self._takes_parts()
        self._closing, self._lead = self._around_an_answer()
        self.stop_ids = self._stop_ids()

    def __reduce__(self):
        return ChatTokenizer, (self.folder,)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def render(self, turns: Sequence[Turn], prompt: bool = False) -> str:
        """The template's text of some turns; `prompt` opens an assistant turn behind them."""
        messages = [
            {
                "role": turn.role,
                "content": [{"type": "text", "text": turn.text}] if self._in_parts else turn.text,
            }
            for turn in turns
        ]
        return self._template.render(messages, prompt, self._special)

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        """Tokens of a whole conversation; every assistant turn is learned.

        What is said stays text: only the template's own control tokens are any.
        """
        turns, guarded = self._guarded(turns)
        text = self.render(turns)
        spans = [self._span(text, turns, i) for i, t in enumerate(turns) if t.role == "assistant"]
        if spans and turns[-1].role == "assistant" and not self._is_closed(text, spans[-1][1]):
            # A template that leaves the last turn open teaches to stop nowhere.
            text += self._closing.strip()
            spans[-1] = spans[-1][0], len(text)
        encoding = self._encoding(text, guarded)
        offsets = np.array(encoding.offsets).reshape(-1, 2)
        learned, ends = np.zeros(len(offsets), bool), []
        for start, end in spans:
            said = (offsets[:, 0] < end) & (offsets[:, 1] > start)
            learned |= said
            if not said.any():
                raise DataError(f"the tokenizer in {self.folder} has no tokens for an answer")
            ends.append(int(np.flatnonzero(said)[-1]) + 1)
        return Encoded(np.array(encoding.ids, np.int32), learned, tuple(ends))

    def encode_prompt(self, turns: Sequence[Turn]) -> np.ndarray:
        """Tokens of some turns and of the opening of the assistant's answer, int32 [length]."""
        turns, guarded = self._guarded(turns)
        text = self.render(turns, prompt=True) + self._lead
        return np.array(self._encoding(text, guarded).ids, np.int32)

    def _guarded(self, turns: Sequence[Turn]) -> tuple[Sequence[Turn], bool]:
        """The turns, hidden if the tokenizer would find control tokens in what they say."""
        if not any(self._control.in_text(turn.text) for turn in turns):
            return turns, False
        return [replace(turn, text=self._control.hide(turn.text)) for turn in turns], True

    def _encoding(self, text: str, guarded: bool) -> tokenizers.Encoding:
        with calling_tokenizers(f"the tokenizer in {self.folder} fails", DataError):
            try:
                if guarded:
                    return self._control.encode(text)
                return self._tokenizer.encode(text, add_special_tokens=False)
            except TypeError as error:
                raise DataError(
                    f"a conversation holds halves of characters: {text[:80]!r}"
                ) from error

    def decode(self, tokens: Iterable[int], strip: bool = True) -> str:
        """Text of an answer, up to its first stop token, special tokens left out.

        Args:
          tokens: the answer.
          strip: whether outer white space is left out too.
        """
        ids = []
        for token in tokens:
            if int(token) in self.stop_ids:
                break
            ids.append(int(token))
        with calling_tokenizers(f"the tokenizer in {self.folder} fails", DataError):
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text.strip() if strip else text

    def save(self, folder: Path) -> None:
        """Copies the tokenizer, so that a run keeps what it was trained with."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("tokenizer_config.json", "chat_template.jinja", "tokenizer.json"):
            if (self.folder / name).is_file() and folder.resolve() != self.folder.resolve():
                write_whole(folder / name, (self.folder / name).read_bytes(), durable=True)

    def _id_of(self, name: str, default: int) -> int:
        token = self._special.get(name)
        found = self._number_of(token) if token else None
        return default if found is None else found

    def _number_of(self, token: str) -> int | None:
        with calling_tokenizers(f"{self.folder} has the token {token[:80]!r}", DataError):
            return self._tokenizer.token_to_id(token)

    def _span(self, text: str, turns: Sequence[Turn], i: int) -> tuple[int, int]:
        """What of a conversation's text is learned for an answer: with the end of its turn."""
        said, length = turns[i].text, len(turns[i].text)
        prompt = self.render(turns[:i], prompt=True)
        start = at = len(prompt)
        if text[at : at + length] != said:
            at = self._place(text, turns, i)
            # Blanks in front are part of it: a word with its blank is one token.
            if not text.startswith(prompt) or at < start or text[start:at].strip():
                start = at
        return start, self._end_of_turn(text, at + length)

    def _place(self, text: str, turns: Sequence[Turn], i: int) -> int:
        """Where an answer stands in the conversation's text."""
        said = turns[i].text
        marks = MARK * len(said)
        marked = self.render([*turns[:i], replace(turns[i], text=marks), *turns[i + 1 :]])
        at = marked.find(marks)
        if at < 0 or marked[:at] + said + marked[at + len(said) :] != text:
            raise DataError(
                f"the chat template of {self.folder} does not put an assistant turn right "
                "behind its generation prompt, so that its tokens cannot be told apart"
            )
        return at

    def _end_of_turn(self, text: str, end: int) -> int:
        """`end`, moved behind the special token that closes a turn."""
        closing = [t for t in self._closing_tokens if text.startswith(t, end)]
        if not closing and self._closing and text.startswith(self._closing, end):
            return end + len(self._closing)
        return end + max(map(len, closing), default=0)

    def _is_closed(self, text: str, end: int) -> bool:
        return not self._closing or text[:end].endswith(self._closing.strip())

    @functools.cached_property
    def _closing_tokens(self) -> list[str]:
        return list(self._control.ids)

    def _takes_parts(self) -> bool:
        """Whether the template leaves out what is said unless it comes in parts."""
        probe = [Turn("user", MARK)]
        try:
            if MARK in self.render(probe):
                return False
            self._in_parts = True
            return MARK in self.render(probe)
        except DataError:  # of turns that it cannot do without, perhaps
            return False
        finally:
            self._in_parts = False

    def _around_an_answer(self) -> tuple[str, str]:
        """What closes an answer, blanks in front included, and what a template opens it with.

        The latter is beside the generation prompt: an empty thought, for example.
        """
        eos = self._special.get("eos_token", "")
        eos = eos if eos in self._control.ids else ""
        turns = [Turn("user", "x"), Turn("assistant", MARK)]
        text, prompt = self.render(turns), self.render(turns[:1], prompt=True)
        before, found, behind = text.partition(MARK)
        if not found:
            return eos, ""
        lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        closing = self._first_control(behind)
        if not closing:  # a template that leaves the last turn open may close others
            try:
                text = self.render([*turns, Turn("user", "x")])
            except DataError:
                text = ""
            direct = text.partition(MARK)[2]
            closing = next((t for t in self._closing_tokens if direct.startswith(t)), "") or eos
        return closing, lead if lead.strip() else ""

    def _first_control(self, text: str) -> str:
        """The control token that a text begins with, with the blanks before it; "" without one."""
        plain = text.lstrip()
        found = [token for token in self._closing_tokens if plain.startswith(token)]
        if not found:
            return ""
        return text[: len(text) - len(plain)] + max(found, key=len)

    def _stop_ids(self) -> frozenset[int]:
        """End of text, and whatever closes an assistant turn in the template."""
        ids = {self._id_of("eos_token", -1), self._control.ids.get(self._closing.strip(), -1)}
        return frozenset(i for i in ids if i >= 0)


def encode_record(record: Record, tokenizer: ChatTokenizer, limit: int) -> Encoded:
    """A record's conversation in at most `limit` tokens. Raises DataError if no answer fits."""
    try:
        whole = tokenizer.encode(record.turns)
    except DataError as error:
        raise record.error(str(error), "chat template") from error
    return whole_answers(record, whole, limit)


def whole_answers(record: Record, whole: Encoded, limit: int) -> Encoded:
    """What `limit` tokens hold of a record's conversation. Raises DataError if no answer fits."""
    encoded = whole.within(limit)
    if not encoded.learned.any():
        raise record.error(
            f"no answer is left within data.max_text_length={limit} tokens: the first one ends at "
            f"token {whole.ends[0]} of {len(whole.tokens)}; shorten it, or raise the length",
            "too long a text",
        )
    return encoded


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Trains a byte-level BPE tokenizer and saves it as a Hugging Face folder.

    Any text can be encoded, since every byte is a token of its own.

    Args:
      texts: what to learn pieces from.
      vocab_size: at most this many tokens, the bytes and special tokens included.
      folder: where it goes; InternLM2's special tokens and chat template with it.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    config = json.dumps(settings, indent=2) + "\n"
    write_whole(folder / "tokenizer_config.json", config, durable=True)
    # The settings first: a folder with tokenizer.json is complete.
    write_whole(folder / "tokenizer.json", tokenizer.to_str(pretty=True), durable=True)
