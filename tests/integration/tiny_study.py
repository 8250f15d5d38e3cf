"""A study of one's own, as docs/extending.md has it; run as a script, it is a process that can be killed."""

import sys

from bit_ray.cli.main import main
from bit_ray.recipes.embedded import EMBEDDED_MODEL
from bit_ray.recipes.upstream import UpstreamRecipe
from bit_ray.studies.catalog import STUDIES, GridStudy
from bit_ray.training.config import PretrainConfig

TINY = GridStudy(
    title="Does a tiny network learn?",
    base=PretrainConfig(
        name="tiny",
        shards="?",
        model=EMBEDDED_MODEL,
        recipe=UpstreamRecipe(
            name="tiny", epochs=1, decay_epochs=(0.6,), warmup_steps=2, global_batch_size=8, crop_size=32
        ),
    ),
    axes={"recipe.weight_decay": (0.0, 1e-2)},
    val="?",
    seeds=2,
    at=(0.5,),
)

if __name__ == "__main__":
    STUDIES["tiny"] = TINY
    sys.exit(main())
