"""Named whole runs; anything in them can be overridden on the command line."""

from foundation.config import BackboneConfig, DataConfig, OptimConfig, Recipe

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="phantom-tiny"),
        Recipe(
            name="phantom-standard",
            data=DataConfig(phantom="standard", subjects=("1", "2", "7")),
        ),
        Recipe(
            name="v4",  # recordings of macaque V4 (tests/recordings/v4.json), 256 patches of a ViT-S/14
            data=DataConfig(encoder="encoder-vits14", subjects=("PE201025", "PE210224", "PE210325"), parcels="auto:8"),
            backbone=BackboneConfig(width=64, n_patch_layer=2, dropout=0.2),
            optim=OptimConfig(epochs=8),
        ),
    )
}


def recipe_named(name: str) -> Recipe:
    """Return a recipe.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; there are {', '.join(RECIPES)}")
    return RECIPES[name]
