"""The four questions asked about every scene, and their answers."""

import numpy as np

QUESTIONS = {
    "category": "What's the object in the hand?",
    "clear": "Is it clear to identify the object in the hand?",
    "color": "What color is the object in the hand?",
    "occlusion_ratio": "How much of the object is hidden by the hand?",
}
ANSWERS = ("word", "sentence")


def answer_words(category: str, color: str, occlusion: float) -> dict[str, str]:
    """The short answer to each kind of question; occlusion is the occlusion ratio, 0 to 1."""
    return {
        "category": category,
        "clear": "yes" if occlusion < 0.5 else "no",
        "color": color,
        "occlusion_ratio": f"{10 * int(10 * occlusion + 0.5)} percent",
    }


def answer_sentences(category: str, color: str, occlusion: float) -> dict[str, str]:
    """The same answers as whole sentences."""
    words = answer_words(category, color, occlusion)
    return {
        "category": f"The object is {category}.",
        "clear": f"{words['clear'].capitalize()}.",
        "color": f"The object is {color}.",
        "occlusion_ratio": f"About {words['occlusion_ratio']} of the object is hidden.",
    }


def conversation(
    rng: np.random.Generator, category: str, color: str, occlusion: float, answers: str = "word"
) -> list[dict[str, str]]:
    """The four questions in random order, each followed by its answer.

    A human turn also carries its "kind" (a key of QUESTIONS); `answers` is one of ANSWERS.
    """
    if answers not in ANSWERS:
        raise ValueError(f"unknown answers {answers!r}: one of {', '.join(ANSWERS)}")
    make = answer_words if answers == "word" else answer_sentences
    replies = make(category, color, occlusion)
    turns = []
    for kind in rng.permutation(list(QUESTIONS)).tolist():
        image = "" if turns else "<image>\n"
        turns.append({"from": "human", "value": image + QUESTIONS[kind], "kind": kind})
        turns.append({"from": "gpt", "value": replies[kind]})
    return turns
