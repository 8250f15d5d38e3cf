from types import SimpleNamespace

from bit_ray.errors import StoreError
from bit_ray.run_folder import RunFolder
from bit_ray.training.group import Fit


def test_a_storage_that_ray_cannot_write_to_is_an_error_of_one_line():
    def trainer(worker):
        raise OSError("AWS Error NETWORK_CONNECTION during\nCreateMultipartUpload")

    fit = Fit(SimpleNamespace(folder=RunFolder("s3://b/runs/x")), trainer)
    fit.run()
    assert isinstance(fit.error, StoreError)
    assert str(fit.error).startswith("s3://b/runs/x: ")
    assert "\n" not in str(fit.error)
    assert fit.error.passing
