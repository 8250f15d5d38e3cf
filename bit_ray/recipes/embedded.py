"""BiT's recipes at the size of a laptop, for the embedded data sets of 32-pixel images."""

from bit_ray.recipes.hyperrule import RuleOverrides
from bit_ray.recipes.upstream import UpstreamRecipe

EMBEDDED_MODEL = "R1-1-1-1x0.5"
"""The real class, shallow and narrow."""
EMBEDDED_NAME = "glyphs-m"
"""Name of such a network, pre-trained on the embedded characters, as a run and as a registered model."""
EMBEDDED_INIT = f"models:/{EMBEDDED_NAME}@champion"
"""Its weights, which the main job registers, and a study that needs them."""

# Characters have a right way round: no flips, and crops that keep most of them.
GLYPHS = UpstreamRecipe(
    name="glyphs",
    epochs=6.4,
    decay_epochs=(4.0, 5.6),
    global_batch_size=128,
    base_lr_per_256=0.12,
    warmup_steps=75,
    crop_size=32,
    area_range=(0.4, 1.0),
    random_flip=False,
)
# The HyperRule's small regime, its 500 steps of 512 images at 128 pixels cut to what 32-pixel images on a CPU need.
DIGITS = RuleOverrides(resize=36, crop=32, num_steps=30, batch_size=64, base_lr=0.01)
