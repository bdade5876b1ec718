"""HeldObjects: procedural scenes in which a hand holds an object and hides part of it.

Eight kinds of objects in eight named colours; everything is drawn from a seed, nothing is
downloaded. `make_scene` gives one scene as arrays, `build_scenes` writes a dataset in the project's
record format, `contact_sheet` shows what a dataset holds.
"""

from htfa_jax.data.held_objects.builder import build_scenes
from htfa_jax.data.held_objects.objects import CATEGORIES, COLORS
from htfa_jax.data.held_objects.questions import QUESTIONS, conversation
from htfa_jax.data.held_objects.scenes import SPLITS, Scene, make_scene
from htfa_jax.data.held_objects.sheet import contact_sheet

__all__ = [
    "CATEGORIES",
    "COLORS",
    "QUESTIONS",
    "SPLITS",
    "Scene",
    "build_scenes",
    "contact_sheet",
    "conversation",
    "make_scene",
]
