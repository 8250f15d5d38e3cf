"""One training of the few-shot protocol, in this process."""

import numpy as np
import pytest

from bit_ray.data.shards.manifest import read_manifest
from bit_ray.data.shards.write import write_shards
from bit_ray.data.sources.embedded.digits import DigitsSource
from bit_ray.recipes.hyperrule import hyperrule
from bit_ray.studies import transfer
from bit_ray.studies.transfer import train_and_test
from bit_ray.training.plan import transfer_plan


@pytest.mark.parametrize("validation", [(), (1, 3, 5)])
def test_a_training_reads_the_test_set_once_and_other_images_for_the_choice_of_a_rate(
    tmp_path, monkeypatch, validation
):
    digests = {}
    for name in ("train", "test"):
        source = DigitsSource(name)
        write_shards(iter(source.part(np.arange(40))), tmp_path / name, name=name, class_names=source.class_names)
        digests[name] = read_manifest(tmp_path / name).digest
    done = []
    read, fit = transfer.read_views, transfer.fit

    def reading(uri, manifest, groups, view):
        [(_, _, rows)] = groups  # a small set is one row group
        done.append((manifest.name, *rows.tolist()))
        return read(uri, manifest, groups, view)

    monkeypatch.setattr(transfer, "read_views", reading)
    monkeypatch.setattr(transfer, "fit", lambda *args, **more: done.append("fit") or fit(*args, **more))
    chosen = np.arange(0, 20, 2)
    rule = hyperrule(
        len(chosen), (32, 32), random_flip=False, resize=36, crop=32, num_steps=2, warmup_steps=0, boundaries=(),
        batch_size=8,
    )  # fmt: skip
    plan = transfer_plan(
        rule, model="R1-1-1-1x0.5", num_classes=10, manifest_digest=digests["train"], init="", init_digest="", seed=0
    )
    looked_at = np.array(validation) if validation else None
    sets = str(tmp_path / "train"), str(tmp_path / "test")
    train_and_test({}, "i", plan, sets[0], chosen, looked_at, sets[1], digests["test"], 1)
    reads = [("train", *chosen), "fit", ("test", *range(40)), *([("train", *validation)] if validation else [])]
    assert done == reads
