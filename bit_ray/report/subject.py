"""The model that a page is about: found by the name of a run or model, with what is recorded of it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from bit_ray import store
from bit_ray.config import DEFAULT_STORAGE
from bit_ray.errors import BitRayError
from bit_ray.inference.classifier import Classifier, load_model
from bit_ray.inference.named import saved_model
from bit_ray.tracking.listing import ListedModel
from bit_ray.tracking.recorded import RecordedRun, recorded_run
from bit_ray.tracking.reference import find
from bit_ray.tracking.registry import list_models

LOSS, RATE = "train/loss", "train/lr"
_NOTHING = RecordedRun(params={}, metrics={}, sets={}, curves={})


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model and its records."""

    name: str
    """What the page is called."""
    model: str
    """By which commands find it."""
    classifier: Classifier
    version: ListedModel | None = None
    """Its entry in the registry."""
    run: RecordedRun = _NOTHING
    """Its training, empty if it cannot be read."""
    missing: tuple[str, ...] = ()
    """What is not known, a sentence each."""
    commands: Mapping[str, str] = field(default_factory=dict)
    """What can be done with it: a command for each purpose."""


def find_subject(model: str, *, storage: str, tracking_uri: str, device: str = "cpu") -> Subject:
    """Find a model, load it, and read what is recorded of it.

    Args:
        model: ``models:/NAME@ALIAS``, or what `saved_model` takes.
        storage: Folder of all runs.
        tracking_uri: Of the registry and the runs.
        device: A torch device for the network.

    Raises:
        ModelError: There is no such model, or the run is not finished.
        TrackingError: The registry that the model is named by cannot be reached.
    """
    named = saved_model(model, storage)
    reference = find(model, tracking_uri) if model.startswith("models:/") else None
    package = reference.weights_uri if reference else named
    classifier = load_model(named, tracking_uri=tracking_uri, device=device)
    missing = []
    version, run = None, _NOTHING
    run_id = classifier.spec.provenance.get("run_id", "")
    try:
        package_uri = package if "://" in package else store.absolute(package)
        same = [each for each in list_models(tracking_uri) if each.weights_uri == package_uri]
        if reference:  # of several names of the same weights, the one that was asked for
            same = [each for each in same if (each.name, each.version) == (reference.name, reference.version)]
        version = same[0] if same else None
        if version is None:
            missing.append("It is not in the registry; its folder names it.")
        if run_id:
            run = recorded_run(tracking_uri, run_id, (LOSS, RATE))
        else:
            missing.append("No run is recorded in it, so its curves, settings and test set are not known.")
    except BitRayError as error:
        missing.append(f"MLflow's records cannot be read, so curves and settings are left out: {error}")
    name = version.name if version else classifier.spec.provenance.get("run_name") or package.rstrip("/").split("/")[-1]
    uri = shlex.quote(_uri(version) if version else package)
    where = "" if storage == DEFAULT_STORAGE or not version else f" --storage {shlex.quote(storage)}"
    return Subject(
        name=name,
        model=_uri(version) if version else package,
        classifier=classifier,
        version=version,
        run=run,
        missing=tuple(missing),
        commands={
            "The classes of an image": f"bit-ray predict IMAGE --model {uri}{where}",
            "The same in the browser, by dropping images": f"bit-ray demo {uri}{where}",
            "How good it is on other images": f"bit-ray evaluate --model {uri} --shards SHARDS{where}",
        },
    )


def _uri(version: ListedModel) -> str:
    """Return what names a registered version."""
    return f"models:/{version.name}" + (f"@{version.aliases[0]}" if version.aliases else f"/{version.version}")
