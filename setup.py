"""Puts the discovery files beside the package. ``nnssl/pretrain``, ``nnssl/trainers`` and ``nnssl/experiments`` are links.

A wheel gets two files at the root of site-packages: ``nnssl_discovery.pth``, which Python runs at its start, and
``_nnssl_discovery.py`` (a copy of ``trainers/discovery.py``), which that line calls to append the folder of nnU-Net
trainers to ``nnUNet_extTrainer``. An editable install gets the same two, with the folder of the checkout in the line.
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TRAINERS = ROOT / "nnssl" / "trainers"  # a link in a checkout, a folder in an sdist, which has no other one
HELPER, PTH = "_nnssl_discovery", "nnssl_discovery.pth"


class BuildWithDiscovery(build_py):
    """build_py that also writes the discovery files; in an editable build straight into the wheel."""

    def run(self):
        super().run()
        if self.editable_mode:
            target, folder = (
                self.get_finalized_command("install").install_lib,
                repr(str((TRAINERS / "extension").resolve())),
            )
        else:
            target, folder = self.build_lib, ""
        Path(target).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(TRAINERS / "discovery.py", Path(target, f"{HELPER}.py"))
        Path(target, PTH).write_text(f"import {HELPER}; {HELPER}.activate({folder})\n", encoding="utf-8")

    def get_outputs(self, include_bytecode=True):
        outputs = super().get_outputs(include_bytecode)
        if not self.editable_mode:
            outputs += [str(Path(self.build_lib, name)) for name in (f"{HELPER}.py", PTH)]
        return outputs


setup(
    packages=find_packages(include=["nnssl", "nnssl.*"]),
    package_data={"nnssl": ["py.typed"], "nnssl.trainers": ["extension/*.py"], "nnssl.experiments": ["*.j2"]},
    cmdclass={"build_py": BuildWithDiscovery},
)
