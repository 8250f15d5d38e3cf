"""What a user calls a model, where a run's name is enough."""

from bit_ray import store
from bit_ray.errors import ModelError
from bit_ray.run_folder import RunFolder
from bit_ray.weights.location import DESCRIPTION_FILE


def saved_model(model: str, storage: str) -> str:
    """Return the saved model of a run, by the run's name or folder; anything else as it is given.

    Args:
        model: A run's name or folder, or whatever `bit_ray.inference.classifier.load_model` takes.
        storage: Folder of all runs.

    Raises:
        ModelError: The run is not finished.
    """
    if model.startswith("models:/") or ("://" in model and not model.startswith(("s3://", "gs://", "file://"))):
        return model
    # A run's name first: the folder of images that it was trained on often has the same.
    folders = [RunFolder.of(storage, model)] if "/" not in model else []
    for folder in [*folders, RunFolder(model)]:
        for package in (folder.uri, store.join(folder.uri, "model")):
            if store.exists(store.join(package, DESCRIPTION_FILE)):
                return package
        if store.exists(folder.result):
            result = store.read_json(folder.result)
            if isinstance(result, dict) and isinstance(result.get("package_uri"), str):
                return str(result["package_uri"])
        if store.exists(folder.plan) or store.exists(folder.settings):
            raise ModelError(f"{folder.uri}: this run is not finished; start it again to finish it")
    return model
