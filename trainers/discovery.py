"""Tells stock nnU-Net where our trainers are: one folder appended to the variable ``nnUNet_extTrainer``.

The installation copies this file to ``site-packages/_nnssl_discovery.py``, and the line of ``nnssl_discovery.pth`` beside
it calls :func:`activate` at each start of Python. So it imports nothing but ``os``, prints nothing, and changes nothing
but that variable, which only nnU-Net reads.
"""

import os

__all__ = ["VARIABLE", "activate", "is_active", "shim_folder"]

VARIABLE = "nnUNet_extTrainer"


def shim_folder() -> str:
    """The folder that nnU-Net searches: beside this file in the package, below ``nnssl`` from site-packages."""
    here = os.path.dirname(os.path.abspath(__file__))
    installed = os.path.join(here, "nnssl", "trainers", "extension")
    return installed if os.path.isdir(installed) else os.path.join(here, "extension")


def is_active(folder: str) -> bool:
    """Whether ``nnUNet_extTrainer`` names ``folder`` in this process."""
    return folder in os.environ.get(VARIABLE, "").split(os.pathsep)


def activate(folder: str = "") -> None:
    """Append ``folder`` (default: :func:`shim_folder`) to ``nnUNet_extTrainer``, after whatever the user has set.

    Does nothing where it is there already, as in a child process, or where the folder does not exist.
    """
    folder = folder or shim_folder()
    if os.path.isdir(folder) and not is_active(folder):
        before = os.environ.get(VARIABLE, "")
        os.environ[VARIABLE] = before + os.pathsep + folder if before else folder
