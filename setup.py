"""What pyproject.toml can't say: two folders that lie beside the package in the checkout are packages of the wheel."""

from setuptools import find_packages, setup

SHIPPED = {"alignx_ds.recipes": "launch/recipes", "alignx_ds.ds_configs": "ds_configs"}

setup(packages=[*find_packages(include=["alignx_ds*"]), *SHIPPED], package_dir=SHIPPED)
