"""What there is to say of the package stands in pyproject.toml; this is for tools that ask for a setup.py."""

from setuptools import setup

setup()
