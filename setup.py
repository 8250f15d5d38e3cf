"""The optional C extension; everything else stands in pyproject.toml.

Without a C compiler or libjpeg-turbo's headers the package installs all the same and decodes JPEG files in full.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "bit_ray.data.images._jpeg",
            ["bit_ray/data/images/_jpeg.c"],
            depends=["bit_ray/data/images/_markers.h", "bit_ray/data/images/_resize.h"],
            libraries=["jpeg"],
            # No fused multiply-add: the resize's weights have the same bits on every CPU.
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,
        )
    ]
)
