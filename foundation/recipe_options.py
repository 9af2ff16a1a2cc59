"""What commands that take a recipe share: its options on the command line, and the data that it names, opened."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from tyro.conf import Positional

from data.embedded import embedded_phantom
from data.home import set_home
from data.store import PooledStore
from foundation.config import BackboneConfig, LossConfig, OptimConfig, Recipe
from foundation.recipes import RECIPES, recipe_named

Command = TypeVar("Command", bound="RecipeOptions")
NEWEST = "newest"
"""What a bare ``--resume`` is completed to."""
DEFAULT_RECIPE = "phantom-tiny"


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """A recipe by name, and what may be given in place of its own settings."""

    recipe: Positional[str] = DEFAULT_RECIPE
    """The run's name among the recipes: phantom-tiny, phantom-standard, base; base without a branch: cls-only,
    patch-only; base with one stream: single-mamba, single-transformer, single-gru, single-mlp; chasm, v4."""
    store: str | None = None
    """Store's path or URL (default: the embedded phantom, made if it is missing)."""
    subjects: tuple[str, ...] = ()
    """Subjects to pool, by number or name."""
    encoder: str = "gabor"
    """Encoder whose tokens are read."""
    parcels: str = "auto:30"
    """ROIs of Stage 1: sequential:30, compact:30, auto:30 (compact where positions are known), functional:30,
    roi:FAMILY or atlas:PATH."""
    sessions: int | None = None
    """Learn from the first N sessions of each subject (default: all)."""
    shuffle_buffer: int | None = None
    """Samples of each subject within which the order is shuffled (default: the whole epoch)."""
    start: Literal["ridge", "random"] = "ridge"
    """Start of the adapters: a closed-form path beside the network, its fields handed to the network; or neither."""
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; the best model by validation is kept besides."""
    seed: int = 0
    """Seed of everything random."""
    backbone: BackboneConfig = BackboneConfig()
    """Shared backbone."""
    loss: LossConfig = LossConfig()
    """Objective."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and length."""

    @classmethod
    def of(cls: type[Command], recipe: Recipe, **options: Any) -> Command:
        """Return the command that a recipe is without options of its own; `options` are the command's others."""
        of_data = {name: getattr(recipe.data, name) for name in _OF_DATA}
        of_recipe = {name: getattr(recipe, name) for name in _OF_RECIPE}
        return cls(recipe=recipe.name, **of_data, **of_recipe, **options)

    def resolved(self) -> Recipe:
        """Return the recipe with this command's options in place of its own."""
        recipe = recipe_named(self.recipe)
        of_data: dict[str, Any] = {name: getattr(self, name) for name in _OF_DATA}
        if self.store and "://" not in self.store:
            of_data["store"] = str(Path(self.store).resolve())
        of_recipe: dict[str, Any] = {name: getattr(self, name) for name in _OF_RECIPE}
        return replace(recipe, data=replace(recipe.data, **of_data), **of_recipe)


_OF_DATA = ("store", "subjects", "encoder", "parcels", "sessions", "shuffle_buffer")
_OF_RECIPE = tuple(field.name for field in fields(RecipeOptions) if field.name not in ("recipe", *_OF_DATA))


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The data that a recipe names."""

    where: str
    """The store's path or URL."""
    store: PooledStore
    subjects: list[str]
    digest: str
    """Of all that a run of the recipe reads."""


def opened(recipe: Recipe, *, tell: Callable[[str], None]) -> Opened:
    """Open the store and find the subjects of a recipe; the embedded phantom is made if it is missing.

    Raises
    ------
    ValueError
        If there is no such store, encoder or subject, or none or one twice is named.
    """
    where = recipe.data.store or embedded_phantom(recipe.data.phantom, tell=tell)
    store = PooledStore.open(where)
    subjects = [store.resolve_subject(s) for s in recipe.data.subjects]
    if not subjects or len(set(subjects)) < len(subjects):
        raise ValueError(f"--subjects {' '.join(recipe.data.subjects) or '(none)'} must name at least one, each once")
    return Opened(where=where, store=store, subjects=subjects, digest=store.digest(subjects, recipe.data.encoder))


@dataclass(frozen=True)
class Words:
    """A command line before it is parsed, for what decides the defaults of the rest."""

    args: list[str]
    """The words, a bare ``--resume`` completed."""

    @classmethod
    def of(cls, args: Sequence[str]) -> "Words":
        """Complete a bare ``--resume``, and make ``--home`` our home."""
        completed: list[str] = []
        for i, word in enumerate(args):
            completed.append(word)
            following = args[i + 1] if i + 1 < len(args) else "-"
            if word == "--resume" and (following.startswith("-") or following in RECIPES):
                completed.append(NEWEST)
        words = cls(completed)
        set_home(words.value_of("--home"))
        return words

    def value_of(self, option: str) -> str | None:
        """Return what is given to an option, be it ``--option value`` or ``--option=value``."""
        for i, word in enumerate(self.args):
            if word == option and i + 1 < len(self.args):
                return self.args[i + 1]
            if word.startswith(f"{option}="):
                return word.removeprefix(f"{option}=")
        return None

    @property
    def resumed(self) -> str | None:
        """The run that is to be resumed by name."""
        given = self.value_of("--resume")
        return None if given == NEWEST else given

    def recipe(self) -> Recipe:
        """Return the recipe that is named.

        Raises
        ------
        ValueError
            If it is unknown.
        """
        first = self.args[0] if self.args and not self.args[0].startswith("-") else None
        return recipe_named(first or next((word for word in self.args if word in RECIPES), DEFAULT_RECIPE))
