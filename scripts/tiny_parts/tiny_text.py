"""What can be said about HeldObjects: captions of images with their facts, and conversations.

A caption states some facts ("a red bottle": a category and a colour). It fits an image of which
all of them are true, so that in a batch with two red bottles both pairs are right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from htfa_jax.data.held_objects import CATEGORIES, COLORS, conversation
from htfa_jax.data.held_objects.questions import QUESTIONS, answer_sentences
from htfa_jax.data.records import Turn

SHARES = {"little": (0.0, 0.35), "half": (0.35, 0.65), "most": (0.65, 1.0)}
GROUPS = {
    "category": tuple(CATEGORIES),
    "color": tuple(COLORS),
    "hand": ("yes", "no"),
    "share": tuple(SHARES),
    "reconstruction": ("yes", "no"),
}
# Number of each fact in the vectors below.
FACTS = {
    fact: number
    for number, fact in enumerate(f"{g}={v}" for g, values in GROUPS.items() for v in values)
}

# Images of a record, in the order of `tiny_siglip.views`.
KINDS = ("original", "target", "reconstruction", "blend")

# A caption's words, by the facts it states.
TEMPLATES = {
    ("category",): ("{a_category}", "an image of {a_category}", "there is {a_category}"),
    ("color",): ("something {color}", "{a_color} object", "the object is {color}"),
    ("category", "color"): (
        "{a_color} {category}",
        "an image of {a_color} {category}",
        "the {category} is {color}",
    ),
    ("category", "color", "hand=yes"): (
        "a hand holds {a_color} {category}",
        "{a_color} {category} in a hand",
    ),
    ("category", "color", "hand=no"): (
        "{a_color} {category} and no hand",
        "{a_color} {category} that nobody holds",
    ),
    ("category", "reconstruction=yes"): (
        "a reconstruction of {a_category}",
        "a 3D model of {a_category}",
    ),
    ("category", "share=little"): ("a hand hides a little of {a_category}",),
    ("category", "share=half"): ("a hand hides about half of {a_category}",),
    ("category", "share=most"): ("a hand hides most of {a_category}",),
}
# What is known of each kind of image. A reconstruction has a colour of its own.
KNOWN = {
    "original": ("category", "color", "hand", "share", "reconstruction"),
    "target": ("category", "color", "hand", "share", "reconstruction"),
    "reconstruction": ("category", "hand", "share", "reconstruction"),
    "blend": ("category", "color"),
}


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is so in an image.

    Attributes:
      facts: by group; a group that says nothing here has no value.
      known: groups that can be judged at all.
    """

    facts: Mapping[str, str]
    known: tuple[str, ...]


def truth(kind: str, meta: Mapping[str, Any]) -> Truth:
    """The truth about one of a record's images.

    Args:
      kind: one of `KINDS`.
      meta: of the record: category, color, occlusion.
    """
    facts = {"category": meta["category"], "color": meta["color"]}
    facts["hand"] = "yes" if kind == "original" else "no"
    facts["reconstruction"] = "yes" if kind == "reconstruction" else "no"
    if kind == "original":
        facts["share"] = next(s for s, (_, top) in SHARES.items() if meta["occlusion"] <= top)
    return Truth(facts, KNOWN[kind])


def with_article(word: str) -> str:
    """The word behind "a" or "an"."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def caption(image: Truth, rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    """A true caption of an image, and the facts that it states."""

    def holds(fact: str) -> bool:
        group, _, value = fact.partition("=")
        known = group in image.known and group in image.facts
        return known and value in ("", image.facts[group])

    fitting = [needed for needed in TEMPLATES if all(map(holds, needed))]
    needed = fitting[rng.integers(len(fitting))]
    words = TEMPLATES[needed]
    text = words[rng.integers(len(words))].format(
        category=image.facts["category"],
        color=image.facts["color"],
        a_category=with_article(image.facts["category"]),
        a_color=with_article(image.facts["color"]),
    )
    stated = tuple(fact if "=" in fact else f"{fact}={image.facts[fact]}" for fact in needed)
    return text, stated


def name(group: str, value: str) -> str:
    """The plainest caption of one category or colour."""
    return TEMPLATES[group,][1].format(a_category=with_article(value), a_color=with_article(value))


def vectors(facts: Mapping[str, str] | tuple[str, ...]) -> np.ndarray:
    """Facts as bool [number of facts]."""
    if isinstance(facts, Mapping):
        facts = tuple(f"{group}={value}" for group, value in facts.items())
    out = np.zeros(len(FACTS), bool)
    out[[FACTS[fact] for fact in facts]] = True
    return out


def unknown(image: Truth) -> np.ndarray:
    """Facts that cannot be judged of an image, bool [number of facts]."""
    return vectors(
        tuple(f"{g}={v}" for g, values in GROUPS.items() if g not in image.known for v in values)
    )


def dialogue(rng: np.random.Generator) -> tuple[Turn, ...]:
    """A conversation about a held object that nobody has seen: questions, answers, descriptions."""
    category = GROUPS["category"][rng.integers(len(CATEGORIES))]
    color = GROUPS["color"][rng.integers(len(COLORS))]
    share = float(rng.uniform(0.05, 0.95))
    style = rng.integers(4)
    if style < 2:
        turns = conversation(rng, category, color, share, ("word", "sentence")[style])
        return tuple(
            Turn(
                "user" if turn["from"] == "human" else "assistant",
                turn["value"].replace("<image>\n", ""),
            )
            for turn in turns
        )
    image = truth("original", {"category": category, "color": color, "occlusion": share})
    if style == 2:
        said = [caption(image, rng)[0] for _ in range(2)]
        asked = ("Describe the image.", "What do you see?")[rng.integers(2)]
        return Turn("user", asked), Turn("assistant", ". ".join(s.capitalize() for s in said) + ".")
    # Told first, then asked: what the answers are about stands in the text.
    told = answer_sentences(category, color, share)
    kinds = rng.permutation(list(QUESTIONS))
    facts = " ".join(told[kind] for kind in kinds)
    turns = [Turn("system", facts)]
    for kind in rng.permutation(list(QUESTIONS))[:2]:
        turns += [Turn("user", QUESTIONS[kind]), Turn("assistant", told[kind])]
    return tuple(turns)


def texts(rng: np.random.Generator, num: int) -> Iterator[str]:
    """Text to learn a tokenizer's pieces from."""
    for _ in range(num):
        for turn in dialogue(rng):
            yield from (turn.role, turn.text)
        meta = {
            "category": GROUPS["category"][rng.integers(len(CATEGORIES))],
            "color": GROUPS["color"][rng.integers(len(COLORS))],
            "occlusion": float(rng.uniform(0.05, 0.95)),
        }
        for kind in KINDS:
            yield caption(truth(kind, meta), rng)[0]
